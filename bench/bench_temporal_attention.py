"""ops.temporal_attention beside what upstream does for it: frames moved together, attention, and back, by every route.

python -m bench.bench_temporal_attention --dtype bfloat16 --clips 32
"""

from __future__ import annotations

import functools
from typing import Annotated

import torch
import typer

from bench import contest
from bench.bench_attention import BACKENDS, eager, sdpa
from lbfast import ops
from lbfast.reference.temporal_attention import temporal_attention as reference


def moved(attention, q, k, v):
    """rearrange '(b t) n d -> (b n) t d', attention over t with heads before frames, all contiguous, and back."""
    b, t, n, h, d = q.shape
    together = (x.transpose(1, 2).reshape(b * n, t, h, d) for x in (q, k, v))
    heads_first = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in together)
    return attention(*heads_first).view(b, n, t, h, d).transpose(1, 2).contiguous()


def contenders():
    found = {
        "reference": reference,
        "upstream eager": functools.partial(moved, eager),
        "upstream torch.compile": torch.compile(functools.partial(moved, eager), dynamic=False),
    }
    for name in BACKENDS:
        found[f"upstream sdpa {name}"] = functools.partial(moved, functools.partial(sdpa, backend=name))
    for impl in ("flash_attn", "xformers"):
        found[f"upstream {impl}"] = functools.partial(moved, functools.partial(ops.attention, impl=impl))
    for impl in ("torch", "native", "triton"):
        found[f"lbfast {impl}"] = functools.partial(ops.temporal_attention, impl=impl)
    return found


def case(clips: int, frames: int, d: int, device: str, dtype: torch.dtype) -> contest.Case:
    """Three separate projections. Moved: q, k, v, out; backward: q, k, v, dO, dq, dk, dv."""
    shape = (clips, frames, 257, 16, d)
    inputs = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
    one = inputs[0].numel() * inputs[0].element_size()
    flops = 4 * clips * 257 * 16 * frames**2 * d
    return contest.Case("x".join(map(str, shape)), inputs, flops=(flops, 2.5 * flops), bytes=(4 * one, 7 * one))


def main(
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    clips: Annotated[int, typer.Option(help="Clips; default 32 on a GPU, 1 on a CPU.")] = 0,
    frames: Annotated[int, typer.Option(help="Frames of a clip.")] = 8,
    seconds: Annotated[float, typer.Option(help="Time for each number.")] = 1.0,
    out: Annotated[str, typer.Option(help="Name of the result file; empty: none.")] = "",
) -> None:
    """Forward, backward and both, at the video towers' shapes: L/14 and H/14."""
    device = contest.device()
    clips = clips or (32 if device == "cuda" else 1)
    found = [case(clips, frames, d, device, getattr(torch, dtype)) for d in (64, 80)]
    contest.show("temporal_attention", contest.run(found, contenders(), seconds=seconds), out)


if __name__ == "__main__":
    typer.run(main)
