"""Tensors of random memory layouts: offsets, steps, permutations, expanded and overlapping axes, lazy negation."""

from __future__ import annotations

import random

import torch


def generator(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.randrange(2**31))


def draw(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers times `scale` of that shape, anyhow in memory."""
    values = (torch.randn(shape, generator=generator(rng), dtype=torch.float64) * scale).to(dtype)
    return rng.choices(list(LAYOUTS.values()), [6, 2, 3, 3, 2, 2, 1])[0](rng, values)


def dense(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    return x


def shifted(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    """Behind some numbers of another tensor: aligned to its own size only."""
    offset = rng.randrange(1, 9)
    storage = torch.full((x.numel() + 16,), float("nan"), dtype=x.dtype)
    view = storage[offset : offset + x.numel()].view(x.shape)
    return view.copy_(x)


def stepped(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    """Every second or third of some axes; NaN between."""
    steps = [rng.choice((1, 1, 2, 3)) for _ in x.shape]
    storage = torch.full([size * step for size, step in zip(x.shape, steps)], float("nan"), dtype=x.dtype)
    view = storage[tuple(slice(None, None, step) for step in steps)]
    return view.copy_(x)


def permuted(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    """Its axes in memory in another order."""
    order = rng.sample(range(x.dim()), x.dim())
    inverse = sorted(range(x.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(inverse)


def expanded(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    """One number, or one row of them, seen again and again."""
    shape = x.shape
    for axis, size in enumerate(shape):
        if size and rng.random() < 0.5:
            x = x.narrow(axis, 0, 1)
    return x.expand(shape)


def overlapping(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    """Windows that share memory."""
    strides = [rng.choice((0, 1, 1, 2, 3)) for _ in x.shape]
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides)) if x.numel() else 1
    flat = x.flatten()
    storage = flat.repeat(-(-length // max(1, flat.numel())))[:length] if flat.numel() else x.new_zeros(1)
    return storage.as_strided(x.shape, strides)


def negated(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    """A view that stands for -x, which PyTorch negates when it is read."""
    return torch._neg_view(x)


LAYOUTS = {f.__name__: f for f in (dense, shifted, stepped, permuted, expanded, overlapping, negated)}
