"""ops.mlp beside the formula, torch and torch.compile, for both activations.

python -m bench.bench_mlp --dtype bfloat16 --clips 32
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from bench import contest
from lbfast import ops
from lbfast.reference.mlp import mlp as reference


def eager(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation):
    h = F.linear(x, fc1_weight, fc1_bias)
    a = F.gelu(h) if activation == "gelu" else h * torch.sigmoid(1.702 * h)
    return F.linear(a, fc2_weight, fc2_bias)


def contenders(activation: str):
    return {
        "reference": partial(reference, activation=activation),
        "torch": partial(eager, activation=activation),
        "torch.compile": torch.compile(partial(eager, activation=activation), dynamic=False),
        "lbfast torch": partial(ops.mlp, activation=activation, recompute=False, impl="torch"),
        "lbfast triton": partial(ops.mlp, activation=activation, recompute=False, impl="triton"),
        "lbfast recompute": partial(ops.mlp, activation=activation),
    }


def cases(device: str, dtype: torch.dtype, clips: int) -> list[contest.Case]:
    """L/14's and H/14's perceptron on clips of 8 frames of 257 tokens."""
    found = []
    for d in (1024, 1280):
        rows, f = clips * 8 * 257, 4 * d
        shapes = ((rows, d), (f, d), (f,), (d, f), (d,))
        inputs = [(torch.randn(s, device=device, dtype=dtype) * s[-1] ** -0.5).requires_grad_() for s in shapes]
        flops = 4.0 * rows * d * f
        found.append(contest.Case(f"{rows}x{d}x{f}", inputs, flops=(flops, 2 * flops)))
    return found


def main(
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    clips: Annotated[int, typer.Option(help="Clips of 8 frames; default 32 on a GPU, 1 on a CPU.")] = 0,
    activation: Annotated[str, typer.Option(help="gelu or quick_gelu.")] = "gelu",
    seconds: Annotated[float, typer.Option(help="Time for each number.")] = 1.0,
    out: Annotated[str, typer.Option(help="Name of the result file; empty: none.")] = "",
) -> None:
    """Forward, backward and both, at the video towers' shapes."""
    device = contest.device()
    found = cases(device, getattr(torch, dtype), clips or (32 if device == "cuda" else 1))
    contest.show(f"mlp, {activation}", contest.run(found, contenders(activation), seconds=seconds), out)


if __name__ == "__main__":
    typer.run(main)
