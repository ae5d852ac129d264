"""Embedding runs: what they write, which modality a file is, and that nothing finished is lost however they end."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lbfast import files
from lbfast.checkpoints import open_checkpoints
from lbfast.embedding import BadFileError, embed_files, find_items
from lbfast.embedding.items import LONGEST_CAPTION, Item
from lbfast.embedding.journal import Journal, partial_path
from lbfast.model.languagebind import LanguageBind, model_dict
from lbfast.processing import default_tokenizer, transform_dict
from lbfast.processing.media import MediaWarning
from tests import tiny

FILES = {"image": tiny.picture, "depth": tiny.depth_map, "video": tiny.clip, "audio": tiny.sound}
SUFFIX = {"image": ".jpg", "depth": ".png", "video": ".mp4", "audio": ".wav"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny.checkpoint(folder, name) for name in ("image", "video", "audio", "depth")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny.pictures(tmp_path_factory.mktemp("pictures"), 10)


def rows(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def vectors(path: Path) -> np.ndarray:
    return np.array([row["embedding"] for row in rows(path)], dtype=np.float32)


def test_every_modality_in_one_run(models, tmp_path, monkeypatch):
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    files = {name: [FILES[name](Path(name, f"{i}{SUFFIX[name]}"), seed=i) for i in (1, 0)] for name in FILES}
    captions = ["a cat", "a dog on a mat"]
    Path("words.txt").write_text(f"{captions[0]}\n\n  {captions[1]}  \n")
    given = ["words.txt", "image", *map(str, files["video"]), "audio", "depth=depth"]
    summary = embed_files(given, list(models.values()), "out.parquet", batch_size=3, dtype="float32")
    assert summary.embedded == {"image": 2, "video": 2, "audio": 2, "depth": 2, "language": 2}
    assert not summary.failures and not partial_path(Path("out.parquet")).exists()

    expected = [f"image:image/{i}.jpg" for i in (0, 1)]  # folders by name, files as given
    expected += [f"video:video/{i}.mp4" for i in (1, 0)]
    expected += [f"audio:audio/{i}.wav" for i in (0, 1)] + [f"depth:depth/{i}.png" for i in (0, 1)]
    expected += ["language:words.txt#1", "language:words.txt#3"]
    found = rows(Path("out.parquet"))
    assert [row["id"] for row in found] == expected
    assert [row["modality"] for row in found] == [name.partition(":")[0] for name in expected]
    assert found[0]["path"] == "image/0.jpg" and found[-1]["path"] == "words.txt"
    assert found[2]["model"] == str(models["video"]) and found[-1]["model"] == str(models["depth"])
    kind = pq.read_schema("out.parquet").field("embedding").type
    assert (kind.list_size, str(kind.value_type)) == (tiny.SIZE, "float")

    loaded = {name: model_dict[name].from_pretrained(where) for name, where in models.items()}
    bound = LanguageBind.from_models(loaded, use_temp=False).eval()
    inputs = {name: transform_dict[name](loaded[name].config)(files[name]) for name in files}
    inputs["language"] = dict(default_tokenizer()(captions, padding="max_length", max_length=77, return_tensors="pt"))
    with torch.inference_mode():
        want = bound(inputs)
    for name in ("image", "audio", "depth"):
        want[name] = want[name].flip(0)
    want = torch.cat([want[name] for name in ("image", "video", "audio", "depth", "language")]).numpy()
    np.testing.assert_allclose(vectors(Path("out.parquet")), want, atol=2e-6)


def test_modality_of_a_file(tmp_path):
    picture, sound = tiny.picture(tmp_path / "a.PNG"), tiny.sound(tmp_path / "b.wav")
    (tmp_path / "c.txt").write_text("words")
    (tmp_path / "d.xyz").write_text("")
    tiny.picture(tmp_path / ".hidden.png")

    def modalities(inputs, available, modality=None):
        return [(i.modality, Path(i.path).name) for i in find_items(inputs, available, modality).items]

    folder = str(tmp_path)
    assert modalities([folder], {"image", "depth", "audio"}) == [
        ("image", "a.PNG"),
        ("audio", "b.wav"),
        ("language", "c.txt"),
    ]
    assert modalities([picture], {"thermal", "video"}) == [("thermal", "a.PNG")]
    assert modalities([picture], {"image", "thermal"}, "thermal") == [("thermal", "a.PNG")]
    assert modalities([folder], {"image", "depth"}, "depth") == [("depth", "a.PNG"), ("depth", "b.wav")]
    assert modalities([folder], {"image"}, "language") == [("language", "c.txt")]
    assert modalities([f"depth={picture}", folder], {"image", "depth"}) == [("depth", "a.PNG"), ("language", "c.txt")]
    assert modalities([picture, folder, picture], {"image"}) == [("image", "a.PNG"), ("language", "c.txt")]

    listing = find_items([folder, sound, "nowhere.jpg", tmp_path / "d.xyz", f"video={sound}"], {"image"}, None)
    assert listing.ignored == {"no model for audio": 1, "unknown type .xyz": 1}
    assert [f.reason for f in listing.failures] == [
        "no model for video",
        "no model for audio",
        "No such file or directory",
        "unknown type .xyz",
    ]
    with pytest.raises(ValueError, match=r"modality: expected one that there is a model for.*got 'audio'"):
        find_items([folder], {"image"}, "audio")


@pytest.mark.parametrize("name, content", [("latin.txt", b"caf\xe9\n"), ("empty.txt", b"\n \n")])
def test_text_files_without_captions(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    listing = find_items([tmp_path / name], (), None)
    assert not listing.items
    assert listing.failures[0].reason in ("the text is not UTF-8", "no captions: expected one a line")


def test_text_files_that_never_end(tmp_path):
    """A line of 50 GB of zeros, and what is no file of captions whoever writes to it."""
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(50 << 30)
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    (tmp_path / "d.txt").write_text("one\r\n" + "x" * LONGEST_CAPTION + "\n\nthree\x85x")
    (tmp_path / "e.txt").write_text("one\n" + "x" * LONGEST_CAPTION + "x")
    listing = find_items([tmp_path], (), None)
    assert [item.id.rpartition("#")[2] for item in listing.items] == ["1", "2", "4"]
    long = "expected a caption of at most 1,000,000 characters"
    assert [f.reason for f in listing.failures] == [
        f"line 1: {long}",
        f"not a regular file: {tmp_path / 'b.txt'}",
        f"not a regular file: {tmp_path / 'c.txt'}",
        f"line 2: {long}",
    ]


def test_a_file_name_that_is_not_utf8(tmp_path, models):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    tiny.picture(tmp_path / "a.jpg").rename(name)
    failure = find_items([tmp_path], {"image"}, None).failures[0]
    assert failure.reason == "the name is not UTF-8" and "\\xe9" in failure.path


def test_bad_files_are_skipped_and_counted(models, tmp_path):
    tiny.picture(tmp_path / "good.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "zero.jpg").write_bytes(b"")
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    met = []
    summary = embed_files([tmp_path], [models["image"]], tmp_path / "o.parquet", on_failure=met.append)
    assert summary.embedded == {"image": 1} and met == summary.failures
    assert [Path(f.path).name for f in met] == ["text.jpg", "torn.jpg", "zero.jpg"]
    assert all(f.path in f.reason for f in met)
    assert [Path(row["path"]).name for row in rows(tmp_path / "o.parquet")] == ["good.jpg"]

    with pytest.raises(BadFileError, match=r"text\.jpg: expected an image"):
        embed_files([tmp_path], [models["image"]], tmp_path / "p.parquet", strict=True)
    assert not (tmp_path / "p.parquet").exists()


def test_nothing_to_embed_writes_nothing(models, tmp_path):
    (tmp_path / "bad.jpg").write_text("no picture")
    summary = embed_files([tmp_path], [models["image"]], tmp_path / "o.parquet")
    assert summary.out is None and len(summary.failures) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jpg"]


def test_embeddings_that_are_not_finite_are_not_written(tmp_path):
    model = tiny.model("image")
    with torch.no_grad():
        model.visual_projection.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "model")
    picture = tiny.picture(tmp_path / "a.jpg")
    summary = embed_files([picture], [tmp_path / "model"], tmp_path / "o.parquet")
    assert summary.out is None and "not finite" in summary.failures[0].reason


def stop_after(batches: int):
    """A progress callback that ends the run, as Ctrl-C would, after that many batches."""
    left = [batches]

    def progress(modality: str, done: int, total: int) -> None:
        if done and not left[0]:
            raise KeyboardInterrupt
        left[0] -= bool(done)

    return progress


def test_an_interrupted_run_goes_on(models, pictures, tmp_path):
    straight, out = tmp_path / "straight.parquet", tmp_path / "out.parquet"
    embed_files([pictures], [models["image"]], straight, batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        embed_files([pictures], [models["image"]], out, batch_size=3, progress=stop_after(1))
    assert not out.exists()
    summary = embed_files([pictures], [models["image"]], out, batch_size=4)
    assert summary.resumed == 6 and summary.embedded == {"image": 10}
    assert [r["id"] for r in rows(out)] == [r["id"] for r in rows(straight)]
    np.testing.assert_allclose(vectors(out), vectors(straight), atol=2e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "straight.parquet"]


def test_a_changed_file_is_embedded_again(models, tmp_path):
    for i in range(4):
        tiny.picture(tmp_path / "in" / f"{i}.png", seed=i)
    out = tmp_path / "out.parquet"
    with pytest.raises(KeyboardInterrupt):
        embed_files([tmp_path / "in"], [models["image"]], out, batch_size=2, progress=stop_after(1))
    tiny.picture(tmp_path / "in" / "0.png", seed=9)
    (tmp_path / "in" / "1.png").unlink()
    summary = embed_files([tmp_path / "in"], [models["image"]], out)
    assert summary.resumed == 2 and summary.embedded == {"image": 3}
    fresh = tmp_path / "fresh.parquet"
    embed_files([tmp_path / "in"], [models["image"]], fresh)
    np.testing.assert_allclose(vectors(out), vectors(fresh), atol=2e-6)


def test_other_settings_are_not_mixed_in(models, pictures, tmp_path):
    out = tmp_path / "out.parquet"

    def run(progress=None, **settings):
        return embed_files(
            [pictures], [models["image"]], out, batch_size=4, progress=progress, **{"dtype": "float32", **settings}
        )

    with pytest.raises(KeyboardInterrupt):
        run(stop_after(0))
    with pytest.raises(ValueError, match=r"unfinished run with other settings.*dtype: float32 then, bfloat16 now"):
        run(dtype="bfloat16")
    tiny.checkpoint(tmp_path, "image", seed=5)
    with pytest.raises(ValueError, match="models: "):
        embed_files([pictures], [tmp_path / "image"], out)
    assert run(overwrite=True).resumed == 4  # the same settings: nothing to throw away
    with pytest.raises(FileExistsError, match=r"already, of a run with other settings \(dtype: float32 then, bfloat16"):
        run(dtype="bfloat16")
    assert run(dtype="bfloat16", overwrite=True).resumed == 0
    exact = tmp_path / "exact.parquet"
    embed_files([pictures], [models["image"]], exact, dtype="float32")
    np.testing.assert_allclose(vectors(out), vectors(exact), atol=2e-2)
    np.testing.assert_allclose(np.linalg.norm(vectors(out), axis=1), 1, atol=1e-6)
    with pytest.raises(FileExistsError, match="of a run with other settings"):
        run(dtype="bfloat16", dim=6)
    run(dim=6, overwrite=True)
    few = vectors(exact)[:, :6]
    np.testing.assert_allclose(vectors(out), few / np.linalg.norm(few, axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(ValueError, match="dim: expected a whole number from 1 to"):
        run(dim=4096, overwrite=True)


def test_a_foreign_file_in_the_journal_s_place_is_left_alone(models, pictures, tmp_path):
    foreign = partial_path(tmp_path / "out.parquet")
    foreign.write_text("somebody's notes")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="got something else"):
            embed_files([pictures], [models["image"]], tmp_path / "out.parquet", overwrite=overwrite)
    assert foreign.read_text() == "somebody's notes"


def test_a_torn_journal_keeps_whole_batches(tmp_path):
    items = [Item(f"image:{i}", "image", str(i), "stamp") for i in range(9)]
    embeds = np.arange(36, dtype=np.float32).reshape(9, 4)
    out, ends = tmp_path / "out.parquet", []
    first = Journal(out, 4, {"a": 1})
    for start in (0, 3, 6):
        ends.append(first.path.stat().st_size)
        first.append(items[start : start + 3], embeds[start : start + 3], "m")
    ends.append(first.path.stat().st_size)
    first.close()
    whole = first.path.read_bytes()
    for cut in {0, 1, *range(0, len(whole), 37), *ends, *(end - 1 for end in ends)}:
        first.path.write_bytes(whole[:cut])
        again = Journal(out, 4, {"a": 1})
        kept = 3 * sum(cut >= end for end in ends[1:])
        assert [item in again for item in items] == [i < kept for i in range(9)], cut
        again.append(items[kept:], embeds[kept:], "m") if kept < 9 else None
        again.finish(items, {})
        again.close()
        np.testing.assert_array_equal(vectors(out), embeds)
        out.unlink()


def test_one_run_at_a_time(models, pictures, tmp_path):
    out = tmp_path / "out.parquet"
    with HeldJournal(out), pytest.raises(BlockingIOError, match="another run is writing here"):
        embed_files([pictures], [models["image"]], out)


class HeldJournal:
    """An open journal, as another run would hold it."""

    def __init__(self, out):
        self.journal = Journal(out, tiny.SIZE, {})

    def __enter__(self):
        return self.journal

    def __exit__(self, *error):
        self.journal.close()


def test_a_full_disk_loses_nothing(models, pictures, tmp_path):
    out = tmp_path / "out.parquet"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # stands for the disk's end: writes past it fail
    try:
        with pytest.raises(OSError, match=r"File too large; what is finished is kept: '.*out\.parquet\.partial'"):
            embed_files([pictures], [models["image"]], out, batch_size=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists()
    summary = embed_files([pictures], [models["image"]], out, batch_size=1)
    assert 0 < summary.resumed < 10 and summary.embedded == {"image": 10}


def test_a_failed_last_step_can_be_repeated(models, pictures, tmp_path, monkeypatch):
    out = tmp_path / "out.parquet"

    def no_space(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "link", no_space)
        with pytest.raises(OSError, match="No space left"):
            embed_files([pictures], [models["image"]], out)
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet.partial"]
    assert embed_files([pictures], [models["image"]], out).resumed == 10


def test_arguments(models, pictures, tmp_path):
    def run(inputs=(pictures,), model=(models["image"],), out=tmp_path / "o.parquet", **settings):
        embed_files(list(inputs), list(model), out, **settings)

    with pytest.raises(ValueError, match="inputs: expected at least one"):
        run(inputs=())
    with pytest.raises(ValueError, match="model: expected at least one"):
        run(model=())
    with pytest.raises(ValueError, match="batch_size: expected a whole number from 1 to 2147483647, got 0"):
        run(batch_size=0)
    with pytest.raises(ValueError, match=r"dtype: expected one of auto, .*got 'int8'"):
        run(dtype="int8")
    with pytest.raises(ValueError, match="device: expected auto"):
        run(device="gpu!")
    with pytest.raises(ValueError, match="device: expected one that is here, got 'cuda:99'"):
        run(device="cuda:99")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        run(out=tmp_path / "no" / "o.parquet")
    with pytest.raises(IsADirectoryError):
        run(out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints(models, tmp_path):
    opened = open_checkpoints([models["depth"], f"image={models['image']}"])
    assert list(opened) == ["depth", "image"]
    with pytest.raises(ValueError, match="expected one a modality, got two for image"):
        open_checkpoints([models["image"], models["image"]])
    wide = tiny.checkpoint(tmp_path, "video", size=24)
    with pytest.raises(ValueError, match=rf"embeddings have one size, got .*{models['image']}: 16.*video: 24"):
        open_checkpoints([models["image"], wide])
    with pytest.raises(ValueError, match="expected model_type LanguageBindDepth, got LanguageBindImage"):
        open_checkpoints([f"depth={models['image']}"])
    with pytest.raises(FileNotFoundError, match=r"expected a config\.json"):
        open_checkpoints([tmp_path])
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"expected a model_type of LanguageBindImage.*got 'bert'"):
        open_checkpoints([tmp_path])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read it"):
        open_checkpoints([tmp_path])
    with pytest.raises(OSError, match=r"LanguageBind/LanguageBind_Nowhere: not a local directory.*offline"):
        open_checkpoints(["LanguageBind_Nowhere"], cache_dir=tmp_path)


def test_the_fingerprint_follows_the_weights(tmp_path):
    (opened,) = open_checkpoints([tiny.checkpoint(tmp_path, "image")]).values()
    before = opened.fingerprint()
    assert before == opened.fingerprint()
    os.utime(tmp_path / "image" / "model.safetensors", ns=(1, 1))
    assert opened.fingerprint() != before


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_killed_and_interrupted_from_outside(models, tmp_path, processes):
    """SIGKILL, then SIGINT, to a real run with a worker; a third run finishes what they left."""
    from tests import runs

    count = 600
    source = tiny.picture(tmp_path / "in" / "000.png")
    for i in range(1, count):
        os.link(source, tmp_path / "in" / f"{i:03}.png")
    out = tmp_path / "out.parquet"
    command = [tmp_path, "embed", tmp_path / "in", "--model", models["image"]]
    command += ["--out", out, "--batch-size", "1", "--workers", "1"]

    def run_until(size: int, number: int) -> tuple[int, str]:
        process = processes.Process(target=runs.lbfast_command, args=command)
        process.start()
        end = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < end:
            if partial_path(out).exists() and partial_path(out).stat().st_size > size:
                os.kill(process.pid, number)
                break
            time.sleep(0.005)
        process.join(60)
        return process.exitcode, (tmp_path / "stderr").read_text()

    assert run_until(3000, signal.SIGKILL)[0] == -signal.SIGKILL
    left = partial_path(out).stat().st_size
    assert not out.exists() and left > 3000
    code, said = run_until(left, signal.SIGINT)
    assert code == 130 and "the same command goes on from here" in said and "Traceback" not in said
    assert not out.exists() and partial_path(out).stat().st_size > left
    summary = embed_files([tmp_path / "in"], [models["image"]], out, batch_size=32)
    assert 0 < summary.resumed < count and summary.embedded == {"image": count}
    assert len({row["id"] for row in rows(out)}) == count
    assert np.abs(vectors(out) - vectors(out)[0]).max() < 2e-6


@pytest.mark.parametrize("workers", [0, 1])
def test_urls_only_when_asked(models, pictures, workers, tmp_path, monkeypatch):
    pytest.importorskip("fsspec")
    local, out = [str(pictures / f"{i}.jpg") for i in (1, 2)], tmp_path / "urls.parquet"
    urls = [f"image={Path(local[0]).as_uri()}", Path(local[1]).as_uri()]
    refused = embed_files(urls, [models["image"]], out, dtype="float32")
    assert refused.out is None and all("allow_urls" in failure.reason for failure in refused.failures)
    captions, none = tmp_path / "captions.txt", (tmp_path / "none.jpg").as_uri()
    captions.write_text("a cat")
    given = [*urls, captions.as_uri(), none]
    summary = embed_files(given, [models["image"]], out, dtype="float32", workers=workers, allow_urls=True)
    reasons = {failure.path: failure.reason for failure in summary.failures}
    assert reasons.keys() == {captions.as_uri(), none}
    assert "captions are read from local files" in reasons[captions.as_uri()] and "cannot be opened" in reasons[none]
    embed_files(local, [models["image"]], tmp_path / "local.parquet", dtype="float32")
    np.testing.assert_array_equal(vectors(out), vectors(tmp_path / "local.parquet"))
    assert embed_files(given, [models["image"]], out, dtype="float32", allow_urls=True).finished
    monkeypatch.setattr("lbfast.embedding.items.url_stamp", len)
    items = find_items(["https://a.b/c/d.mp4?token=x.jpg", "depth=https://a.b/c"], ["video", "depth"], None, True).items
    assert [item.id for item in items] == ["video:https://a.b/c/d.mp4?token=x.jpg", "depth:https://a.b/c"]


def test_strict_refuses_damaged_files_too(models, tmp_path):
    pytest.importorskip("kaldi_native_fbank")
    av = pytest.importorskip("av")
    path = tmp_path / "a.flac"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("flac", rate=16000, layout="mono")
        noise = np.random.default_rng(0).integers(-9999, 9999, (1, 32000), np.int16)
        frame = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        file.mux([*stream.encode(frame), *stream.encode(None)])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(BadFileError, match=r"a\.flac: expected an audio file, .* checksum"):
        embed_files([path], [models["audio"]], tmp_path / "out.parquet", strict=True)
    with pytest.warns(MediaWarning, match="checksum"):
        assert embed_files([path], [models["audio"]], tmp_path / "out.parquet").embedded == {"audio": 1}
