"""Evaluation and averages during a run: what `lbfast eval` says of its checkpoints, kept through any end."""

from __future__ import annotations

import functools
import io
import json
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import lbfast.cli
from lbfast.processing.text import TOKENIZERS, default_tokenizer
from lbfast.training import checkpoints, report
from lbfast.training.engine import Place
from lbfast.training.parameters import groups
from lbfast.training.trainer import train
from lbfast.training.watch import Evaluation, Watch, task_of
from tests import tiny, trainees


@pytest.fixture(autouse=True)
def _one_thread():
    with trainees.one_thread():
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Depth maps with captions, of which two repeat, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("scenes")
    file = trainees.manifest(folder, 40)
    (folder / "9.png").write_bytes(b"no picture")
    file.write_text(file.read_text().replace("number 3\n", "number 4\n"))
    return file


@functools.cache
def tokenizer():
    return default_tokenizer(TOKENIZERS["depth"])


def evaluation(data, **options):
    return Evaluation([str(data)], tokenizer(), **options)


def run(out, plan, **options):
    model = trainees.trainee(plan)
    return train(plan, model, trainees.Data(), out, **options), trainees.weights(model)


def found_of(out):
    return {
        row["step"]: {name: value for name, value in row.items() if "/" in name and not name.endswith("/seconds")}
        for row in report.read(out / report.METRICS)
    }


def asked(model, data, folder, task="retrieval"):
    """What the command says of a saved model."""
    file = folder / "report.json"
    command = ["eval", task, "--model", str(model), "--data", str(data), "--json", str(file), "--device", "cpu"]
    result = CliRunner().invoke(lbfast.cli.app, command)
    assert result.exit_code == 0, result.stderr
    return json.loads(file.read_text())["results"]


