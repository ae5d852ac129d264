"""Checkpoints over rewinds and damage: what a run names is there and whole, the next goes on from it, nothing is lost.

Folders that have something of somebody else's, and text caches that runs share.
"""

from __future__ import annotations

import io
import os
import shutil

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import lbfast.cli
from lbfast import files
from lbfast.model.checkpoint import CheckpointError
from lbfast.training import checkpoints, report
from lbfast.training.captions import TextCache
from lbfast.training.run import TrainingError
from lbfast.training.trainer import train
from tests import tiny, trainees


@pytest.fixture(autouse=True)
def _one_thread():
    with trainees.one_thread():
        yield


def run(out, **options):
    plan = options.pop("plan", None) or trainees.plan(epochs=10)
    model = trainees.trainee(plan)
    summary = train(plan, model, options.pop("data", None) or trainees.Data(), out, **options)
    return summary, trainees.weights(model)


def names(folder):
    return [path.name for path in checkpoints.existing(folder)]


def spoil(path):
    content = bytearray((path / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "state.pt").write_bytes(content)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An undisturbed run of 16 steps, its checkpoints every 2, and its weights at the end."""
    out = tmp_path_factory.mktemp("straight")
    with trainees.one_thread():
        return out, run(out, steps=16, save_every=2, keep=100)[1]


@pytest.mark.parametrize("keep", [1, 2])
def test_going_back_begins_a_new_line(straight, tmp_path, keep):
    out, folder = tmp_path / "out", tmp_path / "out" / "checkpoints"
    shutil.copytree(straight[0], out)
    said = io.StringIO()
    summary, _ = run(
        out, resume=folder / "step-00000006", steps=9, save_every=3, keep=keep, console=Console(file=said, width=500)
    )
    assert summary.checkpoint == folder / "step-00000009" and not checkpoints.problem(summary.checkpoint)
    assert names(folder) == ["step-00000009", "step-00000006"][:keep][::-1]
    aside = folder / "set-aside-1"
    assert names(aside) == [f"step-{step:08d}" for step in (8, 10, 12, 14, 16)]
    assert not any(checkpoints.problem(path) for path in checkpoints.existing(aside))
    assert [row["step"] for row in report.read(aside / report.METRICS)] == list(range(1, 17))
    assert said.getvalue().count("begins a new line of history; set aside in") == 1
    summary, found = run(out, steps=16, save_every=100, keep=keep)
    assert summary.samples == 7 * 6 and trainees.same(found, straight[1])
    assert [row["step"] for row in report.read(out / report.METRICS)] == list(range(1, 17))

    back, found = run(out, resume=aside / "step-00000014", steps=16, keep=keep)  # what was set aside can be taken up
    assert back.samples == 2 * 6 and trainees.same(found, straight[1])
    assert names(folder) == ["step-00000016"] and "step-00000016" in names(folder / "set-aside-2")


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("damaged", [1, 2, 8])
def test_damaged_checkpoints(straight, tmp_path, keep, damaged):
    """The newest ones, or all: the run goes on from the newest that is whole, and does not remove what it needs."""
    out, folder = tmp_path / "out", tmp_path / "out" / "checkpoints"
    shutil.copytree(straight[0], out)
    for path in checkpoints.existing(folder)[-damaged:]:
        spoil(path)
    for steps in (18, 20):
        summary, _ = run(out, steps=steps, save_every=100, keep=keep)
        assert summary.checkpoint == checkpoints.newest(folder) == folder / f"step-{steps:08d}"
        if steps == 18:
            assert summary.samples == 6 * (2 + 2 * damaged)
            assert len(names(folder / "set-aside-1")) == damaged  # not removed: they may be mended
    assert summary.samples == 2 * 6
    whole = [path for path in checkpoints.existing(folder) if not checkpoints.problem(path)]
    assert len(whole) == keep


def test_a_damaged_one_between_does_not_count(straight, tmp_path):
    out, folder = tmp_path / "out", tmp_path / "out" / "checkpoints"
    shutil.copytree(straight[0], out)
    spoil(folder / "step-00000014")
    run(out, steps=18, save_every=100, keep=3)
    assert names(folder) == [f"step-{step:08d}" for step in (12, 14, 16, 18)]


def test_a_refused_checkpoint_changes_nothing(straight, tmp_path):
    out, folder = tmp_path / "out", tmp_path / "out" / "checkpoints"
    shutil.copytree(straight[0], out)
    before = names(folder)
    with pytest.raises(CheckpointError, match="another recipe"):
        run(out, plan=trainees.plan(epochs=10, lr=0.5), resume=folder / "step-00000006")
    assert names(folder) == before and not list(folder.glob("set-aside*"))
    assert len(report.read(out / report.METRICS)) == 16


def test_one_run_at_a_time(tmp_path):
    data, met = trainees.Data(), []

    def meanwhile(step):
        with pytest.raises(BlockingIOError, match="another run is writing here"):
            run(tmp_path / "out")
        met.append(step)

    data.before = meanwhile
    run(tmp_path / "out", data=data, steps=1)
    assert met == [0]
    assert run(tmp_path / "out", steps=2)[0].samples == 6


def test_other_processes_hear_of_it(tmp_path, monkeypatch):
    """Where the first process fails to take the directory, the others end too, and do not say the same."""
    from lbfast.training import engine, trainer
    from lbfast.training.engine import Place

    monkeypatch.setattr(engine, "agreed", lambda value, place: 1)
    other = Place(1, 2, torch.device("cpu"), None)
    with pytest.raises(TrainingError, match="the first process could not take the directory of the run"):
        trainer._held(tmp_path / "out", trainees.plan(), other).__enter__()
    assert not (tmp_path / "out").exists()


def test_changed_captions_are_refused(tmp_path):
    manifest, model = trainees.manifest(tmp_path), tiny.checkpoint(tmp_path, "image")
    fields = ("batch_size=6", "epochs=2", "warmup=1", "micro_batch=6")
    command = ["train", "--recipe", "depth", "--model", str(model), "--data", str(manifest), "--device", "cpu"]
    command += ["--out", str(tmp_path / "out"), *(part for field in fields for part in ("--set", field))]
    assert CliRunner().invoke(lbfast.cli.app, [*command, "--steps", "1"]).exit_code == 0
    text = manifest.read_text()
    manifest.write_text(text.replace("caption number 7", "caption number 9"))
    result = CliRunner().invoke(lbfast.cli.app, [*command, "--steps", "2"])
    assert result.exit_code == 1 and "of a run with other data: paths or captions have changed" in result.stderr
    manifest.write_text(text)
    assert CliRunner().invoke(lbfast.cli.app, [*command, "--steps", "2"]).exit_code == 0


def strangers(folder, *paths):
    """Files of somebody else's, and a way to see that they are as they were."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(f"somebody's {path}")
    return {path: (folder / path).read_text() for path in paths}


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "metrics.jsonl", "model/model.safetensors", "checkpoints/step-00000001/a", "adapter/a"]
)
def test_a_run_leaves_a_strangers_files_alone(tmp_path, name):
    kept = strangers(tmp_path, name, "notes.txt")
    with pytest.raises(FileExistsError, match=r"which no (run|export) of lbfast made"):
        run(tmp_path, steps=1, plan=trainees.plan(lora_r=2))
    assert {path: (tmp_path / path).read_text() for path in kept} == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({name.split("/")[0], "notes.txt"})


