"""What `make gpu` does, in the order of its worth: phases of jobs, each job a process. bench/gpu.py runs them.

The seconds of FIRST add up to 470, for 16 cores and an H100; those of SECOND are for another call.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import harness, tune
from .run import OPS

TESTS = harness.HERE.parent / "tests"
PYTEST = ("-o", "addopts=", "-v", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu")
QUICK = ("--seconds", "0.15")
ALONE = ("training_plan",)
"""Files of tests that measure time: nothing else may run."""

DTYPES = {"bfloat16": "bfloat16", "float16": "float16 and not bfloat16", "float32": "float32", "other": "not float"}


@dataclasses.dataclass(frozen=True)
class Job:
    """`python -m module arguments`, a process of its own.

    Attributes:
        name: of its result, and in the summary.
        kind: how its end is judged: "bench" (it takes --out), "tests", "compile" (a bench whose figures are thrown
            away) or "sanitizer".
        op: whose tests vouch for its figures; "": those of every op.
        seconds: planned, beside the phase's other jobs.
        gib: of the GPU's memory, where jobs run at once.
        before: the command that runs Python, where there is one; absent: why it can't be run, where it can't.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    kind: str = "bench"
    op: str = ""
    seconds: float = 10
    gib: float = 0
    before: tuple[str, ...] = ()
    absent: str = ""

    @property
    def command(self) -> list[str]:
        return [*self.before, sys.executable, "-m", self.module, *self.arguments]


@dataclasses.dataclass(frozen=True)
class Found:
    """What has been measured so far: name -> {"header": ..., "rows": [...]}, and the file that it is in."""

    file: Path
    results: Mapping[str, Mapping[str, Any]]


NOTHING = Found(Path(), {})


@dataclasses.dataclass(frozen=True)
class Phase:
    """`jobs` of what was found before. together: at once, as far as cores and the GPU's memory go; else one by one."""

    name: str
    about: str
    seconds: float
    jobs: Callable[[Found], Sequence[Job]]
    together: bool = False


def _bench(name: str, *arguments: str, module: str = "", seconds: float, op: str = "", gib: float = 6) -> Job:
    module = f"bench.{module or 'bench_' + name.replace('-', '_')}"
    return Job(name, module, arguments, op=op, seconds=seconds, gib=gib)


def _attention(case: str, *arguments: str, name: str = "", seconds: float) -> Job:
    arguments = ("--only", case, *arguments, *QUICK)
    return _bench(f"attention{name}", *arguments, module="bench_attention", seconds=seconds, op="attention", gib=10)


DEVICE = (_bench("device", module="device", seconds=20),)
OP_BENCHES = (
    _attention("image L/14", seconds=20),
    _attention("audio L/14", "--samples", "128", name="-audio", seconds=20),  # whole score matrices of more don't fit
    _attention("text L", name="-text", seconds=14),
    _bench("info-nce", "--size", "32768", "8192", "--dim", "768", *QUICK, seconds=22, op="info_nce", gib=20),
    _bench("mlp", "--shape", "1024", "4096", *QUICK, seconds=11, op="mlp"),
    _bench("patch-embed", "--width", "1024", *QUICK, seconds=13, op="patch_embed"),
    _bench("layer-norm", "--width", "1024", *QUICK, seconds=15, op="layer_norm"),
    _bench("temporal-attention", "--shape", "257", "16", "64", *QUICK, seconds=15, op="temporal_attention"),
)
CANDIDATES = (
    "reference float32",
    "reference autocast",
    "lbfast float32",
    "lbfast short",
    "lbfast fp8",
    "sdpa torch.compile short",
)


def _encoder(modality: str, *batches: str, seconds: float) -> Job:
    arguments = (modality, "--batch", *batches, "--seconds", "0.4", "--candidates", *CANDIDATES)
    return _bench(f"languagebind-{modality}", *arguments, module="bench_languagebind", seconds=seconds, gib=12)


ENCODERS = (  # the largest batch first: it tells most
    _encoder("image", "256", "8", "1", seconds=38),
    _encoder("video", "32", "1", seconds=34),
    _encoder("audio", "64", seconds=17),
    _encoder("text", "1024", "64", seconds=16),
)
TRAINING = (
    _bench("training", "--arch", "L/14", "--batch", "1024", "--micro-batch", "128", "--memory-batch", "4096",
           "--seconds", "0.5", module="bench_training", seconds=70, gib=30),
    _bench("info-nce-large", "--size", "131072", "1048576", "--dim", "768", "--passes", "both", *QUICK,
           module="bench_info_nce", seconds=50, op="info_nce", gib=20),
)  # fmt: skip
PROFILES = (_bench("profile", module="profile", seconds=10),)
LOSSES = (
    _bench("sigmoid-loss", "--size", "32768", "8192", *QUICK, seconds=12, op="sigmoid_loss", gib=20),
    _bench("nested-info-nce", "--size", "32768", "--dim", "768", "--passes", "fwd", "both", "--nested", *QUICK,
           module="bench_info_nce", seconds=8, op="info_nce", gib=20),
)  # fmt: skip

