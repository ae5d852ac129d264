"""InfoNCE against its peers: time and extra memory, forward, backward and both.

    python -m bench.bench_info_nce --size 1024 4096 --dim 512 768 1024
    python -m bench.bench_info_nce --size 16384 --dim 768 --dtype bfloat16 --passes both
    python -m bench.bench_info_nce --size 4096 --dim 768 --nested           what nested embeddings cost beside one call
    pytest bench/bench_info_nce.py                      one size, under pytest-benchmark

Peers: open_clip's arithmetic (`dense`), the same from one product (`dense, one product`), row chunks in plain torch
under autograd (`row-chunked`), torch's `linear_cross_entropy` in both directions (torch 2.13 or later), `dense`
compiled by Inductor with its auto-chunker (on a GPU); memeff and inf-cl where installed and a GPU is there. Inputs are
unit rows, the scale 14.3 and learnt; ours are measured at 100, too. Up to 8,192 pairs a GPU waits for launches: there
forward and backward are measured in a CUDA graph as well. TFLOP/s count 8 B^2 D for forward and backward, 2 and 6 for
one alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lbfast.ops.info_nce import IMPLEMENTATIONS, info_nce

from . import contest, harness, peers
from .options import count

GPU_SIZES, CPU_SIZES = [1024, 4096, 8192, 16384, 32768, 65536, 131072], [1024, 4096]
NESTED, CALLS = "lbfast nested", "lbfast, a call each"
"""With --nested: the losses of the first 1, 2/3, 1/3 and 1/12 of the numbers, at once or as four."""
FLOPS = {"fwd": 2, "bwd": 6, "both": 8}  # times B^2 D
PEERS_TO = 2**18
"""Pairs: with more, the others would take minutes; ours then take seconds, and are called once for each number."""
SLOW = 2.0
"""Seconds: a peer that takes longer for a call on a GPU is called no more."""
DENSE_LIMIT_GIB = {"cpu": 8, "cuda": 100}
"""Dense candidates that would need more than this are left out."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""How far a loss may be from float64's, relatively: dense losses round their logits."""

HIGH_SCALE = 100.0
ALL_IN_FORWARD = "linear_cross_entropy"
"""Computes its gradients in the forward, and gives them once: there is no backward alone to measure."""
GRAPHED = 8192
"""Up to so many pairs passes are captured in a CUDA graph, too."""


def _here() -> str:
    return ""


PEERS: dict[str, tuple[Callable[..., torch.Tensor], Callable[[], str]]] = {
    "dense": (peers.clip_loss, _here),
    "dense, one product": (peers.clip_loss_one_product, _here),
    "row-chunked": (peers.clip_loss_row_chunked, _here),
    "linear_cross_entropy": (peers.clip_loss_linear_cross_entropy, peers.missing_linear_cross_entropy),
    "dense, torch.compile in chunks": (peers.clip_loss_compiled_in_chunks, peers.missing_auto_chunker),
    "memeff": (peers.memeff_loss, lambda: peers.missing("memeff")),
    "inf-cl": (peers.inf_cl_loss, lambda: peers.missing("inf_cl")),
}
"""Name -> loss of (image, text, scale), and why it cannot be measured here."""


def inputs(size: int, dim: int, dtype: str, device: str, scale: float = peers.SCALE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(size, dim, generator=generator), dim=-1) for _ in range(2)]
    made = [x.to(device, getattr(torch, dtype)).requires_grad_() for x in rows]
    return [*made, torch.tensor(scale, device=device, requires_grad=True)]


def prefixes(d: int) -> tuple[int, ...]:
    return d, 2 * d // 3, d // 3, d // 12


def nested_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return info_nce(image, text, scale, dims=prefixes(image.shape[1]))


