"""Corpora: recordings in parts, files that come later, shares of it; and that nothing is lost or made twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from lbfast.cli.app import app
from lbfast.data import crew
from lbfast.embedding import BadFileError, Embedder, embed_files, run
from lbfast.embedding.journal import partial_path
from lbfast.signals import Stopped
from tests import tiny, workers
from tests.test_media_bounds import encoded, wav
from tests.test_processing_video import make_video

pytest.importorskip("av")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(tiny.checkpoint(folder, name)) for name in ("image", "video", "audio")]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Sounds of 3.3, 1 and 5.05 s, a video of 1.67 s, a picture and a caption."""
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    for name, seconds in (("a", 3.3), ("b", 1), ("c", 5.05)):
        (folder / f"{name}.wav").write_bytes(wav((rng.standard_normal(int(16000 * seconds)) * 3000).astype("<i2")))
    make_video(folder / "d.mp4")
    tiny.picture(folder / "e.jpg")
    (folder / "f.txt").write_text("a cat\n")
    return folder


def table(out):
    return {row.pop("id"): row for row in pq.read_table(out).to_pylist()}


def same(one, other):
    """Whether two outputs have the same rows in the same order, bit for bit."""
    return pq.read_table(one).replace_schema_metadata(None).equals(pq.read_table(other).replace_schema_metadata(None))


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_are_rows(models, recordings, tmp_path, workers):
    out, seen = tmp_path / "out.parquet", []
    options = {"segment": "1s", "batch_size": 2, "fuse": "segments", "dtype": "float32"}
    found = embed_files([recordings], models, out, workers=workers, progress=lambda *one: seen.append(one), **options)
    assert found.embedded == {"image": 1, "video": 3, "audio": 13, "language": 1} and not found.failures
    rows = table(out)
    assert pq.read_schema(out).names == ["id", "modality", "path", "start_sec", "end_sec", "embedding", "model"]
    sounds = [name.removeprefix(f"audio:{recordings}/") for name in rows if name.startswith("audio")]
    assert sounds == [
        *("a.wav#0-1", "a.wav#1-2", "a.wav#2-3", "a.wav#3-3.3", "a.wav"),
        *("b.wav#0-1", "b.wav"),
        *(f"c.wav#{i}-{i + 1}" for i in range(5)),  # the last 0.05 s are less than a tenth of a part
        "c.wav",
    ]
    part = rows[f"audio:{recordings}/a.wav#3-3.3"]
    assert (part["start_sec"], part["end_sec"], part["path"]) == (3.0, 3.3, f"{recordings}/a.wav")
    assert rows[f"image:{recordings}/e.jpg"]["start_sec"] is None
    parts = np.array([row["embedding"] for name, row in rows.items() if "a.wav#" in name])
    mean = parts.sum(0) / np.linalg.norm(parts.sum(0))
    assert np.allclose(rows[f"audio:{recordings}/a.wav"]["embedding"], mean, atol=1e-6)
    for name in ("video", "audio"):
        done, total = [one[1:] for one in seen if one[0] == name][-1]
        assert done == total == found.embedded[name] - (3 if name == "audio" else 1)
    embedder = Embedder(models, dtype="float32", batch_size=2)
    clip = embedder({"path": [f"{recordings}/d.mp4"], "start_sec": [0.0], "end_sec": [1.0]})["embedding"][0]
    assert np.allclose(rows[f"video:{recordings}/d.mp4#0-1"]["embedding"], clip, atol=1e-6)
    assert embed_files([recordings], models, out, **options).finished


def test_killed_anywhere_a_run_goes_on_to_the_same_rows(models, recordings, tmp_path):
    options = {"segment": "0.5s", "hop": "0.3s", "batch_size": 3, "fuse": "segments", "dtype": "float32"}
    whole = tmp_path / "whole.parquet"
    embed_files([recordings], models, whole, **options)
    for moment in (1, 3, 7, 9):
        out, calls = tmp_path / f"{moment}.parquet", []

        def progress(*one, calls=calls, moment=moment):
            calls.append(one)
            if len(calls) > 2 * moment:
                raise Stopped(signal.SIGTERM)

        with pytest.raises(Stopped):
            embed_files([recordings], models, out, progress=progress, **options)
        again = embed_files([recordings], models, out, workers=2 * (moment % 2), **options)
        assert again.resumed and same(out, whole)


def test_a_recording_that_is_broken_off_keeps_what_came_before(models, tmp_path):
    path = encoded(tmp_path / "a.flac", "flac", 3)
    path.write_bytes(path.read_bytes()[:-9000])
    out = tmp_path / "out.parquet"
    options = {"segment": "0.5s", "fuse": "segments"}
    found = embed_files([path], models, out, **options)
    assert ["that is truncated" in failure.reason for failure in found.failures] == [True]
    assert 2 < found.embedded["audio"] < 6 and f"audio:{path}" not in table(out)
    again = embed_files([path], models, out, **options)
    assert again.finished and again.failed == 1
    with pytest.raises(BadFileError, match="truncated"):
        embed_files([path], models, tmp_path / "strict.parquet", strict=True, **options)


