"""Training runs: resumed after any end, equal over processes, their checkpoints whole; recipes, starts, exports."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import lbfast.cli
from lbfast.model.checkpoint import CheckpointError
from lbfast.model.languagebind import model_dict
from lbfast.training import checkpoints, report
from lbfast.training.checkpoints import CheckpointWriteError
from lbfast.training.run import TrainingError, scheduled
from lbfast.training.trainer import train
from tests import tiny, trainees

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("LBFAST_TEST_KILLS", "3"))
LONG = {"epochs": max(10, 5 * KILLS), "patch_dropout": 0.5}
LAST = 3 * LONG["epochs"]


@pytest.fixture(autouse=True)
def _one_thread():
    with trainees.one_thread():
        yield


def run(out, plan=None, data=None, **options):
    plan = plan or trainees.plan()
    model = trainees.trainee(plan)
    summary = train(plan, model, data or trainees.Data(), out, **options)
    return summary, trainees.weights(model)


def steps_of(out):
    return [row["step"] for row in report.read(out / report.METRICS)]


def losses_of(out):
    return [row["loss"] for row in report.read(out / report.METRICS)]


def test_a_run_learns_and_is_exported(tmp_path):
    plan = trainees.plan(epochs=12)
    summary, weights = run(tmp_path, plan, save_every=10, keep=2)
    assert (summary.steps, summary.total, summary.samples, summary.stopped) == (36, 36, 216, None)
    assert steps_of(tmp_path) == list(range(1, 37))
    losses = losses_of(tmp_path)
    assert losses[-1] == summary.loss and sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert [p.name for p in checkpoints.existing(tmp_path / "checkpoints")] == ["step-00000030", "step-00000036"]
    loaded = model_dict["depth"].from_pretrained(summary.model, merge_lora=False)
    assert trainees.same(trainees.weights(loaded), weights)
    row = report.read(tmp_path / report.METRICS)[-1]
    assert row.keys() == {"step", "epoch", "lr", "rows", "loss", "scale", "norm", "memory_mib", "samples_per_second"}
    assert row["epoch"] == 11 and row["memory_mib"] > 1 and row["samples_per_second"] > 0


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    plan = trainees.plan(patch_dropout=0.5, lora_dropout=0.1)
    whole, wanted = run(tmp_path / "whole", plan)
    for steps in (4, 5, None):
        part, found = run(tmp_path / "parts", plan, steps=steps, save_every=2)
    assert whole.steps == part.steps == 9
    assert trainees.same(found, wanted)
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    again, found = run(tmp_path / "parts", plan)
    assert (again.samples, again.loss) == (0, None)  # nothing is left to do
    assert trainees.same(found, wanted)


def test_killed_at_random_moments(tmp_path, processes):
    """SIGKILL, whatever the run is doing: it goes on from at most one interval before, to bitwise the same end."""
    from tests import runs

    begun = time.monotonic()
    whole = processes.Process(target=runs.long_run, args=(tmp_path / "whole", LONG))
    whole.start()
    whole.join()
    longest = (time.monotonic() - begun) / (KILLS + 1)  # all of them together do not reach the end
    draw, lost = random.Random(os.urandom(8).hex()), []
    for _ in range(KILLS):
        child = processes.Process(target=runs.long_run, args=(tmp_path / "killed", LONG))
        child.start()
        child.join(draw.uniform(0.1, 1) * longest)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        done = max(steps_of(tmp_path / "killed"), default=0)
        last = checkpoints.newest(tmp_path / "killed" / "checkpoints")
        lost.append(done - (int(last.name[5:]) if last else 0) if child.exitcode else -1)
    last = processes.Process(target=runs.long_run, args=(tmp_path / "killed", LONG))
    last.start()
    last.join()
    assert whole.exitcode == last.exitcode == 0
    assert 0 <= max(lost) <= runs.SAVE_EVERY, lost
    print(f"{sum(loss >= 0 for loss in lost)} killed, steps lost: {lost}, of {done} at the last")
    ends = [checkpoints.load(tmp_path / name / "checkpoints" / f"step-{LAST:08d}") for name in ("whole", "killed")]
    assert trainees.same(ends[0][0], ends[1][0])
    moments = [end[1]["optimizer"] for end in ends]
    assert all(trainees.same(moments[0][name], moments[1][name]) for name in moments[0])
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "killed")
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) == 2  # nothing half written is left


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signals_save_and_end(tmp_path, processes, number, status):
    from tests import runs

    child = processes.Process(target=runs.command, args=(tmp_path,))
    child.start()
    runs.wait_for(tmp_path / "out" / report.METRICS)
    os.kill(child.pid, number)
    child.join(60)
    assert child.exitcode == status
    done = steps_of(tmp_path / "out")
    assert checkpoints.newest(tmp_path / "out" / "checkpoints").name == f"step-{done[-1]:08d}"
    assert done[-1] < runs.STEPS
    assert "the same command goes on" in (tmp_path / "stdout").read_text()


def test_two_processes_equal_one(tmp_path, processes):
    """Under torchrun's agent, from files, by the command line."""
    from tests import runs

    data, model = trainees.manifest(tmp_path), tiny.checkpoint(tmp_path, "image")
    common = ["train", "--recipe", "depth", "--model", str(model), "--data", str(data), "--device", "cpu"]
    for field in ("batch_size=6", "epochs=2", "warmup=2", "lr=0.01", "coef_lr=0.1", "micro_batch=2"):
        common += ["--set", field]
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    arguments = (ranks, 2, *common, "--out", str(tmp_path / "two"), "--steps", "4")
    child = processes.Process(target=runs.torchrun, args=arguments)
    child.start()
    child.join(120)
    said = [(ranks / rank / "stdout").read_text() for rank in "01"]
    assert child.exitcode == 0, [(ranks / rank / "stderr").read_text() for rank in "01"]
    assert [text.count("steps") for text in said] == [1, 0]  # the first process speaks
    result = CliRunner().invoke(lbfast.cli.app, [*common, "--out", str(tmp_path / "one"), "--steps", "4"])
    assert result.exit_code == 0, result.stderr
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)
    two, one = (checkpoints.load(tmp_path / name / "checkpoints" / "step-00000004") for name in ("two", "one"))
    start = trainees.weights(model_dict["depth"].from_pretrained(model, config=tiny.config("depth")))
    for name, value in one[0].items():
        moved = value - start.get(name, torch.zeros_like(value))
        assert (two[0][name] - value).norm() <= 1e-2 * moved.norm() + 1e-6, name


