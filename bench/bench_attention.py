"""ops.attention beside the formula, SDPA's backends, torch.compile, flash-attn and xformers.

python -m bench.bench_attention --dtype bfloat16 --samples 256
python -m bench.bench_attention --shape 1025 16 64
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lbfast import ops
from lbfast.reference.attention import attention as reference

from . import contest, harness, options

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
    for impl in ("flash_attn", "xformers", "torch", "native", "triton"):  # the first two are others' kernels
        name = impl if impl in ("flash_attn", "xformers") else f"lbfast {impl}"
        found[name] = functools.partial(ops.attention, causal=causal, impl=impl)
    return found


def case(name: str, shape: Sequence[int], causal: bool, samples: int, device: str, dtype: torch.dtype) -> contest.Case:
    """q, k, v as views of one projection (B, N, 3 H D). Moved: q, k, v, out; backward: those, dO, dq, dk, dv."""
    n, h, d = shape
    projection = torch.randn(samples, n, 3, h, d, device=device, dtype=dtype)
    inputs = [x.requires_grad_() for x in projection.unbind(2)]
    one = inputs[0].numel() * inputs[0].element_size()
    flops = 4 * samples * h * n * n * d / (2 if causal else 1)
    return contest.Case(f"{name} {samples}x{n}x{h}x{d}", inputs, flops=(flops, 2.5 * flops), bytes=(4 * one, 8 * one))


def main(argv: Sequence[str] | None = None) -> int:
    parser = contest.arguments(__doc__)
    parser.add_argument("--samples", type=options.count, help="images or captions; default 256 on a GPU, 4 on a CPU")
    parser.add_argument("--only", default="", help="towers whose name has this in it")
    parser.add_argument(
        "--shape", type=options.count, nargs=3, metavar=("N", "H", "D"), help="tokens, heads, their width"
    )
    parser.add_argument("--causal", action="store_true", help="with --shape: as captions are")
    given = parser.parse_args(argv)
    record = harness.Record("Attention", harness.device(), given.out)
    samples = given.samples or (256 if record.device == "cuda" else 4)
    shapes = {name: (shape, name.startswith("text")) for name, shape in SHAPES.items() if given.only in name}
    if given.shape:
        shapes = {"causal" if given.causal else "all": (given.shape, given.causal)}
    record.expects(len(given.dtype) * len(shapes))
    for dtype in given.dtype:
        for name, (shape, causal) in shapes.items():
            found = case(name, shape, causal, samples, record.device, getattr(torch, dtype))
            contest.run([found], contenders(causal), record, given)
    return contest.show(record)


if __name__ == "__main__":
    sys.exit(main())
