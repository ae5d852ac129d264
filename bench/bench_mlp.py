"""ops.mlp beside the formula, torch and torch.compile, for both activations.

python -m bench.bench_mlp --dtype bfloat16 --clips 32
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F

from lbfast import ops
from lbfast.reference.mlp import mlp as reference

from . import contest, harness, options


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


def cases(device: str, dtype: torch.dtype, rows: int, widths: Sequence[tuple[int, int]]) -> list[contest.Case]:
    """Moved: x, the weights and out; backward: x, dout, dx, the weights and their gradients."""
    found = []
    for d, f in widths:
        shapes = ((rows, d), (f, d), (f,), (d, f), (d,))
        inputs = [(torch.randn(s, device=device, dtype=dtype) * s[-1] ** -0.5).requires_grad_() for s in shapes]
        flops = 4.0 * rows * d * f
        x, weights = rows * d * dtype.itemsize, 2 * d * f * dtype.itemsize
        moved = (2 * x + weights, 3 * x + 2 * weights)
        found.append(contest.Case(f"{rows}x{d}x{f}", inputs, flops=(flops, 2 * flops), bytes=moved))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = contest.arguments(__doc__)
    parser.add_argument(
        "--rows", type=options.count, help="tokens; default those of 32 clips of 8 frames on a GPU, of 1 on a CPU"
    )
    parser.add_argument("--shape", type=options.count, nargs=2, metavar=("D", "F"), help="width and inner width")
    parser.add_argument("--activation", default="gelu", choices=("gelu", "quick_gelu"), help="%(default)s")
    given = parser.parse_args(argv)
    record = harness.Record(f"MLP, {given.activation}", harness.device(), given.out)
    rows = given.rows or 8 * 257 * (32 if record.device == "cuda" else 1)
    widths = [tuple(given.shape)] if given.shape else [(1024, 4096), (1280, 5120)]
    for dtype in given.dtype:
        contest.run(
            cases(record.device, getattr(torch, dtype), rows, widths), contenders(given.activation), record, given
        )
    return contest.show(record)


if __name__ == "__main__":
    sys.exit(main())
