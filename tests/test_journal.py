"""What keeps finished rows: damage is seen and embedded again, other rows are never mixed in or written over."""

from __future__ import annotations

import os
import random

import numpy as np
import pyarrow.parquet as pq
import pytest

from lbfast.embedding import embed_files
from lbfast.embedding.items import Item
from lbfast.embedding.journal import CHANGED, Journal, partial_path
from lbfast.embedding.pipeline import BadFileError
from tests import tiny
from tests.damage import damaged

DAMAGES = int(os.environ.get("LBFAST_TEST_DAMAGES", "60"))
ITEMS = [Item(f"image:{i}", "image", str(i), f"stamp {i}") for i in range(40)]
EMBEDS = np.random.default_rng(0).standard_normal((40, 64), dtype=np.float32)


def written(out):
    """A journal of eight batches, and its bytes."""
    journal = Journal(out, 64, {"a": 1})
    for start in range(0, 40, 5):
        journal.append(ITEMS[start : start + 5], EMBEDS[start : start + 5], "m")
    journal.close()
    return journal.path.read_bytes()


def vectors(out):
    return np.array(pq.read_table(out)["embedding"].to_pylist(), dtype=np.float32)


def test_a_damaged_journal_is_right_or_refused(tmp_path):
    """Flipped bits, zeroed pages, torn, repeated, missing and moved parts, at random; the seed is printed."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    draw, out, kept = random.Random(seed), tmp_path / "out.parquet", []
    whole = written(out)
    for _ in range(DAMAGES):
        partial_path(out).write_bytes(damaged(whole, draw))
        try:
            journal = Journal(out, 64, {"a": 1})
        except ValueError as error:
            assert "got something else, or damage; move it away" in str(error) and "\n" not in str(error)
            kept.append(None)
            continue
        left = [i for i in range(40) if ITEMS[i] not in journal]
        kept.append(40 - len(left))
        if left:
            journal.append([ITEMS[i] for i in left], EMBEDS[left], "m")
        journal.finish(ITEMS, {})
        journal.close()
        np.testing.assert_array_equal(vectors(out), EMBEDS)
        out.unlink()
    assert any(kept)  # what comes before the damage is not thrown away


def test_rows_that_change_after_they_were_read_are_not_written(tmp_path):
    out = tmp_path / "out.parquet"
    written(out)
    journal = Journal(out, 64, {"a": 1})
    content = bytearray(journal.path.read_bytes())
    content[-100] ^= 4
    journal.path.write_bytes(content)
    with pytest.raises(OSError, match="finished rows are not as they were written; call again"):
        journal.finish(ITEMS, {})
    journal.close()
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet.partial"]
    again = Journal(out, 64, {"a": 1})
    assert sum(item in again for item in ITEMS) == 35
    again.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny.checkpoint(folder, name, seed=i) for i, name in enumerate(("image", "depth"))}


@pytest.fixture
def pictures(tmp_path):
    for i in range(5):
        tiny.picture(tmp_path / "in" / f"{i}.jpg", seed=i)
    (tmp_path / "in" / "words.txt").write_text("a cat\na dog\na mat\n")
    return tmp_path / "in"


def stopped(*arguments, **options):
    """A run that ends, as Ctrl-C would, when the first batch of captions is there."""

    def progress(modality, done, total):
        if modality == "language" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_files(*arguments, progress=progress, batch_size=2, **options)


def test_caption_towers_are_not_mixed(models, pictures, tmp_path):
    """Captions are the last model's: the same models in another order are other settings."""
    out = tmp_path / "out.parquet"
    stopped([pictures], [models["image"], models["depth"]], out)
    with pytest.raises(ValueError, match=r"unfinished run with other settings \(language: .*depth"):
        embed_files([pictures], [models["depth"], models["image"]], out)
    assert embed_files([pictures], [models["image"], models["depth"]], out).resumed == 7


def test_tokenizers_are_not_mixed(pictures, tmp_path):
    from lbfast.processing.text import write_clip_vocabulary

    model, out = tiny.checkpoint(tmp_path, "image"), tmp_path / "out.parquet"
    stopped([pictures], [model], out)
    write_clip_vocabulary(model)
    with pytest.raises(ValueError, match=r"other settings \(language: "):
        embed_files([pictures], [model], out)


