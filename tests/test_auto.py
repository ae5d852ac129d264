"""transformers' Auto classes, and embeddings of several modalities as one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

import lbfast
from lbfast import mini


@pytest.mark.parametrize("modality", lbfast.model_dict)
def test_auto_classes_know_the_model_types(modality, tmp_path):
    lbfast.register()
    lbfast.register()
    where, own = str(mini.checkpoint(modality)), f"LanguageBind{modality.capitalize()}"
    config, model = AutoConfig.from_pretrained(where), AutoModel.from_pretrained(where)
    assert type(config) is getattr(lbfast, f"{own}Config") and type(model) is getattr(lbfast, own)
    expected = getattr(lbfast, own).from_pretrained(where)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in expected.state_dict().items())
    assert type(AutoModel.from_config(config)) is type(model)
    assert AutoModel.from_pretrained(where, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    tokenizer, processor = AutoTokenizer.from_pretrained(where), AutoProcessor.from_pretrained(where)
    assert type(tokenizer) is getattr(lbfast, f"{own}Tokenizer") and len(tokenizer) == config.text_config.vocab_size
    assert type(processor) is getattr(lbfast, f"{own}Processor")
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(processor)


def test_fuse_is_the_unit_sum_of_unit_embeddings():
    torch.manual_seed(0)
    video, audio = torch.randn(2, 5, 16, dtype=torch.float64)
    fused = lbfast.fuse({"video": 30 * video, "audio": audio})
    for row, a, b in zip(fused, video, audio):
        total = a / a.norm() + b / b.norm()
        torch.testing.assert_close(row, total / total.norm(), rtol=1e-12, atol=1e-12)
    assert fused.dtype == torch.float64 and torch.equal(fused, lbfast.fuse({"a": audio, "v": 30 * video}))
    more = lbfast.fuse({"video": video, "audio": audio}, weights={"video": 3, "audio": 1})
    total = 3 * video[0] / video[0].norm() + audio[0] / audio[0].norm()
    torch.testing.assert_close(more[0], total / total.norm(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lbfast.fuse({"video": video[0]}), video[0] / video[0].norm(), rtol=1e-12, atol=1e-12)
    half = lbfast.fuse({"video": video.half(), "audio": audio.half()})
    assert half.dtype == torch.float16 and (half.double() - fused).abs().max() < 2e-3
    tiny = torch.full((1, 4), 1e-30)
    torch.testing.assert_close(lbfast.fuse({"a": tiny, "b": tiny}), torch.full((1, 4), 0.5))


def test_fuse_has_gradients():
    parts = {name: torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for name in ("a", "b")}
    assert torch.autograd.gradcheck(
        lambda a, b: lbfast.fuse({"a": a, "b": b}, {"a": 2.0, "b": 1.0}), tuple(parts.values())
    )


@pytest.mark.parametrize(
    ("embeddings", "weights", "message"),
    [
        ({}, None, "embeddings: expected a mapping"),
        (torch.ones(2, 3), None, "embeddings: expected a mapping"),
        ({"a": torch.ones(2, 3), "b": torch.ones(2, 4)}, None, r"expected one shape \(..., E\)"),
        ({"a": torch.ones(3)}, {"b": 1.0}, "weights: expected a positive number for each of a"),
        ({"a": torch.ones(3), "b": torch.ones(3)}, {"a": 1.0}, "weights: expected a positive number"),
        ({"a": torch.ones(3)}, {"a": 0.0}, "weights: expected a positive number"),
        ({"a": torch.ones(3)}, {"a": float("nan")}, "weights: expected a positive number"),
        ({"a": torch.zeros(2, 3)}, None, "embeddings: a: expected finite vectors"),
        ({"a": torch.full((3,), float("inf"))}, None, "embeddings: a: expected finite vectors"),
        ({"a": torch.ones(3), "b": -torch.ones(3)}, None, "the sum of embeddings: expected finite vectors"),
    ],
)
def test_fuse_refuses(embeddings, weights, message):
    with pytest.raises(ValueError, match=message):
        lbfast.fuse(embeddings, weights)
    with pytest.raises(TypeError, match=r"expected floats, got torch.int64 for a"):
        lbfast.fuse({"a": torch.ones(3, dtype=torch.int64)})
