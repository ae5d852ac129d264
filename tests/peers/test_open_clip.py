"""open_clip's own training epoch on LanguageBindImage, with its ClipLoss and with InfoNCELoss in its place.

python -m pytest -o addopts= tests/peers/test_open_clip.py, where open_clip_torch is installed
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lbfast
from tests import tiny
from tests.peers.packages import stub_torchvision

if importlib.util.find_spec("open_clip_train") is None:
    pytest.skip("open_clip_torch is not installed", allow_module_level=True)


stub_torchvision()
open_clip: Any = importlib.import_module("open_clip")
epochs: Any = importlib.import_module("open_clip_train.train")

STEPS = 5


class Clip(nn.Module):
    """As open_clip's models are called in training."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.model("image")

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.inner.logit_scale

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> dict[str, torch.Tensor]:
        image, text = self.inner.get_image_features(images), self.inner.get_text_features(texts)
        unit = nn.functional.normalize
        return {
            "image_features": unit(image, dim=-1),
            "text_features": unit(text, dim=-1),
            "logit_scale": self.inner.logit_scale.exp(),
        }


class Batches(list):
    num_samples, num_batches = 64, 20


def _trained(loss: nn.Module, accumulated: int, precision: str) -> dict[str, torch.Tensor]:
    model = Clip()
    generator = torch.Generator().manual_seed(0)
    batches = Batches()
    for _ in range(STEPS * accumulated):
        ids = torch.randint(2, 400, (4, 6), generator=generator)
        ids[:, -1] = 49407
        batches.append((torch.randn(4, 3, 64, 64, generator=generator), ids))
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    args = SimpleNamespace(device="cpu", precision=precision, accum_freq=accumulated, skip_scheduler=True, rank=0)
    vars(args).update(distill=False, horovod=False, distributed=False, grad_clip_norm=1.0, log_every_n_steps=100)
    vars(args).update(world_size=1, batch_size=4, wandb=False, save_logs=False, local_rank=0)
    data = {"train": SimpleNamespace(dataloader=batches, set_epoch=lambda epoch: None)}
    scaler = torch.amp.GradScaler("cpu")  # one whose step is the optimizer's, once gradients are unscaled
    epochs.train_one_epoch(model, data, loss, 0, optimizer, scaler, None, None, args)
    return model.state_dict()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_an_epoch_of_open_clips(accumulated: int) -> None:
    made = {"local_loss": False, "gather_with_grad": False, "cache_labels": True, "rank": 0, "world_size": 1}
    want, theirs = (_trained(open_clip.ClipLoss(**made), accumulated, kind) for kind in ("fp32", "amp_bf16"))
    got, ours = (_trained(lbfast.InfoNCELoss(**made), accumulated, kind) for kind in ("fp32", "amp_bf16"))
    start = Clip().state_dict()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5, msg=name)
    name = "inner.visual_projection.weight"
    assert (got[name] - start[name]).abs().max() > 1e-3
    errors = [sum((some[name] - value).square().sum() for name, value in want.items()) for some in (ours, theirs)]
    assert errors[0] <= 2 * errors[1]


def test_open_clips_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["open_clip.factory"], "ClipLoss", lbfast.InfoNCELoss)
    args = SimpleNamespace(distill=False, model="x", siglip=False, horovod=False, rank=3, world_size=8)
    loss = open_clip.create_loss(SimpleNamespace(**vars(args), local_loss=True, gather_with_grad=True))
    assert isinstance(loss, lbfast.InfoNCELoss)
    read = (loss.local_loss, loss.gather_with_grad, loss.cache_labels, loss.rank, loss.world_size, loss.use_horovod)
    assert read == (True, True, True, 3, 8, False)
