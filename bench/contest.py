"""Contenders for one op, on cases, pass by pass: they must agree with the reference before they are timed.

Above harness.py, for ops whose contenders are functions of the same tensors. GPU passes are captured once and their
replays are timed: a kernel of 50 us is not drowned by its launch.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lbfast.testing import relative_error

from . import harness, headline, options

PASSES = ("fwd", "bwd", "both")
ORACLE = "reference"
"""The contender that the others are compared with and that is not timed: it computes in float64."""

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


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every bench of an op has."""
    parser = options.parser(description)
    dtypes = ["bfloat16"] if harness.device() == "cuda" else ["float32", "bfloat16"]
    known = ("float32", "float16", "bfloat16")
    said = f"of {', '.join(known)}; default: {' '.join(dtypes)}"
    parser.add_argument("--dtype", nargs="+", choices=known, metavar="DTYPE", default=dtypes, help=said)
    said = f"of {', '.join(PASSES)}; default: all"
    parser.add_argument("--passes", nargs="+", choices=PASSES, metavar="PASS", default=list(PASSES), help=said)
    parser.add_argument("--seconds", type=options.seconds, default=1.0, help="time for each number (%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", help="JSON file of the results; default: none")
    return parser


def run(
    cases: Sequence[Case],
    contenders: Mapping[str, Callable[..., Any]],
    record: harness.Record,
    given: argparse.Namespace,
) -> None:
    """A row for every contender, case and pass; one that cannot take a case gives a row that says why.

    All must agree with the first of the contenders. Unless it was said before how many cases are to come, there are as
    many for each of the dtypes.
    """
    if not record.cases:
        record.expects(len(cases) * len(given.dtype))
    for case in cases:
        torch.compiler.reset()  # it stops compiling after a few shapes
        named = {n: c for n, c in contenders.items() if not (given.no_compile and "torch.compile" in n)}
        if record.device == "cuda":
            side = torch.cuda.Stream()  # a backward runs where its forward ran: to be captured, not on the default one
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                _run_case(case, named, record, given)
            torch.cuda.current_stream().wait_stream(side)
        else:
            _run_case(case, named, record, given)


def _run_case(
    case: Case, contenders: Mapping[str, Callable[..., Any]], record: harness.Record, given: argparse.Namespace
) -> None:
    dtype = case.inputs[0].dtype
    wanted = [t for t in case.inputs if t.requires_grad]
    about = {"case": case.name, "dtype": str(dtype).removeprefix("torch.")}
    record.begins(f"{case.name}, {about['dtype']}")
    able, expected = {}, None
    for name, function in contenders.items():
        try:
            with torch.no_grad():
                out = as_tuple(function(*case.inputs))[0]
        except Exception as error:  # a peer fails in ways of its own
            record.add([{**about, "name": name, "note": reason(error)}])
            continue
        expected = out if expected is None else expected
        if name == ORACLE:
            continue
        error = relative_error(out, expected)
        if error <= _TOLERANCE.get(out.dtype, 1e-6):
            able[name] = function
        else:
            record.add(
                [{**about, "name": name, "note": f"wrong: {error:.1e} from {next(iter(contenders))}: not timed"}]
            )
    rates = record.rates(dtype)
    for part in given.passes:
        if part != "fwd" and not wanted:
            continue
        which = {"fwd": (0,), "bwd": (1,), "both": (0, 1)}[part]
        flops, moved = (sum(pair[i] for i in which) for pair in (case.flops, case.bytes))
        steps, memory = {}, {}
        for name, function in able.items():
            try:
                step = _step(part, function, case.inputs, wanted)
                memory[name] = _extra_mib(step, record.device)
                steps[name] = captured(step) if record.device == "cuda" else step
            except Exception as error:  # a backward that it has not, memory that is not there
                record.add([{**about, "part": part, "name": name, "note": reason(error)}])
        rows = []
        for name, timing in harness.interleaved(steps, record.device, given.seconds).items():
            row = {**about, "part": part, "name": name, **dataclasses.asdict(timing)}
            row["tflops"] = round(flops / timing.median_ms / 1e9, 3)
            row["gbytes"] = round(moved / timing.median_ms / 1e6, 1)
            row["of_floor"] = round(rates.floor_ms(flops, moved) / timing.median_ms, 3)
            rows.append({**row, "extra_MiB": round(memory[name], 1)})
        record.add(rows)


