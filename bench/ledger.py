"""What a run on a GPU has measured and what became of its jobs, on disk from the moment it is known.

One JSON file a device: name of the result -> {"header", "rows"}; "run" is the jobs, a row each. A job's state is
"done", "red" (it says that something is wrong) or "open" (another run takes it up).
"""

from __future__ import annotations

import io
import json
import re
import signal
import tarfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbfast import files

from . import harness, story
from .phases import Found, Job

TAIL = 16_000  # characters of a job's output that are kept
TRACE = 6 * 2**20  # bytes of a trace that is kept, at most
ARCHIVE, SUMMARY = "gpu.tar.gz", "summary.txt"
REFUSED = ("Device not supported", "Internal Sanitizer Error", "Unable to find injection", "not supported on this")


def judge(job: Job, code: int | None, text: str, seconds: float) -> tuple[str, str]:
    """(state, ending) of a job from its exit status (None: it was stopped after `seconds`) and what it printed."""
    if job.kind == "tests":
        return _judge_tests(code, text, seconds)
    if job.kind == "sanitizer":
        return _judge_sanitizer(code, text, seconds)
    if code is None:
        return "open", f"stopped after {seconds:.0f} s; what it had is kept"
    if code == 0:
        return "done", ""
    wrong = [line for line in text.splitlines() if line.startswith("lbfast") and ": wrong" in line]
    if not wrong and (code == -signal.SIGKILL or "out of memory" in _last(text).lower()):
        return "done", f"memory short: {_last(text) or 'killed'}"
    if job.kind == "compile":  # the bench itself comes later, and says so
        return "done", f"exit status {code}: {_last(text)}"
    return "red", f"FAILED with exit status {code}: {wrong[0] if wrong else _last(text)}"


def _judge_tests(code: int | None, text: str, seconds: float) -> tuple[str, str]:
    """From pytest's lines, a test each, so that a run that was stopped tells how far it came."""
    ends: dict[str, list[str]] = {"PASSED": [], "FAILED": [], "ERROR": [], "SKIPPED": []}
    for test, end in re.findall(r"^\S*::(.+?) (PASSED|FAILED|ERROR|SKIPPED)", text, re.MULTILINE):
        ends[end].append(test)
    reasons = dict(re.findall(r"^(?:FAILED|ERROR) \S*::(.+?) - (.*)$", text, re.MULTILINE))
    counts = ", ".join(f"{len(ends[end])} {end.lower()}" for end in ends if ends[end]) or "no test ended"
    short = [test for test in reasons if "out of memory" in reasons[test].lower()]
    if wrong := [test for test in (*ends["FAILED"], *ends["ERROR"]) if test not in short]:
        return "red", f"tests: failed: {', '.join(dict.fromkeys(wrong))} ({counts})"
    if "No module named pytest" in text:
        return "open", "absent: pytest is not installed"
    if code is None:
        return "open", f"not finished: stopped after {seconds:.0f} s ({counts})"
    if short:
        return "open", f"memory short: {', '.join(short)} ({counts})"
    if code in (0, 5):  # 5: nothing was selected
        return "done", counts if code == 0 else "no such test"
    return "red", f"tests: failed: exit status {code}: {_last(text)} ({counts})"


def _judge_sanitizer(code: int | None, text: str, seconds: float) -> tuple[str, str]:
    """Only what the tool itself reports of a kernel is red; that it can't work here is not."""
    found = re.findall(r"^=+ ((?:Invalid|Misaligned|Out-of-bounds|Race|Uninitialized|Barrier) .*)$", text, re.MULTILINE)
    refused = next((line.strip("= ") for line in text.splitlines() if any(r in line for r in REFUSED)), "")
    if found and not refused:
        return "red", f"compute-sanitizer: {len(found)} errors: {found[0]}"
    passed = len(re.findall(r": ok$", text, re.MULTILINE))
    if code is None:
        return "open", f"not finished: stopped after {seconds:.0f} s, {passed} cases without errors"
    if code == 0:
        return "done", f"no errors in {passed} cases"
    return "done", f"refused: compute-sanitizer: {refused or f'exit status {code}: {_last(text)}'}"


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


