"""The benches themselves: they refuse what is wrong, go on where one fails, and say what they measured."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench.options
from bench import (
    bench_files,
    bench_info_nce,
    bench_languagebind,
    bench_training,
    contest,
    harness,
    peers,
    run,
)
from lbfast.cli.bench import BENCHES
from lbfast.model.config import LanguageBindImageConfig
from lbfast.profiling import machine
from lbfast.reference import languagebind as reference
from tests import tiny, workers

ROOT = Path(__file__).resolve().parents[1]
OPS = {
    "attention": ["--shape", "9", "2", "32"],
    "temporal_attention": ["--shape", "5", "2", "32", "--frames", "3"],
    "patch_embed": ["--side", "28", "--width", "32"],
    "layer_norm": ["--tokens", "3", "--width", "64"],
    "mlp": ["--rows", "7", "--shape", "16", "32"],
    "info_nce": ["--size", "32", "--dim", "16"],
    "sigmoid_loss": ["--size", "32", "--dim", "16"],
}
BRIEF = ["--seconds", "0", "--no-compile"]


@pytest.fixture(autouse=True)
def _rates(monkeypatch):
    """No matrix product of 2048 x 2048 in each test."""
    monkeypatch.setattr(machine, "rates", lambda device, dtype: machine.Rates(1e11, 1e10))


def options(**more):
    given = {"no_compile": False, "passes": list(contest.PASSES), "seconds": 0, "dtype": ["float32"]}
    return argparse.Namespace(**{**given, **more})


@pytest.mark.parametrize("installed", [True, False])
def test_help_fits_a_terminal_and_names_the_command(installed, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(bench.options, "INSTALLED", installed)
    command = "lbfast bench " if installed else "python -m bench.bench_"
    for name in BENCHES:
        with pytest.raises(SystemExit):
            importlib.import_module(f"bench.bench_{name}").main(["--help"])
        said = capsys.readouterr().out
        assert said.startswith(f"usage: {command}{name} ") and said.count(f"{command}{name}") >= 2
        assert ("python -m bench" in said) != installed
        assert max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("attention", ["--shape", "0", "4", "8"], "argument --shape: expected a whole number of at least 1, got '0'"),
        ("attention", ["--seconds", "nan"], "argument --seconds: expected a number of seconds from 0, got 'nan'"),
        ("info_nce", ["--size", "1e3"], "argument --size: expected a whole number of at least 1, got '1e3'"),
        ("languagebind", ["--batch", "-1"], "argument --batch: expected a whole number of at least 1, got '-1'"),
        ("languagebind", ["--layers", "0"], "argument --layers: expected a whole number of at least 1, got '0'"),
        ("training", ["--micro-batch", "0"], "argument --micro-batch: expected a whole number of at least 1, got '0'"),
    ],
)
def test_sizes_that_are_none(name, wrong, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"bench.bench_{name}").main(wrong)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_bench_that_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "cpu_memory", lambda *a, **k: harness.Memory(1.0, 2.0))  # a process each
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    module = importlib.import_module(f"bench.bench_{name}")
    out = tmp_path / "new" / "out.json"
    assert module.main([*OPS[name], *BRIEF, "--dtype", "float32", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    timed = [row for row in result["rows"] if "median_ms" in row]
    assert {row["part"] for row in timed} == {"fwd", "bwd", "both"}
    assert any(row["name"].startswith("lbfast") for row in timed)
    for row in timed:
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["of_floor"] >= 0 and row["dtype"] == "float32"
    assert {"device", "torch", "commit", "date", "tests", "slug", "matmul_tflops_float32"} <= result["header"].keys()
    shown, said = capsys.readouterr()
    assert "lbfast triton: not timed" in shown and "median ms" in shown
    short = shown[shown.index(", float32, forward and backward:\n  lbfast ") :]
    lines = [line for line in short.splitlines() if line != str(out)]
    assert max(map(len, lines)) <= 80 and said.startswith("1 of ")


def test_contenders_must_agree_and_one_that_fails_is_a_row(capsys):
    x = torch.randn(4, 4, requires_grad=True)
    record = harness.Record("a title", "cpu")

    def broken(x):
        raise RuntimeError("no kernel for this\nand more")

    contenders = {"plain": torch.sin, "peer": torch.cos, "lbfast": lambda x: x.sin() * 1.5, "broken": broken}
    contest.run([contest.Case("4x4", [x])], contenders, record, options(passes=["fwd"]))
    notes = {row["name"]: row["note"] for row in record.rows if "note" in row}
    assert notes["broken"] == "no kernel for this" and "wrong" in notes["peer"] and "not timed" in notes["lbfast"]
    assert [row["name"] for row in record.rows if "median_ms" in row] == ["plain"]
    assert contest.show(record) == 1  # one of ours is wrong
    assert "no kernel for this" in capsys.readouterr().out
    record.rows = [row for row in record.rows if row["name"] != "lbfast"]
    assert contest.show(record) == 0  # a peer may be


def test_contest_on_a_gpu(monkeypatch):
    """What is captured is what is timed, on a stream of its own; a backward that cannot be captured is a row."""
    calls = []

    def captured(step):
        calls.append(step)
        if len(calls) == 4:  # fwd, bwd, both, behind what waits
            raise RuntimeError("operation not permitted when stream is capturing")
        return step

    class Stream:
        def wait_stream(self, other):
            calls.append("waits")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(contest, "captured", captured)
    monkeypatch.setattr(harness, "gpu_extra_mib", lambda step: 3.0)
    monkeypatch.setattr(harness, "_gpu_ms", harness._cpu_ms)
    monkeypatch.setattr(machine, "facts", lambda device: {"device": "NVIDIA H200", "cuda": "13.0"})
    record = harness.Record("a title", "cuda")
    x = torch.randn(4, 4, requires_grad=True)
    contest.run([contest.Case("4x4", [x], (8, 8), (64, 64))], {"lbfast": torch.sin}, record, options())
    assert calls[0] == "waits" == calls[-1]
    assert [(row["part"], row["extra_MiB"]) for row in record.rows if "median_ms" in row] == [
        ("fwd", 3.0),
        ("bwd", 3.0),
    ]
    assert [row["part"] for row in record.rows if "note" in row] == ["both"]
    assert harness.describe(record.header).startswith("NVIDIA H200, ") and record.header["slug"] == "nvidia-h200"


def test_what_a_captured_step_reads_stays_alive(monkeypatch):
    """A replay reads what the step held when it was captured."""
    graph = SimpleNamespace(replay=lambda: replays.append(1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())
    kept, replays = torch.zeros(3), []
    held = weakref.ref(kept)
    replay = contest.captured(lambda kept=kept: kept.add(1))
    del kept
    replay()
    assert replays == [1] and held() is not None
    del replay
    assert held() is None


def test_a_backward_that_cannot_be_repeated_is_a_row(monkeypatch):
    def once(name, part, tensors, step=bench_info_nce.step):
        def fails():
            raise RuntimeError("compiled with donated buffers\nand more")

        return fails if (name, part) == ("dense", "bwd") else step(name, part, tensors)

    monkeypatch.setattr(bench_info_nce, "step", once)
    monkeypatch.setattr(harness, "cpu_memory", lambda *of, **more: harness.Memory(1.0, 2.0))
    record = harness.Record("a title", "cpu")
    bench_info_nce.measure(16, 8, "float32", record, ["fwd", "bwd", "both"], 0.0)
    noted = [row for row in record.rows if row["name"] == "dense" and "note" in row]
    assert [(row["part"], row["note"]) for row in noted] == [("bwd", "compiled with donated buffers")]
    assert {row["part"] for row in record.rows if row["name"] == "dense" and "median_ms" in row} == {"fwd", "both"}


@pytest.mark.parametrize("name", OPS)
def test_every_bench_on_a_pretended_gpu(name, pretended_gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    out = tmp_path / "out.json"
    module = importlib.import_module(f"bench.bench_{name}")
    arguments = ["--samples", "2"] if name == "attention" else ["--clips", "1"]
    arguments = arguments if name not in ("mlp", "info_nce", "sigmoid_loss") else []
    assert module.main([*OPS[name], *arguments, *BRIEF, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["header"]["device"] == "NVIDIA H200" and result["header"]["slug"] == "nvidia-h200"
    timed = [row for row in result["rows"] if "median_ms" in row]
    assert {row["part"] for row in timed} == {"fwd", "bwd", "both"} and {row["dtype"] for row in timed} == {"bfloat16"}
    assert all(row["extra_MiB"] > 0 for row in timed)


def test_whole_encoders_on_a_pretended_gpu(pretended_gpu, tiny_archs, tmp_path):
    out = tmp_path / "out.json"
    assert bench_languagebind.main(["video", "--batch", "1", *BRIEF, "--out", str(out)]) == 0
    rows = [row for row in json.loads(out.read_text())["rows"] if "median_ms" in row]
    assert {"lbfast bfloat16", "lbfast float32", "reference autocast"} <= {row["name"] for row in rows}
    assert all(row["peak_MiB"] > 0 and row["cosine"] > 0.98 for row in rows)


@pytest.mark.parametrize(("tuned", "modality"), [("full", "image"), ("lora", "video")])
def test_every_way_of_a_training_step_gives_the_same_gradient(tuned, modality):
    size = bench_training.Size(micro_batch=2, width=64, layers=1, modality=modality)
    found = {}
    for kind in bench_training.KINDS:
        torch.manual_seed(1)
        model = bench_training.step(kind, tuned, 3, size, "cpu")()
        found[kind] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.norm()}
    dense = found["dense"]
    for kind, gradients in found.items():
        assert gradients.keys() == dense.keys(), kind
        pieces = 2 if kind == "accumulation" else 1  # open_clip's loop adds the scale's gradient up, once for each
        for name, times in (("logit_scale", pieces), ("visual_projection.weight", 1)):
            wanted = times * dense[name]
            torch.testing.assert_close(gradients[name], wanted, rtol=1e-3, atol=1e-6, msg=f"{kind} {name}")


def test_memory_of_a_process_of_its_own():
    found = harness.cpu_memory(workers.allocates, 64)
    assert 60 < found.extra < 80 and found.peak > found.own > found.extra - 4
    with pytest.raises(RuntimeError, match="ended early"):
        harness.cpu_memory(workers.dies)


def test_slow_candidates_get_two_rounds():
    timing = harness.interleaved({"a": lambda: time.sleep(0.01)}, "cpu", seconds=0.001)["a"]
    assert timing.rounds == 2 and timing.median_ms >= 10
    assert harness.interleaved({"a": int}, "cpu", seconds=0.001, most=7)["a"].rounds == 7


@pytest.mark.any_device
def test_small_cases_of_every_kernel(monkeypatch, capsys):
    pytest.importorskip("triton")
    from bench import memcheck, resources

    assert memcheck.main([]) == 0
    files = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"primitives", "configs", "pairs"}
    kernels = {resources.op_of(name) for name in files}
    named = {re.split(r"[ ,]", line)[0] for line in capsys.readouterr().out.splitlines()}
    assert kernels <= named


def test_lines_are_broken_between_words_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    harness.say("CPU, torch 2.13.0, matmul_tflops_float32 1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    harness.say("CPU, torch 2.13.0, matmul_tflops_float32 1")
    whole, *broken = capsys.readouterr().out.splitlines()
    assert whole == " ".join(broken) and broken == ["CPU, torch 2.13.0,", "matmul_tflops_float32", "1"]


# Whole encoders


@pytest.fixture
def tiny_archs(monkeypatch):
    monkeypatch.setattr(bench_languagebind, "published_config", lambda name, size: tiny.config(name, lora_r=0))


def languagebind(tmp_path, *arguments):
    out = tmp_path / "out.json"
    code = bench_languagebind.main([*arguments, *BRIEF, "--no-memory", "--out", str(out)])
    return code, json.loads(out.read_text())["rows"]


def test_whole_encoders(tiny_archs, tmp_path, capsys):
    code, rows = languagebind(tmp_path, "--batch", "2")
    assert code == 0
    timed = {(row["modality"], row["name"]): row for row in rows if "median_ms" in row}
    names = {name for _, name in timed}
    assert {"reference float32", "reference autocast", "lbfast drop-in float32", "lbfast float32"} <= names
    assert "lbfast bfloat16" in names and {m for m, _ in timed} == set(bench_languagebind.MODALITIES)
    for row in timed.values():
        assert row["cosine"] >= 0.999 and row["mfu"] >= 0 and row["items_s"] > 0 and row["batch"] == 2
    notes = {row["name"]: row["note"] for row in rows if "note" in row}
    assert "absent" in notes["languagebind float32"] and "emulated" in notes["lbfast fp8"]
    assert "items/s" in capsys.readouterr().out


def test_candidates_of_one_precision_take_turns():
    groups = bench_languagebind.groups(list(bench_languagebind.CANDIDATES), "bfloat16")
    assert sorted(name for group in groups for name in group) == sorted(bench_languagebind.CANDIDATES)
    assert groups[0][0] == "reference float32"  # what all are compared with
    assert [name for name in groups[-1] if name.split()[0] in ("lbfast", "openvino")] == [
        "lbfast int8",
        "openvino int8",
    ]
    assert {"lbfast short", "openvino short"} <= set(groups[1])


@pytest.mark.parametrize("modality", bench_languagebind.MODALITIES)
def test_plain_torchs_best_is_the_same_model(tiny_archs, modality):
    """SDPA and weights in bfloat16, which torch.compile then has to beat."""
    about = bench_languagebind.subject(modality, "L/14", None, "bfloat16", "cpu")
    given = bench_languagebind.inputs(about, 2, "cpu")
    build = bench_languagebind._theirs(bench_languagebind._sdpa, compiled=False, short=True)
    with torch.inference_mode():
        got, expected = build(about)(given), bench_languagebind.CANDIDATES["reference float32"](about)(given)
    assert got.dtype == torch.bfloat16 and next(about.model.parameters()).dtype == torch.float32
    assert torch.cosine_similarity(got.double(), expected.double(), dim=-1).min() > 0.999


def test_an_encoder_that_is_wrong_is_not_timed(tiny_archs, tmp_path, monkeypatch):
    wrong = bench_languagebind._as_is(lambda pixel_values: torch.randn(len(pixel_values), tiny.SIZE))
    monkeypatch.setitem(bench_languagebind.CANDIDATES, "lbfast float32", lambda about: wrong)
    code, rows = languagebind(tmp_path, "image", "--batch", "2")
    assert code == 1
    (row,) = [row for row in rows if row["name"] == "lbfast float32"]
    assert "wrong: a cosine of" in row["note"]


def test_upstreams_package_is_measured_where_it_is(tiny_archs, tmp_path, monkeypatch):
    """A package of its layout: config_dict and model_dict, and parameters of the same names."""

    config_dict = {"image": SimpleNamespace(from_dict=LanguageBindImageConfig.from_dict)}
    upstream = SimpleNamespace(config_dict=config_dict, model_dict={"image": reference.LanguageBind})
    monkeypatch.setitem(sys.modules, "languagebind", upstream)
    _, rows = languagebind(tmp_path, "image", "--batch", "1")
    (row,) = [row for row in rows if row["name"] == "languagebind float32"]
    assert row["cosine"] > 0.99999 and "median_ms" in row
    upstream.model_dict["image"] = lambda config: torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="parameters of other names: weight"):
        peers.languagebind_model(tiny.model("image"))


def test_encoders_alone_for_their_memory(tiny_archs):
    for name in ("reference autocast", "lbfast short"):
        call = bench_languagebind.once(name, "video", "L/14", None, "bfloat16", 77, 1)
        assert call().shape == (1, tiny.SIZE)


def test_nothing_in_an_encoder_can_be_left_out(tiny_archs):
    """OpenVINO made one product of queries, keys and values whose weights were equal."""
    tensors = [
        p for p in bench_languagebind.subject("video", "L/14", None, "bfloat16", "cpu").model.parameters() if p.dim()
    ]
    assert all(p.std() > 0 and p.ne(0).all() for p in tensors)
    for i, one in enumerate(tensors):
        assert not any(one.shape == other.shape and torch.equal(one, other) for other in tensors[:i])


def test_flops_are_those_of_the_reference(tiny_archs):
    """Of captions without padding: the same whatever they are padded to."""
    about = bench_languagebind.subject("text", "L/14", None, "bfloat16", "cpu")
    given = bench_languagebind.inputs(about, 3, "cpu")
    shorter = {key: value[:, :30] for key, value in given.items()}
    assert bench_languagebind.flops(about, given) == bench_languagebind.flops(about, shorter) > 0
    with pytest.raises(SystemExit):
        bench_languagebind.main(["smell"])


# The runner


@pytest.fixture
def commands(monkeypatch):
    """What run.run is asked for; the answer is that of `codes`, by the first word found in the command, else 0."""
    asked, codes = [], {}

    def fake(command, seconds, env):
        line = " ".join(map(str, command))
        asked.append((line, dict(env), seconds))
        if "--out" in command:
            row = {"case": "1", "dtype": "float32", "median_ms": 2.0}
            rows = [{**row, "name": "lbfast torch"}, {**row, "name": "eager", "median_ms": 5.0}]
            Path(command[command.index("--out") + 1]).write_text(json.dumps({"header": {}, "rows": rows}))
        return next((code for word, code in codes.items() if word in line), 0)

    monkeypatch.setattr(run, "run", fake)
    monkeypatch.delenv(harness.TESTS, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield SimpleNamespace(asked=asked, codes=codes)
    import os

    os.environ.pop(harness.TESTS, None)


def test_red_tests_and_nothing_is_measured(commands, tmp_path, capsys):
    commands.codes["pytest"] = 1
    assert run.main(["--folder", str(tmp_path)]) == 1
    assert len(commands.asked) == 1 and not list(tmp_path.iterdir())
    assert "the tests failed with exit status 1: nothing is measured" in capsys.readouterr().err


def test_one_bench_fails_and_the_others_still_run(commands, tmp_path, capsys):
    commands.codes |= {"bench_mlp": 1, "bench_layer_norm": None}
    assert run.main(["--folder", str(tmp_path)]) == 1
    benches = [line for line, _, _ in commands.asked if "--out" in line]
    assert len(benches) == sum(not piece.extra for piece in run.PIECES)
    assert all(env["CUDA_VISIBLE_DEVICES"] == "" for _, env, _ in commands.asked)
    assert commands.asked[0][1].get(harness.TESTS) is None and commands.asked[1][1][harness.TESTS] == "passed"
    shown = capsys.readouterr().out
    assert "mlp: FAILED with exit status 1" in shown and "layer-norm: stopped after" in shown
    assert "2.50 x" in shown.split("mlp: FAILED")[0]  # the table comes before
    commands.codes.clear()
    assert run.main(["--skip-tests", "--only", "attention", "--folder", str(tmp_path)]) == 0


def test_no_time_left(commands, tmp_path, capsys):
    assert run.main(["--skip-tests", "--budget", "1", "--folder", str(tmp_path)]) == 0
    assert not commands.asked and capsys.readouterr().out.count("not run: no time left") > 5


def test_a_bench_that_hangs_is_stopped_with_its_children(tmp_path):
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begun = time.monotonic()
    assert run.run([sys.executable, "-c", program], 1.0, {}) is None
    assert time.monotonic() - begun < 10
    said = "import sys; print('out'); print('err', file=sys.stderr); raise SystemExit(7)"
    assert run.run([sys.executable, "-c", said], 30, {}, tmp_path / "log") == 7
    assert sorted((tmp_path / "log").read_text().split()) == ["err", "out"]


def test_files_beside_others_and_a_model_that_is_fed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_files, "EATERS", (bench_files.Eater("image", 2, 0.005, 12),))
    out = tmp_path / "files.json"
    arguments = ["--kinds", "JPEG 500", "depth", "wav", "--seconds", "0.01", "--workers", "0", "--out", str(out)]
    assert bench_files.main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    timed = {(row["case"], row["name"]): row for row in rows if "median_ms" in row}
    assert timed["JPEG 500 x 375", "lbfast"]["decode_ms"] < timed["JPEG 500 x 375", "lbfast"]["median_ms"]
    assert all(row["differs"] < 1e-5 for (case, name), row in timed.items() if name == "upstream")
    assert {case for case, _ in timed} == {"JPEG 500 x 375", "depth PNG 640 x 480", "wav 10 s"}
    (fed,) = (row for row in rows if row.get("what") == "pipeline")
    assert 0 < fed["busy"] <= 1 and fed["main_ms"] > 0
    said = capsys.readouterr().out
    assert ("simplejpeg (No module named" in said) != ("simplejpeg" in {name for _, name in timed})
    assert "JPEG 500 x 375: " in said and "  upstream: " in said and " of the time busy, " in said


def test_pieces_name_benches_that_take_their_arguments():
    assert len({piece.name for piece in run.PIECES}) == len(run.PIECES)
    assert sum(piece.limit for piece in run.PIECES if not piece.extra) > run.BUDGET / 2
    for piece in run.PIECES:
        module = importlib.import_module(f"bench.{piece.module}")
        with pytest.raises(SystemExit) as ended:
            module.main([*piece.arguments, "--help"])
        assert ended.value.code == 0, piece
