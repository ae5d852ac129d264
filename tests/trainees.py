"""Tiny models and data in memory, for tests of training, and the dense step that its steps must equal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lbfast import ops
from lbfast.model.languagebind import LanguageBindModel, model_dict
from lbfast.training.parameters import prepare, trained
from lbfast.training.recipes import Recipe, recipe
from lbfast.training.step import patch_noise, unit
from tests import tiny

SHAPES = {"image": (3, 64, 64), "depth": (3, 64, 64), "video": (3, 2, 64, 64), "audio": (3, 112, 112)}
STEP = 5


def plan(modality: str = "depth", **changes: Any) -> Recipe:
    fields = {"lr": 1e-2, "coef_lr": 0.1, "warmup": 2, "epochs": 3, "batch_size": 6, "micro_batch": 2}
    return recipe("depth", **{"modality": modality, **fields, **changes})


def trainee(plan: Recipe, seed: int = 0) -> LanguageBindModel:
    """A tiny model, prepared; its adapters are not zero, so that every one of them has a gradient."""
    torch.manual_seed(seed)
    model = model_dict[plan.modality](tiny.config(plan.modality, **plan.vision))
    prepare(model, plan)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def rows(modality: str, count: int, seed: int = 3, length: int = 9) -> SimpleNamespace:
    """So many pairs of random pixels and captions of 3 to `length` tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 49000, (count, length), generator=generator)
    ids[:, 0] = 49406
    ends = torch.randint(2, length, (count,), generator=generator)
    ids = torch.where(torch.arange(length) < ends[:, None], ids, 49407)
    mask = (torch.arange(length) <= ends[:, None]).long()
    pixels = torch.randn(count, *SHAPES[modality], generator=generator)
    return SimpleNamespace(pixel_values=pixels, input_ids=ids, attention_mask=mask, groups=torch.arange(count) // 2)


def part(batch: SimpleNamespace, start: int, end: int) -> SimpleNamespace:
    return SimpleNamespace(**{name: value[start:end] for name, value in vars(batch).items()})


def dense(model: LanguageBindModel, batch: Any, plan: Recipe, mask_repeats: bool = False) -> tuple[float, dict]:
    """Loss and gradients of the whole batch in one ordinary forward and backward."""
    model.zero_grad()
    dropout = model.vision_model.patch_dropout
    dropout.noise = patch_noise(model, 0, len(batch.pixel_values), (plan.seed, STEP), torch.device("cpu"))
    image = unit(model.get_image_features(batch.pixel_values))
    dropout.noise = None
    text = unit(model.get_text_features(batch.input_ids, batch.attention_mask))
    ids = batch.groups if mask_repeats else None
    scale = model.logit_scale.exp()
    if plan.loss == "sigmoid":
        loss = ops.sigmoid_loss(image, text, scale, model.logit_bias, ids=ids)
    else:
        pairs = [(image, text)] if plan.dims is None else [(unit(image[:, :d]), unit(text[:, :d])) for d in plan.dims]
        losses = [ops.info_nce(*pair, scale, ids=ids, label_smoothing=plan.label_smoothing) for pair in pairs]
        loss = torch.stack(losses).mean()
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in trained(model).items()}
    model.zero_grad()
    return loss.item(), gradients


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative error of a gradient, and whose.

    A softmax does not see a key's bias: its gradient is zero, and what is there is rounding. That is measured against
    the gradient of the key's weight.
    """
    assert found.keys() == wanted.keys()
    errors = {}
    for name, gradient in wanted.items():
        of = name.replace("k_proj.bias", "k_proj.weight")
        errors[name] = ((found[name] - gradient).norm() / wanted[of].norm()).item()
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


class Data:
    """Batches in memory; `delay` is called before each."""

    def __init__(self, modality: str = "depth", samples: int = 20, batch: int = 6, rank: int = 0, world: int = 1):
        self.all = rows(modality, samples)
        self.samples, self.batch, self.rank, self.world = samples, batch, rank, world
        self.steps_per_epoch = samples // batch
        self.before = lambda step: None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[SimpleNamespace]:
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(epoch))
        for step in range(start, self.steps_per_epoch):
            self.before(epoch * self.steps_per_epoch + step)
            chosen = order[step * self.batch : (step + 1) * self.batch]
            mine = chosen[self.batch * self.rank // self.world : self.batch * (self.rank + 1) // self.world]
            yield SimpleNamespace(**{name: value[mine] for name, value in vars(self.all).items()})


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def manifest(folder: Path, samples: int = 20) -> Path:
    """Depth maps and a manifest of them."""
    lines = ["path,caption"]
    for i in range(samples):
        lines.append(f"{tiny.depth_map(folder / f'{i}.png', i).name},caption number {i}")
    (folder / "data.csv").write_text("\n".join(lines) + "\n")
    return folder / "data.csv"