@pytest.mark.parametrize("lora_r", [0, 2])
def test_numbers_are_those_of_the_command(tmp_path, scenes, lora_r):
    plan = trainees.plan(lora_r=lora_r, ema=0.9, patch_dropout=0.5, epochs=2)
    summary, weights = run(tmp_path / "run", plan, evaluation=evaluation(scenes, every=4))
    found = found_of(tmp_path / "run")
    assert [step for step, numbers in found.items() if numbers] == [4, 6]
    for prefix, model in (("eval", summary.model), ("ema", tmp_path / "run" / "model-ema")):
        told = asked(model, scenes, tmp_path)
        for name, ranking in told.items():
            way = f"{prefix}/{name.replace(' -> ', '-')}"
            for k, share in ranking["recall"].items():
                assert found[6][f"{way}/R@{k}"] == share
            assert found[6][f"{way}/median rank"] == ranking["median_rank"]
        shares = [ranking["recall"]["5"] for ranking in told.values()]
        assert found[6][f"{prefix}/R@5"] == sum(shares) / 2
    _, unwatched = run(tmp_path / "unwatched", plan)
    assert trainees.same(weights, unwatched)
    _, parts = run(tmp_path / "parts", plan, evaluation=evaluation(scenes, every=4), steps=5)
    _, parts = run(tmp_path / "parts", plan, evaluation=evaluation(scenes, every=4))
    assert trainees.same(weights, parts) and found_of(tmp_path / "parts") == found
    ours, theirs = (tmp_path / name / "model-ema" / "model.safetensors" for name in ("run", "parts"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_classes(tmp_path):
    for name in ("red_car", "dog"):
        for seed in range(3):
            tiny.depth_map(tmp_path / "photos" / name / f"{seed}.png", seed + 7 * len(name))
    summary, _ = run(tmp_path / "run", trainees.plan(), evaluation=evaluation(tmp_path / "photos", best="top-1"))
    (told,) = asked(summary.model, tmp_path / "photos", tmp_path, "zero-shot").values()
    assert found_of(tmp_path / "run")[9] == {f"eval/top-{k}": share for k, share in told["recall"].items()}
    assert summary.best == summary.checkpoint


def test_text_is_embedded_once(tmp_path, scenes, monkeypatch):
    from lbfast.evaluation.encoder import Encoder

    asked, texts, plan = [], Encoder.texts, trainees.plan(epochs=1)
    monkeypatch.setattr(Encoder, "texts", lambda self, found: asked.append(len(found)) or texts(self, found))
    run(tmp_path / "frozen", plan, evaluation=evaluation(scenes, every=2))
    assert len(asked) == 1
    run(tmp_path / "trained", plan.replace(train_text=True), evaluation=evaluation(scenes, every=2))
    assert len(asked) == 1 + 2


def test_the_best_checkpoint_stays(tmp_path, scenes, monkeypatch):
    values = iter([0.2, 0.7, 0.7, 0.3, 0.1])
    monkeypatch.setattr("lbfast.training.watch.Watch.__call__", lambda self, model, prefix: {"eval/R@1": next(values)})
    options = {"evaluation": evaluation(scenes, every=2, best="R@1"), "save_every": 3, "keep": 1}
    first, _ = run(tmp_path, trainees.plan(), steps=6, **options)
    names = ["step-00000004", "step-00000006"]
    assert [path.name for path in checkpoints.existing(tmp_path / "checkpoints")] == names
    second, _ = run(tmp_path, trainees.plan(), **options)  # what was best is known to the run that goes on
    assert [path.name for path in checkpoints.existing(tmp_path / "checkpoints")] == ["step-00000004", "step-00000009"]
    assert first.best == second.best == tmp_path / "checkpoints" / "step-00000004"


def test_an_evaluation_where_no_sample_could_be_read(tmp_path, scenes, monkeypatch):
    """Its numbers are kept, and that nothing was learnt is said."""
    monkeypatch.setattr("lbfast.training.watch.Watch.__call__", lambda self, model, prefix: {"eval/R@1": 0.25})
    data, said = trainees.Data(), Console(file=io.StringIO(), width=200)
    epoch = data.epoch

    def some(number, start=0):
        for step, batch in enumerate(epoch(number, start), start):
            yield trainees.part(batch, 0, 0 if step == 1 else 6)

    data.epoch = some
    plan = trainees.plan(epochs=1)
    train(plan, trainees.trainee(plan), data, tmp_path, evaluation=evaluation(scenes, every=2), console=said)
    rows = report.read(tmp_path / report.METRICS)
    assert rows[1] == {"step": 2, "epoch": 0, "rows": 0, "eval/R@1": 0.25} and len(rows) == 3
    assert "step 2: none of its samples could be read, so that nothing was learnt" in said.file.getvalue()


def test_killed_in_an_evaluation(tmp_path, scenes, processes):
    """SIGKILL between two of its batches: the run goes on from the checkpoint before, to bitwise the same end."""
    from tests import runs

    fields = {"ema": 0.9, "patch_dropout": 0.5}
    for name in ("whole", "killed"):
        child = processes.Process(target=runs.watched, args=(tmp_path / name, fields, scenes, name == "killed"))
        child.start()
        child.join()
        assert child.exitcode == (-signal.SIGKILL if name == "killed" else 0)
    assert max(found_of(tmp_path / "killed")) == 5  # the sixth was being evaluated
    assert checkpoints.newest(tmp_path / "killed" / "checkpoints").name == "step-00000004"
    child = processes.Process(target=runs.watched, args=(tmp_path / "killed", fields, scenes, False))
    child.start()
    child.join()
    ends = [checkpoints.load(tmp_path / name / "checkpoints" / "step-00000009") for name in ("whole", "killed")]
    assert trainees.same(ends[0][0], ends[1][0])
    for part in ("averages", "best"):
        assert str(ends[0][1][part]) == str(ends[1][1][part])
    assert found_of(tmp_path / "whole") == found_of(tmp_path / "killed")


def test_processes_evaluate_together(tmp_path, scenes, processes):
    """Three processes find what one finds, to the bit; where one of them fails all say so."""
    from tests import runs

    plan = trainees.plan()
    alone = Watch(evaluation(scenes, batch_size=8), plan, Place(0, 1, torch.device("cpu"), None), False)
    wanted = alone(trainees.trainee(plan), "eval")
    children = [processes.Process(target=runs.evaluated, args=(rank, tmp_path, scenes)) for rank in range(3)]
    for child in children:
        child.start()
    for rank, child in enumerate(children):
        child.join(120)
        found, said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {**found, "eval/seconds": 0} == {**wanted, "eval/seconds": 0}
        assert said == ("ValueError: no" if rank == 1 else "RuntimeError: evaluation: process 1 failed: ValueError: no")


def test_what_is_evaluated(tmp_path, scenes):
    (tmp_path / "classes" / "dog").mkdir(parents=True)
    labels = tiny.table(tmp_path / "labels.csv", ["path", "label"], [["a.png", "dog"]])
    both = tiny.table(tmp_path / "both.csv", ["path", "label", "caption"], [["a.png", "dog", "a dog"]])
    for data, task in ((tmp_path / "classes", "zero-shot"), (labels, "zero-shot"), (both, "retrieval")):
        assert task_of([str(data)], None) == task
    assert task_of([str(scenes.parent)], None) == task_of([str(both), str(labels)], None) == "retrieval"
    plan = trainees.plan()
    for wrong, message in (
        ({"best": "R@2"}, r"best: expected one of R@1, R@5, .*, got 'R@2'"),
        ({"best": "ema/R@1"}, "best: expected a recipe with ema"),
        ({"every": 0}, "eval_every: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "out", plan, evaluation=evaluation(scenes, **wrong))
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "out", plan, evaluation=evaluation(tmp_path / "nothing.csv"))


def test_averages(tmp_path):
    """As a loop over steps computes them."""
    plan = trainees.plan(ema=0.7)
    wanted = trainees.weights(trainees.trainee(plan))
    for step in (1, 2, 3):
        _, now = run(tmp_path / f"{step}", plan, steps=step)
        share = min(0.7, step / (step + 9))
        wanted = {name: share * w + (1 - share) * now[name] for name, w in wanted.items()}
    found = checkpoints.load(tmp_path / "3" / "checkpoints" / "step-00000003")[1]["averages"]
    for name, average in found.items():
        torch.testing.assert_close(average, wanted[name])
    result = CliRunner().invoke(lbfast.cli.app, ["export", str(tmp_path / "1"), "--out", str(tmp_path / "x"), "--ema"])
    assert result.exit_code == 1 and "expected the directory of a training run" in result.stderr


def test_layers_learn_at_their_rates():
    plan = trainees.plan(layer_decay=0.5, coef_lr=1.0, lora_r=0, lock_image=False, train_text=True)
    shares = {name: group["share"] for group in groups(trainees.trainee(plan), plan) for name in group["names"]}
    for name, share in (
        ("visual_projection.weight", 1.0),
        ("vision_model.post_layernorm.weight", 1.0),
        ("vision_model.encoder.layers.1.mlp.fc1.weight", 0.5),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", 0.25),
        ("vision_model.embeddings.patch_embedding.weight", 0.125),
        ("text_model.encoder.layers.1.mlp.fc1.bias", 0.5),
        ("text_model.embeddings.token_embedding.weight", 0.125),
    ):
        assert shares[name] == share, name
    assert {g["share"] for g in groups(trainees.trainee(trainees.plan()), trainees.plan())} == {1.0, 0.1}


def test_the_command(tmp_path, scenes, monkeypatch):
    told = []
    board = SimpleNamespace(
        define_metric=lambda *a, **k: None, log=told.append, finish=lambda exit_code: told.append(exit_code)
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: told.append(options) or board))
    model, out = tiny.checkpoint(tmp_path, "image"), tmp_path / "out"
    fields = ["batch_size=20", "epochs=1", "warmup=1", "micro_batch=20", "ema=0.5"]
    settings = [item for field in fields for item in ("--set", field)]
    command = ["train", "--recipe", "depth", "--model", str(model), "--data", str(scenes), "--out", str(out), *settings]
    watched = ["--eval", str(scenes), "--eval-every", "1", "--best", "ema/R@5", "--log", "wandb"]
    result = CliRunner().invoke(lbfast.cli.app, [*command, *watched])
    assert result.exit_code == 0, result.stderr
    assert "\nthe best by " in result.stdout
    assert re.search("step 1: R@1 [0-9.]+ %, .* s, ema/R@1 ", " ".join(result.stderr.split()))
    assert told[0]["config"]["ema"] == 0.5 and told[-1] == 0 and "eval/R@1" in told[2] and len(told) == 4
    result = CliRunner().invoke(lbfast.cli.app, ["export", str(out), "--out", str(tmp_path / "averaged"), "--ema"])
    assert result.exit_code == 0, result.stderr
    written = [folder / "model.safetensors" for folder in (tmp_path / "averaged", out / "model-ema", out / "model")]
    assert written[0].read_bytes() == written[1].read_bytes() != written[2].read_bytes()
    for wrong, message in (
        (["--best", "R@1"], "best: expected data by --eval"),
        (["--log", "paper"], "log: expected wandb, got 'paper'"),
    ):
        result = CliRunner().invoke(lbfast.cli.app, [*command, *wrong])
        assert result.exit_code == 1 and message in result.stderr
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulated = events.EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in accumulated.Scalars("eval/R@1")] == [1, 2]
