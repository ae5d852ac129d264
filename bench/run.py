"""On a CPU: correctness first, then every bench, then one short table: `make bench`. (`make gpu` is bench/gpu.py.)

    python -m bench.run                        at most 10 minutes on 2 cores
    python -m bench.run --only languagebind    pieces whose name has this in it
    python -m bench.run --list

Every bench is a process of its own that writes bench/results/<device>-<name>.json as it goes: one that fails or hangs
is reported and the others still run. Where the tests are red nothing is measured. The exit status is 0 where all went
well, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import harness, headline, options

ROOT = harness.HERE.parent
OPS = ("attention", "info_nce", "layer_norm", "mlp", "patch_embed", "sigmoid_loss", "temporal_attention")
SLOW = "triton or 768 or 1024 or published_sizes or opcheck or compile or export or gradcheck"
"""Of the ops' tests on a CPU: kernels that are not measured there, and what takes long."""
BUDGET = 590  # seconds, all in all


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
PIECES = (
    _encoder("image", "--batch", "1", "--seconds", "1", "--candidates", *MAIN, *COMPILED, limit=120),
    _encoder("video", "--seconds", "1", "--candidates", *MAIN, limit=200),
    _encoder("audio", "--seconds", "1", "--candidates", *MAIN, "--no-memory", limit=180),
    _encoder("text", "--seconds", "1", "--candidates", *MAIN, "--no-memory", limit=90),
    _encoder(
        "image", "--batch", "8", "--seconds", "1", "--candidates", *MAIN, "--no-memory", limit=120, name="image-8"
    ),
    Piece("info-nce", "bench_info_nce", ("--size", "1024", "--dim", "768", "--seconds", "0.1"), limit=90),
    Piece("sigmoid-loss", "bench_sigmoid_loss", ("--size", "1024", "--seconds", "0.1"), limit=60),
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
    Piece("files", "bench_files", ("--seconds", "0.3"), limit=120),
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
    Piece(
        "nested-info-nce",
        "bench_info_nce",
        ("--size", "4096", "--dim", "768", "--passes", "fwd", "both", "--nested", "--seconds", "3"),
        limit=120,
        extra=True,
    ),
    *(
        Piece(
            f"sigmoid-loss-16k-{dtype}",
            "bench_sigmoid_loss",
            ("--size", "16384", "--dtype", dtype, "--passes", "both", "--seconds", "1"),
            limit=300,
            extra=True,
        )
        for dtype in ("float32", "bfloat16")
    ),
    _encoder("video", "--seconds", "1", "--no-memory", limit=400, name="video-compile", extra=True),
    Piece("training", "bench_training", ("--seconds", "3"), limit=500, extra=True),
    *(
        Piece(
            f"training-l14-{modality}",
            "bench_training",
            ("--arch", "L/14", "--once", "--modality", modality, "--batch", batch, "--micro-batch", micro_batch),
            limit=1500,
            extra=True,
        )
        for modality, batch, micro_batch in (("image", "4", "1"), ("video", "2", "1"))
    ),
    Piece("files-all", "bench_files", ("--kinds", "all"), limit=400, extra=True),
)


def tests(seconds: float) -> str:
    """Runs the tests; an empty string where they are green, else what went wrong."""
    if not (ROOT / "tests").is_dir():
        return f"no tests in {ROOT}: they come with a checkout, not with a wheel"
    files = [f"tests/test_{name}.py" for name in (*OPS, "model", "inference")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "not slow", "-k", f"not ({SLOW})", *files]
    code = run(command, seconds, {**environment(), "OMP_NUM_THREADS": "1"})  # what they compute is small
    return "" if code == 0 else _ending(code, "the tests")


def environment(*paths: str | Path) -> dict[str, str]:
    """For a child: the checkout on its path, and these folders."""
    path = os.pathsep.join(filter(None, (str(ROOT), *map(str, paths), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}


def run(command: Sequence[str], seconds: float, env: Mapping[str, str], log: Path | None = None) -> int | None:
    """Exit status of a command, None where it was stopped, with its children, after so many seconds.

    What it prints goes to the file `log`, where one is given.
    """
    with contextlib.ExitStack() as stack:
        to: Any = {}
        if log is None:
            print("$", " ".join(str(part) for part in command), flush=True)
        else:
            to = {"stdout": stack.enter_context(log.open("wb")), "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=ROOT, env=dict(env), start_new_session=True, **to)
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


def measure(pieces: Sequence[Piece], folder: Path, slug: str, until: float) -> dict[str, str]:
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
        code = run(command, min(piece.limit, left), environment())
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
    parser.add_argument("--only", nargs="+", help="pieces whose name has one of these in it, extra ones too")
    parser.add_argument("--all", action="store_true", help="extra pieces too")
    parser.add_argument("--list", action="store_true", help="names of the pieces, and nothing else")
    parser.add_argument("--budget", type=options.seconds, default=BUDGET, help="seconds for everything (%(default)s)")
    parser.add_argument("--skip-tests", action="store_true", help="and say so in the results")
    parser.add_argument("--folder", type=Path, default=harness.RESULTS, help="of the results")
    given = parser.parse_args(argv)
    pieces = [p for p in PIECES if given.all or given.only or not p.extra]
    pieces = [p for p in pieces if not given.only or any(part in p.name for part in given.only)]
    if given.list:
        print("\n".join(f"{p.name}{' (extra)' if p.extra else ''}" for p in pieces))
        return 0
    if not pieces:
        parser.error(f"--only: no piece has {' or '.join(given.only)} in its name; --list shows them")
    return _main(given, pieces)


def _main(given: argparse.Namespace, pieces: Sequence[Piece]) -> int:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    until = time.monotonic() + given.budget
    if not given.skip_tests:
        wrong = tests(0.5 * given.budget)
        if wrong:
            print(f"error: {wrong}: nothing is measured", file=sys.stderr)
            return 1
        os.environ[harness.TESTS] = "passed"
    slug = harness.machine.slug("cpu")
    endings = measure(pieces, given.folder, slug, until)
    print(f"\n{harness.describe(harness.header('cpu'))}\n\n{summary(endings, given.folder, slug)}")
    print(f"results: {given.folder}")
    return int(any(ending and not ending.startswith("not ") for ending in endings.values()))


if __name__ == "__main__":
    sys.exit(main())
