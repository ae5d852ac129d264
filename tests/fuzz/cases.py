"""One random call of each op, with its oracle, what plain PyTorch makes of it, and what rounding it allows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lbfast import ops, products
from lbfast.ops.attention import apart
from lbfast.reference.attention import MASKED, attention as attention_reference
from lbfast.reference.info_nce import info_nce as info_nce_reference
from lbfast.reference.layer_norm import layer_norm as layer_norm_reference
from lbfast.reference.mlp import mlp as mlp_reference
from lbfast.reference.patch_embed import patch_embed as patch_embed_reference
from lbfast.reference.sigmoid_loss import sigmoid_loss as sigmoid_loss_reference
from lbfast.reference.temporal_attention import temporal_attention as temporal_reference
from lbfast.testing import ROUNDING, order_of_sums
from tests.fuzz.layouts import draw, generator

HALF = (torch.float16, torch.bfloat16)
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 32, 33, 64, 65)


@dataclass
class Case:
    """`call(*tensors)` is under test; `reference` and each of `plain` are the same function of the same tensors."""

    op: str
    what: str
    tensors: list[torch.Tensor]
    call: Callable[..., Any]
    reference: Callable[..., Any]
    plain: Sequence[Callable[..., Any]]
    terms: int
    """In the op's sums one after another: what their order may add to float32's rounding grows with its root."""
    wanted: Sequence[bool] = ()
    """Whose gradients; default: of all that are floating point."""
    floors: Callable[..., list[float]] | None = None
    """Norms, of the results in order, that rounding is relative to where the result itself cancels."""
    alike: bool = False
    """Whether the op makes equal terms of numbers that differ."""

    @property
    def order(self) -> float:
        """The relative error that the order of the op's sums can make.

        Where a tensor repeats itself along an axis, the terms of a sum may all be equal: each step then errs alike, by
        up to half a unit of the partial sum, which gives terms / 4 units instead of their root.
        """
        if self.tensors[0].dtype == torch.float64:
            return 0.0
        alike = self.alike or any(repeats(t) for t in self.tensors if t.is_floating_point())
        return max(order_of_sums(self.terms), self.terms / 4 * 2**-24 if alike else 0.0)


def repeats(t: torch.Tensor) -> bool:
    """Whether all slices along some axis, of several, are the same."""
    return any(size > 1 and bool((t == t.narrow(axis, 0, 1)).all()) for axis, size in enumerate(t.shape))


def size(rng: random.Random, most: int = 65, least: int = 1) -> int:
    return rng.choice([s for s in SIZES if least <= s <= most])


def dtype_of(rng: random.Random, *dtypes: torch.dtype) -> torch.dtype:
    return rng.choice(
        dtypes or (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16, torch.float64)
    )


def magnitude(rng: random.Random) -> float:
    return rng.choice((1.0, 1.0, 1.0, 1e-3, 30.0, 0.0))


def attention_floors(q, k, v, scale, causal=False, padded=None) -> list[float]:
    """Norms of (B, N, H, D) attention's result and gradients, before dP - delta cancels; of one key 0."""
    q, k, v = (x.double() for x in (q, k, v))
    n, m = q.shape[1], k.shape[1]
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    scores = scores + (torch.full((n, m), MASKED, dtype=torch.float64).triu(1) if causal else 0)
    p = (scores if padded is None else scores + padded[:, None, None] * MASKED).softmax(-1)
    along = torch.randn(q.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    dp = torch.einsum("bnhd,bmhd->bhnm", along.abs(), v.abs())
    ds = p * (dp + (p * dp).sum(-1, keepdim=True)) * (abs(scale) if m > 1 else 0.0)
    dq, dk = torch.einsum("bhnm,bmhd->bnhd", ds, k.abs()), torch.einsum("bhnm,bnhd->bmhd", ds, q.abs())
    return [0.0, float(dq.norm()), float(dk.norm()), 0.0]


def attention(rng: random.Random, impl: str, small: bool = False) -> Case:
    dtype = dtype_of(rng, torch.float32, torch.bfloat16) if impl == "native" else dtype_of(rng)
    n, m = size(rng, 8 if small else 65), size(rng, 8 if small else 65)
    b, h, d = (
        rng.randrange(1, 3 if small else 4),
        rng.randrange(1, 3 if small else 4),
        rng.choice((2, 6, 8, 16, 32, 64, 80)),
    )
    causal = rng.random() < 0.4
    m = n if causal else m
    scale = rng.choice((None, None, None, 1.0, 0.0, 1e-30, -0.3, 3.0, 1e-3))
    padded = None
    if rng.random() < 0.4:
        padded = torch.rand(b, m, generator=generator(rng)) < rng.choice((0.1, 0.5, 1.0))
        padded = rng.choice((padded, padded.T.contiguous().T, padded[:1].expand(b, m)))
    tensors = [draw(rng, (b, rows, h, d), dtype, magnitude(rng)) for rows in (n, m, m)]
    options = {"causal": causal, "key_padding_mask": padded, "scale": scale}
    used = d**-0.5 if scale is None else scale

    def plain(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = torch.zeros(n, m)
        mask = mask + (torch.full((n, m), MASKED).triu(1) if causal else 0)
        mask = mask if padded is None else mask + padded[:, None, None] * MASKED
        scores = (q * used @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) + mask
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)

    def library(q, k, v):  # of dense tensors: of others it may take another way, where more is kept
        q, k, v = (x.contiguous().transpose(1, 2) for x in (q if used > 0 else -q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=abs(used) or 1.0).transpose(1, 2)

    return Case(
        "attention",
        f"{impl} causal={causal} scale={scale} padded={padded is not None}",
        tensors,
        lambda *x: ops.attention(*x, impl=impl, **options),
        lambda *x: attention_reference(*x, **options),
        [plain, *([library] if impl == "torch" and padded is None else [])],
        2 * d + 3 * m + n,
        floors=lambda *x: attention_floors(*x, used, causal, padded),
    )


def temporal_attention(rng: random.Random, impl: str, small: bool = False) -> Case:
    dtype = dtype_of(rng, torch.float32, torch.bfloat16) if impl == "native" else dtype_of(rng)
    most = 8 if small else 32
    b, t, n, h = rng.randrange(1, 3), size(rng, most), size(rng, most if small else 17), rng.randrange(1, 4)
    d = rng.choice((1, 2, 7, 16, 33, 64, 80, 128))
    scale = rng.choice((None, None, 1.0, 0.0, -0.3, 3.0))
    tensors = [draw(rng, (b, t, n, h, d), dtype, magnitude(rng)) for _ in range(3)]
    used = d**-0.5 if scale is None else scale

    def plain(q, k, v):
        q, k, v = (x.permute(0, 2, 3, 1, 4) for x in (q, k, v))
        scores = (q * used @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
        return (scores.softmax(-1).to(v.dtype) @ v).permute(0, 3, 1, 2, 4)

    def library(q, k, v):
        q, k, v = (x.contiguous().permute(0, 2, 3, 1, 4).flatten(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=used)
        return out.unflatten(1, (n, h)).permute(0, 3, 1, 2, 4)

    return Case(
        "temporal_attention",
        f"{impl} scale={scale}",
        tensors,
        lambda *x: ops.temporal_attention(*x, scale=scale, impl=impl),
        lambda *x: temporal_reference(*x, scale=scale),
        [plain, *([library] if impl == "torch" else [])],
        2 * d + 4 * t,
        floors=lambda *x: attention_floors(*(y.transpose(1, 2).flatten(0, 1) for y in x), used),
    )


def patch_embed(rng: random.Random, impl: str, small: bool = False) -> Case:
    dtype = dtype_of(rng, torch.float32, torch.bfloat16) if impl == "native" else dtype_of(rng)
    b, c, p, width = rng.randrange(1, 3), rng.randrange(1, 4), rng.randrange(1, 5 if small else 9), size(rng, 33)
    rows, columns, tube, frames = (rng.randrange(1, 4) for _ in range(4))
    video = rng.random() < 0.5
    tube, frames = (tube, frames) if video else (1, 1)
    shape = (b, c, tube * frames, rows * p + rng.randrange(p), columns * p + rng.randrange(p))
    shape = shape if video else (*shape[:2], *shape[3:])
    bytes_ = rng.random() < 0.4
    mean = std = None
    if bytes_:
        pixels = draw(rng, shape, torch.float32, 60.0).abs().clamp(max=255).to(torch.uint8)
        mean, std = (torch.tensor([least + rng.random() for _ in range(c)]) for least in (0.0, 0.2))
    else:
        pixels = draw(rng, shape, rng.choice((dtype, dtype, torch.float32)) if impl != "native" else dtype)
    weight = draw(rng, (width, c, *([tube] if video and (tube > 1 or rng.random() < 0.5) else []), p, p), dtype, 0.3)
    class_embedding = draw(rng, rng.choice(((width,), (frames, width))), dtype)
    position = draw(rng, (1 + rows * columns, width), dtype)
    kept = None
    if rng.random() < 0.4:
        count = rng.randrange(0, rows * columns + 1)
        kept = torch.stack([torch.randperm(rows * columns, generator=generator(rng))[:count] for _ in range(b)])
        kept = rng.choice((kept, kept.T.contiguous().T))
    options = {"kept": kept, "mean": mean, "std": std}
    names = ("pixels", "weight", "class_embedding", "position_embedding")

    def of(function, **more):
        def call(*x):
            pixels, weight, *others = x
            return function(pixels, weight, **dict(zip(names[2:], others)), **options, **more)

        return call

    def floors(pixels, weight, class_embedding, position):
        """Of bytes: x - 128 and a bias, whose parts of the result and of the weight's gradient may cancel; squares.

        A weight that is read at several places has one rounding there, and these add up.
        """
        if not bytes_:
            return [0.0] * 5
        clips = pixels.double().view(b, c, tube * frames, *shape[-2:])
        by_channel = [t.double().view(-1, 1, 1, 1) for t in (1 / (255 * std), (128 / 255 - mean) / std)]
        parts = ((clips - 128) * by_channel[0]).abs(), (by_channel[1] * torch.ones_like(clips)).abs()
        kernel = weight.double().view(width, c, tube, p, p).abs()
        squares = kernel.square().requires_grad_()
        out = F.conv3d(parts[0].square() + parts[1].square(), squares, stride=(tube, p, p))
        (grad,) = torch.autograd.grad(out.sum(), squares)  # of a gradient of ones, as the result's is in the mean
        norm = float(out.detach().sum().sqrt())
        if apart(weight) is not weight:
            norm = float(F.conv3d(parts[0] + parts[1], kernel, stride=(tube, p, p)).norm())
        return [norm, 0.0, float(grad.sum().sqrt()), 0.0, 0.0]

    return Case(
        "patch_embed",
        f"{impl} uint8={bytes_} kept={kept is not None}",
        [pixels, weight, class_embedding, position],
        of(ops.patch_embed, impl=impl),
        of(patch_embed_reference),
        [of(patch_embed_reference)],
        c * tube * p * p + b * frames * (1 + rows * columns) + width,
        wanted=[not bytes_ and rng.random() < 0.5, True, True, True],
        floors=floors,
    )


def info_nce(rng: random.Random, impl: str, small: bool = False) -> Case:
    dtype = dtype_of(rng, torch.float32, torch.bfloat16, torch.float16) if impl != "torch" else dtype_of(rng)
    b, d = rng.choice((1, 2, 3, 7, 63, 64, 65, 130) if not small else (1, 2, 7, 17)), rng.choice((1, 2, 3, 8, 31, 64))
    scale = rng.choice((1.0, 14.3, 100.0, 1e-3, 1e-6, 0.0, -1.0, -14.3))
    smoothing = rng.choice((0.0, 0.0, 0.1, 0.5, 0.9))
    ids = torch.randint(0, max(1, b // 2), (b,), generator=generator(rng)) if rng.random() < 0.3 else None
    embeds = [F.normalize(draw(rng, (b, d), torch.float64), dim=-1).to(dtype) for _ in range(2)]
    embeds = [draw(rng, (b, d), dtype) if rng.random() < 0.5 else e for e in embeds]
    tensors = [*embeds, torch.tensor(scale)]
    options = {"ids": ids, "label_smoothing": smoothing}

    def floors(x, y, s):
        """Probabilities, and their targets, are rounded before they cancel: what that moves, for results in order."""
        x, y, s = x.double(), y.double(), s.double()
        allowed = (
            torch.eye(b, dtype=torch.bool) if ids is None else torch.eye(b, dtype=torch.bool) | (ids[:, None] != ids)
        )
        allowed = torch.ones(b, b, dtype=torch.bool) if ids is None else allowed
        z = (x @ y.T * s).masked_fill(~allowed, -math.inf)
        each = z.softmax(0) + z.softmax(1) + torch.eye(b, dtype=torch.float64) + 2 * smoothing / b * allowed
        each /= 2 * b
        rows, columns = (each**2 @ (y**2)).sum().sqrt(), ((each**2).T @ (x**2)).sum().sqrt()
        by_scale = (each * (x @ y.T).abs()).square().sum().sqrt()
        logits = z.masked_fill(~allowed, 0.0).abs().max()
        floors = [float(1 + logits), float(rows * s.abs()), float(columns * s.abs()), float(by_scale)]
        if dtype in HALF:  # what is left of them is rounded to 16 bits, the gradient of a float32 scale after that
            floors[3] *= ROUNDING[dtype] / ROUNDING[torch.float32]
        return floors

    return Case(
        "info_nce",
        f"{impl} B={b} D={d} scale={scale} smoothing={smoothing} ids={ids is not None}",
        tensors,
        lambda *x: ops.info_nce(*x, impl=impl, **options),
        lambda *x: info_nce_reference(*x, **options),
        [lambda x, y, s: info_nce_reference(x, y, s, **options).to(torch.promote_types(x.dtype, torch.float32))],
        2 * d + 4 * b,
        floors=floors,
    )


def nested_info_nce(rng: random.Random, impl: str, small: bool = False) -> Case:
    dtype = dtype_of(rng, torch.float32, torch.float64) if impl == "torch" else torch.float32
    b, d = rng.choice((1, 2, 7, 17, 64, 130) if not small else (1, 2, 7)), rng.choice((1, 2, 3, 8, 31, 64))
    dims = sorted(rng.sample(range(1, d + 1), rng.randrange(1, min(4, d) + 1)), key=lambda _: rng.random())
    tensors = [draw(rng, (b, d), dtype), draw(rng, (b, d), dtype), torch.tensor(rng.choice((1.0, 14.3, 59.0, -3.0)))]
    weights = rng.choice((None, [rng.random() + 0.1 for _ in dims]))
    shares = [w / sum(weights) for w in weights] if weights else [1 / len(dims)] * len(dims)

    def reference(x, y, s):
        sides = [[F.normalize(e[:, :size], dim=-1) for e in (x, y)] for size in dims]
        return sum(share * info_nce_reference(*pair, s) for share, pair in zip(shares, sides))

    def floors(x, y, s):
        """What a row's norm takes from its gradient cancels; of one number, all of it."""
        x, y, s = x.double(), y.double(), s.double()
        total = [0.0, 0.0, 0.0]
        for share, size in zip(shares, dims):
            u, v = (F.normalize(e[:, :size], dim=-1) for e in (x, y))
            z = u @ v.T * s
            each = share / (2 * b) * (z.softmax(0) + z.softmax(1) + torch.eye(b, dtype=torch.float64))
            lengths = [e[:, :size].norm(dim=-1).clamp_min(1e-12) for e in (x, y)]
            total[0] += float(((each**2).sum(1) / lengths[0] ** 2).sum() * s**2)
            total[1] += float(((each**2).sum(0) / lengths[1] ** 2).sum() * s**2)
            total[2] += float((each * (u @ v.T)).square().sum())
        return [float(1 + s.abs()), *(t**0.5 for t in total)]

    return Case(
        "nested info_nce",
        f"{impl} B={b} D={d} dims={dims} scale={float(tensors[2])}",
        tensors,
        lambda *x: ops.info_nce(*x, dims=dims, dim_weights=weights, impl=impl),
        reference,
        [lambda x, y, s: reference(x, y, s).to(x.dtype)],
        2 * d + 4 * b,
        floors=floors,
        alike=1 in dims,  # of one number a sign is left
    )


def sigmoid_loss(rng: random.Random, impl: str, small: bool = False) -> Case:
    dtype = dtype_of(rng, torch.float32, torch.bfloat16, torch.float16) if impl != "torch" else dtype_of(rng)
    b, d = rng.choice((1, 2, 3, 7, 63, 64, 65, 130) if not small else (1, 2, 7, 17)), rng.choice((1, 2, 3, 8, 31, 64))
    n = b + rng.choice((0, 0, 1, 9))
    scale, bias = rng.choice((1.0, 10.0, 100.0, 1e-3, 0.0, -3.0)), rng.choice((-10.0, 0.0, 3.0))
    ids = torch.randint(0, max(1, n // 2), (n,), generator=generator(rng)) if rng.random() < 0.3 else None
    embeds = [F.normalize(draw(rng, (rows, d), torch.float64), dim=-1).to(dtype) for rows in (b, n)]
    tensors = [*embeds, torch.tensor(scale), torch.tensor(bias)]

    def floors(x, y, s, t):
        """Probabilities, and their targets, are rounded before they cancel."""
        x, y, s, t = x.double(), y.double(), s.double(), t.double()
        z, eye = x @ y.T * s + t, torch.eye(b, n, dtype=torch.float64)
        each = (z.sigmoid() + eye) / b
        if ids is not None:
            each = each.masked_fill((ids[:b, None] == ids[None]) & (eye == 0), 0.0)
        rows, columns = (each**2 @ y**2).sum().sqrt() * s.abs(), ((each**2).T @ x**2).sum().sqrt() * s.abs()
        by_scale, by_bias = (each * (x @ y.T)).square().sum().sqrt(), each.square().sum().sqrt()
        return [float((z.abs() + 1).sum() / b), float(rows), float(columns), float(by_scale), float(by_bias)]

    return Case(
        "sigmoid_loss",
        f"{impl} B={b} N={n} D={d} scale={scale} bias={bias} ids={ids is not None}",
        tensors,
        lambda *x: ops.sigmoid_loss(*x, ids=ids, impl=impl),
        lambda *x: sigmoid_loss_reference(*x, ids=ids),
        [lambda *x: sigmoid_loss_reference(*x, ids=ids).to(torch.promote_types(x[0].dtype, torch.float32))],
        2 * d + 4 * n,
        floors=floors,
    )


def layer_norm(rng: random.Random, impl: str, small: bool = False) -> Case:
    dtype = dtype_of(rng)
    few = [size(rng, 8) for _ in range(rng.randrange(0, 4))]
    many = [rng.choice((200, 3000, 20000))] if rng.random() < 0.1 and not small else few
    d = rng.choice((1, 2, 3, 8, 17, 64, 100))
    shape = (*many, d)
    weights = [draw(rng, (d,), rng.choice((dtype, torch.float32) if dtype in HALF else (dtype,))) for _ in range(2)]
    tensors = [draw(rng, shape, dtype, rng.choice((1.0, 1.0, 1e-2, 30.0))), *weights]
    residual = rng.random() < 0.5
    if residual:
        axes = [1 if rng.random() < 0.4 else s for s in shape][rng.randrange(0, len(shape) + 1) :]
        tensors.append(draw(rng, tuple(axes), dtype))
    keep = rng.random() < 0.7

    def call(x, weight, bias, residual=None, function=ops.layer_norm, **more):
        if residual is None:
            return function(x, weight, bias, **more)
        got = function(x, weight, bias, residual=residual, **more)
        return got if keep else got[0]

    def plain(x, weight, bias, residual=None):
        total = x if residual is None else x + residual
        y = F.layer_norm(total, (d,), weight.to(total.dtype), bias.to(total.dtype))
        return (y, total) if residual is not None and keep else y

    def floors(x, weight, bias, residual=None):
        """A row's gradient has its mean taken away, all of it where D is 1; a residual's is a sum of such gradients."""
        outs = 2 if residual is not None and keep else 1
        total = x.double() if residual is None else x.double() + residual.double()
        along = torch.randn(total.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        flow = along * weight.double() / (total.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        flow = 3 * float(flow.norm() + (along.numel() ** 0.5 if outs == 2 else 0.0))
        repeats = 1.0 if residual is None else (total.numel() / max(1, residual.numel())) ** 0.5
        return [0.0] * outs + [flow, 0.0, 0.0] + ([flow * repeats] if residual is not None else [])

    return Case(
        "layer_norm",
        f"{impl} {shape} residual={tuple(tensors[3].shape) if residual else None} keep={keep}",
        tensors,
        lambda *x: call(*x, impl=impl),
        lambda *x: call(*x, function=layer_norm_reference),
        [plain, lambda *x: cast(call(*x, function=layer_norm_reference), plain(*x))],
        2 * d + math.prod(many),
        floors=floors,
    )


def cast(results: Any, like: Any) -> Any:
    """The same in the dtypes of others."""
    if isinstance(results, torch.Tensor):
        return results.to(like.dtype)
    return tuple(r.to(x.dtype) for r, x in zip(results, like))


def mlp(rng: random.Random, impl: str, small: bool = False) -> Case:
    dtype = dtype_of(rng)
    shape = [size(rng, 17) for _ in range(rng.randrange(0, 3))]
    d, f, e = (size(rng, 33 if small else 65) for _ in range(3))
    activation = rng.choice(("gelu", "quick_gelu"))
    shapes = ((*shape, d), (f, d), (f,), (e, f), (e,))
    tensors = [draw(rng, s, dtype, magnitude(rng) if i in (0, 2, 4) else 0.3) for i, s in enumerate(shapes)]
    recompute = rng.random() < 0.5
    if rng.random() < 0.3:  # the layers' own product
        x = tensors[0] if tensors[0].dim() > 1 else tensors[0][None]
        return Case(
            "linear",
            f"{tuple(x.shape)} -> {f}",
            [x, *tensors[1:3]],
            products.trained_linear,
            F.linear,
            [F.linear],
            2 * d + f + math.prod(shape),
        )

    def plain(x, w1, b1, w2, b2):
        h = F.linear(x, w1, b1)
        return F.linear(F.gelu(h) if activation == "gelu" else h * torch.sigmoid(1.702 * h), w2, b2)

    def floors(x, w1, b1, w2, b2):
        """What is added up in each gradient was rounded before, and may cancel."""
        x, w1, b1, w2 = (t.double() for t in (x, w1, b1, w2))
        x, rows = x.reshape(-1, d), math.prod(shape)
        h = x @ w1.T + b1
        along = torch.randn((*shape, e), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        along = along.reshape(rows, e).square()
        dh = 1.3 * (along @ w2.square())  # squares; the activations' slopes are at most 1.13
        squares = (dh @ w1.square(), dh.T @ x.square(), dh, along.T @ h.square(), along)
        return [0.0, *(float(s.sum().sqrt()) for s in squares)]

    return Case(
        "mlp",
        f"{impl} {tuple(shape)} D={d} F={f} E={e} {activation}",
        tensors,
        lambda *x: ops.mlp(*x, activation=activation, recompute=recompute, impl=impl),
        lambda *x: mlp_reference(*x, activation=activation),
        [plain, lambda *x: mlp_reference(*x, activation=activation)],
        3 * (d + f + e) + 2 * math.prod(shape),
        floors=floors,
    )


IMPLS = {
    attention: ("torch", "native", "native"),
    temporal_attention: ("torch", "native", "native"),
    patch_embed: ("torch", "native"),
    info_nce: ("torch", "native", "native"),
    nested_info_nce: ("torch", "native", "native"),
    sigmoid_loss: ("torch", "native", "native"),
    layer_norm: ("torch",),
    mlp: ("torch",),
}


def case(rng: random.Random, impl: str | None = None) -> Case:
    """A call of a random op; of that implementation, on little, where one is named."""
    make = rng.choice(list(IMPLS))
    return make(rng, impl or rng.choice(IMPLS[make]), impl is not None)