# The same benches on little work, at once: what they compile is in the caches before anything is timed.
FEW = ("--seconds", "0")
WARM = {
    "bench_languagebind": (*FEW, "--layers", "2", "--no-memory"),
    "bench_training": (*FEW, "--layers", "2", "--batch", "256", "--memory-batch"),
    "bench_info_nce": (*FEW, "--size", "4096"),
    "bench_attention": (*FEW, "--samples", "16"),
}


def compiled(found: Found) -> list[Job]:
    return [
        dataclasses.replace(
            job,
            name=f"compile {job.name}",
            kind="compile",
            arguments=(*job.arguments, *WARM.get(job.module.removeprefix("bench."), FEW)),
        )
        for job in (*OP_BENCHES, *ENCODERS, *TRAINING[:1])
    ]


def tests(found: Found) -> list[Job]:
    """Of each op one of each dtype; then the others of each file. Most of their time is Triton compiling."""
    files = [str(path) for path in sorted(TESTS.glob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]
    if not files:
        return [Job("tests", "pytest", kind="tests", absent=f"no tests in {TESTS}: they come with a checkout")]
    jobs = []
    for op in OPS:
        of_op = "attention and not temporal" if op == "attention" else op
        for dtype, words in DTYPES.items():
            name, about = f"tests {op} {dtype}", (*PYTEST, *files, "-k", f"{of_op} and {words}")
            jobs.append(Job(name, "pytest", about, "tests", op, gib=12 if dtype == "other" else 3))
    for file in files:
        name = Path(file).stem.removeprefix("test_")
        if not any(op in name for op in OPS) and name not in ALONE:
            about = (*PYTEST, file, "-k", f"not ({' or '.join(OPS)})")
            jobs.append(Job(f"tests other, {name}", "pytest", about, "tests", "other", gib=12))
    return jobs


def tests_alone(found: Found) -> list[Job]:
    about = {name: (*PYTEST, str(TESTS / f"test_{name}.py"), "-k", name) for name in ALONE}
    return [Job(f"tests other, {name}", "pytest", about[name], "tests", "other", seconds=50) for name in ALONE]


def tuned_check(found: Found) -> list[Job]:
    """Every row of every table once: compiled, and compared with the row in use."""
    names = dict.fromkeys(t.table for t in tune.TUNABLES)
    return [
        Job(f"check {name}", "bench.tune", ("--table", name, "--check"), "compile", gib=6, seconds=90) for name in names
    ]


def tuned(found: Found) -> list[Job]:
    return [_bench("tune", module="tune", seconds=150)]


def again(found: Found) -> list[Job]:
    """Benches of the ops whose rows changed, with those rows."""
    changed = [row["name"].lower() for row in found.results.get("tune", {}).get("rows", ()) if row.get("changed")]
    return [
        dataclasses.replace(
            job,
            name=f"{job.name}-tuned",
            module="bench.tuned",
            arguments=(str(found.file), job.module, *job.arguments),
        )
        for job in OP_BENCHES
        if any(name.startswith(job.op) for name in changed)
    ]


def sanitized(found: Found) -> list[Job]:
    """compute-sanitizer over small cases of each op."""
    tool = sanitizer()
    options = ("--tool", "memcheck", "--error-exitcode", "99", "--report-api-errors", "no")
    absent = "" if tool else "compute-sanitizer is not on this machine"
    return [
        Job(f"memcheck {op}", "bench.memcheck", (op,), "sanitizer", op, 90, 4, (tool or "", *options), absent)
        for op in OPS
    ]


def sanitizer() -> str | None:
    """Path of compute-sanitizer: on PATH, in a CUDA toolkit, or in a wheel beside torch."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *sorted(glob.glob("/usr/local/cuda*"))]
    places = [Path(home, part) for home in homes if home for part in ("bin", "compute-sanitizer")]
    for site in map(Path, sys.path):
        places += [Path(p) for p in glob.glob(str(site / "nvidia" / "*" / "bin"))]
    return shutil.which("compute-sanitizer") or next(
        (found for place in places if (found := shutil.which("compute-sanitizer", path=str(place)))), None
    )


FIRST = (
    Phase("device", "the device, versions, clocks, what products and copies reach", 20, lambda _: DEVICE),
    Phase("compile", "what the benches launch, into the caches, on all cores", 40, compiled, together=True),
    Phase("tests", "every kernel against float64, in three dtypes", 45, tests, together=True),
    Phase("ops", "ops beside all peers", 130, lambda _: OP_BENCHES),
    Phase("encoders", "whole encoders beside upstream's arithmetic", 105, lambda _: ENCODERS),
    Phase("training", "a training step of L/14; the loss at 131,072 and 1,048,576", 120, lambda _: TRAINING),
    Phase("profile", "where the time of image and video goes, and the power", 10, lambda _: PROFILES),
)
SECOND = (
    Phase("losses", "the sigmoid loss beside its peers; nested embeddings beside one call", 20, lambda _: LOSSES),
    Phase("plans", "whether runs of training take what was planned", 50, tests_alone),
    Phase("check", "the rows to tune, compiled and compared, on all cores", 90, tuned_check, together=True),
    Phase("tune", "launch tables: eight rows each", 150, tuned),
    Phase("again", "the ops that tuning changed", 80, again),
    Phase("sanitizer", "compute-sanitizer over small cases of every kernel", 90, sanitized, together=True),
)
PHASES = (*FIRST, *SECOND)