def test_a_worker_that_dies_in_the_middle_goes_on_where_it_was(models, recordings, tmp_path, monkeypatch):
    plain, out = tmp_path / "plain.parquet", tmp_path / "out.parquet"
    options = {"segment": "0.5s", "batch_size": 2, "dtype": "float32"}
    embed_files([recordings / "c.wav", recordings / "a.wav"], models, plain, **options)
    monkeypatch.setattr(crew, "_work", workers.dying)
    found = embed_files([recordings / "c.wav", recordings / "a.wav"], models, out, workers=1, **options)
    assert not found.failures and same(out, plain)
    monkeypatch.setattr(crew, "_work", workers.poisoned)
    bad = tmp_path / "poison.wav"
    bad.write_bytes((recordings / "b.wav").read_bytes())
    found = embed_files([bad], models, tmp_path / "bad.parquet", workers=1, **options)
    assert "the worker process was ended by SIGKILL while decoding it" in found.failures[0].reason


def test_modalities_of_a_recording_in_parts_are_fused_by_their_means(models, recordings, tmp_path):
    make_video(tmp_path / "x.mp4")
    (tmp_path / "x.wav").write_bytes((recordings / "a.wav").read_bytes())
    out = tmp_path / "out.parquet"
    embed_files([tmp_path], models, out, segment=1, fuse=["segments", "video+audio"])
    rows = table(out)
    both = np.array(rows[f"video:{tmp_path}/x.mp4"]["embedding"]) + rows[f"audio:{tmp_path}/x.wav"]["embedding"]
    assert np.allclose(rows["video+audio:x"]["embedding"], both / np.linalg.norm(both), atol=1e-6)


