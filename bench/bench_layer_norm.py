"""ops.layer_norm beside the formula, torch and torch.compile: plain, with a residual, with a temporal embedding.

python -m bench.bench_layer_norm --dtype bfloat16 --clips 32
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from bench import contest
from lbfast import ops
from lbfast.reference.layer_norm import layer_norm as reference


def eager(x, weight, bias, residual=None):
    total = x if residual is None else x + residual
    y = F.layer_norm(total, x.shape[-1:], weight, bias)
    return y if residual is None else (y, total)


def contenders():
    def ours(impl):
        return lambda x, weight, bias, residual=None: ops.layer_norm(x, weight, bias, residual=residual, impl=impl)

    return {
        "reference": lambda x, weight, bias, residual=None: reference(x, weight, bias, residual=residual),
        "torch": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
        "lbfast torch": ours("torch"),
        "lbfast triton": ours("triton"),
    }


def cases(device: str, dtype: torch.dtype, clips: int) -> list[contest.Case]:
    """A video layer's: (clips, 8, 257, D). Moved: x and y; with a residual two more, or its few rows."""
    found = []
    for d in (1024, 1280):
        shape = (clips, 8, 257, d)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(size, device=device, dtype=dtype).requires_grad_()

        x, weight, bias = random(*shape), random(d), random(d)
        one = x.numel() * x.element_size()
        plain = (x, weight, bias)
        name = "x".join(map(str, shape))
        found += [
            contest.Case(name, plain, bytes=(2 * one, 3 * one)),
            contest.Case(f"{name} + residual", (*plain, random(*shape)), bytes=(4 * one, 4 * one)),
            contest.Case(f"{name} + temporal", (*plain, random(1, 8, 1, d)), bytes=(3 * one, 4 * one)),
        ]
    return found


def main(
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    clips: Annotated[int, typer.Option(help="Clips of 8 frames; default 32 on a GPU, 1 on a CPU.")] = 0,
    seconds: Annotated[float, typer.Option(help="Time for each number.")] = 1.0,
    out: Annotated[str, typer.Option(help="Name of the result file; empty: none.")] = "",
) -> None:
    """Forward, backward and both, at the video towers' shapes."""
    device = contest.device()
    found = cases(device, getattr(torch, dtype), clips or (32 if device == "cuda" else 1))
    contest.show("layer_norm", contest.run(found, contenders(), seconds=seconds), out)


if __name__ == "__main__":
    typer.run(main)
