"""Correctness first, then every bench, then one short table: `make bench` and `make gpu`.

    python -m bench.run cpu                        at most 10 minutes on 2 cores
    python -m bench.run gpu                        at most 8 minutes; needs torch, triton, transformers and pytest
    python -m bench.run cpu --only languagebind    pieces whose name has this in it
    python -m bench.run cpu --list

Every bench is a process of its own that writes bench/results/<device>-<name>.json as it goes: one that fails or hangs
is reported and the others still run. Where the tests are red nothing is measured. The exit status is 0 where all went
well, else 1.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import harness, headline

ROOT = harness.HERE.parent
OPS = ("attention", "info_nce", "layer_norm", "mlp", "patch_embed", "temporal_attention")
SLOW = "triton or 768 or 1024 or published_sizes or opcheck or compile or export or gradcheck"
"""Of the ops' tests on a CPU: kernels that are not measured there, and what takes long."""
BUDGET = {"cpu": 590, "gpu": 460}  # seconds, all in all


@dataclasses.dataclass(frozen=True)
class Piece:
    """One bench: its result's name, its module, its arguments, the seconds it may take; extra: only when named."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    limit: int = 60
    extra: bool = False


def _encoder(modality: str, *arguments: str, limit: int, name: str = "", extra: bool = False) -> Piece:
    return Piece(
        f"languagebind-{name or modality}", "bench_languagebind", (modality, *arguments), limit=limit, extra=extra
    )


MAIN = ("reference float32", "reference autocast", "lbfast float32", "lbfast short")  # where time is short
COMPILED = ("lbfast drop-in float32", "reference torch.compile autocast")
ROW = ("--batch", "1", "2", "4", "8", "16", "32", "64", "--no-memory", "--candidates", *MAIN)
QUICK = ("--seconds", "0.2")
PIECES = {
    "cpu": (
        _encoder("image", "--batch", "1", "--seconds", "1", "--candidates", *MAIN, *COMPILED, limit=120),
        _encoder("video", "--seconds", "1", "--candidates", *MAIN, limit=200),
        _encoder("audio", "--seconds", "1", "--candidates", *MAIN, "--no-memory", limit=180),
        _encoder("text", "--seconds", "1", "--candidates", *MAIN, "--no-memory", limit=90),
        _encoder(
            "image", "--batch", "8", "--seconds", "1", "--candidates", *MAIN, "--no-memory", limit=120, name="image-8"
        ),
        Piece("info-nce", "bench_info_nce", ("--size", "1024", "--dim", "768", "--seconds", "0.1"), limit=90),
        Piece("attention", "bench_attention", ("--only", "L", *QUICK, "--no-compile"), limit=60),
        Piece(
            "temporal-attention",
            "bench_temporal_attention",
            ("--shape", "257", "16", "64", *QUICK, "--no-compile"),
            limit=60,
        ),
        Piece("patch-embed", "bench_patch_embed", ("--width", "1024", *QUICK, "--no-compile"), limit=60),
        Piece("layer-norm", "bench_layer_norm", ("--width", "1024", *QUICK, "--no-compile"), limit=60),
        Piece("mlp", "bench_mlp", ("--shape", "1024", "4096", *QUICK, "--no-compile"), limit=60),
        _encoder("image", "--layers", "2", "--seconds", "0.2", *ROW, limit=150, name="row"),
        Piece(
            "info-nce-4k",
            "bench_info_nce",
            ("--size", "4096", "--passes", "both", "--seconds", "0.3"),
            limit=150,
            extra=True,
        ),
        *(
            Piece(
                f"info-nce-16k-{dtype}",
                "bench_info_nce",
                ("--size", "16384", "--dim", "768", "--dtype", dtype, "--passes", "both", "--seconds", "1"),
                limit=300,
                extra=True,
            )
            for dtype in ("float32", "bfloat16")
        ),
        _encoder("video", "--seconds", "1", "--no-memory", limit=400, name="video-compile", extra=True),
        Piece("training", "bench_training", ("--seconds", "3"), limit=500, extra=True),
    ),
    "gpu": (
        _encoder("image", "--batch", "1", "8", "64", "--seconds", "0.5", limit=90),
        _encoder("video", "--batch", "1", "32", "--seconds", "0.5", limit=90),
        Piece(
            "info-nce",
            "bench_info_nce",
            ("--size", "8192", "32768", "--dim", "768", "--dtype", "bfloat16", "--seconds", "0.3"),
            limit=60,
        ),
        Piece("attention", "bench_attention", ("--only", "L", *QUICK, "--no-compile"), limit=50),
        Piece("temporal-attention", "bench_temporal_attention", ("--shape", "257", "16", "64", *QUICK), limit=50),
        Piece("patch-embed", "bench_patch_embed", ("--width", "1024", *QUICK), limit=50),
        Piece("layer-norm", "bench_layer_norm", ("--width", "1024", *QUICK), limit=50),
        Piece("mlp", "bench_mlp", ("--shape", "1024", "4096", *QUICK), limit=50),
        _encoder("audio", "--batch", "8", "--seconds", "0.5", limit=60),
        _encoder("text", "--batch", "64", "1024", "--seconds", "0.5", limit=60),
        _encoder("image", "--seconds", "0.3", *ROW, limit=60, name="row"),
        Piece("training", "bench_training", ("--seconds", "3"), limit=300, extra=True),
        Piece("info-nce-sweep", "bench_info_nce", ("--seconds", "0.5"), limit=400, extra=True),
        *(
            _encoder(
                modality,
                "--batch",
                batch,
                "--compile",
                "max-autotune",
                limit=580,
                name=f"{modality}-autotune",
                extra=True,
            )
            for modality, batch in (("image", "64"), ("video", "32"))
        ),
        _encoder("image", "--batch", "256", "--arch", "H/14", limit=200, name="image-huge", extra=True),
        _encoder("video", "--batch", "8", "--arch", "H/14", limit=200, name="video-huge", extra=True),
    ),
}


def tests(kind: str, seconds: float) -> str:
    """Runs the tests; an empty string where they are green, else what went wrong."""
    if not (ROOT / "tests").is_dir():
        return f"no tests in {ROOT}: they come with a checkout, not with a wheel"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    env = {**environment(kind), "OMP_NUM_THREADS": "1"}  # what they compute on the CPU is small
    if kind == "cpu":
        files = [f"tests/test_{name}.py" for name in (*OPS, "model", "inference")]
        code = run([*command, "-m", "not slow", "-k", f"not ({SLOW})", *files], seconds, env)
        return "" if code == 0 else _ending(code, "the tests")
    marked = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8")]
    # most of the time is Triton compiling, on the CPU: an op each, at once where the GPU's memory allows it
    parts = [f"{op} and not temporal" if op == "attention" else op for op in OPS]
    parts.append(f"not ({' or '.join(OPS)})")
    commands = [[*command, "-m", "gpu", "-k", part, *map(str, marked)] for part in parts]
    until = time.monotonic() + seconds
    with concurrent.futures.ThreadPoolExecutor(_at_once()) as pool:
        codes = list(pool.map(lambda each: run(each, until - time.monotonic(), env), commands))
    wrong = [f"{_ending(code, 'the tests')} (-k {part!r})" for code, part in zip(codes, parts) if code != 0]
    return "; ".join(wrong)


def _at_once() -> int:
    """How many processes of tests the GPU has the memory for, and the machine the cores."""
    import torch

    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return max(1, min(len(OPS) + 1, int(gib / 30), (os.cpu_count() or 1) // 2))


def memcheck(seconds: float) -> tuple[str, str]:
    """compute-sanitizer over a small case of each kernel: (what to print, what is wrong, empty where nothing is)."""
    tool = sanitizer()
    if tool is None:
        return "memcheck: compute-sanitizer is not on this machine; not run", ""
    command = [tool, "--tool", "memcheck", "--error-exitcode", "99", sys.executable, "-m", f"{__package__}.memcheck"]
    code = run(command, seconds, {**environment("gpu"), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    if code is None:
        return f"memcheck: stopped after {seconds:.0f} s; not finished", ""
    return ("memcheck: no errors", "") if code == 0 else ("", _ending(code, "compute-sanitizer memcheck"))


def sanitizer() -> str | None:
    """Path of compute-sanitizer: on PATH, in a CUDA toolkit, or in a wheel beside torch."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *sorted(glob.glob("/usr/local/cuda*"))]
    places = [Path(home, "bin") for home in homes if home]
    places += [Path(home, "compute-sanitizer") for home in homes if home]
    for site in map(Path, sys.path):
        places += [Path(p) for p in glob.glob(str(site / "nvidia" / "*" / "bin"))]
    return shutil.which("compute-sanitizer") or next(
        (found for place in places if (found := shutil.which("compute-sanitizer", path=str(place)))), None
    )