@pytest.mark.parametrize(
    "options,match",
    [
        ({"hop": "1s"}, "^hop: expected with segment"),
        ({"fuse": "segments"}, "^fuse: segments: expected with segment"),
        ({"segment": "0"}, r"^segment: expected 0\.5 to 3600 seconds"),
        ({"shard": "0/2"}, "^shard: expected I/N with I from 1 to N"),
        ({"shard": "3/2"}, "^shard: expected"),
        ({"shard": "1"}, "^shard: expected"),
    ],
)
def test_wrong_arguments(models, recordings, tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        embed_files([recordings], models, tmp_path / "out.parquet", **options)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        tiny.picture(folder / f"{i}.jpg", seed=i)
    return folder


def test_a_finished_file_takes_in_what_is_new(models, pictures, tmp_path, monkeypatch):
    out, embedded = tmp_path / "out.parquet", []
    keep = run.Run._keep
    monkeypatch.setattr(
        run.Run, "_keep", lambda self, items, *o: embedded.extend(i.path for i in items) or keep(self, items, *o)
    )
    options = {"dtype": "float32", "batch_size": 1}
    embed_files([pictures], models, out, **options)
    before = table(out)
    embedded.clear()
    tiny.picture(pictures / "1.jpg", seed=40)  # changed
    tiny.picture(pictures / "00.jpg", seed=41)  # new
    (pictures / "2.jpg").unlink()  # gone
    other = tmp_path / "other"
    other.mkdir()
    tiny.picture(other / "x.jpg", seed=5)
    (other / "bad.jpg").write_text("no picture")
    found = embed_files([pictures, other], models, out, **options)
    assert sorted(map(os.path.basename, embedded)) == ["00.jpg", "1.jpg", "x.jpg"]
    assert (found.resumed, found.gone, found.kept, len(found.failures), found.finished) == (2, 1, 0, 1, False)
    rows = table(out)
    assert [Path(row["path"]).name for row in rows.values()] == ["0.jpg", "00.jpg", "1.jpg", "3.jpg", "x.jpg"]
    assert all((rows[name] == before[name]) == (not name.endswith("/1.jpg")) for name in rows.keys() & before.keys())
    fresh = tmp_path / "fresh.parquet"
    embed_files([pictures, other], models, fresh, **options)
    assert same(out, fresh)
    content = out.read_bytes()  # of some of them, and nothing new: left as it is
    found = embed_files([other / "x.jpg"], models, out, **options)
    assert found.finished and found.kept == 4 and out.read_bytes() == content and not partial_path(out).exists()
    new = tmp_path / "new.jpg"
    tiny.picture(new, seed=6)
    found = embed_files([new], models, out, **options)
    assert found.embedded == {"image": 6} and found.kept == 5 and f"image:{new}" in table(out)
    new.write_text("no picture any more")
    assert embed_files([new], models, out, **options).embedded == {"image": 5}


def test_a_finished_file_of_parts_takes_in_what_is_new(models, recordings, tmp_path):
    options = {"segment": "1s", "fuse": "segments", "dtype": "float32"}
    one, both, out = recordings / "a.wav", [recordings / "a.wav", recordings / "c.wav"], tmp_path / "out.parquet"
    embed_files([one], models, out, **options)
    found = embed_files(both, models, out, **options)
    assert found.resumed == 5
    embed_files(both, models, tmp_path / "fresh.parquet", **options)
    assert same(out, tmp_path / "fresh.parquet")
    assert embed_files(both[1:], models, out, **options).finished
    assert len(table(out)) == found.embedded["audio"]


def test_a_finished_file_without_its_tags_is_left_alone(models, pictures, tmp_path):
    out = tmp_path / "out.parquet"
    embed_files([pictures / "0.jpg"], models, out)
    found = pq.read_table(out)
    pq.write_table(found, out)  # by somebody who keeps the metadata
    with pytest.raises(FileExistsError, match="of a run with other inputs, and does not say of which files"):
        embed_files([pictures], models, out)
    assert pq.read_table(out).equals(found)


def test_shares_are_the_whole(models, pictures, tmp_path):
    (pictures / "words.txt").write_text("\n".join(f"word {i}" for i in range(20)))
    found: dict = {}
    for i in (1, 2, 3):
        out = tmp_path / f"{i}.parquet"
        if embed_files([pictures], models, out, shard=f"{i}/3").out:
            assert not found.keys() & table(out).keys()
            found |= table(out)
    embed_files([pictures], models, tmp_path / "all.parquet")
    assert found.keys() == table(tmp_path / "all.parquet").keys()


def test_from_the_command_line(models, recordings, tmp_path):
    command = ["embed", str(recordings / "a.wav"), "--model", models[2], "--out", str(tmp_path / "out.parquet")]
    done = CliRunner().invoke(app, [*command, "--segment", "1s", "--hop", "500ms", "--fuse", "segments"])
    assert done.exit_code == 0 and done.stdout.startswith("7 embedded (7 audio), 0 failed"), done.output


def test_several_devices_make_the_same_rows(models, recordings, pictures, tmp_path):
    """Each batch is embedded by one of two processes, which have a thread each, as this one has."""
    one, two, options = tmp_path / "one.parquet", tmp_path / "two.parquet", {"dtype": "float32", "segment": "1s"}
    given, calls = [recordings, pictures], []
    embed_files(given, models, one, batch_size=2, **options)

    def progress(*at):
        calls.append(at)
        if len(calls) > 6:
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        embed_files(given, models, two, batch_size=2, progress=progress, **options)
    found = embed_files(given, models, two, batch_size=2, device="cpu,cpu", **options)
    assert found.resumed and not found.failures and same(one, two)
    (tmp_path / "bad").mkdir()
    broken = tiny.checkpoint(tmp_path / "bad", "image")
    next(Path(broken).glob("*.safetensors")).write_bytes(b"no weights")
    with pytest.raises(RuntimeError, match="CheckpointError"):
        embed_files(given, [str(broken)], tmp_path / "bad.parquet", device="cpu,cpu", dtype="float32")
    with pytest.raises(ValueError, match="device: expected auto, cpu, cuda or cuda:N, got 'nothing'"):
        embed_files(given, models, tmp_path / "no.parquet", device="cpu,nothing")


def test_what_cannot_be_listed_now_loses_no_rows(models, pictures, tmp_path):
    """A disk that is away, a table that is torn, a tar that breaks off, captions that are no text any more."""
    away, out = tmp_path / "away", tmp_path / "out.parquet"
    away.mkdir()
    tiny.picture(away / "a.jpg", seed=50)
    files = {f"{i}.jpg": (pictures / f"{i}.jpg").read_bytes() for i in (0, 1)}
    tar = tiny.shard(tmp_path / "x.tar", files)
    cells = pa.array([{"bytes": data, "path": name} for name, data in files.items()])
    pq.write_table(pa.table({"image": cells}), tmp_path / "t.parquet")
    (tmp_path / "words.txt").write_text("one\ntwo\n")
    inputs = [away, tar, tmp_path / "t.parquet", tmp_path / "words.txt"]
    before = (embed_files(inputs, models, out), table(out))[1]
    assert len(before) == 7
    away.rename(tmp_path / "else")
    tar.write_bytes(tar.read_bytes()[:1500])
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    (tmp_path / "words.txt").write_bytes(b"\xff\xfe")
    found = embed_files([*inputs, pictures / "2.jpg"], models, out)
    assert found.gone == 0 and len(found.failures) == 4
    assert [failure.reason for failure in found.failures if failure.path == str(away)] == ["No such file or directory"]
    assert table(out).keys() == before.keys() | {f"image:{pictures / '2.jpg'}"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_no_input_is_replaced(models, pictures, tmp_path, overwrite):
    pq.write_table(pa.table({"path": ["pictures/0.jpg"]}), tmp_path / "t.parquet")
    for out, inputs in (
        (pictures / "0.jpg", [pictures]),
        (pictures / "0.jpg", [f"image={pictures}/../{pictures.name}/0.jpg"]),
        (tmp_path / "t.parquet", [tmp_path / "t.parquet", pictures]),
    ):
        content = out.read_bytes()
        with pytest.raises(FileExistsError, match="out: it is one of the inputs"):
            embed_files(inputs, models, out, overwrite=overwrite)
        assert out.read_bytes() == content and not partial_path(out).exists()
