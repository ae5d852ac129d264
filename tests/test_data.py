"""Training data: the same batches whatever the ranks, workers and interruptions; and bad data is never fatal."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from lbfast.cli import app
from lbfast.data.manifest import Manifest
from lbfast.data.reader import check_views, open_sources
from lbfast.data.sample import Sample
from lbfast.data.tar import members
from lbfast.processing import default_tokenizer, transform_dict
from lbfast.training.batches import Batches
from tests import tiny
from tests.tiny import Tokenizer, noise, shard, table
from tests.workers import Noise

COUNT = 22
PICTURES = (".jpg", ".png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of one byte, and a manifest of them."""
    where = tmp_path_factory.mktemp("data")
    for i in range(COUNT):
        (where / f"{i:02}").write_bytes(bytes([i]))
    table(where / "all.csv", ["path", "caption"], [[f"{i:02}", f"caption {i}"] for i in range(COUNT)])
    return where


def joined(batches) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
    batches = list(batches)
    keys = [key for batch in batches for key in batch.keys]
    tensors = [(b.pixel_values, b.input_ids, b.groups) for b in batches]
    return keys, *(torch.cat(parts) for parts in zip(*tensors))


def assert_same(ours, theirs) -> None:
    assert ours[0] == theirs[0]
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(a, b)


def test_captions_are_views_with_weights():
    with pytest.raises(TypeError, match="captions: expected views with weights"):
        check_views(["caption"])


def test_an_epoch_is_a_permutation_drawn_from_seed_and_epoch(folder):
    batches = noise(folder / "all.csv", batch_size=COUNT, seed=3)
    epochs = [next(batches.epoch(epoch)) for epoch in (0, 1, 0)]
    assert [sorted(batch.keys) for batch in epochs] == [[f"{i:02}" for i in range(COUNT)]] * 3
    assert epochs[0].keys == epochs[2].keys and torch.equal(epochs[0].pixel_values, epochs[2].pixel_values)
    other = next(noise(folder / "all.csv", batch_size=COUNT, seed=4).epoch(0))
    assert len({tuple(batch.keys) for batch in (epochs[0], epochs[1], other)}) == 3
    draws = [dict(zip(batch.keys, (batch.pixel_values[:, 0, 0, 0] % 1).tolist())) for batch in (*epochs, other)]
    assert all(draws[0][key] == draws[2][key] for key in draws[0])
    assert not any(draws[0][key] == draws[i][key] for key in draws[0] for i in (1, 3))
    assert len(set(draws[0].values())) == COUNT