def test_a_loss_that_is_no_number(tmp_path):
    data = trainees.Data()

    def spoil(step):
        if step == 5:
            data.all.pixel_values[:] = math.nan

    data.before = spoil
    with pytest.raises(
        TrainingError, match=r"the loss is nan at step 6 of 9: .*the last good checkpoint is .*00000004"
    ):
        run(tmp_path, data=data, save_every=2)
    assert checkpoints.newest(tmp_path / "checkpoints").name == "step-00000004"
    assert all(math.isfinite(loss) for loss in losses_of(tmp_path))


def test_a_gradient_that_is_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr("lbfast.training.run.gradient_norm", lambda parameters, group: torch.tensor(math.inf))
    with pytest.raises(TrainingError, match=r"gradient is inf at step 1 of 9: .*there is no checkpoint yet"):
        run(tmp_path, save_every=1)
    assert not checkpoints.existing(tmp_path / "checkpoints")


def test_a_full_disk(tmp_path, processes):
    """Files may not grow past a limit: the checkpoint fails, the one before stays, and the run goes on from it."""
    from tests import runs

    child = processes.Process(target=runs.on_a_small_disk, args=(tmp_path,))
    child.start()
    child.join()
    said = (tmp_path / "error").read_text()
    assert "step-00000004: cannot write the checkpoint: " in said and "MiB are free there" in said
    assert "the last complete checkpoint is" in said and said.endswith("step-00000002")
    folder = tmp_path / "out" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    summary, found = run(tmp_path / "out")
    assert summary.samples == 7 * 6
    assert trainees.same(found, run(tmp_path / "whole")[1])


@pytest.mark.parametrize("call", ["torch.save", "os.fsync", "os.rename"])
def test_no_space_left(tmp_path, monkeypatch, call):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run(tmp_path, steps=2)
    data = trainees.Data()
    data.before = lambda step: monkeypatch.setattr(call, full)  # when the run goes on
    with pytest.raises(CheckpointWriteError, match=r"No space left on device .*checkpoint is .*step-00000002"):
        run(tmp_path, data=data, steps=4)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert run(tmp_path)[0].steps == 9


