"""A folder of Parquet parts in the making: rows as they come, in files that are whole or absent, resumed by their keys.

`OUT.partial` is filled and then becomes OUT: OUT is complete or absent, and its `_manifest.json` lists the parts. One
process writes, whoever computes the rows, so that nothing needs a file system that all machines share, and no row
comes twice. What a killed run left is taken up by the next: the keys of the parts' rows say what is finished. Rows with
an `error`, and those that are not wanted any more, leave their part then, which is written anew beside and takes its
place.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lbfast import files
from lbfast.embedding.journal import differences

MANIFEST = "_manifest.json"
"""Begins with what readers of a folder of Parquet files pass over, as do staged files."""

_KIND = "parts"
_BYTES = 64 * 2**20  # of a part's rows, about
_SECONDS = 30.0  # of work that a killed process may have to do again
_DIGEST = 15


class Keys:
    """A set of keys, by their hashes of 120 bits: 16 bytes each, for tens of millions of rows."""

    def __init__(self, digests: np.ndarray | None = None):
        self.arrays: list[np.ndarray] = []
        """Of digests, each sorted; no digest is in two."""
        if digests is not None:
            self.add(digests)

    def __len__(self) -> int:
        return sum(map(len, self.arrays))

    def add(self, digests: np.ndarray) -> None:
        """Takes digests (n,) in, none of which is there yet, nor twice among them."""
        new = np.sort(digests)
        while self.arrays and len(self.arrays[-1]) <= len(new):  # so that they are few, and seldom sorted again
            new = np.sort(np.concatenate([self.arrays.pop(), new]))
        if len(new):
            self.arrays.append(new)

    def have(self, digests: np.ndarray) -> np.ndarray:
        """(n,) bool: which of them are there."""
        found = np.zeros(len(digests), bool)
        for some in self.arrays:
            found |= self.within(digests, some)
        return found

    @staticmethod
    def within(digests: np.ndarray, some: np.ndarray) -> np.ndarray:
        """(n,) bool: which of them are in one of `arrays`."""
        return some[np.minimum(np.searchsorted(some, digests), len(some) - 1)] == digests


def digests(columns: Sequence[Sequence[object]]) -> np.ndarray:
    """(n,) of 16 bytes: the hashes of rows' keys, each the values of a row in these columns."""
    hashed = [
        hashlib.blake2b("\0".join(map(str, key)).encode(errors="surrogateescape"), digest_size=_DIGEST).digest() + b"."
        for key in zip(*columns)  # numpy takes trailing zeros away, and so the last byte is none
    ]
    return np.array(hashed, dtype=f"S{_DIGEST + 1}")


def digests_of(table: pa.Table, key: Sequence[str]) -> np.ndarray:
    """`digests` of a table's rows. ValueError where it lacks a column of the key."""
    absent = [name for name in key if name not in table.column_names]
    if absent:
        raise ValueError(f"id: expected a column of {', '.join(table.column_names)}, got {absent[0]}")
    return digests([table[name].to_pylist() for name in key])


