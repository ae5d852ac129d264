"""ops.temporal_attention beside what upstream does for it: frames moved together, attention, and back, by every route.

python -m bench.bench_temporal_attention --dtype bfloat16 --clips 32
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import torch

from lbfast import ops
from lbfast.reference.temporal_attention import temporal_attention as reference

from . import contest, harness, options
from .bench_attention import BACKENDS, eager, sdpa


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


def case(clips: int, frames: int, n: int, h: int, d: int, device: str, dtype: torch.dtype) -> contest.Case:
    """Three separate projections. Moved: q, k, v, out; backward: q, k, v, dO, dq, dk, dv."""
    shape = (clips, frames, n, h, d)
    inputs = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
    one = inputs[0].numel() * inputs[0].element_size()
    flops = 4 * clips * n * h * frames**2 * d
    return contest.Case("x".join(map(str, shape)), inputs, flops=(flops, 2.5 * flops), bytes=(4 * one, 7 * one))


def main(argv: Sequence[str] | None = None) -> int:
    parser = contest.arguments(__doc__)
    parser.add_argument("--clips", type=options.count, help="default 32 on a GPU, 1 on a CPU")
    parser.add_argument("--frames", type=options.count, default=8, help="of a clip (%(default)s)")
    parser.add_argument(
        "--shape", type=options.count, nargs=3, metavar=("N", "H", "D"), help="positions, heads, their width"
    )
    given = parser.parse_args(argv)
    record = harness.Record("Temporal attention", harness.device(), given.out)
    clips = given.clips or (32 if record.device == "cuda" else 1)
    shapes = [given.shape] if given.shape else [(257, 16, 64), (257, 16, 80)]
    for dtype in given.dtype:
        found = [case(clips, given.frames, *shape, record.device, getattr(torch, dtype)) for shape in shapes]
        contest.run(found, contenders(), record, given)
    return contest.show(record)


if __name__ == "__main__":
    sys.exit(main())
