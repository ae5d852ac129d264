"""Timing and memory, the same way for every bench: candidates take turns, medians with spread, JSON with a header.

A candidate is a callable without arguments that does its work once; what it needs is made before. GPU times are those
of events around a call with a cold L2 cache; CPU times are wall clock. Extra memory is what a call needs beyond what
was there before it: on a GPU by the allocator's peak, on a CPU by the peak resident size, of this process or, where
that matters, of one of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import errno
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lbfast import files
from lbfast.profiling import machine

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
MIB = 2**20
TESTS = "LBFAST_BENCH_TESTS"
"""Environment variable by which bench.run and bench.gpu tell their benches how the tests went: "passed"."""
COMMIT = "LBFAST_COMMIT"
"""Environment variable: the checkout's commit, where git is not there to say it, or that of another day."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds: median, 20th and 80th percentile of `rounds` calls."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def header(device: str) -> dict[str, Any]:
    """What was measured on, and when: device, versions, threads or clocks, commit, how the tests went, and the load.

    load: of the CPUs over the minute before, by others than the bench; on as many CPUs as threads it should be near 0.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    found = {
        **machine.facts(device),
        "slug": machine.slug(device),
        "commit": _commit(),
        "date": now.strftime("%Y-%m-%d"),
    }
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {**found, "tests": os.environ.get(TESTS, "not run"), "load": load}


def _commit() -> str:
    """What COMMIT says, or the checkout's commit, "+" behind it where files differ; "unknown" without either."""
    if COMMIT in os.environ:
        return os.environ[COMMIT]
    try:
        git = ["git", "-C", str(HERE)]
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        # results are written while benches run: they are no difference
        changed = [*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)bench/results"]
        dirty = subprocess.run(changed, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if dirty else "")


def _is_result(path: Path) -> bool:
    try:
        return {"header", "rows"} <= json.loads(path.read_text()).keys()
    except (ValueError, AttributeError):
        return False


class Record:
    """Rows of one bench, written to a file as they come, so that what ends early loses only what it had not done.

    Args:
        title: of the table.
        device: "cpu" or "cuda".
        out: the JSON file, or None: none is written.

    Raises FileExistsError where there is a file that is no bench's.
    """

    def __init__(self, title: str, device: str, out: str | Path | None = None):
        self.title, self.device, self.out = title, device, Path(out) if out else None
        if self.out is not None and self.out.is_file() and not _is_result(self.out):
            raise FileExistsError(
                errno.EEXIST, "expected a new file, or a bench's results: this is something else", str(out)
            )
        self.header = {"title": title, **header(device)}
        self.rows: list[dict[str, Any]] = []
        self.cases = self.begun = 0
        self.began = 0.0

    def expects(self, cases: int) -> None:
        """So many cases are to come: then `begins` says how long they may take."""
        self.cases = cases

    def begins(self, case: str) -> None:
        """A line on stderr: the case that is measured now, and when the last may be done."""
        now = time.monotonic()
        self.began = self.began or now
        left = (now - self.began) / self.begun * (self.cases - self.begun) if self.begun and self.cases else 0.0
        self.begun += 1
        which = f"{self.begun} of {self.cases}: " if self.cases else ""
        print(f"{which}{case}{f', about {left:.0f} s left' if left else ''}", file=sys.stderr, flush=True)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.rows += [dict(row) for row in rows]
        self.write()

    def rates(self, dtype: torch.dtype) -> machine.Rates:
        """Of this machine, in this run; noted in the header."""
        found, name = machine.rates(self.device, dtype), str(dtype).removeprefix("torch.")
        self.header[f"matmul_tflops_{name}"] = round(found.flops / 1e12, 3)
        self.header["copy_gbytes"] = round(found.bytes / 1e9, 1)
        return found

    def write(self) -> None:
        if self.out is None:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        files.write(self.out, json.dumps({"header": self.header, "rows": self.rows}, indent=1) + "\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """A Markdown table with aligned columns: the first `left` to the left, the rest to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(3, len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(columns)]

    def line(row: Sequence[str]) -> str:
        padded = (f"{c:<{w}}" if i < left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths)))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(columns), rule, *map(line, cells)])