def test_a_run_beside_a_strangers_other_files(tmp_path):
    kept = strangers(tmp_path, "notes.txt", "data/a.csv", ".step-1", "checkpoints.txt")
    run(tmp_path, plan=trainees.plan(epochs=1), steps=3)
    assert (tmp_path / "model" / "config.json").is_file()
    assert {path: (tmp_path / path).read_text() for path in kept} == kept


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A complete run of the command."""
    where = tmp_path_factory.mktemp("trained")
    data, model = trainees.manifest(where), tiny.checkpoint(where, "image")
    command = ["train", "--recipe", "depth", "--model", str(model), "--data", str(data), "--device", "cpu"]
    for field in ("batch_size=20", "epochs=1", "warmup=1", "micro_batch=20"):
        command += ["--set", field]
    result = CliRunner().invoke(lbfast.cli.app, [*command, "--out", str(where / "runs" / "a")])
    assert result.exit_code == 0, result.output
    return where / "runs" / "a"


def everything(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def export(run, out, *options):
    return CliRunner().invoke(lbfast.cli.app, ["export", str(run), "--out", str(out), *options])


def test_export_refuses_what_is_not_its_own(trained, tmp_path):
    strangers(tmp_path, "full/notes.txt", "link/notes.txt")
    (tmp_path / "link.d").symlink_to(tmp_path / "link")
    (tmp_path / "file").write_text("a file")
    shutil.copytree(trained.parent.parent / "image", tmp_path / "checkpoint")
    inside = trained / "checkpoints" / "step-00000001"
    places = [trained, trained.parent, trained.parent.parent, trained / "model" / "..", inside, trained / "checkpoints"]
    places += [tmp_path / name for name in ("full", "link.d", "checkpoint", "file")]
    before = everything(trained.parent.parent) | everything(tmp_path)
    for run in (trained, inside):
        for place in places:
            result = export(run, place)
            assert result.exit_code == 1 and result.stderr.count("\n") == 1, place
            assert "expected a" in result.stderr
    assert everything(trained.parent.parent) | everything(tmp_path) == before


def test_an_earlier_export_is_replaced_and_a_strangers_files_in_it_stay(trained, tmp_path):
    out = tmp_path / "out"
    assert export(trained, out).exit_code == 0
    strangers(out, "README.md", "data/a.txt")
    assert export(trained, out, "--style", "peft").exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [files.MARK, "README.md", "data", "adapter_config.json", "adapter_model.safetensors", "trained.safetensors"]
    )
    (tmp_path / "empty").mkdir()
    assert export(trained / "checkpoints" / "step-00000001", tmp_path / "empty").exit_code == 0
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_caches_of_runs_at_once_do_not_mix(tmp_path):
    """Two writers at any time read their own and each other's rows, and a third finds all."""
    batches = [trainees.rows("depth", 4, seed=seed).input_ids for seed in range(3)]
    embeddings = [torch.randn(4, 16) for _ in batches]
    first, second = (TextCache(tmp_path, "weights", 16) for _ in range(2))
    for cache, ids, rows in zip((first, second, first), batches, embeddings):
        cache.write(ids, rows)
    third, out = TextCache(tmp_path, "weights", 16), torch.zeros(4, 16)
    for ids, rows in zip(batches, embeddings):
        assert not len(third.read(ids, out)) and torch.equal(out, rows)
    assert len(list(tmp_path.iterdir())) == 3
    del first, second, third
    assert len(TextCache(tmp_path, "weights", 16)) == 12 and len(list(tmp_path.iterdir())) == 3  # files are taken up


