"""InfoNCELoss, SigLipLoss and LanguageBindLoss: the calls that training loops make."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lbfast
from lbfast.ops import info_nce, sigmoid_loss
from lbfast.testing import randn


def unit(seed, b=12, d=16):
    return F.normalize(randn(b, d, seed=seed), dim=-1)


def clip_loss(image_features, text_features, logit_scale):
    """What open_clip's ClipLoss computes on one process."""
    labels = torch.arange(len(image_features))
    per_image = logit_scale * image_features @ text_features.T
    per_text = logit_scale * text_features @ image_features.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def test_open_clip_call():
    """Constructor and call as in open_clip's and Inf-CLIP's training loops."""
    loss = lbfast.InfoNCELoss(
        local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1, use_horovod=False
    )
    out = {"image_features": unit(0), "text_features": unit(1), "logit_scale": torch.tensor(14.3)}
    losses = loss(**out, output_dict=True)
    assert list(losses) == ["contrastive_loss"]
    torch.testing.assert_close(sum(losses.values()), clip_loss(**out))
    torch.testing.assert_close(loss(out["image_features"], out["text_features"], out["logit_scale"]), clip_loss(**out))


@pytest.fixture(scope="module")
def open_clips():
    """open_clip's losses, where it is installed."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip is not installed")
    where = Path(str(package.origin)).with_name("loss.py")  # the package itself imports torchvision
    spec = importlib.util.spec_from_file_location("open_clip_loss", where)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    return peer


def test_siglip_call():
    """Constructor, attributes and call as open_clip's; what its formula gives; no bias is one of 0."""
    loss = lbfast.SigLipLoss(True, 1, 1, "shift", 8)  # 4.x has the fifth
    read = (loss.cache_labels, loss.rank, loss.world_size, loss.dist_impl, loss.chunk_size)
    assert read == (True, 1, 1, "shift", 8)
    out = {"image_features": unit(0), "text_features": unit(1), "logit_scale": torch.tensor(14.3)}
    logits = 14.3 * out["image_features"] @ out["text_features"].T
    for bias in (torch.tensor(-10.0), None):
        want = -F.logsigmoid((2 * torch.eye(12) - 1) * (logits + (bias or 0))).sum() / 12
        losses = loss(**out, logit_bias=bias, output_dict=True)
        assert list(losses) == ["contrastive_loss"]
        torch.testing.assert_close(losses["contrastive_loss"], want)
        torch.testing.assert_close(loss(*out.values(), bias), want)
    ids = torch.arange(12) // 3
    assert torch.equal(loss(*out.values(), -10.0, ids=ids), sigmoid_loss(*out.values(), -10.0, ids=ids))
    with pytest.raises(ValueError, match="dist_impl: expected one of bidir, shift, reduce, gather, or None, got 'no'"):
        lbfast.SigLipLoss(dist_impl="no")
    for wrong in (-1, None, "3", 1.5, True):
        with pytest.raises(ValueError, match=rf"chunk_size: expected 0 \(none\) or a number of rows, got {wrong!r}"):
            lbfast.SigLipLoss(chunk_size=wrong)


def test_siglip_is_open_clips(open_clips):
    given = (unit(0, 7, 6), unit(1, 7, 6), torch.tensor(4.0), torch.tensor(-3.0))
    given = [t.double().requires_grad_() for t in given]
    results = []
    for kind in (lbfast.SigLipLoss, open_clips.SigLipLoss):
        value = kind()(*given, output_dict=True)["contrastive_loss"]
        results.append((value, *torch.autograd.grad(value, given)))
    torch.testing.assert_close(results[0], results[1])


def test_open_clips_attributes_and_loss(open_clips):
    """Constructed as open_clip's, it has its attributes, and on one process its loss and gradients."""
    loss = lbfast.InfoNCELoss(True, True, True, 1, 2)
    read = (loss.local_loss, loss.gather_with_grad, loss.cache_labels, loss.rank, loss.world_size, loss.use_horovod)
    assert read == (True, True, True, 1, 2, False)
    x, y, s = (t.double().requires_grad_() for t in (unit(0, 7, 6), unit(1, 7, 6), torch.tensor(4.0)))
    for options in ({}, {"local_loss": True, "gather_with_grad": True, "cache_labels": True}):
        results = []
        for kind in (lbfast.InfoNCELoss, open_clips.ClipLoss):
            value = kind(**options)(x, y, s, output_dict=True)["contrastive_loss"]
            results.append((value, *torch.autograd.grad(value, (x, y, s))))
        torch.testing.assert_close(results[0], results[1])


