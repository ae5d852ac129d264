"""`make gpu`, rehearsed on a pretended GPU: whatever goes wrong, all else is on disk, and what is missing is named."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.nn.functional as F

from bench import bench_languagebind, compare, gpu, harness, ledger, phases, report, tune
from lbfast.profiling import machine, subjects
from tests import tiny
from tests.pretend import pretended_gpu

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
FEW = ["--seconds", "0"]
LITTLE = ["--memory-batch", "2", "4", "--tuned", "lora"]
TINY = {  # arguments by which the benches do what a CPU can, in place of the plan's
    "bench.device": ["--smaller", "256", *FEW],
    "bench.bench_attention": ["--shape", "9", "2", "32", "--samples", "2", *FEW, "--no-compile"],
    "bench.bench_temporal_attention": [
        "--shape",
        "5",
        "2",
        "32",
        "--frames",
        "3",
        "--clips",
        "1",
        *FEW,
        "--no-compile",
    ],
    "bench.bench_patch_embed": ["--side", "28", "--width", "32", "--clips", "1", *FEW, "--no-compile"],
    "bench.bench_layer_norm": ["--tokens", "3", "--width", "64", "--clips", "1", *FEW, "--no-compile"],
    "bench.bench_mlp": ["--rows", "7", "--shape", "16", "32", *FEW, "--no-compile"],
    "bench.bench_info_nce": ["--size", "32", "--dim", "16", *FEW],
    "bench.bench_sigmoid_loss": ["--size", "32", "--dim", "16", *FEW],
    "bench.bench_training": ["--batch", "2", "--micro-batch", "2", "--width", "64", "--layers", "1", *LITTLE, *FEW],
    "bench.profile": ["--batch", "1", "1", *FEW],
    "bench.tune": [],
}
PASSED = "tests/test_gpu.py::test_x[1] PASSED [ 50%]\ntests/test_gpu.py::test_x[2] PASSED [100%]\n"
CLEAN = "mlp, bfloat16: ok\n========= ERROR SUMMARY: 0 errors\n"
SHORT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB."


def result(name, **more):
    """What a bench writes: two rows, and one of a peer that is not there."""
    rows = [
        {"case": "c", "dtype": "bfloat16", "part": "both", "name": n, "median_ms": ms, "p20_ms": ms, "p80_ms": ms}
        for n, ms in (("lbfast triton", 2.0), ("torch", 5.0))
    ]
    if name == "tune":
        rows = [{"name": "MLP_FWD", "key": "sm_90", "before_ms": 2, "after_ms": 1, "changed": True}]
        rows[0] |= {"tile": {"BLOCK": 2048}, "num_warps": 8, "num_stages": 1}
    elif name.startswith(("languagebind", "training", "profile", "device")):
        rows = []
    absent = {"case": "c", "dtype": "bfloat16", "name": "memeff", "note": "absent: memeff is not installed"}
    header = {**_header(), "title": name}
    return json.dumps({"header": header, "rows": [*rows, *([absent] if rows and name != "tune" else [])]})


@functools.cache
def _header():
    return harness.header("cuda")


class Machine:
    """Stands for bench.run.run: every command is answered here. `faults`: name of a job -> (exit status, output).

    Time is the clock's, which goes on by what jobs that run alone take.
    """

    def __init__(self, takes=1.0):
        self.asked, self.envs, self.faults, self.takes, self.now = [], {}, {}, takes, 1000.0

    def monotonic(self):
        return self.now

    def run(self, command, seconds, env, log):
        name, module = log.stem, command[command.index("-m") + 1]
        self.asked.append(name)
        self.envs[name] = env
        code, text = self.faults.get(name, (0, ""))
        if isinstance(code, BaseException):
            raise code
        if "--out" in command and not (code and "crashed" in text):
            self.bench(module, Path(command[command.index("--out") + 1]), command, log)
        elif not text:
            text = PASSED if module == "pytest" else CLEAN
        if text:
            log.write_text(text)
        if "--out" in command:
            self.now += min(self.takes, seconds)
            code = None if self.takes > seconds else code
        return code

    def bench(self, module, out, command, log):
        out.write_text(result(out.stem))


@pytest.fixture
def rates(monkeypatch):
    monkeypatch.setattr(machine, "rates", lambda device, dtype: machine.Rates(1e11, 1e10))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv(harness.TESTS, raising=False)


@pytest.fixture
def here(monkeypatch, tmp_path, rates):
    """A machine, and a call of `make gpu` on it: -> exit status, the results, what is printed."""
    found = Machine()
    monkeypatch.setattr(gpu, "run", lambda *arguments: found.run(*arguments))
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: found.now))
    monkeypatch.setattr(phases, "sanitizer", lambda: "/cuda/bin/compute-sanitizer")

    def call(*arguments):
        with pretended_gpu():
            code = gpu.main(["--folder", str(tmp_path / "results"), "--out", str(tmp_path / "out"), *arguments])
        return code, json.loads((tmp_path / "results" / "nvidia-h200.json").read_text())

    found.call, found.folder = call, tmp_path
    return found


def endings(results):
    return {row["name"]: (row["state"], row["ending"]) for row in results["run"]["rows"]}


FIGURES = {job.name for phase in phases.FIRST if not phase.together for job in phase.jobs(phases.NOTHING)} | {"tune"}


def test_the_whole_with_the_benches_themselves(here, monkeypatch, capsys):
    """Every bench runs, on little; the archive is what the report reads."""

    def bench(module, out, command, log):
        name = "bench.tune" if module == "bench.tuned" else module
        if module != "bench.bench_languagebind":
            arguments = TINY[name]
        else:
            arguments = [out.stem.split("-")[1], "--batch", "1", *FEW, "--no-compile", "--no-upstream"]
        if module == "bench.tuned":
            inner = command[command.index("-m") + 3]
            arguments = [command[command.index("-m") + 2], inner, *TINY[inner]]
        with log.open("w") as file, contextlib.redirect_stdout(file):
            assert importlib.import_module(module).main([*arguments, "--out", str(out)]) == 0

    small = tune.Tunable(
        "LAYER_NORM_FWD",
        {"NUMBERS": (16, 32)},
        lambda device: tune._random(device, (5, 48), (48,), (48,)),
        lambda x, w, b: F.layer_norm(x, (48,), w, b),
        warps=(4,),
    )
    monkeypatch.setattr(tune, "TUNABLES", (small,))
    monkeypatch.setattr(tune, "timer", lambda step: 1.0 if any(r.tile["NUMBERS"] == 16 for r in rows.values()) else 2.0)
    monkeypatch.setattr(bench_languagebind, "published_config", lambda name, size: tiny.config(name, lora_r=0))
    monkeypatch.setattr(subjects, "random_model", lambda arch, modality, layers: tiny.model(modality))
    here.bench = bench
    rows = tune._configs().LAYER_NORM_FWD
    before = dict(rows)
    try:
        code, results = here.call()
    finally:
        rows.clear()
        rows.update(before)
    said = capsys.readouterr().out
    assert code == 0, [end for end in endings(results).values() if end[0] != "done"]
    assert FIGURES | {"layer-norm-tuned"} <= results.keys()
    assert all(results[name]["header"]["tests"] == "passed" for name in FIGURES)
    assert any(row.get("MiB") for row in results["training"]["rows"])
    assert {"image L/14, batch 1", "video L/14, batch 1"} <= {row.get("case") for row in results["profile"]["rows"]}
    tail = said[-12_000:]
    assert tail.index("DEVICE") < tail.index("ENCODERS") < tail.index("memeff: absent") < tail.index("RED\nnothing")
    for name in (
        "power and clocks: not sampled",
        "image L/14",
        "LAYER_NORM_FWD[interpreter]: ",
        "info-nce",
        "lora, lbfast",
    ):
        assert name in tail, name

    left = list((here.folder / "out").iterdir())
    assert {path.name for path in left} == {ledger.ARCHIVE, ledger.SUMMARY}
    assert all(path.stat().st_size < 16 * 2**20 for path in left)
    home = here.folder / "home"
    with tarfile.open(here.folder / "out" / ledger.ARCHIVE) as archive:
        assert len(archive.getnames()) <= 8 and "nvidia-h200-image.trace.json.gz" in archive.getnames()
        tiny.unpack(archive, home)
    machines = {**report.load(harness.RESULTS), **report.load(home)}
    assert machines["nvidia-h200"].keys() >= FIGURES
    tables = {name: report.section(name, machines) for name in report.NAMES}
    assert tables["encoders"].startswith("H200: NVIDIA H200") and report.NO_GPU not in tables["encoders"]
    assert "layer norm" in tables["ops"] and "32x16" in tables["info-nce"]
    every, _ = report.index(machines)
    assert "nvidia-h200: profile" in every and "| languagebind-row " in every


def test_a_red_test_marks_its_ops_figures_and_the_rest_goes_on(here, capsys):
    here.faults["tests-mlp-float16"] = (1, "tests/test_gpu.py::test_mlp[gelu-float16] FAILED [100%]\n")
    code, results = here.call()
    assert code == 1 and results.keys() >= FIGURES
    assert results["mlp"]["header"]["tests"] == "failed: test_mlp[gelu-float16] (1 failed)"
    assert results["attention"]["header"]["tests"] == "passed"
    assert results["languagebind-video"]["header"]["tests"].startswith("failed: test_mlp")
    assert here.envs["mlp"][harness.TESTS].startswith("failed") and here.envs["attention"][harness.TESTS] == "passed"
    said = capsys.readouterr().out
    assert "tests mlp float16: tests: failed: test_mlp[gelu-float16]" in said.split("RED\n")[1]
    assert "mlp (tests: failed)" in said
    machines = {"nvidia-h200": report.load(here.folder / "results")["nvidia-h200"]}
    assert "**tests failed: test_mlp[gelu-float16] (1 failed)**" in report.section("ops", machines)
    assert "(tests failed)" in report.coverage(machines)


REFUSAL = (
    "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the docs\nRuntimeError: 999\n"
)
FINDING = "========= Invalid __global__ read of size 2 bytes\n=========     at _k\n========= ERROR SUMMARY: 1 error\n"


def test_a_sanitizer_that_refuses_the_device_is_no_failure(here, capsys):
    here.faults |= {f"memcheck-{op}": (99, REFUSAL) for op in phases.OPS}
    code, results = here.call()
    assert code == 0 and results.keys() >= FIGURES
    state, ending = endings(results)["memcheck mlp"]
    assert state == "done" and "refused: compute-sanitizer: Error: Device not supported" in ending
    assert "memcheck mlp: refused" in capsys.readouterr().out.split("MISSING\n")[1]
    here.faults = {"memcheck-mlp": (1, "ERROR: no such tool\n")}
    assert here.call("--only", "sanitizer")[0] == 0


def test_what_the_sanitizer_finds_is_red(here, capsys):
    here.faults["memcheck-mlp"] = (99, FINDING)
    code, results = here.call()
    assert code == 1 and results.keys() >= FIGURES
    assert "memcheck mlp: compute-sanitizer: 1 errors: Invalid __global__ read" in capsys.readouterr().out
    assert endings(results)["memcheck attention"] == ("done", "no errors in 1 cases")


def test_peers_and_tools_that_are_not_there(here, monkeypatch, capsys):
    monkeypatch.setattr(phases, "sanitizer", lambda: None)
    here.faults |= {f"tests-{op}-float32": (1, "/usr/bin/python3: No module named pytest") for op in phases.OPS}
    code, results = here.call()
    said = capsys.readouterr().out
    assert code == 0 and results.keys() >= FIGURES
    assert "memeff: absent: memeff is not installed (attention, attention-audio, attention-text, info-nce, mlp" in said
    assert "memcheck mlp: absent: compute-sanitizer is not on this machine" in said.split("MISSING\n")[1]
    assert "tests mlp float32: absent: pytest is not installed" in said
    assert results["mlp"]["header"]["tests"] == "not finished: absent: pytest is not installed"


def test_jobs_out_of_time_take_nothing_from_others(here, capsys):
    """Each is stopped, at its share; none of the later phases is late; what does not fit is for the next call."""
    here.takes = 1e6
    begun = here.now
    code, results = here.call("--seconds", "570")
    ends, first = endings(results), sum(phase.seconds for phase in phases.FIRST if not phase.together)
    assert code == 0 and results.keys() >= FIGURES  # what they had is kept
    assert all(ends[name][0] == "open" and ends[name][1].startswith("stopped after") for name in FIGURES)
    assert first <= here.now - begun <= 570  # phases of many jobs take no time here
    spent = {row["name"]: row["seconds"] for row in results["run"]["rows"]}
    for job in (*phases.OP_BENCHES[1:], *phases.ENCODERS, *phases.TRAINING, *phases.PROFILES):
        assert spent[job.name] >= 0.99 * job.seconds * min(1, 97 / 100), job.name
    assert "attention: stopped after" in capsys.readouterr().out.split("MISSING\n")[1]
    here.takes = 1.0
    code, results = here.call("--seconds", "570")
    assert all(endings(results)[name] == ("done", "") for name in FIGURES)


def test_a_short_call_shrinks_the_shares(here):
    """And what has no time left says so; a second call does that alone."""
    here.takes = 1e6
    begun = here.now
    code, results = here.call("--seconds", "100")
    assert code == 0 and here.now - begun <= 100
    assert endings(results)["profile"][1].startswith("stopped after")
    here.takes = 50.0
    here.asked.clear()
    _, results = here.call("--seconds", "60", "--only", "ops")
    assert endings(results)["temporal-attention"][0] == "open"
    assert set(here.asked) <= {job.name for job in phases.OP_BENCHES}
    with pytest.raises(SystemExit):
        here.call("--only", "smell")


def test_tests_that_were_skipped_have_not_passed(here):
    skipped = "tests/test_gpu.py::test_mlp[1] SKIPPED (no GPU) [100%]\n"
    here.faults |= {f"tests-mlp-{dtype}": (0, skipped) for dtype in phases.DTYPES}
    _, results = here.call()
    assert results["mlp"]["header"]["tests"] == "not run" and results["attention"]["header"]["tests"] == "passed"


def test_no_time_left_is_said(here, capsys):
    here.call("--seconds", "5")
    assert "mlp: not run: no time left" in capsys.readouterr().out.split("MISSING\n")[1]


def test_memory_short(here, capsys):
    """Of a bench: a row that says so, and no failure. Of a test: it is not finished."""
    here.faults["languagebind-image"] = (1, f"Traceback\n{SHORT_OF_MEMORY}\n")
    here.faults["training"] = (-9, "")
    failed = "tests/test_gpu.py::test_layer_norm_beyond_int32 FAILED [100%]\n"
    here.faults["tests-layer_norm-other"] = (
        1,
        f"{failed}FAILED tests/test_gpu.py::test_layer_norm_beyond_int32 - {SHORT_OF_MEMORY}\n",
    )
    code, results = here.call()
    missing = capsys.readouterr().out.split("MISSING\n")[1]
    assert code == 0 and results.keys() >= FIGURES
    assert "languagebind-image: memory short: torch.OutOfMemoryError" in missing
    assert "training: memory short: killed" in missing
    assert "tests layer_norm other: memory short: test_layer_norm_beyond_int32" in missing


def test_one_of_ours_that_is_wrong_is_red(here):
    """Whatever a peer ran out of."""
    said = f"eager: not timed: {SHORT_OF_MEMORY}\nlbfast triton: not timed: wrong: 1e-1 from reference\n/out.json\n"
    here.faults["mlp"] = (1, said)
    code, results = here.call()
    assert code == 1 and results.keys() >= FIGURES
    assert endings(results)["mlp"][1].startswith("FAILED with exit status 1: lbfast triton: not timed: wrong: 1e-1")


def test_a_bench_that_crashes_is_red(here):
    here.faults["patch-embed"] = (1, "Traceback\nValueError: crashed\n")
    code, results = here.call()
    assert code == 1 and results.keys() >= FIGURES - {"patch-embed"} and "patch-embed" not in results
    assert endings(results)["patch-embed"] == ("red", "FAILED with exit status 1: ValueError: crashed")


def test_a_killed_run_is_gone_on_with(here, capsys):
    """On a fresh machine: the file of results is all that it needs."""
    here.faults["layer-norm"] = (KeyboardInterrupt(), "")
    with pytest.raises(KeyboardInterrupt):
        here.call()
    results = json.loads((here.folder / "results" / "nvidia-h200.json").read_text())
    assert {"device", "attention", "mlp"} <= results.keys() and "layer-norm" not in results
    assert endings(results)["layer-norm"] == ("open", "not finished: the run ended before it")
    assert "layer-norm: not finished" in (here.folder / "out" / ledger.SUMMARY).read_text()
    first, here.faults = set(here.asked) - {"layer-norm"}, {}
    here.asked.clear()
    code, results = here.call()
    assert code == 0 and results.keys() >= FIGURES and not first & set(here.asked)
    assert {"layer-norm", "temporal-attention", "languagebind-image", "tune", "mlp-tuned"} <= set(here.asked)
    assert "attention" in capsys.readouterr().out.split("OPS")[1]  # the first run's figures are told, too
    here.asked.clear()
    assert here.call()[0] == 0 and not here.asked
    file = str(here.folder / "results" / "nvidia-h200.json")
    assert compare.main([file, file]) == 0 and "mlp: c" in capsys.readouterr().out
    here.call("--again")
    assert first <= set(here.asked)


def test_other_sources_are_measured_again(here, monkeypatch):
    here.call()
    here.asked.clear()
    monkeypatch.setattr(gpu, "sources", lambda: "another")
    here.call()
    assert "attention" in here.asked


def test_ops_whose_rows_changed_are_measured_with_them(here, monkeypatch):
    _, results = here.call()
    assert "mlp-tuned" in results and "attention-tuned" not in results
    table = dict(tune._configs().MLP_FWD)
    seen = []
    module = SimpleNamespace(main=lambda rest: seen.append((rest, dict(tune._configs().MLP_FWD))) or 0)
    monkeypatch.setitem(sys.modules, "bench.seen", module)
    try:
        assert (
            importlib.import_module("bench.tuned").main(
                [str(here.folder / "results" / "nvidia-h200.json"), "bench.seen", "--rows", "3"]
            )
            == 0
        )
    finally:
        tune._configs().MLP_FWD.clear()
        tune._configs().MLP_FWD.update(table)
    ((rest, rows),) = seen
    assert rest == ["--rows", "3"] and rows["sm_90"] == tune._configs().Launch({"BLOCK": 2048}, 8)


def test_results_are_on_disk_while_a_job_runs(here, tmp_path):
    """What a job has written is taken in before it ends."""
    work = tmp_path / "work"
    work.mkdir()
    with pretended_gpu():
        book = ledger.Ledger(tmp_path / "results", tmp_path / "out", work, "s")
        (work / "mlp.json").write_text(result("mlp"))
        book.keep()
    assert "mlp" in json.loads(book.file.read_text()) and (tmp_path / "out" / ledger.ARCHIVE).exists()


def test_peers_from_wheels(here, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "memeff-0.3.1-py3-none-any.whl", "w") as archive:
        archive.writestr("memeff/__init__.py", "here = True")
    (wheels / "broken-1-py3-none-any.whl").write_text("no archive")
    seen = []
    here.bench = lambda module, out, command, log: (
        seen.append([p for p in here.envs[log.stem]["PYTHONPATH"].split(os.pathsep) if Path(p, "memeff").exists()]),
        out.write_text(result(out.stem)),
    )
    here.call("--only", "mlp", "--wheels", str(wheels), "--commit", "abc123")
    assert len(seen[0]) == 1
    os.environ.pop(harness.COMMIT, None)