def test_torn_checkpoints_are_passed_over(tmp_path):
    _, wanted = run(tmp_path / "whole")
    run(tmp_path / "torn", steps=6, save_every=1, keep=5)
    folder = tmp_path / "torn" / "checkpoints"
    (folder / "step-00000006" / "manifest.json").unlink()
    state = folder / "step-00000005" / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])
    weights = folder / "step-00000004" / "trained.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (folder / ".step-00000007.1").mkdir()
    assert checkpoints.newest(folder).name == "step-00000003"
    with pytest.raises(CheckpointError, match=r"state.pt: expected .* bytes"):
        run(tmp_path / "torn", resume=folder / "step-00000005")
    summary, found = run(tmp_path / "torn")
    assert summary.samples == 6 * 6
    assert trainees.same(found, wanted)
    assert not list(folder.glob(".*"))


def test_a_checkpoint_of_another_run(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(CheckpointError, match=r"another recipe: lr was 0.01 and is 0.5"):
        run(tmp_path, trainees.plan(lr=0.5))
    with pytest.raises(CheckpointError, match="other data: an epoch had 3 steps and has 2"):
        run(tmp_path, data=trainees.Data(samples=12))
    with pytest.raises(CheckpointError, match="began with another model"):
        train(trainees.plan(), trainees.trainee(trainees.plan(), seed=1), trainees.Data(), tmp_path)
    with pytest.raises(ValueError, match="has checkpoints of an earlier run"):
        run(tmp_path, resume="never")
    with pytest.raises(ValueError, match="resume: expected 'auto', 'never' or the directory"):
        run(tmp_path, resume=tmp_path / "nowhere")
    assert run(tmp_path, trainees.plan(micro_batch=3, checkpointing="layers"), steps=3)[0].steps == 3


def test_the_learning_rate():
    plan = trainees.plan(lr=1.0, warmup=4)
    rates = [scheduled(plan, step, 12) for step in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[8] == pytest.approx(0.5)
    assert rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.05


def test_the_temperature_stays_in_its_range(tmp_path):
    plan = trainees.plan(lr=100.0, coef_lr=1.0, warmup=0, temperature=0.0101)
    run(tmp_path, plan, steps=3)
    scales = [row["scale"] for row in report.read(tmp_path / report.METRICS)]
    assert all(1 <= scale <= 100.001 for scale in scales)
    assert max(scales) > 99.9 or min(scales) < 1.001  # steps this large do reach an end


def test_clipping(tmp_path):
    _, free = run(tmp_path / "free", trainees.plan(clip_norm=1e9), steps=1)
    _, plain = run(tmp_path / "plain", trainees.plan(), steps=1)
    assert trainees.same(free, plain)
    plan = trainees.plan(clip_norm=1e-9, eps=1.0)
    model = trainees.trainee(plan)
    before = trainees.weights(model)
    train(plan.replace(weight_decay=0.0), model, trainees.Data(), tmp_path / "clipped", steps=1)
    assert max((value - before[name]).abs().max() for name, value in trainees.weights(model).items()) < 1e-8


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_runs_and_resumes(tmp_path, precision):
    plan = trainees.plan(precision=precision)
    _, wanted = run(tmp_path / "whole", plan)
    for steps in (4, None):
        _, found = run(tmp_path / "parts", plan, steps=steps)
    assert trainees.same(found, wanted)
    run(tmp_path / "float32")
    losses, exact = losses_of(tmp_path / "parts"), losses_of(tmp_path / "float32")
    assert losses[0] == pytest.approx(exact[0], rel=0.01) and losses[0] != exact[0]
    if precision == "bfloat16":  # the scaler of float16 passes over its first steps, until its scale is small enough
        assert losses == pytest.approx(exact, rel=0.05)


def test_steps_whose_samples_are_all_corrupt(tmp_path):
    data = trainees.Data()
    epoch = data.epoch

    def some(number, start=0):
        for step, batch in enumerate(epoch(number, start), start):
            yield trainees.part(batch, 0, 0 if step == 1 else 6)

    data.epoch = some
    summary, _ = run(tmp_path, data=data)
    assert (summary.steps, summary.samples) == (9, 36)
    assert steps_of(tmp_path) == [1, 3, 4, 6, 7, 9]


def test_rates_that_are_hardly_meant_are_told(tmp_path):
    for warmup in (9, 10):  # it has nine steps
        said = Console(file=io.StringIO(), width=200)
        run(tmp_path / str(warmup), trainees.plan(warmup=warmup), console=said, steps=1)
        told = "warmup: 10 steps, and the run has 9: its learning rate ends at" in said.file.getvalue()
        assert told == (warmup == 10)
    for rank in (0, 2):  # the rate of what is no adapter
        said = Console(file=io.StringIO(), width=200)
        run(tmp_path / f"rank{rank}", trainees.plan(lora_r=rank, lr=5e-4, coef_lr=1e-3), console=said, steps=1)
        assert ("learns at coef_lr 0.001 of lr, 5e-07; `--set" in said.file.getvalue()) == (rank == 0)


def test_too_little_data(tmp_path):
    with pytest.raises(ValueError, match="expected at least one batch of 6"):
        run(tmp_path, data=trainees.Data(samples=5))


def test_what_is_shown(tmp_path):
    pytest.importorskip("matplotlib")
    run(tmp_path)
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 10))
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(losses_of(tmp_path))