def test_one_direction_and_hard_negatives_reach_the_op():
    x, y = unit(0, 4, 6), unit(1, 6, 6)
    halves = [lbfast.InfoNCELoss(direction=side)(x, y, torch.tensor(3.0)) for side in ("image", "text")]
    torch.testing.assert_close(lbfast.InfoNCELoss()(x, y, torch.tensor(3.0)), sum(halves) / 2)
    want = torch.nn.functional.cross_entropy(3 * x @ y.T, torch.arange(4))
    torch.testing.assert_close(halves[0], want)


def test_logit_bias_changes_nothing():
    bias = torch.tensor(-10.0, requires_grad=True)
    loss = lbfast.InfoNCELoss()(unit(0), unit(1), torch.tensor(5.0), bias)
    torch.testing.assert_close(loss, clip_loss(unit(0), unit(1), torch.tensor(5.0)))
    loss.backward()
    assert bias.grad == 0


def test_options_reach_the_op():
    ids = torch.arange(12) // 3
    loss = lbfast.InfoNCELoss(label_smoothing=0.1)(unit(0), unit(1), torch.tensor(5.0), ids=ids)
    assert torch.equal(loss, info_nce(unit(0), unit(1), torch.tensor(5.0), ids=ids, label_smoothing=0.1))
    with pytest.raises(ValueError, match="use_horovod"):
        lbfast.InfoNCELoss(use_horovod=True)


def test_training_lowers_the_loss():
    towers = torch.nn.ModuleList([torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)])
    scale = torch.nn.Parameter(torch.tensor(14.3).log())
    optimizer = torch.optim.AdamW([*towers.parameters(), scale], lr=1e-2)
    data, loss, history = randn(32, 8), lbfast.InfoNCELoss(), []
    for _ in range(60):
        x, y = (F.normalize(tower(data), dim=-1) for tower in towers)
        value = loss(x, y, scale.exp())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        history.append(float(value.detach()))
    assert history[-1] < 0.2 * history[0]


def test_languagebind_loss():
    embeds = {"video": unit(0), "audio": unit(1), "language": unit(2)}
    scale = torch.tensor(8.0)
    loss = lbfast.LanguageBindLoss(weights={"audio": 0.5})
    parts = loss(embeds, scale, output_dict=True)
    video, audio = (clip_loss(embeds[m], embeds["language"], scale) for m in ("video", "audio"))
    torch.testing.assert_close(parts, {"video_loss": video, "audio_loss": 0.5 * audio})
    torch.testing.assert_close(loss(embeds, scale), video + 0.5 * audio)


def test_languagebind_loss_with_captions_and_factors_of_each_modality():
    embeds = {
        "video": unit(0),
        "depth": unit(1, b=5),
        "language": {"video": unit(2), "depth": unit(3, b=5)},
    }
    scales = {"video": torch.tensor(8.0), "depth": torch.tensor(20.0)}
    parts = lbfast.LanguageBindLoss()(embeds, scales, True, ids={"video": torch.arange(12), "depth": torch.arange(5)})
    for m in ("video", "depth"):
        torch.testing.assert_close(parts[f"{m}_loss"], clip_loss(embeds[m], embeds["language"][m], scales[m]))
    with pytest.raises(ValueError, match="'depth'"):
        lbfast.LanguageBindLoss()(embeds, {"video": torch.tensor(8.0)})


def test_languagebind_loss_errors():
    with pytest.raises(ValueError, match="expected the key 'language'"):
        lbfast.LanguageBindLoss()({"video": unit(0)}, torch.tensor(1.0))
    with pytest.raises(ValueError, match="expected a modality beside"):
        lbfast.LanguageBindLoss()({"language": unit(0)}, torch.tensor(1.0))
