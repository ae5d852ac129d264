"""Contenders for one op, on cases, pass by pass: they must agree with the first before anything is timed.

Above harness.py, for ops whose contenders are functions of the same tensors. GPU passes are captured once and their
replays are timed: a kernel of 50 us is not drowned by its launch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bench import harness
from lbfast.testing import relative_error

PASSES = ("fwd", "bwd", "both")
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """inputs: tensors handed to every contender; those that require grad are differentiated.

    flops, bytes: what the forward, and the backward, must do and move: (fwd, bwd).
    """

    name: str
    inputs: Sequence[torch.Tensor]
    flops: tuple[float, float] = (0, 0)
    bytes: tuple[float, float] = (0, 0)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def run(
    cases: Sequence[Case],
    contenders: Mapping[str, Callable[..., Any]],
    *,
    passes: Sequence[str] = PASSES,
    seconds: float = 1.0,
) -> list[dict[str, Any]]:
    """A row for every contender, case and pass; one that cannot take a case gives a row that says why."""
    rows = []
    for case in cases:
        wanted = [t for t in case.inputs if t.requires_grad]
        about = {"case": case.name, "dtype": str(case.inputs[0].dtype).removeprefix("torch.")}
        able, expected = {}, None
        for name, function in contenders.items():
            try:
                out = _tuple(function(*case.inputs))[0].detach()
            except (RuntimeError, ValueError, TypeError, ImportError) as error:
                rows.append({**about, "name": name, "note": str(error).strip().splitlines()[0]})
                continue
            expected = out if expected is None else expected
            if not relative_error(out, expected) <= _TOLERANCE.get(out.dtype, 1e-6):
                raise AssertionError(f"{name} disagrees with {next(iter(able))} on {case.name}: nothing is timed")
            able[name] = function
        for part in passes:
            if part != "fwd" and not wanted:
                continue
            steps = {name: _step(part, function, case.inputs, wanted) for name, function in able.items()}
            memory = {name: harness.gpu_extra_mib(step) for name, step in steps.items()} if device() == "cuda" else {}
            if device() == "cuda":
                steps = {name: _captured(step) for name, step in steps.items()}
            flops, moved = (
                {"fwd": pair[0], "bwd": pair[1], "both": sum(pair)}[part] for pair in (case.flops, case.bytes)
            )
            for name, timing in harness.interleaved(steps, device(), seconds).items():
                row = {**about, "part": part, "name": name, **dataclasses.asdict(timing)}
                row["tflops"] = round(flops / timing.median_ms / 1e9, 3)
                row["gbytes"] = round(moved / timing.median_ms / 1e6, 1)
                rows.append({**row, "extra_MiB": round(memory[name], 1)} if memory else row)
    return rows


def _tuple(outs: Any) -> tuple[torch.Tensor, ...]:
    return (outs,) if isinstance(outs, torch.Tensor) else tuple(outs)


def _step(
    part: str, function: Callable[..., Any], inputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]
) -> Callable[[], Any]:
    """One call of the pass to be timed."""
    if part == "fwd":

        def fwd() -> Any:
            with torch.no_grad():
                return function(*inputs)

        return fwd
    outs = _tuple(function(*inputs))
    along = [torch.randn_like(out) for out in outs]
    if part == "bwd":
        return lambda: torch.autograd.grad(outs, wanted, along, retain_graph=True)
    return lambda: torch.autograd.grad(_tuple(function(*inputs)), wanted, along)


def _captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as a CUDA graph's replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def show(title: str, rows: Sequence[Mapping[str, Any]], out: str = "") -> None:
    """A table; with `out` also bench/results/<out>.json."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    names = ("case", "dtype", "part", "name", "median ms", "p20", "p80", "TFLOP/s", "GB/s", "extra MiB")
    for name in names:
        table.add_column(name, justify="left" if name in names[:4] else "right")
    for row in rows:
        if "part" in row:
            times = [f"{row[key]:.3f}" for key in ("median_ms", "p20_ms", "p80_ms")]
            rates = [f"{row[key]:.2f}" if row[key] else "" for key in ("tflops", "gbytes")]
            table.add_row(*(row[key] for key in names[:4]), *times, *rates, str(row.get("extra_MiB", "")))
    console = Console(width=150)
    console.print(str(harness.header(device())), highlight=False)
    console.print(table)
    for reason in dict.fromkeys(f"{row['name']}: not timed: {row['note']}" for row in rows if "note" in row):
        console.print(reason, markup=False, highlight=False)
    if out:
        console.print(str(harness.write(out, device(), [dict(row) for row in rows])))