def test_progress_fits_a_terminal():
    """Of 80 columns: how far, how long still, loss and rate."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    numbers = {"loss": 3.1, "samples_per_second": 123.4, "lr": 1e-4, "scale": 14.3, "memory_mib": 45_000}
    with report.Report(None, 123456, 0, console) as shown:
        shown.step({"step": 1002, **numbers})
        shown._bar.refresh()
        shown.evaluates(1003)
        shown._bar.refresh()
    assert re.search("1003/123456.*evaluating", console.file.getvalue())
    line = max(console.file.getvalue().replace("\r", "\n").splitlines(), key=lambda each: "1002/123456" in each)
    assert "1002/123456" in line and "loss 3.1000  123/s  43.95 GiB" in line and ":" in line
    assert len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)) <= 80


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(tmp_path, terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    run(tmp_path, steps=2, console=console)
    run(tmp_path, console=console)
    shown = console.file.getvalue()
    assert "going on from" in shown and "step-00000002" in shown
    assert ("9/9" if terminal else "step 3/9") in shown
    for word in ("loss ", "/s", "lr ", "scale ", "GiB"):
        assert word in shown, word


def test_metrics_of_a_killed_run(tmp_path):
    path = tmp_path / report.METRICS
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    report.keep_until(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_commands(tmp_path):
    data, model = trainees.manifest(tmp_path), tiny.checkpoint(tmp_path, "image")
    out = tmp_path / "out"
    invoke = CliRunner().invoke
    fields = ["batch_size=6", "epochs=1", "warmup=1", "micro_batch=4"]
    settings = [item for field in fields for item in ("--set", field)]
    command = ["train", "--recipe", "depth", "--model", str(model), "--data", str(data), "--out", str(out), *settings]
    result = invoke(lbfast.cli.app, [*command, "--caption", "caption"])
    assert result.exit_code == 0, result.stderr
    assert "3 of 3 steps, 18 samples" in result.stdout
    for style in ("upstream", "merged", "peft"):
        result = invoke(lbfast.cli.app, ["export", str(out), "--out", str(tmp_path / style), "--style", style])
        assert result.exit_code == 0, result.stderr
    trained, exported, merged = (
        model_dict["depth"].from_pretrained(where)
        for where in (out / "model", tmp_path / "upstream", tmp_path / "merged")
    )
    assert trainees.same(trainees.weights(trained), trainees.weights(exported))
    assert trainees.same(trainees.weights(trained), trainees.weights(merged))
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    assert json.loads((out / "start.json").read_text())["where"] == str(model)

    for wrong, message in (
        (["--recipe", "deth"], "recipe: expected one of"),
        (["--set", "lrr=1"], "unknown field 'lrr'; did you mean lr?"),
        (["--set", "lr"], "expected FIELD=VALUE"),
        (["--caption", "title"], "missing: title"),
        (["--caption", "caption", "--set", "captions={caption: 2}"], "by --caption or with weights by --set captions="),
        (["--set", "batch_size=21"], "`--set batch_size=20` makes one step of them all"),
        (["--set", "lr=high"], "lr: expected a number"),
        (["--data", str(tmp_path / "nothing.csv")], "nothing.csv"),
        (["--device", "cuda"], "PyTorch sees no GPU"),
    ):
        if "cuda" in wrong and torch.cuda.is_available():
            continue
        result = invoke(lbfast.cli.app, command + wrong)
        assert result.exit_code == 1 and message in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1
    result = invoke(lbfast.cli.app, ["export", str(tmp_path), "--out", str(tmp_path / "x")])
    assert result.exit_code == 1 and "expected the directory of a training run" in result.stderr
