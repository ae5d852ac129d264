"""The embedder: rows as `lbfast embed` writes them, wherever it is opened; what fails is a row with its reason."""

from __future__ import annotations

import pickle
import re
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import lbfast
from lbfast.embedding import BadFileError, Embedder, embed_files
from tests import tiny

FILES = {"image": tiny.picture, "video": tiny.clip, "audio": tiny.sound, "depth": tiny.depth_map}
SUFFIX = {"image": ".jpg", "video": ".mp4", "audio": ".wav", "depth": ".png"}
VIDEO = "a clip that is there"
TEXTS = ["a cat", "a dog in the rain", "", "x" * 400]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three good files a modality and a bad one among them."""
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("embedder")
    for name, make in FILES.items():
        tiny.checkpoint(folder / "models", name)
        for i in (0, 1, 3):
            make(folder / name / f"{i}{SUFFIX[name]}", seed=i)
        (folder / name / f"2{SUFFIX[name]}").write_text("no media")
    (folder / "words.txt").write_text("\n".join(TEXTS))
    return folder


@pytest.fixture(scope="module")
def models(folder):
    return [folder / "models" / name for name in FILES]


@pytest.fixture(scope="module")
def embedder(models):
    return Embedder(models, batch_size=3, dtype="float32")


@pytest.fixture(scope="module")
def written(folder, models):
    """What `embed_files` writes: path, or caption, -> row."""
    given = [*(folder / name for name in FILES if name != "depth"), f"depth={folder / 'depth'}", folder / "words.txt"]
    embed_files(given, models, folder / "out.parquet", batch_size=3, dtype="float32")
    rows = pq.read_table(folder / "out.parquet").to_pylist()
    captions = {f"language:{folder}/words.txt#{i}": text for i, text in enumerate(TEXTS, start=1)}
    return {captions.get(row["id"], row["path"]): np.array(row["embedding"], dtype=np.float32) for row in rows}


def batch_of(folder) -> dict:
    """Every file and text, no modality by itself."""
    rows = []
    for i, text in enumerate(TEXTS):
        rows += [(str(folder / name / f"{i}{SUFFIX[name]}"), None, name) for name in FILES]
        rows += [(None, text, None)] if text else []  # a file of captions has no empty ones
    path, text, modality = zip(*rows)
    return {"path": list(path), "text": list(text), "modality": list(modality), "own": np.arange(len(rows))}


def check(found, batch, written):
    """Every row is to the last bit what a run writes, and the others say why they are not."""
    names = [path or text for path, text in zip(batch["path"], batch["text"])]
    bad = [i for i, error in enumerate(found["error"]) if error is not None]
    assert [Path(names[i]).stem for i in bad] == ["2"] * len(FILES)
    assert np.isnan(found["embedding"][bad]).all() and found["embedding"].dtype == np.float32
    for i, name in enumerate(names):
        if i not in bad:
            np.testing.assert_array_equal(found["embedding"][i], written[name], err_msg=name)
        else:
            assert name in found["error"][i]
    assert list(found["own"]) == list(batch["own"]) and found["path"] is not None


def in_another_process(file: Path, batch: dict, out) -> None:
    torch.set_num_threads(1)
    opened = pickle.loads(file.read_bytes())
    found = opened(batch)
    out.send({name: list(found[name]) if name != "embedding" else found[name] for name in found})


def test_rows_are_those_that_a_run_writes(folder, embedder, written, processes, tmp_path):
    """In one call; in two halves, pickled between them; by a copy in another process; from the bytes of the files."""
    torch.set_num_threads(1)
    batch = batch_of(folder)
    whole = embedder(batch)
    check(whole, batch, written)
    assert set(whole["modality"]) == {*FILES, "language"}
    assert [Path(name).name for name in whole["model"]] == [
        "depth" if name == "language" else name for name in whole["modality"]
    ]
    decoded = pickle.loads(pickle.dumps(embedder.decode(batch)))
    halves = embedder.embed(decoded)
    assert "pixels" not in halves
    check(halves, batch, written)

    fresh = Embedder(embedder.text_checkpoint.where, batch_size=3)
    assert len(pickle.dumps(fresh)) < 50_000
    (tmp_path / "embedder").write_bytes(pickle.dumps(embedder))  # its models are open, and stay here
    assert (tmp_path / "embedder").stat().st_size < 200_000
    ours, theirs = processes.Pipe()
    process = processes.Process(target=in_another_process, args=(tmp_path / "embedder", batch, theirs))
    process.start()
    assert ours.poll(120)
    check(ours.recv(), batch, written)
    process.join()

    contents = [None if path is None else Path(path).read_bytes() for path in batch["path"]]
    check(embedder({**batch, "bytes": contents}), batch, written)


def test_a_list_of_anything(folder, embedder):
    """Each as the processor or the tokenizer takes it, whatever stands beside it."""
    picture, sound = folder / "image" / "0.jpg", folder / "audio" / "0.wav"
    with wave.open(str(sound)) as file:
        samples = np.frombuffer(file.readframes(8000), dtype=np.int16)
    opened = Image.open(picture)
    items = [
        "a dog in the rain",
        str(picture),
        picture,
        opened,
        (samples, 16000),
        sound,
        {"array": samples, "sampling_rate": 16000},
        {"path": str(sound), "bytes": None},
        folder / "video" / "1.mp4",
        "https://is.no.file",
    ]
    rows = embedder.encode(items[:-1])
    assert rows.shape == (9, tiny.SIZE) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    pixels = np.asarray(opened)
    alone = [embedder.encode([item])[0] for item in items[:-1]]
    np.testing.assert_allclose(rows, alone, atol=2e-6)
    np.testing.assert_allclose(rows[[1, 2, 4, 4, 5]], rows[[2, 3, 5, 6, 7]], atol=2e-6)
    as_arrays = embedder.encode([pixels, torch.from_numpy(pixels.copy())], "image")
    np.testing.assert_allclose(as_arrays, rows[[1, 1]], atol=2e-6)
    np.testing.assert_allclose(embedder.encode([picture.read_bytes()], "image")[0], rows[1], atol=2e-6)
    assert embedder.encode([]).shape == (0, tiny.SIZE)
    assert embedder.encode(["0.jpg", "no/such.mp4"], "language").shape == (2, tiny.SIZE)
    with pytest.raises(BadFileError, match=r"^items\[1\]: .*a URL \(allow_urls=True opens it\)"):
        embedder.encode([items[0], "https://is.no.file/a.jpg"])


def test_strings_that_are_meant_as_files_are_no_texts(folder, embedder, monkeypatch):
    """A name with a slip in it is an error, not a caption."""
    monkeypatch.chdir(folder)
    Path("plain").write_text("words")
    for item, why in [
        ("image/9.jpg", "no such file"),
        (Path("a cat"), r"a cat: modality: expected one of image, video, audio, depth: it cannot be told from path"),
        ("plain", r"plain: modality: expected one of"),
        ("words.txt", "words.txt: a text file: its captions are rows with a text"),
    ]:
        with pytest.raises(BadFileError, match=rf"^items\[0\]: .*{why}"):
            embedder.encode([item])
    assert embedder.encode(["plain words", "image"]).shape == (2, tiny.SIZE)  # a folder is no file


@pytest.mark.parametrize(
    "row, error",
    [
        ({"text": None}, "expected data or bytes or path or text, got none"),
        ({"text": 3}, "text: expected a string, got int"),
        ({"text": "\ud800"}, "text: expected Unicode, got half of a surrogate pair"),
        ({"text": "a" * 1_000_001}, "text: expected at most 1,000,000 characters, got 1,000,001"),
        ({"text": "a cat", "modality": "image"}, "expected data, bytes, path of modality image, got a text"),
        ({"path": "a.jpg", "modality": "language"}, "expected text, got none"),
        ({"path": "a.jpg", "modality": "smell"}, "modality: expected one that there is a model for .*, got 'smell'"),
        (
            {"path": "a.jpg", "modality": "thermal"},
            "modality: expected one that there is a model for .*, got 'thermal'",
        ),
        ({"path": "a.jpg", "modality": ["image"]}, "modality: expected one that there is a model for .*, got a list"),
        ({"path": "a\0b.jpg"}, "path: expected the name of a file, got one with a null character"),
        ({"path": 7}, "path: expected a string, got int"),
        ({"path": "none.jpg"}, "no such file"),
        ({"path": "none.xyz"}, "none.xyz: modality: expected one of image, .*: it cannot be told from path"),
        ({"bytes": b"\xff\xd8"}, "modality: expected one of .*: it cannot be told from bytes"),
        ({"bytes": b"", "modality": "image"}, r"bytes \(0 of them\): expected an image, got an empty file"),
        ({"bytes": "text", "modality": "image"}, "bytes: expected the bytes of a file, got str"),
        ({"bytes": b"no picture", "path": "x/y.jpg"}, "x/y.jpg: expected an image, got text"),
        ({"data": np.zeros((3, 3, 9, 9)), "modality": "image"}, "expected"),
        ({"data": object(), "modality": "audio"}, "expected"),
        ({"path": VIDEO, "start_sec": -1.0}, "start_sec: expected seconds of at least 0, got -1.0"),
        ({"path": VIDEO, "end_sec": "3"}, "end_sec: expected seconds of at least 0, got '3'"),
        ({"path": VIDEO, "start_sec": 2, "end_sec": 2}, "end_sec: expected more than start_sec, 2, got 2"),
        ({"path": VIDEO, "start_sec": 1e6, "end_sec": 2e6}, "expected a video with frames from 1e"),
    ],
)
def test_a_row_that_fails_hurts_no_other(folder, embedder, row, error):
    video = str(folder / "video" / "0.mp4")
    row = {name: video if value is VIDEO else value for name, value in row.items()}
    names = dict.fromkeys([*row, "text"])
    good = {"text": "a cat"}
    batch = {name: [good.get(name), row.get(name), good.get(name)] for name in names}
    for found in (embedder(batch), embedder.embed(embedder.decode(batch))):
        assert found["error"][0] is None and found["error"][2] is None
        assert re.search(error, found["error"][1]), found["error"][1]
        assert np.isnan(found["embedding"][1]).all()
        np.testing.assert_array_equal(found["embedding"][[0, 2]], embedder.encode(["a cat", "a cat"]))


def test_columns_of_every_kind(folder, embedder):
    """Of lists, arrays and Arrow; what a table has in the place of nothing is nothing; a part of a clip is one."""
    video, picture = str(folder / "video" / "0.mp4"), str(folder / "image" / "0.jpg")
    plain = embedder({"path": [video, picture], "start_sec": [0.1, None], "end_sec": [0.3, None]})
    assert list(plain["error"]) == [None, None]
    for make in (lambda values: np.array(values), pa.array, lambda values: pa.chunked_array([values])):
        again = embedder(
            {"path": make([video, picture]), "start_sec": make([0.1, np.nan]), "end_sec": make([0.3, np.nan])}
        )
        np.testing.assert_array_equal(again["embedding"], plain["embedding"])
    whole = embedder({"path": [video]})["embedding"][0]
    assert not np.array_equal(whole, plain["embedding"][0])
    assert embedder({"path": []})["embedding"].shape == (0, tiny.SIZE)


def test_what_is_no_batch(embedder):
    for batch, kind, error in [
        (["a.jpg"], TypeError, "batch: expected a dict of columns, got list"),
        ({"path": "a.jpg"}, TypeError, "batch\\['path'\\]: expected a column, a value for each row, got str"),
        ({"path": {"a.jpg"}}, TypeError, "batch\\['path'\\]: expected a column, a value for each row, got set"),
        ({"name": ["a.jpg"]}, ValueError, "batch: expected a column of data, bytes, path, text, got name"),
        ({"path": ["a", "b"], "text": ["a"]}, ValueError, "batch: expected columns of one length, got .*'path': 2"),
    ]:
        for call in (embedder, embedder.decode):
            with pytest.raises(kind, match=error):
                call(batch)
    with pytest.raises(ValueError, match="decoded: expected columns that `decode` has made"):
        embedder.embed({"path": ["a.jpg"]})
    with pytest.raises(ValueError, match="pixels: expected arrays as decode gives them, of one dtype, got float64"):
        embedder.embed({"pixels": [np.zeros((3, 64, 64))], "modality": ["image"], "error": [None]})
    for items in ("a.jpg", 3, {"a.jpg"}, frozenset(["a"]), {"a.jpg": 1}.keys(), {"a": 1}, (name for name in "a")):
        with pytest.raises(TypeError, match="items: expected a list, got"):
            embedder.encode(items)
    with pytest.raises(ValueError, match=r"modality: expected one that there is a model for.*got 'smell'"):
        embedder.encode(["a.jpg"], "smell")
    with pytest.raises(TypeError, match="model: expected a list, for the last one embeds texts, got set"):
        Embedder({"lbfast-mini/image"})


@pytest.mark.parametrize(
    "wrong, error",
    [
        ({"batch_size": 0}, "batch_size: expected a whole number from 1"),
        ({"batch_size": 2.0}, "batch_size: expected a whole number"),
        ({"dtype": "float64"}, "dtype: expected one of auto"),
        ({"precision": "int4"}, "precision: expected None, 'int8' or 'fp8', got 'int4'"),
        ({"device": "tpu"}, "device: expected auto, cpu"),
        ({"device": None}, "device: expected auto, cpu"),
        ({"dim": 0}, "dim: expected a whole number from 1 to 16"),
        ({"dim": 17}, "dim: expected a whole number from 1 to 16"),
        ({"models": []}, "model: expected at least one checkpoint"),
    ],
)
def test_arguments(models, wrong, error):
    with pytest.raises(ValueError, match=error):
        Embedder(**{"models": models, **wrong})


def test_a_device_that_is_elsewhere(models):
    """It is looked for where the embedder is used, which need not be where it is made."""
    made = Embedder(models, device="cuda:63")
    assert "cuda:63" in repr(made)
    with pytest.raises(ValueError, match="device: expected one that is here"):
        made.encode(["a cat"])


def test_strictly_the_first_bad_row_ends_it(folder, models):
    strict = Embedder(models, strict=True)
    batch = {"path": [str(folder / "image" / f"{i}.jpg") for i in range(4)]}
    for call in (strict, strict.decode):
        with pytest.raises(BadFileError, match=r"^batch\[2\]: .*2\.jpg: expected an image, got text"):
            call(batch)


def test_fewer_numbers_in_bfloat16(folder, models):
    """`decode` gives the dtype that was asked for, and float32 where nobody knows what the device will be."""
    batch = {"path": [str(folder / "image" / "0.jpg")], "text": ["a cat"]}
    half = Embedder(models, dtype="bfloat16", dim=5)
    assert half.decode(batch)["pixels"][0].dtype == np.int16
    assert Embedder(models).decode(batch)["pixels"][0].dtype == np.float32
    found = half(batch)["embedding"]
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(half.embed(half.decode(batch))["embedding"], found)
    np.testing.assert_array_equal(half.embed(Embedder(models).decode(batch))["embedding"], found)


def test_an_embedding_that_is_not_finite_is_an_error(tmp_path):
    model = tiny.model("image")
    with torch.no_grad():
        model.visual_projection.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "model")
    made = Embedder(tmp_path / "model", dtype="float32")
    found = made({"path": [tiny.picture(tmp_path / "a.jpg")]})
    assert found["error"][0] == "its embedding is not finite in torch.float32"
    assert np.isnan(found["embedding"]).all()
    with pytest.raises(BadFileError, match=r"items\[0\]: its embedding is not finite"):
        made.encode([tmp_path / "a.jpg"])


def test_threads_share_one(folder, embedder):
    """It is opened once, and each gets its own rows."""
    copy = pickle.loads(pickle.dumps(embedder))
    texts = [f"caption {i}" for i in range(6)]
    want = [embedder.encode([text]) for text in texts]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda text: copy.encode([text]), texts))
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(want), atol=2e-6)
    copy.close()
    np.testing.assert_allclose(copy.encode([texts[0]]), want[0], atol=2e-6)


def test_it_is_public():
    assert lbfast.Embedder is Embedder
