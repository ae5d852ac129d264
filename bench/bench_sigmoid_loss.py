"""The sigmoid loss of pairs against its peers: time and extra memory, forward, backward and both.

    python -m bench.bench_sigmoid_loss --size 1024 4096 --dim 768
    python -m bench.bench_sigmoid_loss --size 16384 --dtype bfloat16 --passes both

Peers: open_clip's arithmetic (`dense`), the same for some rows at a time under checkpoint (`row-chunked`);
siglip-kernel where it is installed and a GPU is there. Inputs are unit rows, the scale 10 and the bias -10, SigLIP's
first, all four learnt. `fwd` is under no_grad; ours compute the gradients in the forward where there are any, so that
`bwd` alone only multiplies. TFLOP/s count 6 B^2 D for forward and backward, 2 and 4 for one alone.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lbfast.ops import sigmoid_loss
from lbfast.reference.sigmoid_loss import sigmoid_loss as reference

from . import bench_info_nce, contest, harness, options, peers

FLOPS = {"fwd": 2, "bwd": 4, "both": 6}  # times B^2 D
SCALE, BIAS = 10.0, -10.0
DENSE_BYTES = 6
"""Matrices of logits that open_clip's arithmetic holds at once, at least."""
PEERS: dict[str, tuple[Callable[..., torch.Tensor], Callable[[], str]]] = {
    "dense": (peers.siglip_loss, lambda: ""),
    "row-chunked": (peers.siglip_loss_row_chunked, lambda: ""),
    "siglip-kernel": (peers.siglip_kernel_loss, lambda: peers.missing("siglip_kernel")),
}
"""Name -> loss of (image, text, scale, bias), and why it cannot be measured here."""


def inputs(size: int, dim: int, dtype: str, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(size, dim, generator=generator), dim=-1) for _ in range(2)]
    made = [x.to(device, getattr(torch, dtype)).requires_grad_() for x in rows]
    return [*made, *(torch.tensor(value, device=device, requires_grad=True) for value in (SCALE, BIAS))]


def loss_of(name: str) -> Callable[..., torch.Tensor]:
    if name.startswith("lbfast "):
        return lambda *tensors: sigmoid_loss(*tensors, impl=name.removeprefix("lbfast "))
    return PEERS[name][0]


def step(name: str, part: str, tensors: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """A callable that runs forward, backward or both; gradients are made anew each time."""
    loss = loss_of(name)
    if part == "fwd":
        return torch.no_grad()(lambda: loss(*tensors))
    if part == "bwd":
        kept = loss(*tensors)
        return lambda: torch.autograd.grad(kept, tensors, retain_graph=True)
    return lambda: torch.autograd.grad(loss(*tensors), tensors)


def whole_step(name: str, size: int, dim: int, dtype: str) -> Callable[[], Any]:
    """Forward and backward on the CPU, inputs included: for harness.cpu_memory."""
    return step(name, "both", inputs(size, dim, dtype, "cpu"))


def candidates(size: int, dtype: str, device: str) -> tuple[list[str], dict[str, str]]:
    """Names that can be measured, and those that cannot: why."""
    ours, absent = bench_info_nce.ours(dtype, device)
    names = list(ours)
    for name, (_, why_not) in PEERS.items():
        reason = why_not()
        need = DENSE_BYTES * size**2 * getattr(torch, dtype).itemsize / 2**30
        if name == "dense" and need > bench_info_nce.DENSE_LIMIT_GIB[device]:
            reason = f"left out: would need about {need:.0f} GiB"
        if size > bench_info_nce.PEERS_TO:
            reason = f"left out: takes minutes above {bench_info_nce.PEERS_TO} pairs"
        if reason:
            absent[name] = reason
        else:
            names.append(name)
    return names, absent


def measure(size: int, dim: int, dtype: str, record: harness.Record, passes: Sequence[str], seconds: float) -> None:
    names, absent = candidates(size, dtype, record.device)
    tensors = inputs(size, dim, dtype, record.device)
    about = {"case": f"{size}x{dim}", "dtype": dtype}
    record.add({**about, "name": name, "note": reason} for name, reason in absent.items())
    exact = float(reference(*(t.detach().double() for t in tensors))) if size <= 4096 else None
    memory: dict[str, float] = {}
    for name in names:
        try:
            if record.device == "cuda":
                extra = harness.gpu_extra_mib(step(name, "both", tensors))
            else:
                extra = harness.cpu_memory(whole_step, name, size, dim, dtype, warm=(name, 64, dim, dtype)).extra
            if exact is not None:
                error = abs(float(loss_of(name)(*(x.detach() for x in tensors))) / exact - 1)
                if not error <= bench_info_nce.TOLERANCE[getattr(torch, dtype)]:
                    raise AssertionError(f"wrong: {error:.1e} from float64: not timed")
            memory[name] = extra
        except Exception as error:  # peers fail in ways of their own, and memory runs out
            record.add([{**about, "name": name, "note": contest.reason(error)}])
    rates = record.rates(getattr(torch, dtype))
    for part in passes:
        # kept graphs of dense candidates add up: backward alone is measured one candidate after the other
        for group in [[name] for name in memory] if part == "bwd" else [list(memory)]:
            rows = []
            steps = {name: step(name, part, tensors) for name in group}
            for name, timing in harness.interleaved(steps, record.device, seconds).items():
                flops = FLOPS[part] * size**2 * dim
                row = {**about, "part": part, "name": name, **dataclasses.asdict(timing)}
                row |= {"tflops": round(flops / timing.median_ms / 1e9, 3), "gbytes": 0}
                row |= {"of_floor": round(rates.floor_ms(flops, 0) / timing.median_ms, 3)}
                rows.append({**row, "extra_MiB": round(memory[name], 1)})
            record.add(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = contest.arguments(__doc__)
    sizes = bench_info_nce.GPU_SIZES if harness.device() == "cuda" else bench_info_nce.CPU_SIZES
    parser.add_argument("--size", type=options.count, nargs="+", default=sizes, help="B; default: %(default)s")
    parser.add_argument("--dim", type=options.count, nargs="+", default=[768], help="D; default: %(default)s")
    given = parser.parse_args(argv)
    record = harness.Record("Sigmoid loss", harness.device(), given.out)
    record.expects(len(given.size) * len(given.dim) * len(given.dtype))
    for size in given.size:
        for dim in given.dim:
            for dtype in given.dtype:
                record.begins(f"{size} x {dim}, {dtype}")
                measure(size, dim, dtype, record, given.passes, given.seconds)
    return contest.show(record)


if __name__ == "__main__":
    sys.exit(main())