def loss_of_calls(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    parts = [[F.normalize(x[:, :d], dim=-1) for x in (image, text)] for d in prefixes(image.shape[1])]
    return torch.stack([info_nce(*pair, scale) for pair in parts]).mean()


def loss_of(name: str) -> Callable[..., torch.Tensor]:
    if name in (NESTED, CALLS):
        return nested_loss if name == NESTED else loss_of_calls
    if name.startswith("lbfast "):
        return lambda *tensors: info_nce(*tensors, impl=name.removeprefix("lbfast "))
    return PEERS[name][0]


def step(name: str, part: str, tensors: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """A callable that runs forward, backward or both; gradients are made anew each time."""
    loss = loss_of(name)
    wanted = tensors[:2] if name == "memeff" else tensors
    if part == "fwd":
        return lambda: loss(*tensors)
    if part == "bwd":
        kept = loss(*tensors)
        return lambda: torch.autograd.grad(kept, wanted, retain_graph=True)
    return lambda: torch.autograd.grad(loss(*tensors), wanted)


def whole_step(name: str, size: int, dim: int, dtype: str) -> Callable[[], Any]:
    """Forward and backward on the CPU, inputs included: for harness.cpu_memory."""
    return step(name, "both", inputs(size, dim, dtype, "cpu"))


def ours(dtype: str, device: str) -> tuple[list[str], dict[str, str]]:
    """Names of our implementations that can be measured, and those that cannot: why."""
    probe = torch.zeros(1, 2, dtype=getattr(torch, dtype), device=device)
    names, absent = [], {}
    for impl, why_not in IMPLEMENTATIONS.items():
        reasons = why_not(probe, probe)
        if impl == "triton" and device == "cpu":
            reasons = ["needs a GPU"]
        if reasons:
            absent[f"lbfast {impl}"] = "absent: " + "; ".join(reasons)
        else:
            names.append(f"lbfast {impl}")
    return names, absent


def candidates(size: int, dtype: str, device: str) -> tuple[list[str], dict[str, str]]:
    """Names that can be measured, and those that cannot: why."""
    names, absent = ours(dtype, device)
    for name, (_, why_not) in PEERS.items():
        reason = why_not()
        if size > PEERS_TO:
            reason = f"left out: takes minutes above {PEERS_TO} pairs"
        if name in ("dense", "dense, one product"):
            need = 7 * size**2 * getattr(torch, dtype).itemsize / 2**30
            if need > DENSE_LIMIT_GIB[device]:
                reason = f"left out: would need about {need:.0f} GiB"
        if reason:
            absent[name] = reason
        else:
            names.append(name)
    return names, absent


class _Watched:
    """A call that knows how long its last run took."""

    def __init__(self, run: Callable[[], Any]):
        self.run, self.seconds = run, 0.0

    def __call__(self) -> None:
        begun = time.perf_counter()
        self.run()
        torch.cuda.synchronize()
        self.seconds = time.perf_counter() - begun


def measure(
    size: int,
    dim: int,
    dtype: str,
    record: harness.Record,
    passes: Sequence[str],
    seconds: float,
    nested: bool = False,
) -> None:
    names, absent = candidates(size, dtype, record.device)
    if nested:
        names, absent = [ours(dtype, record.device)[0][0], NESTED, CALLS], {}
    tensors = inputs(size, dim, dtype, record.device)
    about = {"case": f"{size}x{dim}", "dtype": dtype}
    record.add({**about, "name": name, "note": reason} for name, reason in absent.items())
    memory, able, often = {}, [], size <= PEERS_TO
    exact = _exact(tensors) if size <= 4096 else None
    for name in names:
        try:
            if record.device == "cuda":
                call = _Watched(step(name, "both", tensors))
                memory[name] = harness.gpu_extra_mib(call, warm=often)
                if not name.startswith("lbfast") and call.seconds > SLOW:
                    raise RuntimeError(f"left out: a call took {call.seconds:.0f} s")
            else:
                memory[name] = harness.cpu_memory(whole_step, name, size, dim, dtype, warm=(name, 64, dim, dtype)).extra
            if exact is not None and name not in (NESTED, CALLS):
                error = abs(float(loss_of(name)(*(x.detach() for x in tensors))) / exact - 1)
                if not error <= TOLERANCE[getattr(torch, dtype)]:
                    raise AssertionError(f"wrong: {error:.1e} from float64: not timed")
            able.append(name)
        except Exception as error:  # peers fail in ways of their own, and memory runs out
            record.add([{**about, "name": name, "note": contest.reason(error)}])
    for part in passes:
        # kept graphs of dense candidates add up: backward alone is measured one candidate after the other
        groups = [[name] for name in able if name != ALL_IN_FORWARD] if part == "bwd" else [able]
        for group in groups:
            try:
                _time({n: step(n, part, tensors) for n in group}, part, about, record, seconds, memory)
            except RuntimeError as error:  # a peer's graph that cannot be kept for a second backward
                if len(group) > 1 or group[0].startswith("lbfast "):
                    raise
                record.add([{**about, "part": part, "name": group[0], "note": contest.reason(error)}])
    own = [name for name in able if name.startswith("lbfast ")]
    if "both" in passes and often and not nested:
        high = inputs(size, dim, dtype, record.device, HIGH_SCALE)
        about_high = {**about, "case": f"{size}x{dim}, scale {HIGH_SCALE:g}"}
        _time({name: step(name, "both", high) for name in own}, "both", about_high, record, seconds, memory)
        if record.device == "cuda" and size <= GRAPHED:
            _time_graphs(able, tensors, about, record, seconds, memory)


def _time_graphs(
    names: Sequence[str],
    tensors: Sequence[torch.Tensor],
    about: Mapping[str, str],
    record: harness.Record,
    seconds: float,
    memory: Mapping[str, float],
) -> None:
    """Forward and backward of those that can be captured, as CUDA graphs."""
    about = {**about, "case": f"{about['case']}, in a graph"}
    side = torch.cuda.Stream()  # a backward runs where its forward ran: to be captured, not on the default one
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        replays = {}
        for name in names:
            try:
                replays[name] = contest.captured(step(name, "both", tensors))
            except Exception as error:  # some wait for the device
                record.add([{**about, "name": name, "note": contest.reason(error)}])
        _time(replays, "both", about, record, seconds, memory)
    torch.cuda.current_stream().wait_stream(side)


def _time(
    steps: Mapping[str, Callable[[], Any]],
    part: str,
    about: Mapping[str, str],
    record: harness.Record,
    seconds: float,
    memory: Mapping[str, float],
) -> None:
    """A row a candidate, measured in turns."""
    size, dim = (int(number) for number in about["case"].split(",")[0].split("x"))
    flops = FLOPS[part] * size**2 * dim
    rates = record.rates(getattr(torch, about["dtype"]))
    often = size <= PEERS_TO
    rows = []
    timings = harness.interleaved(steps, record.device, seconds, least=3 if often else 1, warm=often)
    for name, timing in timings.items():
        row = {**about, "part": part, "name": name, **dataclasses.asdict(timing)}
        row["tflops"] = round(flops / timing.median_ms / 1e9, 3)
        row["gbytes"] = 0
        row["of_floor"] = round(rates.floor_ms(flops, 0) / timing.median_ms, 3)
        row["extra_MiB"] = round(memory[name], 1)
        rows.append(row)
    record.add(rows)


def _exact(tensors: Sequence[torch.Tensor]) -> float:
    """The loss in float64."""
    x, y, scale = (t.detach().double() for t in tensors)
    return float(peers.clip_loss_row_chunked(x, y, scale))


def options() -> argparse.ArgumentParser:
    parser = contest.arguments(__doc__)
    sizes = GPU_SIZES if harness.device() == "cuda" else CPU_SIZES
    parser.add_argument("--size", type=count, nargs="+", default=sizes, help="B; default: %(default)s")
    parser.add_argument("--dim", type=count, nargs="+", default=[512, 768, 1024], help="D; default: %(default)s")
    parser.add_argument("--nested", action="store_true", help="of four prefixes at once, not the peers")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    given = options().parse_args(argv)
    record = harness.Record("InfoNCE", harness.device(), given.out)
    record.expects(len(given.size) * len(given.dim) * len(given.dtype))
    for size in given.size:
        for dim in given.dim:
            for dtype in given.dtype:
                record.begins(f"{size} x {dim}, {dtype}")
                measure(size, dim, dtype, record, given.passes, given.seconds, given.nested)
    return contest.show(record)


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("dtype", ["bfloat16", "float32"])
    metafunc.parametrize("name", [*(f"lbfast {impl}" for impl in IMPLEMENTATIONS), *PEERS])


def test_info_nce(benchmark: Any, name: str, dtype: str) -> None:
    """Forward and backward at B = 2048, D = 768, under pytest-benchmark."""
    import pytest

    device = harness.device()
    names, absent = candidates(2048, dtype, device)
    if name not in names:
        pytest.skip(absent[name])
    run = step(name, "both", inputs(2048, 768, dtype, device))

    def once() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(once)


if __name__ == "__main__":
    sys.exit(main())
