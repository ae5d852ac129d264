"""Everything worth knowing from a few minutes on an NVIDIA GPU: `make gpu`. bench/GPU.md has the commands.

    python -m bench.gpu --out DIR --seconds 570       all phases, and what the seconds don't suffice for later:
    python -m bench.gpu --out DIR --seconds 570       goes on where the first ended
    python -m bench.gpu --only tune sanitizer         phases, or jobs with one of these in the name, again if need be
    python -m bench.gpu --list                        the plan: phases, jobs and their seconds

Phases and jobs are rows of data (bench/phases.py); a job is a process of its own with a time limit, forked from one
that has the imports behind it (bench/forked.py). Whatever becomes of one, the others run. What is measured goes to
bench/results/<device>.json as it comes, where the next run, and `bench.report`, find it; DIR gets the same in an
archive to unpack in bench/results, and a summary of a few pages, the end of which is printed too. Needs torch, triton,
transformers and pytest; installs nothing. Pure-Python peers are taken from wheels in --wheels. The exit status is 1
where something is red: a failed test, a bench that fails or finds one of ours wrong, a finding of compute-sanitizer.
What is absent, out of time or short of memory is said, and is no failure.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import signal
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import harness, options, phases, story
from .forked import run
from .ledger import Ledger, judge
from .phases import Job, Phase
from .run import ROOT, environment

SECONDS = 570  # of a lent machine's ten minutes
RESERVE = 4.0  # to write the last results
LEAST = 10.0  # a job with less time than this, and than half of what is planned for it, does not begin
EVERY = 5.0  # seconds between looks at what running jobs have written


def sources() -> str:
    """Of all that figures depend on in the checkout: what was measured with others is measured again."""
    digest = hashlib.sha256()
    for folder in ("kernels", "lbfast", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def unpacked(wheels: Path, into: Path) -> list[Path]:
    """A folder with what the wheels hold, for PYTHONPATH; none where there are no wheels."""
    found = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
    for wheel in found:
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
    return [into] if found else []


class Memory:
    """GiB of the GPU, shared by jobs that run at once."""

    def __init__(self, gib: float):
        self.all = self.free = gib
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, gib: float) -> Iterator[None]:
        need = min(gib, self.all)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= need)
            self.free -= need
        try:
            yield
        finally:
            with self.changed:
                self.free += need
                self.changed.notify_all()


@dataclasses.dataclass
class Runner:
    """Runs jobs, and has the ledger note what became of them."""

    ledger: Ledger
    work: Path
    paths: Sequence[Path]
    memory: Memory

    def do(self, phase: Phase, job: Job, until: float, share: float) -> None:
        """One job, until a moment of time.monotonic(); share: seconds planned for it."""
        begun = time.monotonic()
        left = until - begun
        log = self.work / f"{job.name.replace(' ', '-')}.log"
        if job.absent:
            state, ending = "done", f"absent: {job.absent}"
        elif left < min(LEAST, 0.5 * share):
            state, ending = "open", "not run: no time left"
        else:
            self.ledger.note(phase.name, job, "open", "not finished: the run ended before it", 0)
            code = run(self.command(job), left, self.env(phase, job), log)
            text = log.read_text(errors="replace") if log.exists() else ""
            state, ending = judge(job, code, text, left)
        spent = time.monotonic() - begun
        self.ledger.note(phase.name, job, state, ending, spent, log)
        print(f"{job.name}: {spent:.0f} s{': ' * bool(ending)}{ending}", flush=True)

    def command(self, job: Job) -> list[str]:
        out = ["--out", str(self.work / f"{job.name}.json")] if job.kind == "bench" else []
        return [*job.command, *out]

    def env(self, phase: Phase, job: Job) -> dict[str, str]:
        env = {**environment(*self.paths), harness.TESTS: self.ledger.tests_of(job.op), "PYTHONUNBUFFERED": "1"}
        if phase.together:
            env["OMP_NUM_THREADS"] = "1"
        if job.kind == "sanitizer":
            env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        return env

    def phase(self, phase: Phase, jobs: Sequence[Job], begun: float, share: float, end: float) -> None:
        """Jobs of a phase that has `share` seconds from `begun` on, and what the phases before it left; none after
        `end`."""

        def one(job: Job) -> None:
            with self.memory.taken(job.gib):
                self.do(phase, job, min(begun + share, end), share)

        if phase.together:
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                list(pool.map(one, jobs))
            return
        whole, until = sum(job.seconds for job in jobs), begun
        for job in jobs:
            until += share * job.seconds / whole
            self.do(phase, job, min(until, end), share * job.seconds / whole)


@contextlib.contextmanager
def _kept(ledger: Ledger) -> Iterator[None]:
    """Inside the block what running jobs write is looked at now and then, and at its end."""
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(EVERY):
            ledger.keep()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        ledger.keep()


def scale(seconds: float, pending: float) -> float:
    """By which planned seconds are multiplied: a call that is shorter than the first phases shrinks them, and time that
    what is pending doesn't need stretches it."""
    first = sum(phase.seconds for phase in phases.FIRST)
    return max(seconds / pending, min(1.0, seconds / first)) if pending else 1.0