def environment(kind: str) -> dict[str, str]:
    """For a child: the checkout on its path, and on a run for the CPU no GPU."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **({"CUDA_VISIBLE_DEVICES": ""} if kind == "cpu" else {})}


def run(command: Sequence[str], seconds: float, env: Mapping[str, str]) -> int | None:
    """Exit status of a command, None where it was stopped, with its children, after so many seconds."""
    print("$", " ".join(str(part) for part in command), flush=True)
    process = subprocess.Popen(command, cwd=ROOT, env=dict(env), start_new_session=True)
    try:
        return process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _ending(code: int | None, what: str) -> str:
    if code is None:
        return f"{what} took too long and were stopped"
    return f"{what} failed with exit status {code}"


def measure(pieces: Sequence[Piece], kind: str, folder: Path, slug: str, until: float) -> dict[str, str]:
    """Runs the pieces in order until the time is up. Result name -> "" or what became of it."""
    endings = {}
    for piece in pieces:
        left = until - time.monotonic()
        if left < 10:
            endings[piece.name] = "not run: no time left"
            continue
        out = folder / f"{slug}-{piece.name}.json"
        command = [sys.executable, "-m", f"{__package__}.{piece.module}", *piece.arguments, "--out", str(out)]
        begun = time.monotonic()
        code = run(command, min(piece.limit, left), environment(kind))
        print(f"{piece.name}: {time.monotonic() - begun:.0f} s\n", flush=True)
        if code is None and left < piece.limit:
            endings[piece.name] = "not finished: no time left; what it had is kept"
        elif code is None:
            endings[piece.name] = f"stopped after {piece.limit} s; what it had is kept"
        else:
            endings[piece.name] = "" if code == 0 else f"FAILED with exit status {code}"
    return endings


def summary(endings: Mapping[str, str], folder: Path, slug: str) -> str:
    """The short table: each case's fastest of ours beside the fastest of the others."""
    rows = []
    for name in endings:
        path = folder / f"{slug}-{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            rows += [line.cells(name) for line in headline.lines(result["rows"])]
    lines = [harness.table(headline.COLUMNS, rows, left=4)] if rows else []
    return "\n".join([*lines, "", *(f"{name}: {ending}" for name, ending in endings.items() if ending)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=tuple(PIECES))
    parser.add_argument("--only", nargs="+", help="pieces whose name has one of these in it, extra ones too")
    parser.add_argument("--all", action="store_true", help="extra pieces too")
    parser.add_argument("--list", action="store_true", help="names of the pieces, and nothing else")
    parser.add_argument("--budget", type=float, help="seconds for everything; default 590 on a CPU, 460 on a GPU")
    parser.add_argument("--skip-tests", action="store_true", help="and say so in the results")
    parser.add_argument("--folder", type=Path, default=harness.RESULTS, help="of the results")
    given = parser.parse_args(argv)
    pieces = [p for p in PIECES[given.kind] if given.all or given.only or not p.extra]
    pieces = [p for p in pieces if not given.only or any(part in p.name for part in given.only)]
    if given.list:
        print("\n".join(f"{p.name}{' (extra)' if p.extra else ''}" for p in pieces))
        return 0
    if not pieces:
        parser.error(f"--only: no piece has {' or '.join(given.only)} in its name; --list shows them")
    return _main(given, pieces)


def _main(given: argparse.Namespace, pieces: Sequence[Piece]) -> int:
    if given.kind == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif harness.device() != "cuda":
        print("error: no CUDA device: torch finds none", file=sys.stderr)
        return 1
    until = time.monotonic() + (given.budget or BUDGET[given.kind])
    notes: list[str] = []
    if not given.skip_tests:
        wrong = tests(given.kind, 0.5 * (until - time.monotonic()))
        if not wrong and given.kind == "gpu":
            note, wrong = memcheck(0.2 * (until - time.monotonic()))
            notes.append(note)
        if wrong:
            print(f"error: {wrong}: nothing is measured", file=sys.stderr)
            return 1
        os.environ[harness.TESTS] = "passed"
    slug = harness.machine.slug("cpu" if given.kind == "cpu" else "cuda")
    endings = measure(pieces, given.kind, given.folder, slug, until)
    facts: dict[str, Any] = harness.header("cpu" if given.kind == "cpu" else "cuda")
    print(f"\n{harness.describe(facts)}\n\n{summary(endings, given.folder, slug)}")
    print("\n".join([*notes, f"results: {given.folder}"]))
    return int(any(ending and not ending.startswith("not ") for ending in endings.values()))


if __name__ == "__main__":
    sys.exit(main())
