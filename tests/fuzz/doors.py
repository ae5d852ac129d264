"""The native ops themselves, called with what their Python never gives them: an answer or an error, never a signal."""

from __future__ import annotations

import random

import torch

from lbfast import native
from tests.fuzz.layouts import draw, generator

_WRONG = ("dtype", "shape", "rank", "strides", "empty", "meta", "sparse", "none")


def _spoil(rng: random.Random, x: torch.Tensor | None, kind: str) -> torch.Tensor | None:
    """x, wrong in one way."""
    if x is None or kind == "none":
        return None
    if kind == "dtype":
        return x.to(rng.choice((torch.float64, torch.float16, torch.int32, torch.int64, torch.bool, torch.uint8)))
    if kind == "shape":
        shape = [max(0, s + rng.choice((-1, 0, 1, 7))) for s in x.shape]
        return torch.ones(shape, dtype=x.dtype)
    if kind == "rank":
        return rng.choice((x[None], x.flatten(), x.new_ones(()), x[..., None]))
    if kind == "strides":
        return torch.stack([x, x], -1)[..., 0]
    if kind == "empty":
        return x[..., :0] if x.dim() else x.new_empty(0)
    if kind == "meta":
        return x.to("meta")
    return x.to_sparse() if x.dim() else x


def _info_nce(rng: random.Random, dtype: torch.dtype) -> tuple[str, list]:
    m, n, d = rng.randrange(0, 70), rng.randrange(0, 140), rng.choice((0, 1, 2, 8, 33))
    x, y = draw(rng, (m, d), dtype).contiguous(), draw(rng, (n, d), dtype).contiguous()
    labels = [torch.randint(0, 5, (s,), dtype=torch.int32, generator=generator(rng)) for s in (m, n)]
    labels = rng.choice(([None, None], labels, [labels[0], None], [None, labels[1]]))
    diag = rng.choice((-1, 0, n - m, n - m + 1, 2**62, -(2**62)))
    logits = torch.zeros(m * -(-n // 64) * 64) if rng.random() < 0.5 else None
    scale = rng.choice((1.0, float("nan"), float("inf"), 1e300))
    if rng.random() < 0.5:
        return "info_nce_stats", [x, y, scale, diag, *labels, logits]
    dx, dy = (torch.zeros(s, d) if rng.random() < 0.7 else None for s in (m, n))
    workspace = rng.choice((0, 1 << 20, -1, 2**62, -(2**63)))
    return "info_nce_grads", [
        *(x, y, scale, torch.ones(2, m), torch.ones(2, n), diag, *labels, logits, workspace, 2.0),
        *rng.choice(((dx, dy), (dx, dx), (None, dy))),
    ]


def _attention(rng: random.Random, dtype: torch.dtype) -> tuple[str, list]:
    b, n, m, h, d = (rng.randrange(0, 9) for _ in range(5))
    q, k, v = draw(rng, (b, n, h, d), dtype), draw(rng, (b, m, h, d), dtype), draw(rng, (b, m, h, d), dtype)
    padded = torch.zeros(b, m, dtype=torch.bool) if rng.random() < 0.5 else None
    rest = [rng.random() < 0.5, rng.choice((1.0, 0.0, float("nan"), -1e300))]
    if rng.random() < 0.5:
        return "attention_native", [q, k, v, padded, *rest]
    return "attention_native_bwd", [q, q, k, v, padded, q, torch.ones(b, h, n, 2), *rest]


def _temporal(rng: random.Random, dtype: torch.dtype) -> tuple[str, list]:
    shape = tuple(rng.choice((0, 1, 2, 5, 33, 130)) if i in (1, 4) else rng.randrange(0, 4) for i in range(5))
    q, k, v, do = (draw(rng, shape, dtype) for _ in range(4))
    return rng.choice(
        (("temporal_attention_native", [q, k, v, 1.0]), ("temporal_attention_native_bwd", [do, q, k, v, 1.0]))
    )


def _patches(rng: random.Random, dtype: torch.dtype) -> tuple[str, list]:
    if rng.random() < 0.3:
        c = rng.randrange(0, 4)
        return "patch_fold", [draw(rng, (3, c, 5), dtype).contiguous(), torch.ones(c), torch.ones(c)]
    b, c, t, height, width = (rng.randrange(0, 9) for _ in range(5))
    pixels = draw(rng, (b, c, t, height, width), rng.choice((dtype, torch.float32)))
    kept = torch.randint(-1, 9, (b, rng.randrange(0, 5)), generator=generator(rng)) if rng.random() < 0.5 else None
    sizes = [rng.choice((0, 1, 2, 3, -1, 2**31, 2**62, -(2**63))) for _ in range(2)]
    return "patch_rows", [pixels, kept, *sizes, rng.choice((dtype, torch.float32, torch.float64, torch.int32))]


def knock(rng: random.Random) -> str:
    """One call; returns the op and how it ended. Only a signal, or an error without a text, is wrong."""
    assert not native.why_not()
    name, arguments = rng.choice((_info_nce, _attention, _temporal, _patches))(
        rng, rng.choice((torch.float32, torch.bfloat16))
    )
    if rng.random() < 0.6:
        where = rng.choice([i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)])
        arguments[where] = _spoil(rng, arguments[where], rng.choice(_WRONG))
    try:
        getattr(torch.ops.lbfast, name)(*arguments)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        assert str(error).strip(), f"{name}: an error without a text"
        return f"{name} refused"
    return f"{name} answered"
