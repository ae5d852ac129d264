"""Writing: whole as it was or whole as it is to be, whatever fails on the way; what is somebody else's stays."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lbfast.cli
from bench import harness
from lbfast import files
from lbfast.model.languagebind import model_dict
from lbfast.training.exporter import export
from tests import tiny, trainees


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    files.write(path, "one")
    os.chmod(path, 0o640)
    files.write(path, b"two")
    assert path.read_bytes() == b"two" and stat.S_IMODE(path.stat().st_mode) == 0o640 and names(tmp_path) == ["a.json"]
    with pytest.raises(RuntimeError), files.replacing(path) as staged:
        assert staged.parent == tmp_path and staged.suffix == ".json"
        staged.write_text("half")
        raise RuntimeError
    assert path.read_bytes() == b"two" and names(tmp_path) == ["a.json"]
    with pytest.raises(FileExistsError), files.replacing(path, new=True) as staged:
        staged.write_text("three")
    assert path.read_bytes() == b"two" and names(tmp_path) == ["a.json"]
    with pytest.raises(IsADirectoryError):
        files.write(tmp_path, "")
    with pytest.raises(FileNotFoundError, match=r"nowhere/a\.json"):
        files.write(tmp_path / "nowhere" / "a.json", "")


def test_links_and_devices(tmp_path):
    (tmp_path / "target").write_text("one")
    (tmp_path / "link").symlink_to("target")
    files.write(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "two"
    files.write("/dev/null", "three")
    assert not os.path.isfile("/dev/null")


def killed(code, *arguments):
    """Runs a program that kills itself."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_what_killed_writers_left_is_swept(tmp_path):
    code = "import os, sys; from lbfast import files; writer = files.replacing(sys.argv[1]); writer.__enter__()"
    code += "; os.kill(os.getpid(), 9)"
    files.write(tmp_path / "a", "one")
    (tmp_path / ".lbfast-notes").write_text("somebody's")
    killed(code, tmp_path / "a")
    assert len(names(tmp_path)) == 3 and (tmp_path / "a").read_text() == "one"
    with files.replacing(tmp_path / "a") as ours:
        assert ours.exists()
        with files.replacing(tmp_path / "a") as theirs:  # another writer, alive: it is not swept
            assert ours.exists() and theirs.exists()
    assert names(tmp_path) == [".lbfast-notes", "a"]


def fill(folder, *stale, **content):
    with files.filling(folder, "last", stale) as staged:
        for name, text in content.items():
            (staged / name).write_text(text)


def test_files_that_belong_together(tmp_path):
    folder = tmp_path / "new" / "folder"
    fill(folder, a="1", last="1")
    (folder / "theirs").write_text("theirs")
    fill(folder, "a", "nothing", b="2", last="2")
    assert {name: (folder / name).read_text() for name in names(folder)} == {"b": "2", "last": "2", "theirs": "theirs"}
    (folder / "a").mkdir()
    with pytest.raises(files.WriteError, match="expected no folder of the name a there"):
        fill(folder, a="3", last="3")
    (folder / "a").rmdir()
    with pytest.raises(files.WriteError):
        fill(tmp_path / "missing", **{"a/b": "1"})
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("kill", range(8))
def test_a_kill_between_the_moves(tmp_path, kill):
    """Never files of both: what is read without `last` is an error, and what was there is not lost."""
    fill(tmp_path / "f", a="old", b="old", last="old")
    code = f"""
import os, sys
from pathlib import Path
from lbfast import files
real, calls = os.rename, []
def rename(source, to):
    if len(calls) == {kill}:
        os.kill(os.getpid(), 9)
    calls.append(1)
    real(source, to)
os.rename = rename
with files.filling(Path(sys.argv[1]), "last") as staged:
    for name in ("a", "b", "last"):
        (staged / name).write_text("new")
os.kill(os.getpid(), 9)
"""
    killed(code, tmp_path / "f")
    found = {name: (tmp_path / "f" / name).read_text() for name in names(tmp_path / "f") if name in ("a", "b", "last")}
    assert "last" not in found or (set(found.values()) in ({"old"}, {"new"}) and len(found) == 3)
    held = list(everything(tmp_path / "f").values())
    assert held.count(b"old") == 3 or set(found.values()) == {"new"}
    fill(tmp_path / "f", a="again", b="again", last="again")
    assert names(tmp_path / "f") == ["a", "b", "last"]


def test_claims(tmp_path):
    folder = tmp_path / "a"
    with files.claimed(folder, "run", ("x",)):
        with pytest.raises(BlockingIOError, match="another run is writing here"), files.claimed(folder, "run", ("x",)):
            pass
        (folder / "x").write_text("ours")
    with files.claimed(folder, "run", ("x",)):
        pass
    with pytest.raises(FileExistsError, match="it has x, which no export of lbfast made; expected a new or empty"):
        files.check_claim(folder, "export", None)
    with files.claimed(folder, "world", ("y",)):
        pass
    assert (folder / files.MARK).read_text() == "run\nworld\n"


# Full disks: every write, flush and move of a save may be the one that fails.

FAULTS = """
import os, sys, errno, resource, signal
from pathlib import Path
import torch
from tests import tiny, trainees
from lbfast.training.exporter import export
what, folder = sys.argv[1], Path(sys.argv[2])
model = trainees.trainee(trainees.plan(lora_r=2), seed=5).eval()
def save():
    if what == "save":
        model.save_pretrained(folder)
    elif what == "shards":
        model.save_pretrained(folder, max_shard_size=40_000)
    elif what == "bin":
        model.save_pretrained(folder, safe_serialization=False)
    else:
        export(model, folder, what)
def full(real, number, calls):
    def call(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)
    return call
def attempt():
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    try:
        save()
        return True
    except OSError as error:
        after = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        assert after == before, (sorted(before), sorted(after), error)
        assert "cannot write it" in str(error) and "MiB are free" in str(error), error
        assert not [p for p in folder.iterdir() if p.is_dir()]
        return False
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in (0, 1, 100, 1000, 5000, 100_000, 5_000_000, 50_000_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    ended = attempt()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert ended or limit < 50_000_000
    assert not ended or limit
for name in ("fsync", "rename"):
    real, number, ended = getattr(os, name), 0, False
    while not ended:
        number += 1
        setattr(os, name, full(real, number, []))
        ended = attempt()
        setattr(os, name, real)
    assert number > 3, number
"""