def work_through(chosen: Sequence[Phase], only: Sequence[str], runner: Runner, seconds: float) -> None:
    """Every phase in turn: each may use its share of the seconds, and what those before it left."""
    ledger = runner.ledger

    def pending(phase: Phase) -> tuple[list[Job], float]:
        jobs = list(phase.jobs(ledger.found()))
        if only and phase.name not in only:
            jobs = [job for job in jobs if any(part in job.name for part in only)]
        left = [job for job in jobs if only or not ledger.done(job.name)]
        if phase.together or not jobs:
            return left, phase.seconds if left or phase.name == "again" else 0.0
        return left, phase.seconds * sum(job.seconds for job in left) / sum(job.seconds for job in jobs)

    begun = at = time.monotonic()
    end = begun + seconds - RESERVE
    factor = scale(seconds - RESERVE, sum(pending(phase)[1] for phase in chosen))
    for phase in chosen:
        jobs, planned = pending(phase)
        if jobs:
            print(f"\n{phase.name}: {phase.about}", flush=True)
            runner.phase(phase, jobs, at, factor * planned, end)
        at += factor * planned


def plan() -> str:
    """Phases and their jobs, as a table."""
    rows = []
    for phase in phases.PHASES:
        jobs = phase.jobs(phases.NOTHING)
        rows.append((phase.name, "", f"{phase.seconds:.0f}", phase.about))
        if phase.together:
            rows.append(("", f"{len(jobs)} jobs at once", "", ""))
        else:
            rows += [("", job.name, f"{job.seconds:.0f}", "") for job in jobs]
    whole = sum(phase.seconds for phase in phases.FIRST), sum(phase.seconds for phase in phases.SECOND)
    text = harness.table(("phase", "job", "seconds", "what"), rows, left=2)
    return f"{text}\n{whole[0]:.0f} s to the end of {phases.FIRST[-1].name}, {whole[1]:.0f} s after it"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-out", help="folder of archive and summary")
    parser.add_argument("--seconds", type=options.seconds, default=SECONDS, help="for everything (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[], help="phases, or parts of jobs' names; done or not")
    parser.add_argument("--again", action="store_true", help="what is done, too")
    parser.add_argument("--list", action="store_true", help="print the plan and nothing else")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".whl", help="folder of peers' wheels (%(default)s)")
    parser.add_argument("--commit", help="of the checkout, where git cannot say it")
    parser.add_argument("--folder", type=Path, default=harness.RESULTS, help="of the results (%(default)s)")
    given = parser.parse_args(argv)
    if given.list:
        print(plan())
        return 0
    known = {phase.name for phase in phases.PHASES} | {
        job.name for phase in phases.PHASES for job in phase.jobs(phases.NOTHING)
    }
    if unknown := [part for part in given.only if not any(part in name for name in known)]:
        parser.error(f"--only: {', '.join(unknown)}: expected a phase or part of a job's name; --list shows them")
    if harness.device() != "cuda":
        print("error: no CUDA device: torch finds none", file=sys.stderr)
        return 1
    return _main(given)


def _main(given: argparse.Namespace) -> int:
    import torch

    if given.commit:
        os.environ[harness.COMMIT] = given.commit
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        ledger = Ledger(given.folder, given.out, work, sources())
        if given.again:
            ledger.forget()
        paths = unpacked(given.wheels, work / "site")
        print(harness.describe(ledger.header), flush=True)
        with _kept(ledger):
            work_through(phases.PHASES, given.only, Runner(ledger, work, paths, Memory(0.9 * gib)), given.seconds)
        print("\n" + story.short(ledger.results, ledger.rows))
        print(f"results: {ledger.file}; archive and summary: {given.out}")
        return int(any(row["state"] == "red" for row in ledger.rows))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the running job's process ends too
    sys.exit(main())