@pytest.mark.parametrize("batch", [6, 20])
def test_a_run_is_bitwise_the_same_with_a_cache(tmp_path, batch):
    plan = trainees.plan(batch_size=batch, epochs=3)
    wanted = run(tmp_path / "plain", plan=plan, data=trainees.Data(batch=batch))[1]
    for number in range(2):
        data = trainees.Data(batch=batch)
        found = run(tmp_path / str(number), plan=plan, data=data, text_cache=tmp_path / "cache")[1]
        assert trainees.same(found, wanted)
    assert os.listdir(tmp_path / "cache")


# Checkpoints with the right hashes that no run has written.


def written_anew(path, change):
    """A checkpoint whose state is changed, its manifest with it."""
    state = torch.load(path / checkpoints.STATE, weights_only=True)
    change(state)
    tensors = checkpoints.load(path)[0]
    step = checkpoints.step_of(path)
    shutil.rmtree(path)
    checkpoints.save(path.parent, step, tensors, state, keep=100)


def moments(state):
    return next(iter(state["optimizer"].values()))


@pytest.mark.parametrize(
    "change",
    [
        *[lambda state, key=key: state.pop(key) for key in ("step", "recipe", "frozen", "optimizer", "generators")],
        *[lambda state, step=step: state.update(step=step) for step in (-1, 3, 1.5, 10**30, "2", {}, torch.zeros(0))],
        lambda state: state.update(recipe=[1]),
        lambda state: state.update(recipe={"lr": torch.zeros(2)}),
        lambda state: state.update(data=7),
        lambda state: state.update(micro_batch=-1),
        lambda state: state.update(optimizer={}),
        lambda state: moments(state).update(exp_avg=torch.zeros(3)),
        lambda state: moments(state).update(exp_avg=None),
        lambda state: moments(state).pop("step"),
        lambda state: state["generators"].update(torch=torch.zeros(2)),
        lambda state: state["generators"].update(numpy=[]),
    ],
)
def test_a_checkpoint_that_no_run_has_written(straight, tmp_path, change):
    path = tmp_path / "checkpoints" / "step-00000002"
    shutil.copytree(straight[0] / "checkpoints" / path.name, path)
    shutil.copy(straight[0] / files.MARK, tmp_path)
    written_anew(path, change)
    with pytest.raises(CheckpointError, match=r"step-00000002: ") as caught:
        run(tmp_path, steps=3)
    assert "\n" not in str(caught.value) and checkpoints.existing(path.parent) == [path]


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"recipe": 1, "where": "x"}', "[" * 9999, '{"recipe": {}, "where": []}']
)
def test_a_start_that_no_run_has_written(straight, tmp_path, content):
    shutil.copytree(straight[0] / "checkpoints" / "step-00000002", tmp_path / "run" / "checkpoints" / "step-00000002")
    (tmp_path / "run" / "start.json").write_text(content)
    result = export(tmp_path / "run", tmp_path / "out")
    assert result.exit_code == 1 and "start.json: expected what a training run wrote" in result.stderr
    assert result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