def describe(header: Mapping[str, Any]) -> str:
    """A header as one line: the device first."""
    first = ("device", "threads")
    rest = (f"{key} {value}" for key, value in header.items() if key not in (*first, "title", "slug"))
    threads = [f"{header['threads']} threads"] if "threads" in header else []
    return ", ".join([str(header["device"]), *threads, *rest])


def say(line: str, indent: str = "") -> None:
    """Prints a line, which on a terminal is broken between words; `indent` is of the lines that follow."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        line = textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    print(line, flush=True)


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    device: str,
    seconds: float = 3.0,
    least: int = 3,
    most: int = 50,
    warm: bool = True,
    clock: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, Timing]:
    """Times candidates in turns, so that a machine that slows down slows all; with `warm`, after one call each.

    Rounds go on until each candidate has had `seconds` on average, `least` rounds at least and `most` at most. Where
    one round takes longer than twice that, `least` is 2. `clock`: milliseconds of a call; None: the device's time.
    """
    for run in candidates.values() if warm else ():
        run()
    clock = clock or (_gpu_ms if device == "cuda" else _cpu_ms)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    begun = time.perf_counter()
    for done in range(most):
        if done == 1 and time.perf_counter() - begun > 2 * seconds * len(candidates):
            least = min(least, 2)
        if done >= least and time.perf_counter() - begun > seconds * len(candidates):
            break
        for name, run in candidates.items():
            times[name].append(clock(run))
    return {name: _timing(values) for name, values in times.items()}


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many other processes that never rest: who shares a machine, or decodes beside a model."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def _timing(values: list[float]) -> Timing:
    ordered = sorted(values)
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8)]
    return Timing(*(round(x, 4) for x in (statistics.median(ordered), *at)), len(ordered))


def _cpu_ms(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return (time.perf_counter() - begun) * 1e3


_cold: list[torch.Tensor] = []


def _gpu_ms(run: Callable[[], Any]) -> float:
    if not _cold:
        _cold.append(torch.empty(256 * MIB, dtype=torch.int8, device="cuda"))
    _cold[0].zero_()  # pushes the inputs out of L2
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


def gpu_extra_mib(run: Callable[[], Any], warm: bool = True) -> float:
    """Peak of the CUDA allocator during a call, above what was allocated before it; with `warm`, of the second call."""
    if warm:
        run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


@dataclasses.dataclass(frozen=True)
class Memory:
    """MiB. extra: peak resident size above what was resident before the call. peak: all of it, libraries too. own: of a
    process of its own, without libraries: what it held when its imports were done, and what files are mapped."""

    extra: float
    peak: float
    own: float = 0.0


def cpu_memory(make: Callable[..., Callable[[], Any]], *arguments: Any, warm: tuple[Any, ...] | None = None) -> Memory:
    """Resident size at its peak during `make(*arguments)()`, in a new process.

    make must be importable (a module's function), and makes the inputs. `warm`: arguments of a small call that loads
    libraries and thread pools first, so that they are not counted as extra. Linux only.
    """
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    process = context.Process(target=_measure, args=(child, make, arguments, warm))
    process.start()
    child.close()
    try:
        return parent.recv()
    except EOFError as error:
        raise RuntimeError(f"cpu_memory: {make.__name__}{arguments}: the process ended early") from error
    finally:
        process.join()


def _measure(pipe: Any, make: Callable[..., Callable[[], Any]], arguments: Any, warm: Any) -> None:
    imported = _resident_kib("RssAnon")
    if warm is not None:
        make(*warm)()
    found = cpu_memory_here(make(*arguments))
    libraries = imported + _resident_kib("RssFile")  # of which code is read as it is wanted
    pipe.send(dataclasses.replace(found, own=found.peak - libraries / 1024))


def cpu_memory_here(run: Callable[[], Any]) -> Memory:
    """Resident size at its peak during a call, in this process: what a call before it left to the allocator is not
    counted again, so that small sizes come out too small. Linux only."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _resident_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls back to the present size
    result = run()
    peak = _resident_kib("VmHWM")
    del result
    return Memory((peak - before) / 1024, peak / 1024)


def _resident_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
