"""Hostile checkpoints, configurations and tokenizers: each is loaded, or refused by an error that names the file.

A process of its own opens them one after the other, under limits of time and memory, and watches for connections and
code. Where it dies, the case that it was at is a failure, and another process goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.fuzz import hostile

SECONDS = 20  # a case
MEMORY = 2 << 30  # bytes resident
LONGEST = 4100  # characters of an error
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "socket.getaddrinfo",
)


def run(seconds: float, seed: int, count: int = 10**9, first: int = 0) -> list[str]:
    """Opens so many hostile checkpoints, or for so long; what went wrong, a line each, with how to see it again."""
    failures: list[str] = []
    end, number = time.monotonic() + seconds, first
    while number < first + count and time.monotonic() < end:
        number = _some(number, first + count, seed, end, failures)
    return failures


def _some(first: int, stop: int, seed: int, end: float, failures: list[str]) -> int:
    """Lets one process open cases from `first` on; returns the number of the first that it did not come to."""
    command = [sys.executable, "-m", "tests.fuzz.checkpoints", "--seed", str(seed), "--first", str(first)]
    command += ["--count", str(stop - first), "--seconds", str(end - time.monotonic()), "--child"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said, trouble = child.communicate()
    at = first
    for line in said.splitlines():
        if not line.startswith("{"):
            continue
        found = json.loads(line)
        at = found["number"] + 1
        if found["failure"]:
            failures.append(_line(found["number"], seed, found["failure"]))
    if child.returncode:
        reason = signal.Signals(-child.returncode).name if child.returncode < 0 else f"exit {child.returncode}"
        failures.append(_line(at, seed, f"the process died: {reason} {trouble[-300:]}"))
        return at + 1
    return stop if at == first else at


def _line(number: int, seed: int, failure: str) -> str:
    again = f"python -m tests.fuzz.checkpoints --seed {seed} --first {number} --count 1"
    return f"{failure.splitlines()[0]} ({again})"


def _child(first: int, count: int, seed: int, seconds: float) -> None:
    """Opens cases, and says each."""
    os.environ["HF_HUB_OFFLINE"] = "0"  # it must not even be asked
    import torch

    import lbfast
    from lbfast.mini import checkpoint

    torch.set_num_threads(1)
    lbfast.LanguageBindImage.from_pretrained(checkpoint("image"))  # imports, before anything is watched
    lbfast.LanguageBindImageProcessor.from_pretrained(checkpoint("image"))
    forbidden: list[str] = []
    sys.addaudithook(lambda event, _: forbidden.append(event) if event in _FORBIDDEN else None)
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        for number in range(first, first + count):
            if time.monotonic() > end:
                return
            folder = Path(place) / str(number)
            kind, what = hostile.spoil(folder, number, seed)
            forbidden.clear()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of work: a busy machine is no failure
            signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)  # of sleep
            failure = _open(folder, kind)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            used = _most_resident()
            if forbidden:
                failure = f"it did {', '.join(forbidden)}"
            if Path(hostile.CANARY).exists():
                failure = "code was run"
            if used > MEMORY:
                failure = f"{used >> 20} MiB were used"
            print(json.dumps({"number": number, "failure": failure and f"{what}: {failure}"}), flush=True)
            _remove(folder)
            if used > MEMORY:
                return


def _remove(folder: Path) -> None:
    """Removes a folder of files."""
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def _most_resident() -> int:
    """Bytes, of this process alone: what getrusage says begins with what its parent held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _open(folder: Path, kind: str) -> str:
    """Opens a case with every class that reads it; what is wrong with that, or an empty string."""
    import torch

    import lbfast

    openers: list[Any] = [lbfast.LanguageBindImageProcessor, lbfast.LanguageBindImageTokenizer]
    if kind != "tokenizer":
        openers = [lbfast.LanguageBindImageConfig, lbfast.LanguageBindImage]
    for opener in openers:
        for options in ({}, {"torch_dtype": torch.float16}) if opener is lbfast.LanguageBindImage else ({},):
            try:
                made = opener.from_pretrained(folder, **options)
                if isinstance(made, lbfast.LanguageBindImage):
                    _use(made)
                elif opener is lbfast.LanguageBindImageTokenizer:
                    made(["a large red circle", "<|endoftext|> x\ud7ff"], max_length=77, truncation=True)
            except (lbfast.CheckpointError, FileNotFoundError) as error:
                text = str(error)
                if str(folder) not in text or len(text) > LONGEST + len(str(folder)):
                    return f"{opener.__name__}: an error that does not name the file, or is long: {text[:200]!a}"
                if not text.replace("\n", "").isprintable():
                    return f"{opener.__name__}: an error with control characters: {text[:200]!a}"
            except (Exception, SystemExit) as error:  # a Rust panic is a BaseException, and ends the process: seen too
                return f"{opener.__name__}: {type(error).__name__}: {str(error)[:200]!a}"
    return ""


def _use(model: Any) -> None:
    """A model that loads must give numbers, or say why not."""
    import torch

    side = model.config.vision_config.image_size
    with torch.no_grad():
        try:
            model.get_image_features(
                torch.zeros(1, model.config.vision_config.num_channels, side, side).to(model.dtype)
            )
            model.get_text_features(torch.tensor([[0, 1]]))
        except (ValueError, TypeError):
            pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--child", action="store_true")
    options = parser.parse_args()
    if options.child:
        _child(options.first, options.count, options.seed, options.seconds)
        return 0
    failures = run(options.seconds, options.seed, options.count, options.first)
    print("\n".join(failures) or f"{options.count} cases, nothing failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
