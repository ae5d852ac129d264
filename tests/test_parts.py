"""Folders of Parquet parts: whole or absent, resumed by the keys of their rows."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lbfast.embedding import parts
from lbfast.embedding.parts import Keys, digests, opened

KEY = ("id", "stamp")
SETTINGS = {"dtype": "float32", "models": {"image": ["m", "1"]}}


def rows(*ids, stamp="s", error=None, modality="image"):
    count = len(ids)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(4 * count, dtype=np.float32)), 4)
    texts = {"id": ids, "stamp": [stamp] * count, "modality": [modality] * count, "error": [error] * count}
    return pa.table({"embedding": embedding, **{k: pa.array(list(v), pa.string()) for k, v in texts.items()}})


def ids_in(folder):
    return pq.read_table(folder)["id"].to_pylist()


def keys(*ids, stamp="s"):
    return digests([ids, [stamp] * len(ids)])


def test_keys_are_a_set_however_they_come():
    names = [f"{i}\0" for i in range(1000)] + ["", "\0", "a", "a\0"]
    every = digests([names])
    assert len(set(every.tolist())) == len(names)
    some = Keys()
    for start in range(0, 1000, 7):
        some.add(every[start : min(start + 7, 990)])
    assert some.have(every).tolist() == [i < 990 for i in range(len(names))]
    assert len(some) == 990 and len(some.arrays) < 12
    assert digests([["a", "b"], ["b", "c"]])[0] != digests([["ab"], [""]])[0]


def test_a_folder_is_absent_until_it_is_complete(tmp_path):
    out = tmp_path / "out"
    with opened(out, SETTINGS, KEY) as made:
        made.append(rows("a", "b"))
        made.flush()
        made.append(rows("c", error="bad"))
        assert not out.exists() and len(ids_in(parts.partial_folder(out))) == 2
        made.finish({"failed": 1})
    assert not parts.partial_folder(out).exists()
    manifest = parts.read_manifest(out)
    assert [part["rows"] for part in manifest["parts"]] == [2, 1] and manifest["run"] == {"failed": 1}
    table = pq.read_table(out)
    assert table["id"].to_pylist() == ["a", "b", "c"] and table["error"].to_pylist() == [None, None, "bad"]


def test_a_run_that_died_is_taken_up_where_it_stopped(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), opened(out, SETTINGS, KEY) as made:
        made.append(rows("a", "b"))
        made.flush()
        made.append(rows("failed", error="no file"))
        made.append(rows("old", stamp="before"))
        raise KeyboardInterrupt
    wanted = Keys(keys("a", "b", "old", "failed", "new"))
    with opened(out, SETTINGS, KEY, wanted) as made:
        assert made.kept == 2 and made.rows == {"image": 2}
        assert made.finished.have(keys("a", "b", "old", "failed")).tolist() == [True, True, False, False]
        again = made.append(rows("a", "failed", "new", "new"))
        assert again["id"].to_pylist() == ["a", "new"]
        made.append(rows("old"))
        made.finish({})
    assert sorted(ids_in(out)) == ["a", "b", "failed", "new", "old"]


def test_a_damaged_part_is_made_again(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), opened(out, SETTINGS, KEY) as made:
        for name in "abc":
            made.append(rows(*(f"{name}{i}" for i in range(50))))
            made.flush()
        raise KeyboardInterrupt
    first, second, _ = sorted(parts.partial_folder(out).glob("part-*"))
    content = bytearray(first.read_bytes())
    content[40] ^= 1  # of the embeddings
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-20])
    with opened(out, SETTINGS, KEY) as made:
        assert made.kept == 50 and made.finished.have(keys("c0", "a0", "b0")).tolist() == [True, False, False]


def test_a_finished_folder_gets_what_it_has_not(tmp_path):
    out = tmp_path / "out"
    with opened(out, SETTINGS, KEY) as made:
        made.append(rows("a", "b"))
        made.finish({})
    before = pq.read_table(out)
    with pytest.raises(ValueError, match="stop"), opened(out, SETTINGS, KEY) as made:
        made.append(rows("c"))
        raise ValueError("stop")
    assert pq.read_table(out).equals(before)
    with opened(out, SETTINGS, KEY, Keys(keys("b", "c", "d"))) as made:
        assert made.kept == 2  # c was kept, a is wanted no more
        made.append(rows("d"))
        made.finish({})
    assert sorted(ids_in(out)) == ["b", "c", "d"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_killed_between_the_two_renames_it_goes_on(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", os.rename

    def killed(source, to):
        if to == out:
            raise KeyboardInterrupt
        rename(source, to)

    with opened(out, SETTINGS, KEY) as made:
        made.append(rows("a"))
        made.finish({})
    with pytest.raises(KeyboardInterrupt), opened(out, SETTINGS, KEY) as made:
        made.append(rows("b"))
        monkeypatch.setattr(os, "rename", killed)
        made.finish({})
    monkeypatch.undo()
    assert not out.exists()
    with opened(out, SETTINGS, KEY) as made:
        assert made.kept == 2
        made.finish({})
    assert sorted(ids_in(out)) == ["a", "b"] and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_rows_of_other_settings_are_not_mixed_in(tmp_path):
    out, other = tmp_path / "out", {**SETTINGS, "dtype": "bfloat16"}
    with pytest.raises(KeyboardInterrupt), opened(out, SETTINGS, KEY) as made:
        made.append(rows("a"))
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="dtype: float32 then, bfloat16 now"), opened(out, other, KEY):
        pass
    with opened(out, other, KEY, overwrite=True) as made:
        assert made.kept == 0
        made.append(rows("b"))
        with pytest.raises(BlockingIOError, match="another run"), opened(out, other, KEY):
            pass
        made.finish({})
    with pytest.raises(FileExistsError, match="dtype: bfloat16 then, float32 now"), opened(out, SETTINGS, KEY):
        pass
    assert ids_in(out) == ["b"]


def test_what_is_not_ours_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="no such folder"), opened(tmp_path / "no" / "out", SETTINGS, KEY):
        pass
    out.mkdir()
    (out / parts.MANIFEST).write_text(json.dumps({"settings": {}}))
    with pytest.raises(FileExistsError, match="no folder of parts"), opened(out, SETTINGS, KEY):
        pass
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(FileExistsError, match="a link"), opened(tmp_path / "link", SETTINGS, KEY, overwrite=True):
        pass
    with pytest.raises(ValueError, match=r"expected a column of .*, got name"):
        parts.digests_of(rows("a"), ["name"])
    with opened(tmp_path / "none", SETTINGS, KEY):
        pass
    assert not parts.partial_folder(tmp_path / "none").exists()