def reason(error: BaseException) -> str:
    """An error's first line, for a row's note."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def as_tuple(outs: Any) -> tuple[torch.Tensor, ...]:
    return (outs,) if isinstance(outs, torch.Tensor) else tuple(outs)


def _extra_mib(step: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        return harness.gpu_extra_mib(step)
    step()
    return harness.cpu_memory_here(step).extra


def _step(
    part: str, function: Callable[..., Any], inputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]
) -> Callable[[], Any]:
    """One call of the pass to be timed."""
    if part == "fwd":

        def fwd() -> Any:
            with torch.no_grad():
                return function(*inputs)

        return fwd
    outs = as_tuple(function(*inputs))
    along = [torch.randn_like(out) for out in outs]
    if part == "bwd":
        return lambda: torch.autograd.grad(outs, wanted, along, retain_graph=True)
    return lambda: torch.autograd.grad(as_tuple(function(*inputs)), wanted, along)


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as a CUDA graph's replay, captured on the current stream, where the step's forward ran.

    The replay reads what the step holds, such as what a forward kept: the one keeps the other alive.
    """
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step()

    def replay() -> None:
        graph.replay()

    replay.step = step  # type: ignore[attr-defined]
    return replay


def show(record: harness.Record) -> int:
    """Prints the device, a table, what was not timed and why, and each case in short. 1 where one of ours is wrong,
    else 0. A terminal that is too narrow for the table gets the medians alone.
    """
    harness.say(harness.describe(record.header))
    names = ("case", "dtype", "part", "name", "median ms", "p20", "p80", "TFLOP/s", "GB/s", "of floor", "extra MiB")
    rows = []
    for row in record.rows:
        if "median_ms" in row:
            times = [f"{row[key]:.3f}" for key in ("median_ms", "p20_ms", "p80_ms")]
            rates = [f"{row[key]:.2f}" if row[key] else "" for key in ("tflops", "gbytes")]
            share = f"{row['of_floor']:.0%}" if row["of_floor"] else ""
            rows.append((*(row[key] for key in names[:4]), *times, *rates, share, row["extra_MiB"]))
    text = harness.table(names, rows, left=4)
    if sys.stdout.isatty() and shutil.get_terminal_size().columns < text.index("\n"):
        text = harness.table(names[:5], [row[:5] for row in rows], left=4)
    print(f"\n{record.title}\n\n{text}\n")
    for note in dict.fromkeys(f"{row['name']}: not timed: {row['note']}" for row in record.rows if "note" in row):
        harness.say(note)
    print("\n".join(in_short(record.rows)))
    if record.out:
        print(record.out)
    return int(any(is_wrong(row) for row in record.rows))


def in_short(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Our fastest of each case beside the fastest other, of forward and backward where that was timed; 80 columns."""
    parts = dict.fromkeys(row["part"] for row in rows if "median_ms" in row)
    said = []
    for part in [part for part in parts if part == "both"] or list(parts)[-1:]:
        what = {"both": "forward and backward", "fwd": "forward", "bwd": "backward"}[part]
        for line in headline.lines(rows, part):
            ours, theirs = line.ours, line.theirs
            said.append(f"{ours['case']}, {ours['dtype']}, {what}:")
            beside = f"; {theirs['name']} {theirs['median_ms']:.2f} ms: {line.speedup:.2f} x" if theirs else ""
            said.append(f"  {ours['name']} {ours['median_ms']:.2f} ms{beside}")
    return said


def is_wrong(row: Mapping[str, Any]) -> bool:
    """One of ours that does not compute what the reference does."""
    return row["name"].startswith("lbfast") and str(row.get("note", "")).startswith("wrong")