def test_a_finished_run_has_nothing_left_to_do(models, pictures, tmp_path):
    out = tmp_path / "out.parquet"
    (pictures / "bad.jpg").write_text("no picture")
    first = embed_files([pictures], [models["image"]], out, dtype="float32")
    content, found = out.read_bytes(), os.stat(out)
    again = embed_files([pictures], [models["image"]], out, dtype="float32")
    assert again.finished and not first.finished
    assert again.embedded == first.embedded == {"image": 5, "language": 3} and again.resumed == 8
    assert out.read_bytes() == content and os.stat(out).st_mtime_ns == found.st_mtime_ns

    def refused(match, inputs=(pictures,), model=models["image"], **options):
        with pytest.raises(FileExistsError, match=match):
            embed_files(list(inputs), [model], out, **{"dtype": "float32", **options})

    with pytest.raises(BadFileError):
        embed_files([pictures], [models["image"]], tmp_path / "strict.parquet", strict=True)
    refused("left out 1 files", strict=True)
    refused("with other settings .dtype: float32 then, bfloat16 now.", dtype="bfloat16")
    out.write_bytes(content[:-1])
    refused("no run has made it")
    assert out.read_bytes() == content[:-1]
    assert embed_files([pictures], [models["image"]], out, overwrite=True).embedded == first.embedded


def test_what_a_run_leaves_that_is_killed_at_its_very_end(models, pictures, tmp_path, monkeypatch):
    """OUT is there and the journal too: the next run takes the journal away, unless it is of other settings."""
    out = tmp_path / "out.parquet"
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "remove", lambda self: None)
        embed_files([pictures], [models["image"]], out)
    assert partial_path(out).exists()
    assert embed_files([pictures], [models["image"]], out).finished and not partial_path(out).exists()
    other = written(out)
    assert embed_files([pictures], [models["image"]], out).finished
    assert partial_path(out).read_bytes() == other


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_made_since_the_run_began_is_left_alone(models, pictures, tmp_path, overwrite):
    out = tmp_path / "out.parquet"
    if overwrite:
        out.write_text("to be replaced")

    def progress(modality, done, total):
        out.unlink(missing_ok=True)
        out.write_text("somebody's own")

    with pytest.raises(FileExistsError, match=CHANGED):
        embed_files([pictures], [models["image"]], out, overwrite=overwrite, progress=progress)
    assert out.read_text() == "somebody's own"
    out.unlink()
    assert embed_files([pictures], [models["image"]], out).resumed == 8
    assert not partial_path(out).exists()


def test_another_run_that_finished_while_this_one_waited(models, pictures, tmp_path, monkeypatch):
    out = tmp_path / "out.parquet"

    class Late(Journal):
        def __init__(self, *arguments, **options):
            out.write_text("the other's")
            super().__init__(*arguments, **options)

    monkeypatch.setattr("lbfast.embedding.pipeline.Journal", Late)
    with pytest.raises(FileExistsError, match=CHANGED):
        embed_files([pictures], [models["image"]], out)
    assert out.read_text() == "the other's" and not partial_path(out).exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_links_and_devices_are_not_replaced(models, pictures, tmp_path, overwrite):
    target = tmp_path / "target.parquet"
    target.write_text("somebody's own")
    (tmp_path / "link.parquet").symlink_to(target)
    (tmp_path / "dangling.parquet").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.parquet")
    for name, said in (("link", "it is a link, to "), ("dangling", "it is a link"), ("pipe", "a device or a pipe")):
        with pytest.raises(FileExistsError, match=said):
            embed_files([pictures], [models["image"]], tmp_path / f"{name}.parquet", overwrite=overwrite)
    partial_path(tmp_path / "new.parquet").symlink_to(target)
    os.mkfifo(partial_path(tmp_path / "other.parquet"))
    for name in ("new.parquet", "other.parquet"):
        with pytest.raises(FileExistsError, match=r"expected a file of finished rows, or none.*\.parquet\.partial"):
            embed_files([pictures], [models["image"]], tmp_path / name, overwrite=overwrite)
    assert target.read_text() == "somebody's own" and not (tmp_path / "nowhere").exists()


def test_a_strangers_files_beside_out(models, pictures, tmp_path):
    for name in ("out.parquet.tmp", ".out.parquet.tmp", "out.tmp"):
        (tmp_path / name).write_text(name)
    embed_files([pictures], [models["image"]], tmp_path / "out.parquet")
    for name in ("out.parquet.tmp", ".out.parquet.tmp", "out.tmp"):
        assert (tmp_path / name).read_text() == name


def test_a_resumed_run_is_bitwise_the_same_beside_bad_files(models, pictures, tmp_path):
    """Batches are the same whatever is finished, where files fail too."""
    for name in ("0a", "1a", "3a"):
        (pictures / f"{name}.jpg").write_text("no picture")
    embed_files([pictures], [models["image"]], tmp_path / "straight.parquet", batch_size=3)
    out, stops = tmp_path / "out.parquet", 0
    while not out.exists():

        def progress(modality, done, total, before=stops):
            if done and not (modality == "image" and done <= 3 * before):
                raise KeyboardInterrupt

        try:
            embed_files([pictures], [models["image"]], out, batch_size=3, progress=progress if stops < 3 else None)
        except KeyboardInterrupt:
            stops += 1
    assert stops == 3 and out.read_bytes() == (tmp_path / "straight.parquet").read_bytes()