@pytest.mark.parametrize("what", ["save", "bin", "shards", "upstream", "peft"])
def test_a_full_disk_at_every_step_of_a_save(tmp_path, what, processes):
    from tests import runs

    folder = tmp_path / "model"
    exported = what in ("upstream", "merged", "peft")
    model = trainees.trainee(trainees.plan(lora_r=2)).eval()
    export(model, folder, what) if exported else model.save_pretrained(folder)
    (folder / "README.md").write_text("somebody's")
    child = processes.Process(target=runs.script, args=(tmp_path, FAULTS, what, folder))
    child.start()
    child.join()
    assert child.exitcode == 0, (tmp_path / "stderr").read_text()
    if what != "peft":
        found = model_dict["depth"].from_pretrained(folder)
        wanted = trainees.trainee(trainees.plan(lora_r=2), seed=5).eval()
        assert torch.equal(found.text_projection.weight, wanted.text_projection.weight)
    assert (folder / "README.md").read_text() == "somebody's"


def test_an_index_that_names_other_files_removes_none(tmp_path):
    """Weights that are replaced may come from anywhere."""
    model = tiny.model("image")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../victim.bin", "b": "notes.txt", "c": "old.safetensors"}}'
    )
    (tmp_path.parent / "victim.bin").write_text("theirs")
    for name in ("notes.txt", "old.safetensors"):
        (tmp_path / name).write_text("theirs")
    model.save_pretrained(tmp_path)
    assert (tmp_path.parent / "victim.bin").exists() and (tmp_path / "notes.txt").exists()
    model_dict["image"].from_pretrained(tmp_path)


# A stranger's files at every place that a command is told to write to (those of embed, train and export: their tests).


def refused(*arguments):
    result = CliRunner().invoke(lbfast.cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1, result.output
    assert "expected a" in result.stderr and "Traceback" not in result.stderr
    return True


@pytest.mark.parametrize("name", ["manifest.jsonl", "image/000000.jpg"])
@pytest.mark.parametrize("command", [("mini", "make"), ("demo", "--out")])
def test_worlds_leave_a_strangers_files_alone(tmp_path, command, name):
    place = tmp_path / ("files" if command[0] == "demo" else "")
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    (place / name).write_text("somebody's")
    assert refused(*command, tmp_path)
    assert everything(place) == {(place / name).relative_to(place): b"somebody's"}


def test_a_world_is_made_again(tmp_path):
    (tmp_path / "notes.txt").write_text("somebody's")
    for _ in range(2):
        result = CliRunner().invoke(
            lbfast.cli.app, ["mini", "make", str(tmp_path), "--samples", "2", "--modality", "image"]
        )
        assert result.exit_code == 0, result.output
    assert names(tmp_path) == sorted([files.MARK, "image", "manifest.jsonl", "notes.txt"])


@pytest.mark.parametrize("name", ["start/config.json", "data/a.csv", "weights/model.safetensors"])
def test_mini_train_leaves_a_strangers_files_alone(tmp_path, name):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text("somebody's")
    assert refused("mini", "train", "--out", tmp_path)
    assert list(everything(tmp_path).values()) == [b"somebody's"]


@pytest.mark.parametrize("name", ["trace.json", "profile.json", "memory.png"])
def test_profile_leaves_a_strangers_files_alone(tmp_path, name):
    (tmp_path / name).write_text("somebody's")
    assert refused("profile", "--arch", "L/14", "--layers", 1, "--out", tmp_path)
    assert everything(tmp_path) == {(tmp_path / name).relative_to(tmp_path): b"somebody's"}


def test_results_replace_only_results(tmp_path):
    path = tmp_path / "data.json"
    for content in ('{"rows": [1]}', "[]", "somebody's", ""):
        path.write_text(content)
        assert refused("eval", "zero-shot", "--model", "lbfast-mini/image", "--data", tmp_path, "--json", path)
        assert refused("eval", "retrieval", "--model", "lbfast-mini/image", "--data", tmp_path, "--json", path)
        with pytest.raises(FileExistsError, match="expected a new file, or a bench"):
            harness.Record("a bench", "cpu", path)
        assert path.read_text() == content
    path.unlink()
    for _ in range(2):
        harness.Record("a bench", "cpu", path).add([{"a": 1}])
    assert names(tmp_path) == ["data.json"]


def test_a_processor_is_saved_whole_or_not_at_all(tmp_path):
    processor = lbfast.LanguageBindImageProcessor.from_pretrained("lbfast-mini/image")
    (tmp_path / "model.safetensors").write_bytes(b"somebody's")
    written = [Path(name) for name in processor.save_pretrained(tmp_path)]
    assert all(path.is_file() for path in written) and {"processor_config.json"} < {path.name for path in written}
    before = everything(tmp_path)

    class Full:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("half of i")
            raise OSError(errno.ENOSPC, "No space left on device")

    other = lbfast.LanguageBindImageProcessor(processor.config, Full(), antialias=False)
    with pytest.raises(files.WriteError, match="cannot write it: No space left on device"):
        other.save_pretrained(tmp_path)
    assert everything(tmp_path) == before
