"""Rows of `embed` for items of several modalities."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import lbfast
from lbfast.embedding import BadFileError, embed_files
from lbfast.embedding.fused import find_groups, fused_rows, modalities_of
from lbfast.embedding.items import Item
from tests import tiny


@pytest.fixture
def files(tmp_path):
    """Pictures and depth maps of the stems a, x/b and 0.5; a picture and a map without the other."""
    for stem in ("a", "x/b", "0.5"):
        tiny.picture(tmp_path / "pictures" / f"{stem}.png", seed=len(stem))
        tiny.depth_map(tmp_path / "maps" / f"{stem}.png", seed=len(stem))
    tiny.picture(tmp_path / "pictures" / "alone.png")
    tiny.depth_map(tmp_path / "maps" / "0.png")
    return tmp_path


def rows(out):
    table = pq.read_table(out).to_pylist()
    return {row["id"]: row for row in table}, [row["id"] for row in table]


def embed(files, out="out.parquet", **options):
    models = [files / name if (files / name).exists() else tiny.checkpoint(files, name) for name in ("image", "depth")]
    inputs = [f"image={files}/pictures", f"depth={files}/maps/"]
    return embed_files(inputs, models, files / out, dtype="float32", **options)


def test_files_of_one_stem_are_a_row_more(files):
    summary = embed(files, fuse="image+depth")
    by_id, order = rows(summary.out)
    assert summary.embedded == {"image": 4, "depth": 4, "image+depth": 3} and not summary.failures
    assert summary.ignored == {"not fused: no depth of the same stem": 1, "not fused: no image of the same stem": 1}
    assert [name for name in order if name.startswith("image+depth:")] == order[-3:]
    for stem in ("a", "x/b", "0.5"):
        picture, depth = (by_id[f"image:{files}/pictures/{stem}.png"], by_id[f"depth:{files}/maps/{stem}.png"])
        both = by_id[f"image+depth:{stem}"]
        wanted = lbfast.fuse({"i": torch.tensor(picture["embedding"]), "d": torch.tensor(depth["embedding"])})
        assert both["embedding"] == wanted.tolist() and abs(np.linalg.norm(both["embedding"]) - 1) < 1e-6
        assert both["modality"] == "image+depth" and both["path"] == picture["path"]
        assert both["model"] == f"{picture['model']}+{depth['model']}"
    plain, _ = rows(embed(files, "plain.parquet").out)
    assert {name: row["embedding"] for name, row in by_id.items() if "+" not in name} == {
        name: row["embedding"] for name, row in plain.items()
    }


def test_a_run_goes_on_with_its_fused_rows(files):
    whole, _ = rows(embed(files, "whole.parquet", fuse="image+depth").out)

    def stop(modality, done, total):
        if modality == "depth" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(files, fuse="image+depth", batch_size=2, progress=stop)
    assert rows(embed(files, fuse="image+depth", batch_size=2).out)[0].keys() == whole.keys()


def test_a_stem_that_two_files_have(files):
    tiny.picture(files / "pictures" / "a.jpg")
    summary = embed(files, fuse="image+depth")
    (failure,) = summary.failures
    assert failure.path == "image+depth:a" and "expected one image file of that stem, got " in failure.reason
    assert summary.embedded["image+depth"] == 2 and summary.embedded["image"] == 5
    with pytest.raises(BadFileError, match="image\\+depth:a: expected one image file"):
        embed(files, "other.parquet", fuse="image+depth", strict=True)


def test_files_given_by_name_and_opposite_embeddings():
    items = [Item(f"{m}:{p}", m, p, "1") for m, p in (("video", "a/x.mp4"), ("audio", "b/x.wav"), ("audio", "b/y.wav"))]
    found = find_groups(items, ["a/x.mp4", "audio=b/x.wav", "b/y.wav"], ("video", "audio"))
    assert [group.item.id for group in found.whole] == ["video+audio:x"]
    assert found.ignored == {"not fused: no video of the same stem": 1}
    changed = [items[0], Item(items[1].id, "audio", "b/x.wav", "2")]
    assert find_groups(changed, [], ("video", "audio")).whole[0].item.stamp != found.whole[0].item.stamp
    one = np.float32([[0.6, 0.8]])
    assert next(fused_rows(found.whole, [one, -one]))[1] is None
    assert np.allclose(next(fused_rows(found.whole, [one, one]))[1], one[0])


@pytest.mark.parametrize("given", ["image", "image+image", "image+smell", "image+language", [], ["image", "video"]])
def test_what_can_not_be_fused(given, files):
    with pytest.raises(ValueError, match=r"fuse: expected two or more of image, depth, as video\+audio, got "):
        modalities_of(given, ["image", "depth"])
    with pytest.raises(ValueError, match="fuse: expected two or more"):
        embed(files, fuse=given)