class Ledger:
    """The file `folder`/<device>.json, and in `out` an archive of it and a summary.

    Args:
        folder: of the results, where the last run's may lie.
        out: of what is to be carried home.
        work: where running jobs write NAME.json, NAME.log and traces.
        sources: of the checkout; jobs done with others are not done.
    """

    def __init__(self, folder: Path, out: Path, work: Path, sources: str):
        self.header = {"title": "What was run", **harness.header("cuda"), "sources": sources}
        slug = self.header["slug"]
        self.file, self.out, self.work, self.sources = folder / f"{slug}.json", out, work, sources
        self.results: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}
        rows = self.results.get("run", {}).get("rows", [])
        self.rows: list[dict[str, Any]] = [row for row in rows if row["sources"] == sources]
        self.logs: dict[str, str] = {}
        self._seen: dict[Path, tuple[int, int]] = {}
        self._lock = threading.RLock()
        self.keep(force=True)

    def found(self) -> Found:
        return Found(self.file, self.results)

    def forget(self) -> None:
        self.rows = []

    def done(self, name: str) -> bool:
        return any(row["name"] == name and row["state"] == "done" for row in self.rows)

    def tests_of(self, op: str) -> str:
        """How the tests of an op went, of all of them for "": for the header of what they vouch for."""
        rows = [row for row in self.rows if row["phase"] == "tests" and op in ("", row["op"])]
        for state, words in (("red", "failed"), ("open", "not finished")):
            if wrong := [row for row in rows if row["state"] == state]:
                return f"{words}: {'; '.join(row['ending'].removeprefix('tests: failed: ') for row in wrong)}"
        return "passed" if any(" passed" in row["ending"] for row in rows) else "not run"

    def note(self, phase: str, job: Job, state: str, ending: str, seconds: float, log: Path | None = None) -> None:
        about = {"phase": phase, "name": job.name, "op": job.op, "state": state, "ending": ending}
        with self._lock:
            row = {**about, "seconds": round(seconds, 1), "sources": self.sources}
            known = {old["name"]: old for old in self.rows}  # in the order in which they first began
            self.rows = list({**known, job.name: row}.values())
            if log is not None and log.exists():
                self.logs[job.name] = f"=== {job.name}: {ending}\n{log.read_text(errors='replace')[-TAIL:]}\n"
            self.keep(force=True)

    def keep(self, force: bool = False) -> None:
        """Takes in what jobs have written since, and writes everything where there is something new."""
        with self._lock:
            new = self._take_in()
            if not (new or force):
                return
            self.results["run"] = {"header": self.header, "rows": self.rows}
            for row in self.rows:
                if row["phase"] != "tests" and row["name"] in self.results:
                    self.results[row["name"]]["header"]["tests"] = self.tests_of(row["op"])
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.out.mkdir(parents=True, exist_ok=True)
            content = json.dumps(self.results, indent=1) + "\n"
            files.write(self.file, content)
            texts = {self.file.name: content, f"{self.file.stem}.log": "".join(self.logs.values())}
            files.write(self.out / ARCHIVE, self._archive(texts))
            files.write(self.out / SUMMARY, story.whole(self.results, self.rows))

    def _take_in(self) -> bool:
        new = False
        for path in sorted(self.work.glob("*.json")):
            at = path.stat()
            if self._seen.get(path) != (at.st_mtime_ns, at.st_size):
                self._seen[path] = (at.st_mtime_ns, at.st_size)
                self.results[path.stem] = json.loads(path.read_text())
                new = True
        return new

    def _archive(self, texts: Mapping[str, str]) -> bytes:
        """A .tar.gz of a handful of files, traces too, none in a folder: to unpack in bench/results."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for name, text in texts.items():
                member = tarfile.TarInfo(name)
                member.size = len(text.encode())
                archive.addfile(member, io.BytesIO(text.encode()))
            for path in sorted(self.work.glob("*.trace.json.gz")):
                if path.stat().st_size < TRACE:
                    archive.add(path, f"{self.file.stem}-{path.name}")
        return packed.getvalue()
