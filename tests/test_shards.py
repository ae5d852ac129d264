"""Shards: what they hold, and that a broken one gives what is whole and says what is lost."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import pytest
import torch

from lbfast.data.shards import Shard, expand_braces
from lbfast.data.tar import BrokenTarError, members
from lbfast.processing import transform_dict
from lbfast.training.batches import Batches
from tests import tiny
from tests.tiny import Tokenizer, noise, shard, table

PICTURES = (".jpg", ".png")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny.pictures(tmp_path_factory.mktemp("pictures"), 6)


def test_shards_give_what_files_give(pictures, tmp_path):
    content = {}
    for i in range(6):
        content[f"dir/{i}.jpg"] = (pictures / f"{i}.jpg").read_bytes()
        content[f"dir/{i}.txt"] = f"a picture {i}\n".encode()
    names = list(content)
    for part in range(2):
        shard(tmp_path / f"{part:03}.tar", {name: content[name] for name in names[6 * part : 6 * part + 6]})
    manifest = table(
        tmp_path / "m.csv", ["path", "caption"], [[str(pictures / f"{i}.jpg"), f"a picture {i}"] for i in range(6)]
    )
    processor = transform_dict["image"](tiny.config("image"))
    given = (tmp_path, str(tmp_path / "{000..001}.tar"), [tmp_path / "000.tar", tmp_path / "001.tar"])
    runs = [list(Batches(data, processor, Tokenizer(), batch_size=4).epoch(0)) for data in (manifest, *given)]
    for run in runs[1:]:
        assert [b.captions for b in run] == [b.captions for b in runs[0]]
        assert all(torch.equal(a.pixel_values, b.pixel_values) for a, b in zip(run, runs[0], strict=True))
    assert runs[1][0].keys[0].startswith(str(tmp_path / "00")) and "tar/dir/" in runs[1][0].keys[0]
    with pytest.raises(FileNotFoundError, match=r"no such file.*002\.tar"):
        noise(str(tmp_path / "{000..002}.tar"))


def test_what_a_shard_holds(tmp_path):
    fields = {"title": "T", "polished": "P", "caption": "C", "frames": 3}
    content = {
        "a.jpg": b"a",
        "a.depth.png": b"d",
        "a.json": json.dumps(fields).encode(),
        "b.JPG": b"b",
        "b.txt": b"text",
        "b.json": json.dumps(fields).encode(),
        "c.jpg": b"c",  # no caption
        "d.txt": b"no media",
        "e.jpg": b"e",
        "e.txt": b"  ",
        "f.jpg": b"f",
        "f.json": b"{",
        "g.jpg": b"g",
        "g.txt": b"\xff",
        ".hidden.jpg": b"h",
    }
    file = shard(tmp_path / "s.tar", content)
    with tarfile.open(file, "a") as tar:
        again = tarfile.TarInfo("a.jpg")
        again.size = 1
        tar.addfile(again, io.BytesIO(b"z"))
    batches = noise(file, batch_size=5, shuffle=False)
    (batch,) = batches.epoch(0)
    assert batch.keys == [f"{file}/a", f"{file}/b"] and batch.captions == ["C", "text"]
    assert batch.pixel_values[:, 0, 0, 0].int().tolist() == [ord("a"), ord("b")]
    skipped = {key.removeprefix(f"{file}/"): why for key, why in batches.skipped.items()}
    assert {key: why.partition(":")[0] for key, why in skipped.items() if key not in "fg"} == {
        "a.jpg": "the tar has two members of this name; the first is used",
        "c": "no caption",
        "d": "no media",
        "e": f"{file}/e",
    }
    assert "expected JSON, got" in skipped["f"] and "expected UTF-8 text" in skipped["g"]
    views = noise(file, batch_size=5, shuffle=False, captions={"title": 1, "polished": 1})
    seen = {tuple(next(views.epoch(epoch)).captions) for epoch in range(12)}
    assert seen == {(a, b) for a in "TP" for b in "TP"}
    depth = noise(file, batch_size=1, media="depth.png", shuffle=False)
    assert next(depth.epoch(0)).pixel_values[0, 0, 0, 0].int() == ord("d") and len(depth) == 1


LONG = "folder/" + "long" * 40


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_the_standard_library(tmp_path, kind):
    name = "folder" * 15 + "/" + "x" * 80 if kind == tarfile.USTAR_FORMAT else LONG
    names = ["a.txt", name + ".txt", "ümlaut.txt", "empty.txt", "last.txt"]
    file = tmp_path / "s.tar"
    with tarfile.open(file, "w", format=kind) as tar:
        for i, one in enumerate(names):
            info = tarfile.TarInfo(one)
            info.size = 0 if one == "empty.txt" else 500 + 300 * i
            info.mtime = 1234.5
            tar.addfile(info, io.BytesIO(bytes([i]) * info.size))
            for extra, type_ in ((f"d{i}", tarfile.DIRTYPE), (f"l{i}", tarfile.SYMTYPE), (f"h{i}", tarfile.LNKTYPE)):
                link = tarfile.TarInfo(extra)
                link.type, link.linkname = type_, "long" * 40 if kind != tarfile.USTAR_FORMAT else "a.txt"
                tar.addfile(link)
    with tarfile.open(file) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert list(members(file)) == expected and [name for name, _, _ in expected] == names


def pairs(keys):
    """A picture that holds its number and a caption with it, for each key."""
    return {f"{key}.{suffix}": f"{i}".encode() for i, key in enumerate(keys) for suffix in ("jpg", "txt")}


@pytest.mark.parametrize(
    "keys",
    [
        [f"Y7fm_{s / 2}" for s in range(6)],  # windows that begin every half second
        [f"v1.2_{i:04d}" for i in range(4)],
        ["clip_0", "clip_0.5", "clip_1"],
        ["a", "a.final", "b.c/x", "b.c/x.5"],
        ["0001", "0002", "dir.v2/0001"],
    ],
)
def test_names_with_dots_are_read_or_reported(tmp_path, keys):
    content = pairs(keys)
    file = shard(tmp_path / "s.tar", content)
    read = Shard(file, PICTURES, split="last")
    assert [read[i].path for i in range(len(read))] == [f"{file}/{key}" for key in keys] and not read.skipped
    assert [read[i].captions()["txt"] for i in range(len(read))] == [str(i) for i in range(len(keys))]
    first = Shard(file, PICTURES)
    seen = set(first.skipped)
    for i in range(len(first)):
        media, (text,) = first[i].media, first[i].members
        assert media.read() == text.read()  # of one sample, not of two
        seen |= {f"{file}/{media.name}", f"{file}/{text.name}"}
    assert seen == {f"{file}/{name}" for name in content}
    assert all("split='last'" in why for why in first.skipped.values())
    batches = noise(file, batch_size=len(keys), shuffle=False, split="last")
    assert next(batches.epoch(0)).captions == [str(i) for i in range(len(keys))]


def test_parts_of_a_sample_are_no_lost_samples(tmp_path):
    content = {"a.jpg": b"", "a.seg.png": b"", "a.depth.png": b"", "a.json": b"{}", "a.txt": b"", "a.cls": b""}
    assert not Shard(shard(tmp_path / "s.tar", content), PICTURES).skipped
    assert not Shard(tmp_path / "s.tar", (".depth.png",)).skipped
    mixed = Shard(shard(tmp_path / "m.tar", {"a_0.0.jpg": b"", "a_0.5.txt": b"of another"}), PICTURES)
    assert len(mixed) == 0 and set(mixed.skipped) == {f"{mixed.file}/a_0.5.txt", f"{mixed.file}/a_0"}
    with pytest.raises(ValueError, match="split: expected 'first' or 'last', got 'dot'"):
        Shard(tmp_path / "s.tar", PICTURES, split="dot")


def test_links_are_reported(tmp_path):
    file = shard(tmp_path / "s.tar", pairs(["a"]))
    with tarfile.open(file, "a") as tar:
        for name, kind in (("b.jpg", tarfile.LNKTYPE), ("b.txt", tarfile.SYMTYPE), ("notes", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "a.jpg"
            tar.addfile(link)
    assert Shard(file, PICTURES).skipped == {
        f"{file}/b.jpg": "a hard link, which holds no data that is read here",
        f"{file}/b.txt": "a symbolic link, which holds no data that is read here",
    }


def test_a_shard_that_breaks_off_gives_what_is_whole(tmp_path):
    """Cut at every 100 bytes: never an error, every sample that is left is whole, and the loss is said."""
    content = {}
    for i in range(4):
        content[f"{i}.jpg"] = bytes([i]) * 700
        content[f"{i}.txt"] = f"caption {i}".encode()
    whole = shard(tmp_path / "whole.tar", content)
    data, ends = whole.read_bytes(), [offset + size for _, offset, size in members(whole)]
    assert not Shard(whole, PICTURES).skipped
    cut = tmp_path / "cut.tar"
    for length in range(0, ends[-1] + 512, 100):
        cut.write_bytes(data[:length])
        left = Shard(cut, PICTURES)
        assert len(left) == sum(end <= length for end in ends[1::2])
        for i in range(len(left)):
            sample = left[i]
            assert sample.media.read() == content[f"{i}.jpg"] and sample.captions() == {"txt": f"caption {i}"}
        assert "what follows is lost" in left.skipped[str(cut)]
        halves = sum(end <= length for end in ends) % 2
        assert len(left.skipped) == 1 + halves  # media whose caption is beyond the cut
    cut.write_bytes(data[: ends[4] - 10])
    batches = noise([cut], batch_size=2)
    assert sorted(next(batches.epoch(0)).captions) == ["caption 0", "caption 1"]
    assert batches.skipped == {str(cut): "truncated in 2.jpg: 690 of 700 bytes are there; what follows is lost"}
    broken = bytearray(data)
    broken[ends[1] // 512 * 512 + 512 : ends[1] // 512 * 512 + 600] = b"\x07" * 88
    cut.write_bytes(broken)
    left = Shard(cut, PICTURES)
    assert len(left) == 1 and left.skipped[str(cut)].startswith("broken after 0.txt: no header at byte")
    cut.write_bytes(data)
    batches = noise([cut], batch_size=4)
    cut.write_bytes(data[: ends[2] - 1])  # after it was indexed
    next(batches.epoch(0))
    assert len(batches.skipped) == 3 and all("has the tar changed?" in why for why in batches.skipped.values())


def test_shards_that_are_none(tmp_path):
    whole = shard(tmp_path / "a.tar", {"a.jpg": b"a", "a.txt": b"a"})
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(whole.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.tar\.gz: expected an uncompressed tar, got one compressed with gzip"):
        noise(tmp_path / "a.tar.gz")
    (tmp_path / "text.tar").write_text("This is no tar at all. " * 100)
    with pytest.raises(
        ValueError, match=r"expected samples, got none; 1 skipped.*broken from the beginning: no header"
    ):
        noise(tmp_path / "text.tar")
    with pytest.raises(BrokenTarError, match="no header at byte 0"):
        list(members(tmp_path / "text.tar"))
    assert len(noise([tmp_path / "text.tar", whole], batch_size=1)) == 1


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("a.tar", ["a.tar"]),
        ("s-{08..11}.tar", ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{x}{1,2}", ["{x}1", "{x}2"]),
    ],
)
def test_braces(pattern, names):
    assert expand_braces(pattern) == names
    with pytest.raises(ValueError, match=r"FIRST <= LAST, got \{2\.\.1\}"):
        expand_braces("{2..1}")