def test_a_batch_holds_what_belongs_together(folder):
    batches = noise(folder / "all.csv")
    assert (len(batches), batches.steps_per_epoch) == (COUNT, COUNT // 5)
    for batch in batches.epoch(2):
        assert len(batch) == 5 == len(batch.keys)
        numbers = [int(key) for key in batch.keys]
        assert batch.pixel_values[:, 0, 0, 0].int().tolist() == numbers
        assert batch.captions == [f"caption {i}" for i in numbers]
        assert batch.input_ids.tolist() == [[ord(letter) for letter in text[:8]] for text in batch.captions]
        assert batch.pixel_values.shape == (5, 3, 2, 2) and batch.attention_mask.all()


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_share_each_step(folder, world):
    """Rank after rank, the rows are those of one process; 5 rows on 7 ranks leave some without."""
    whole = noise(folder / "all.csv")
    ranks = [noise(folder / "all.csv", rank=r, world_size=world) for r in range(world)]
    assert {b.steps_per_epoch for b in ranks} == {whole.steps_per_epoch}
    for step, *parts in zip(whole.epoch(1), *(b.epoch(1) for b in ranks), strict=True):
        assert_same(joined(parts), joined([step]))
        assert {len(part) for part in parts} <= {5 // world, -(-5 // world)}
        assert all(part.pixel_values.shape[1:] == (3, 2, 2) and part.input_ids.shape[1] == 8 for part in parts)


def test_workers_change_nothing_and_a_file_that_kills_them_is_skipped(folder, tmp_path):
    (tmp_path / "deadly").write_bytes(b"x")
    rows = [[str(folder / f"{i:02}"), f"caption {i}"] for i in range(7)]
    manifest = table(tmp_path / "m.csv", ["path", "caption"], [*rows, ["deadly", "no"]])
    plain = noise(table(tmp_path / "plain.csv", ["path", "caption"], rows), shuffle=False, training=False, batch_size=4)
    batches = noise(manifest, shuffle=False, training=False, batch_size=4, workers=2, prefetch=3)
    assert_same(joined(batches.epoch(0)), joined(plain.epoch(0)))
    assert batches.skipped == {"deadly": "deadly: the worker process ended with status 3 while decoding it"}
    training = noise(folder / "all.csv", workers=2)
    assert_same(joined(training.epoch(4, start=1)), joined(noise(folder / "all.csv").epoch(4, start=1)))
    for _ in training.epoch(5):
        break  # leaving early ends the workers


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_a_resumed_epoch_equals_an_undisturbed_one(folder, start, monkeypatch):
    whole = list(noise(folder / "all.csv").epoch(3))
    read = []
    call = Noise.pixel_values
    monkeypatch.setattr(Noise, "pixel_values", lambda self, files, raw: read.append(files) or call(self, files, raw))
    rest = list(noise(folder / "all.csv").epoch(3, start=start))
    assert len(rest) == len(whole) - start and len(read) == 5 * len(rest)
    for ours, theirs in zip(rest, whole[start:], strict=True):
        assert_same(joined([ours]), joined([theirs]))


def test_without_training_the_order_and_every_row_are_kept(folder):
    batches = noise(folder / "all.csv", shuffle=False, training=False)
    assert batches.steps_per_epoch == 5
    keys, pixels, _, _ = joined(batches.epoch(0))
    assert keys == [f"{i:02}" for i in range(COUNT)]
    assert torch.equal(pixels[:, 0, 0, 0], torch.arange(COUNT).float())


def test_views_are_drawn_by_weight(tmp_path):
    count, weights = 2000, {"title": 1.0, "polished": 3.0, "spatial": 0.0}
    (tmp_path / "a").write_bytes(b"a")
    rows = [["a", f"title {i}", f"polished {i}", "never"] for i in range(count)]
    manifest = table(tmp_path / "m.csv", ["path", "title", "polished", "spatial"], rows)
    batches = noise(manifest, batch_size=count, captions=weights, shuffle=False)
    first, second = (next(batches.epoch(epoch)).captions for epoch in (0, 1))
    for captions in (first, second):
        assert [text.split()[1] for text in captions] == [str(i) for i in range(count)]
        share = sum(text.startswith("polished") for text in captions) / count
        assert abs(share - 0.75) < 4 * (0.75 * 0.25 / count) ** 0.5
    changed = sum(a != b for a, b in zip(first, second)) / count
    assert abs(changed - 2 * 0.75 * 0.25) < 4 * (0.375 * 0.625 / count) ** 0.5


def test_a_missing_view_leaves_the_others(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    manifest = table(
        tmp_path / "m.csv", ["path", "title", "spatial"], [["a", "", "two"], ["a", "one", " "], ["a", "", ""]]
    )
    batches = noise(manifest, captions={"title": 1, "spatial": 5}, batch_size=2, shuffle=False)
    for epoch in range(5):
        assert next(batches.epoch(epoch)).captions == ["two", "one"]
    assert batches.skipped == {f"{manifest}, row 3": "no caption in title, spatial"}


ROWS = [("x/a.jpg", "one, two"), ("x/b.jpg", "zwei\nZeilen 'ü'"), ("/c.jpg", "three")]


def manifests(where: Path) -> list[Path]:
    columns = pa.table({"path": [p for p, _ in ROWS], "other": [1, 2, 3], "caption": [c for _, c in ROWS]})
    pq.write_table(columns, where / "m.parquet")
    lines = [json.dumps({"caption": c, "path": p, "other": {}}, ensure_ascii=False) for p, c in ROWS]
    (where / "m.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    table(where / "m.csv", ["path", "other", "caption"], [[p, 1, c] for p, c in ROWS])
    (where / "m.tsv").write_text(
        '\ufeffcaption\tpath\n"one, two"\tx/a.jpg\n"zwei\nZeilen \'ü\'"\tx/b.jpg\nthree\t/c.jpg\n'
    )
    return [where / f"m.{suffix}" for suffix in ("parquet", "jsonl", "csv", "tsv")]


def test_every_kind_of_manifest(tmp_path):
    files = manifests(tmp_path)
    expected = [Sample(p, os.path.join(tmp_path, p), {"caption": c}) for p, c in ROWS]
    for file in files:
        manifest = Manifest(file)
        assert [manifest[i] for i in range(len(manifest))] == expected and not manifest.skipped
    assert expected[2].media == "/c.jpg"
    together = open_sources(files, "image")
    assert [len(source) for source in together] == [3] * 4
    assert len(open_sources(tmp_path, "image")) == 4


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("m.csv", "", "got an empty manifest"),
        ("m.csv", "path,caption\n", "expected rows with columns path, caption, got an empty manifest"),
        ("m.jsonl", "\n", "got an empty manifest"),
        ("m.csv", "file,caption\na,b\n", r"expected columns path, caption, got file, caption \(missing: path\)"),
        ("m.jsonl", '{"path": "a"}\n', r"got path \(missing: caption\)"),
        ("m.csv", b"path,caption\na,\xff\xfe\n", "expected UTF-8 text"),
        ("m.parquet", "no", "expected a Parquet file, cannot read it"),
        ("m.xlsx", "no", r"expected a manifest \(.*\), got \.xlsx"),
    ],
)
def test_bad_manifests(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        Manifest(tmp_path / name)


def test_more_bad_manifests(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file.*nowhere\.csv"):
        noise(tmp_path / "nowhere.csv")
    pq.write_table(pa.table({"path": ["a"], "caption": [["x"]]}), tmp_path / "lists.parquet")
    with pytest.raises(ValueError, match=r"caption: expected text, got list"):
        Manifest(tmp_path / "lists.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected a folder with shards \(\.tar\) or manifests"):
        noise(tmp_path / "empty")
    with pytest.raises(ValueError, match="expected at least one manifest or shard"):
        noise([])


def test_rows_that_are_no_samples_are_counted(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    lines = [
        '{"path": "a", "caption": "good"}',
        "{broken",
        '["a"]',
        '{"path": "a", "caption": 3}',
        '{"path": " ", "caption": "x"}',
    ]
    lines += ['{"path": null, "caption": "x"}', '{"path": "a", "caption": "  "}', '{"path": "a", "caption": "good"}']
    file = tmp_path / "m.jsonl"
    file.write_text("\n".join(lines))
    batches = noise(file, batch_size=2, shuffle=False)
    assert [reason.partition(":")[0] for reason in batches.skipped.values()] == [
        "no JSON",
        "expected a JSON object, got list",
        "no caption in caption",
        "no path",
        "no path",
        "no caption in caption",
    ]
    assert next(iter(batches.skipped)) == f"{file}, row 2"
    (batch,) = batches.epoch(0)
    assert batch.captions == ["good", "good"] and batch.groups[0] == batch.groups[1]
    (tmp_path / "m.csv").write_text("path,caption\na,one, two\na\n\na,fine\n")
    manifest = Manifest(tmp_path / "m.csv")
    assert len(manifest) == 1 and [why[:8] for why in manifest.skipped.values()] == ["3 fields", "1 fields"]
    told: list[str] = []
    table(tmp_path / "many.csv", ["path", "caption"], [["a", "good"], *[["a", ""]] * 30])
    many = noise(tmp_path / "many.csv", batch_size=1, on_skip=lambda key, reason: told.append(f"{key}: {reason}"))
    assert len(many.skipped) == 30 and len(told) == 21 and told[-1] == "10 more: the last: no caption in caption"
    (tmp_path / "none.csv").write_text("path,caption\na,\n")
    with pytest.raises(ValueError, match=r"expected samples, got none; 1 skipped, the first: .*row 1: no caption"):
        noise(tmp_path / "none.csv")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    where = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        tiny.picture(where / f"{i}.jpg", seed=i)
    (where / "cut.jpg").write_bytes((where / "0.jpg").read_bytes()[:700])
    (where / "text.jpg").write_text("no picture")
    (where / "empty.jpg").write_bytes(b"")
    (where / "folder.jpg").mkdir()
    return where


BAD = {
    "cut.jpg": "got a JPEG image",
    "text.jpg": "expected an image, got text",
    "empty.jpg": "an empty file",
    "folder.jpg": "a folder",
    "missing.jpg": "no such file",
}


def test_bad_media_are_skipped_and_reported_once(pictures, tmp_path):
    good = [f"{i}.jpg" for i in range(6)]
    rows = [[str(pictures / name), f"a {name}"] for name in (*good, *BAD)]
    manifest = table(tmp_path / "m.csv", ["path", "caption"], rows)
    told: list[tuple[str, str]] = []
    processor = transform_dict["image"](tiny.config("image"))
    batches = Batches(
        manifest, processor, default_tokenizer(), batch_size=4, training=False, on_skip=lambda *skip: told.append(skip)
    )
    for epoch in range(2):
        keys, pixels, ids, _ = joined(batches.epoch(epoch))
        assert sorted(keys) == sorted(str(pictures / name) for name in good)
        assert ids.shape == (6, 77) and ids[0, 0] == 49406
        assert torch.equal(pixels, processor(keys)["pixel_values"])
    assert {Path(key).name for key in batches.skipped} == set(BAD) and dict(told) == batches.skipped and len(told) == 5
    for key, reason in batches.skipped.items():
        assert key in reason and BAD[Path(key).name] in reason
    ranks = [
        Batches(manifest, processor, Tokenizer(), batch_size=11, world_size=11, rank=r, shuffle=False)
        for r in range(11)
    ]
    sizes = [next(b.epoch(0)).pixel_values.shape for b in ranks]
    assert sizes == [(1, 3, 64, 64)] * 6 + [(0, 3, 64, 64)] * 5


def test_nothing_but_bad_media_is_an_error(pictures, tmp_path):
    processor = transform_dict["image"](tiny.config("image"))
    rows = [[str(pictures / name), "x"] for name in BAD]
    batches = Batches(table(tmp_path / "m.csv", ["path", "caption"], rows), processor, Tokenizer(), batch_size=5)
    with pytest.raises(ValueError, match="none of 5 samples could be read; the last: "):
        list(batches.epoch(0))


def test_a_video_without_frames(tmp_path):
    av = pytest.importorskip("av")
    good = tiny.clip(tmp_path / "good.mp4")
    with av.open(str(tmp_path / "empty.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 80, "yuv420p"
        container.start_encoding()
    tiny.sound(tmp_path / "sound.mp4")
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:2000])
    names = ("good.mp4", "empty.mp4", "sound.mp4", "cut.mp4")
    manifest = table(tmp_path / "m.csv", ["path", "caption"], [[name, "x"] for name in names])
    processor = transform_dict["video"](tiny.config("video"))
    batches = Batches(manifest, processor, Tokenizer(), batch_size=4)
    (batch,) = batches.epoch(0)
    assert batch.keys == ["good.mp4"] and batch.pixel_values.shape == (1, 3, 2, 64, 64)
    assert set(batches.skipped) == set(names[1:]) and all("expected a video" in why for why in batches.skipped.values())


def test_flips_and_segments_come_from_the_sample(tmp_path):
    """Clips are mirrored in half of the epochs, sounds begin elsewhere: again so in the next run, and on raw pixels."""
    pytest.importorskip("av")
    rows = [[str(tiny.clip(tmp_path / f"{i}.mp4", i)), "x"] for i in range(4)]
    manifest = table(tmp_path / "m.csv", ["path", "caption"], rows)
    processor = transform_dict["video"](tiny.config("video"))
    options = {"batch_size": 4, "shuffle": False}
    plain = next(Batches(manifest, processor, Tokenizer(), training=False, **options).epoch(0)).pixel_values
    mirrored = []
    for epoch in range(16):
        again = [next(Batches(manifest, processor, Tokenizer(), **options).epoch(epoch)).pixel_values for _ in range(2)]
        assert torch.equal(*again)
        flips = [torch.equal(ours, theirs.flip(-1)) for ours, theirs in zip(again[0], plain)]
        assert all(flip or torch.equal(ours, theirs) for flip, ours, theirs in zip(flips, again[0], plain))
        mirrored.append(flips)
    assert 16 <= sum(map(sum, mirrored)) <= 48 and len(set(map(tuple, mirrored))) > 4
    raw = next(Batches(manifest, processor, Tokenizer(), raw=True, **options).epoch(3)).pixel_values
    straight = processor([path for path, _ in rows], raw=True)["pixel_values"]
    assert raw.dtype == torch.uint8
    assert [torch.equal(ours, theirs.flip(-1)) for ours, theirs in zip(raw, straight)] == mirrored[3]
    assert processor.training is False and torch.equal(processor([rows[0][0]])["pixel_values"][0], plain[0])


def test_segments_of_long_sounds(tmp_path):
    pytest.importorskip("av")
    processor = transform_dict["audio"](tiny.config("audio", target_length=28))
    manifest = table(tmp_path / "m.csv", ["path", "caption"], [[str(tiny.sound(tmp_path / "a.wav")), "x"]])
    batches = [Batches(manifest, processor, Tokenizer(), batch_size=1, workers=0) for _ in range(2)]
    drawn = [[next(b.epoch(epoch)).pixel_values for epoch in range(4)] for b in batches]
    assert all(torch.equal(*pair) for pair in zip(*drawn))
    assert len({tuple(pixels.flatten()[:200].tolist()) for pixels in drawn[0]}) > 1
    assert drawn[0][0].shape == (1, 3, 112, 28)
    with pytest.raises(ValueError, match="raw: expected a modality with pixels, got audio"):
        Batches(manifest, processor, Tokenizer(), batch_size=1, raw=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1, got 0"),
        (
            {"batch_size": COUNT + 1},
            f"at most {COUNT}, the samples there are, got {COUNT + 1}; `--set batch_size={COUNT}",
        ),
        ({"rank": 2, "world_size": 2}, "rank: expected 0 <= rank < world_size = 2, got 2"),
        ({"workers": -1}, "workers: expected"),
        ({"captions": {}}, "captions: expected views with weights"),
        ({"captions": {"caption": -1}}, "captions: expected views with weights"),
        ({"captions": {"title": 1}}, r"missing: title"),
        ({"media": "file"}, r"missing: file"),
    ],
)
def test_wrong_arguments(folder, options, message):
    with pytest.raises(ValueError, match=message):
        noise(folder / "all.csv", **options)


def test_a_start_beyond_the_epoch(folder):
    batches = noise(folder / "all.csv")
    with pytest.raises(ValueError, match="start: expected a step from 0 to 4, got 5"):
        batches.epoch(0, start=5)


def test_sources_may_be_objects():
    class Letters:
        skipped: dict[str, str] = {}  # noqa: RUF012

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return Sample("ab"[index], __file__, {"caption": "ab"[index]})

    assert sorted(next(noise(Letters(), batch_size=2).epoch(0)).keys) == ["a", "b"]
    assert np.unique(next(noise([Letters(), Letters()], batch_size=4).epoch(0)).groups).size == 2


def test_bad_data_and_the_command(tmp_path):
    """An empty manifest and one without a caption are one line of error; of a broken shard the whole samples train."""
    model = tiny.checkpoint(tmp_path, "depth")
    content = {}
    for i in range(5):
        content |= {f"{i}.png": tiny.depth_map(tmp_path / "map.png", i).read_bytes(), f"{i}.txt": f"map {i}".encode()}
    broken = shard(tmp_path / "broken.tar", content)
    at = list(members(broken))[6][1]  # where the media of the fourth sample begins
    broken.write_bytes(broken.read_bytes()[: at + 1000])

    def train(data):
        given = ["train", "--recipe", "depth", "--model", model, "--data", data, "--out", tmp_path / "out"]
        given += ["--set", "batch_size=3", "--device", "cpu"]
        return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(each) for each in given])

    ends = {
        table(tmp_path / "empty.csv", ["path", "caption"], []): "got an empty manifest",
        table(tmp_path / "silent.csv", ["path", "caption"], [["map.png", " "]]): "1 skipped, the first: ",
        table(tmp_path / "gone.csv", ["path", "caption"], [["no.png", "x"]] * 3): "none of 3 samples could be read",
        tmp_path / "nowhere.tar": "no such file, expected a tar",
    }
    for data, message in ends.items():
        result = train(data)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
        last = result.stderr.splitlines()[-1]
        assert last.startswith("error: ") and message in last
    result = train(broken)
    assert result.exit_code == 0, result.stderr
    assert "broken.tar: truncated in 3.png: 1000 of" in result.stderr and "what follows is lost" in result.stderr
    assert (tmp_path / "out" / "model" / "config.json").exists()
