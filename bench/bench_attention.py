"""ops.attention beside the formula, SDPA's backends, torch.compile, flash-attn and xformers.

python -m bench.bench_attention --dtype bfloat16 --samples 256
"""

from __future__ import annotations

import functools
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import contest
from lbfast import ops
from lbfast.reference.attention import attention as reference

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
SHAPES = {
    "image L/14": (257, 16, 64),
    "image H/14": (257, 16, 80),
    "audio L/14": (593, 16, 64),
    "text L": (77, 12, 64),
}


def eager(q, k, v, causal=False):
    """The whole score matrix in the inputs' dtype, as upstream has it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    if causal:
        scores = scores + torch.full(scores.shape[-2:], torch.finfo(q.dtype).min, device=q.device).to(q.dtype).triu(1)
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous()


def sdpa(q, k, v, causal=False, backend=None):
    """SDPA over transposed views, with one of its backends or its own choice; laid out for the output projection."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(list(BACKENDS.values()) if backend is None else [BACKENDS[backend]]):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).contiguous()


def contenders(causal: bool):
    found = {
        "reference": functools.partial(reference, causal=causal),
        "eager": functools.partial(eager, causal=causal),
        "torch.compile": torch.compile(functools.partial(eager, causal=causal), dynamic=False),
    }
    found |= {f"sdpa {name}": functools.partial(sdpa, causal=causal, backend=name) for name in BACKENDS}
    for impl in ("flash_attn", "xformers", "torch", "triton"):
        found[f"lbfast {impl}"] = functools.partial(ops.attention, causal=causal, impl=impl)
    return found


def case(name: str, samples: int, device: str, dtype: torch.dtype) -> contest.Case:
    """q, k, v as views of one projection (B, N, 3 H D). Moved: q, k, v, out; backward: those, dO, dq, dk, dv."""
    n, h, d = SHAPES[name]
    projection = torch.randn(samples, n, 3, h, d, device=device, dtype=dtype)
    inputs = [x.requires_grad_() for x in projection.unbind(2)]
    one = inputs[0].numel() * inputs[0].element_size()
    flops = 4 * samples * h * n * n * d / (2 if name.startswith("text") else 1)
    return contest.Case(f"{name} {samples}x{n}x{h}x{d}", inputs, flops=(flops, 2.5 * flops), bytes=(4 * one, 8 * one))


def main(
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    samples: Annotated[int, typer.Option(help="Images or captions; default 256 on a GPU, 8 on a CPU.")] = 0,
    only: Annotated[str, typer.Option(help="Shapes whose name has this in it.")] = "",
    seconds: Annotated[float, typer.Option(help="Time for each number.")] = 1.0,
    out: Annotated[str, typer.Option(help="Name of the result file; empty: none.")] = "",
) -> None:
    """Forward, backward and both, at the towers' shapes."""
    device = contest.device()
    rows = []
    for name in SHAPES:
        if only in name:
            found = case(name, samples or (256 if device == "cuda" else 8), device, getattr(torch, dtype))
            rows += contest.run([found], contenders(name.startswith("text")), seconds=seconds)
    contest.show("attention", rows, out)


if __name__ == "__main__":
    typer.run(main)
