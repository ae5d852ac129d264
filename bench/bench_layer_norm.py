"""ops.layer_norm beside the formula, torch, torch.compile and Liger: plain, with a residual, with a temporal embedding.

python -m bench.bench_layer_norm --dtype bfloat16 --clips 32
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lbfast import ops
from lbfast.reference.layer_norm import layer_norm as reference

from . import contest, harness, options, peers


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
        "liger": peers.liger_layer_norm,
        "lbfast torch": ours("torch"),
        "lbfast triton": ours("triton"),
    }


def cases(device: str, dtype: torch.dtype, clips: int, tokens: int, widths: Sequence[int]) -> list[contest.Case]:
    """A video layer's: (clips, 8, tokens, D). Moved: x and y; with a residual two more, or its few rows."""
    found = []
    for d in widths:
        shape = (clips, 8, tokens, d)

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


def main(argv: Sequence[str] | None = None) -> int:
    parser = contest.arguments(__doc__)
    parser.add_argument("--clips", type=options.count, help="of 8 frames; default 32 on a GPU, 1 on a CPU")
    parser.add_argument("--tokens", type=options.count, default=257, help="of a frame (%(default)s)")
    parser.add_argument("--width", type=options.count, nargs="+", default=[1024, 1280], help="default: 1024 1280")
    given = parser.parse_args(argv)
    record = harness.Record("Layer norm", harness.device(), given.out)
    clips = given.clips or (32 if record.device == "cuda" else 1)
    for dtype in given.dtype:
        found = cases(record.device, getattr(torch, dtype), clips, given.tokens, given.width)
        contest.run(found, contenders(), record, given)
    return contest.show(record)


if __name__ == "__main__":
    sys.exit(main())