def read_manifest(out: Path) -> dict[str, Any] | None:
    """What `finish` wrote; None where there is no finished folder of parts."""
    try:
        found = json.loads((out / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    fields = ("settings", "run", "parts")
    return found if isinstance(found, dict) and all(field in found for field in fields) else None


def partial_folder(out: Path) -> Path:
    """Where the parts of an unfinished run are kept."""
    return out.with_name(out.name + ".partial")


class Parts:
    """The parts of `out`, of which some may be there. Use `opened`.

    Attributes:
        key: the columns that tell rows apart.
        finished: the keys of the rows that are there.
        kept: how many of them an earlier run has made.
        rows: how many have an embedding, by modality.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], key: Sequence[str], wanted: Keys | None):
        self.out, self.folder, self.key = out, partial_folder(out), tuple(key)
        self._settings, self._wanted = dict(settings), wanted
        self._new: list[pa.Table] = []
        self._since = 0.0
        self.finished = Keys()
        self.rows: collections.Counter[str] = collections.Counter()
        for path in self._paths():
            self._take(path)
        self.kept = len(self.finished)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def _take(self, path: Path) -> None:
        """Takes the rows of a part for finished that are, and the others out of it."""
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            found = digests_of(table, self.key)
            good = ~table["error"].is_valid().to_numpy() & ~self.finished.have(found)
        except (pa.ArrowException, OSError, ValueError, KeyError):  # damaged: its rows are made again
            path.unlink()
            return
        if self._wanted is not None:
            good &= self._wanted.have(found)
        kept = table.filter(pa.array(good))
        if not kept.num_rows:
            path.unlink()
        elif kept.num_rows < table.num_rows:
            _write(path, kept)
        self._count(kept, found[good])

    def _count(self, table: pa.Table, found: np.ndarray) -> None:
        self.finished.add(found)
        self.rows.update(table.filter(table["error"].is_null())["modality"].to_pylist())

    def append(self, table: pa.Table) -> pa.Table:
        """Takes rows with columns of `key`, `modality` and `error`. What comes back are those whose key was there.

        The others are on the disk when they are enough for a part, or with the first that come half a minute later.
        """
        found = digests_of(table, self.key)
        new = np.zeros(len(found), bool)
        new[np.unique(found, return_index=True)[1]] = True
        new &= ~self.finished.have(found)
        again, table = table.filter(pa.array(~new)), table.filter(pa.array(new))
        self._count(table, found[new])
        if table.num_rows:
            self._since = self._since or time.monotonic()
            self._new.append(table)
        if sum(some.nbytes for some in self._new) > _BYTES or time.monotonic() - self._since > _SECONDS:
            self.flush()
        return again

    def flush(self) -> None:
        """Writes a part of what has come since the last."""
        if not self._new:
            return
        paths = self._paths()
        number = int(paths[-1].stem.removeprefix("part-")) + 1 if paths else 0
        table = pa.concat_tables(self._new, promote_options="permissive").combine_chunks()
        _write(self.folder / f"part-{number:06}.parquet", table)
        self._new, self._since = [], 0.0

    def finish(self, run: Mapping[str, Any]) -> None:
        """Writes the manifest, with `run` in it, and makes the folder `out`.

        Raises FileExistsError where there is another `out` by now, and not a folder of parts.
        """
        self.flush()
        parts = []
        for path in self._paths():
            described = pq.read_metadata(path)
            parts.append({"name": path.name, "rows": described.num_rows, "bytes": path.stat().st_size})
        manifest = {"settings": self._settings, "run": dict(run), "parts": parts}
        files.write(self.folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        before = self.out.with_name(f".{self.out.name}.before")
        if check_out(self.out):
            _remove(before)
            os.rename(self.out, before)
        os.rename(self.folder, self.out)
        files.flush(self.out.parent)
        _remove(before)

    def discard(self) -> None:
        """Removes the folder that was to become `out`."""
        _remove(self.folder)


@contextlib.contextmanager
def opened(
    out: str | os.PathLike[str],
    settings: Mapping[str, Any],
    key: Sequence[str],
    wanted: Keys | None = None,
    overwrite: bool = False,
) -> Iterator[Parts]:
    """The parts of a run that writes `out`: what an unfinished run, or a finished one of fewer rows, left is in them.

    Holds a lock: one run at a time. Rows that came are kept whatever ends the block.

    Args:
        out: the folder to make. Its own folder exists.
        settings: what the rows depend on besides what they are made from.
        key: the columns that tell rows apart.
        wanted: the keys of all rows; others leave. None: all are.
        overwrite: throw away what was made with other settings, and a finished `out`.

    Raises:
        ValueError: an unfinished run has other settings. FileExistsError: `out` is no folder of parts, or one of other
        settings. FileNotFoundError: its folder is not. BlockingIOError: another run is writing it.
    """
    out = Path(out)
    settings = {**settings, "key": list(key)}
    there = check_out(out)
    folder = partial_folder(out)
    with files.claimed(folder, _KIND):
        if overwrite:
            _clear(folder)
        elif (begun := _settings_of(folder)) is not None and begun != json.loads(json.dumps(settings)):
            raise ValueError(
                f"{folder}: an unfinished run with other settings ({differences(begun, settings)}). "
                "Finish it with its own settings, or overwrite it"
            )
        elif there:
            _link(out, folder, settings)
        files.write(folder / MANIFEST, json.dumps({"settings": settings}, indent=1, sort_keys=True) + "\n")
        parts = Parts(out, settings, key, wanted)
        try:
            yield parts
        finally:
            if folder.is_dir():
                parts.flush()
                if not parts.finished:
                    parts.discard()


def _settings_of(folder: Path) -> dict[str, Any] | None:
    """Of an unfinished run; None where there is none."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
        return found["settings"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        what = "expected the parts of an unfinished run, got something else; move it away"
        raise ValueError(f"{folder}: {what}") from None


def _link(out: Path, folder: Path, settings: Mapping[str, Any]) -> None:
    """The parts of a finished run are among those of one that has more to do."""
    manifest = read_manifest(out)
    assert manifest is not None
    if other := differences(manifest["settings"], settings):
        _remove(folder)
        raise FileExistsError(
            errno.EEXIST,
            f"out: it is there already, of a run with other settings ({other}); overwrite replaces it",
            str(out),
        )
    for part in manifest["parts"]:
        name = os.path.basename(part["name"])
        if (folder / name).exists() or not (out / name).exists():
            continue
        try:
            os.link(out / name, folder / name)
        except OSError:  # a file system without links
            with files.replacing(folder / name) as staged:
                shutil.copyfile(out / name, staged)


def check_out(out: Path) -> bool:
    """Whether `out` is there. FileNotFoundError: its folder is not. FileExistsError: it is no folder of parts."""
    if not out.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "out: no such folder", str(out.parent))
    there = os.path.lexists(out)
    if there and (out.is_symlink() or not out.is_dir() or read_manifest(out) is None):
        what = "a link" if out.is_symlink() else "and no folder of parts that a run has finished"
        raise FileExistsError(errno.EEXIST, f"out: it is there already, {what}; name another", str(out))
    return there


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != files.MARK:
            path.unlink()


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def _write(path: Path, table: pa.Table) -> None:
    """A part, whole or absent, each of its pages with a checksum."""
    with files.replacing(path) as staged:
        pq.write_table(table, staged, write_page_checksum=True)
