"""Rows as they are finished, on disk: what makes an interrupted run go on where it stopped.

`OUT.partial` only grows: a frame with the schema and the settings, then one with a record batch for each batch of
embeddings. A run that is killed leaves whole frames and at most one torn one. The next run cuts the file at the first
that is not as it was written, and embeds those rows again. `finish` sorts the rows into a Parquet file beside it and
moves that to OUT: OUT is complete or absent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import itertools
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lbfast import files
from lbfast.embedding import frames
from lbfast.embedding.finished import Finished, Tag, schema, settings_of, write
from lbfast.embedding.frames import Frame
from lbfast.embedding.items import Item
from lbfast.embedding.spool import Tables, key

_SYNC_SECONDS = 1.0
_AT_ONCE = 4096  # rows of a finished file that are noted together
_WHOLE = -1  # in the place of a part's number
_NOWHERE = 1e-6  # the length of a sum of unit vectors that cancel each other


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The settings that are not equal: "dtype: float32 then, bfloat16 now"; empty where all are."""
    ours = json.loads(json.dumps(ours))
    return "; ".join(
        f"{key}: {theirs.get(key)} then, {ours.get(key)} now"
        for key in sorted({*theirs, *ours})
        if theirs.get(key) != ours.get(key)
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a row is: the frame of its record batch in the journal, or a row group of `base`, and its number there."""

    tag: Tag
    frame: Frame | int
    row: int


class Journal:
    """The finished rows of a run that writes `out`. Holds a lock: one run at a time.

    Args:
        out: the Parquet file to make. Its folder exists.
        size: dimensions of an embedding.
        settings: what the rows depend on besides the files; a journal of other settings is not mixed in.
        restart: throw a journal of other settings away instead of refusing it.
        parts: rows may be of parts of files: see `Piece`.
        base: the file at `out`, whose rows are as finished as those of the journal.

    Raises:
        ValueError: there is a journal of other settings, or something else under its name.
        BlockingIOError: another run is writing it. OSError: it cannot be written.
    """

    def __init__(
        self,
        out: Path,
        size: int,
        settings: Mapping[str, Any],
        restart: bool = False,
        parts: bool = False,
        base: Finished | None = None,
    ):
        self.out, self.path, self._parts, self._base = out, partial_path(out), parts, base
        tags = [pa.field("stamp", pa.string())]
        tags += [pa.field("number", pa.int32()), pa.field("last", pa.bool_())] if parts else []
        plain = schema(size, settings, parts=parts)
        self._names, self._schema = plain.names, pa.schema([*plain, *tags], metadata=plain.metadata)
        self._size, self._settings = size, dict(settings)
        self._places = Tables(
            out.parent,
            "CREATE TABLE places (file BLOB, number INTEGER, stamp TEXT, last INTEGER, grp INTEGER, offset INTEGER,"
            " size INTEGER, checksum BLOB, before BLOB, row INTEGER, PRIMARY KEY (file, number)) WITHOUT ROWID",
        )
        self.rows = 0
        self._again = functools.lru_cache(maxsize=256)(self._read_again)
        self._synced = time.monotonic()
        self._end, self._checksum = 0, frames.FIRST
        found = iter(base or ())
        while some := list(itertools.islice(found, _AT_ONCE)):
            self._put([(each.id, _Place(each.tag, each.group, each.row)) for each in some])
        self._file = _open_locked(self.path)
        try:
            self._resume(restart)
        except BaseException:
            self._close()
            raise

    def _resume(self, restart: bool) -> None:
        """Reads what an earlier run left, and cuts it off at the first frame that is not as it was written."""
        first, torn = self._schema.serialize(), False
        found = frames.every(self._file.fileno())
        head = next(found, None)
        if head is None:
            whole = frames.pack(memoryview(first), 0, frames.FIRST)[0]
            torn = whole.startswith(self._file.read(len(whole) + 1))
        written = self._read_schema(head[1]) if head is not None else None
        if written is None and not torn:
            raise ValueError(
                f"{self.path}: expected the rows of an unfinished run, got something else, or damage; move it away"
            )
        if head is not None and written is not None and self._is_ours(written, restart):
            self._end, self._checksum = head[0].end, head[0].checksum
            for frame, message in found:
                batch = self._read_batch(message)
                if batch is None:
                    break
                self._index(batch, frame)
                self._end, self._checksum = frame.end, frame.checksum
        self._file.truncate(self._end)
        if self._end == 0:
            self._write(first)

    def _read_schema(self, message: bytes) -> pa.Schema | None:
        """The schema in the first message; None where that is something else."""
        try:
            written = pa.ipc.read_schema(pa.ipc.read_message(message))
        except (EOFError, pa.ArrowInvalid, OSError):
            return None
        return written if settings_of(written) is not None else None

    def _is_ours(self, written: pa.Schema, restart: bool) -> bool:
        """Whether a journal is of this run. ValueError where it is of another, unless that is to be thrown away."""
        if written.equals(self._schema, check_metadata=True):
            return True
        if restart:
            return False
        named = differences(settings_of(written) or {}, self._settings)
        raise ValueError(
            f"{self.path}: an unfinished run with other settings ({named or 'another layout'}). "
            "Finish it with its own settings, or overwrite it"
        )

    def _read_batch(self, message: bytes) -> pa.RecordBatch | None:
        try:
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(message), self._schema)
            batch.validate(full=True)
        except (EOFError, pa.ArrowException, OSError):
            return None
        return batch

    def _index(self, batch: pa.RecordBatch, frame: Frame) -> None:
        names = ("id", "stamp", *(("number", "last") if self._parts else ()))
        columns = zip(*(batch.column(each).to_pylist() for each in names))
        self._put([(name, _Place(Tag(*tag), frame, row)) for row, (name, *tag) in enumerate(columns)])
        self.rows += batch.num_rows

    def _put(self, rows: Sequence[tuple[str, _Place]]) -> None:
        """Rows that are found or made; they take the places of those of the same id, or of a file that has changed."""
        values = []
        for name, place in rows:
            whole, tag, frame = place.tag.number is None, place.tag, place.frame
            file, number = (key(name), _WHOLE) if whole else (key(name.rpartition("#")[0]), tag.number)
            where = (frame, 0, 0, b"", b"") if isinstance(frame, int) else (None, *dataclasses.astuple(frame))
            values.append((file, number, tag.stamp, bool(tag.last), *where, place.row))
        changed = [(row[0], _WHOLE, row[2]) for row in values if row[1] != _WHOLE]
        self._places.fill("DELETE FROM places WHERE file = ? AND number > ? AND stamp <> ?", changed)
        self._places.fill("INSERT OR REPLACE INTO places VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

    def _found(self, item: Item, what: str, more: str = "") -> list[tuple[Any, ...]]:
        which = f"number {'>' if item.cut else '='} {_WHOLE}"
        statement = f"SELECT {what} FROM places WHERE file = ? AND {which} AND stamp = ? {more}"
        return self._places.run(statement, (key(item.id), item.stamp))

    def __contains__(self, item: Item) -> bool:
        """Whether the item is finished, all of it, and its content has not changed since."""
        return bool(self._found(item, "1", "AND last LIMIT 1" if item.cut else ""))

    def numbers(self, item: Item) -> list[int]:
        """Which parts of an item that is cut are finished, rising; its content has not changed since."""
        return [number for (number,) in self._found(item, "number", "ORDER BY number")]

    def count(self, item: Item) -> int:
        """How many rows there are of an item."""
        return int(self._found(item, "COUNT(*)")[0][0])

    def _rows_of(self, item: Item) -> list[_Place]:
        rows = self._found(item, "*", "ORDER BY number")
        return [
            _Place(
                Tag(stamp, None if number == _WHOLE else number, bool(last)),
                Frame(*frame) if group is None else group,
                row,
            )
            for _, number, stamp, last, group, *frame, row in rows
        ]

    def append(self, items: Sequence[Item], embeddings: np.ndarray, model: str) -> None:
        """Adds finished rows. They survive the process at once, and the machine within a second.

        Args:
            items: n of them, or of their parts.
            embeddings: (n, size) float32.
            model: name of the checkpoint.
        """
        flat = pa.array(np.ascontiguousarray(embeddings, dtype=np.float32).reshape(-1))
        values: dict[str, Any] = {
            name: [getattr(item, name, None) for item in items] for name in self._schema.names if name != "embedding"
        }
        values |= {
            "embedding": pa.FixedSizeListArray.from_arrays(flat, self._size),
            "model": [model] * len(items),
        }
        columns = [
            pa.array(values[f.name], f.type) if f.name != "embedding" else values["embedding"] for f in self._schema
        ]
        batch = pa.record_batch(columns, schema=self._schema)
        self._index(batch, self._write(batch.serialize()))

    def _write(self, message: pa.Buffer) -> Frame:
        packed, frame = frames.pack(memoryview(message), self._end, self._checksum)
        left, at = memoryview(packed), self._end
        try:
            while left:
                count = os.pwrite(self._file.fileno(), left, at)
                left, at = left[count:], at + count
        except OSError as error:  # without a name from Python
            raise OSError(error.errno, f"{error.strerror}; what is finished is kept", str(self.path)) from error
        self._end, self._checksum = frame.end, frame.checksum
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()
        return frame

    def embeddings(self, items: Sequence[Item]) -> np.ndarray:
        """(n, size) float32 of finished items, in this order; of those that are cut the mean of their parts.

        Means are of unit length; zeros where the parts' sum points nowhere.
        """
        return np.stack([self._embedding(item) for item in items]) if items else np.empty((0, self._size), np.float32)

    def _embedding(self, item: Item) -> np.ndarray:
        vectors = (self._batch(place).column("embedding")[place.row].values.to_numpy() for place in self._rows_of(item))
        if not item.cut:
            return next(vectors)
        total = np.zeros(self._size)
        for vector in vectors:
            total += vector
        length = np.linalg.norm(total)
        return (total / length if length > _NOWHERE else 0 * total).astype(np.float32)

    def finish(self, items: Iterable[Item], run: Mapping[str, Any], replaces: Signature | None = None) -> None:
        """Writes `out` with the finished rows of `items`, in this order; then removes the journal.

        Args:
            run: what `read_finished` gives back.
            replaces: the signature of the file at `out` that may be replaced; None: there is none.

        Raises FileExistsError where there is another file by now, OSError where rows are not as they were written.
        """
        made = schema(self._size, self._settings, run, self._parts)
        try:
            with files.replacing(self.out, new=replaces is None) as staged:
                write(staged, made, self._rows(items))
                if signature(self.out) != replaces:
                    raise FileExistsError
        except FileExistsError:
            raise FileExistsError(errno.EEXIST, CHANGED, str(self.out)) from None
        self.remove()

    def _rows(self, items: Iterable[Item]) -> Iterator[tuple[pa.RecordBatch, Tag]]:
        for item in items:
            for place in self._rows_of(item):
                yield self._batch(place).slice(place.row, 1), place.tag

    def _batch(self, place: _Place) -> pa.RecordBatch:
        """The batch that a row is in, with the columns of the finished file."""
        if isinstance(place.frame, int):
            assert self._base is not None
            return self._base.group(place.frame).replace_schema_metadata(None)
        return self._again(place.frame)

    def _read_again(self, frame: Frame) -> pa.RecordBatch:
        message = frames.read(self._file.fileno(), frame)
        batch = None if message is None else self._read_batch(message)
        if batch is None:
            raise OSError(errno.EIO, "finished rows are not as they were written; call again", str(self.path))
        return batch.select(self._names).replace_schema_metadata(None)

    def remove(self) -> None:
        """Removes the journal, whose rows are in `out`."""
        self.path.unlink()
        self._close()

    def close(self) -> None:
        """Lets go of the file and the lock. The rows stay for the next run; a journal without any does not."""
        if not self.rows and not self._file.closed:
            self.path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        self._file.close()
        self._places.close()


Signature = tuple[int, int, int]
"""What changes when a file is replaced or written: its number, size and time."""

CHANGED = "out: it has been made or changed since this run began, and is left alone; what is finished is kept"


def signature(path: Path) -> Signature | None:
    """Of the file of a path, which may be a link; None where there is nothing."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def partial_path(out: Path) -> Path:
    """Where the finished rows of an unfinished run are kept."""
    return out.with_name(out.name + ".partial")


def _open_locked(path: Path) -> Any:
    while True:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(path).st_mode):
                raise FileExistsError(
                    errno.EEXIST, "expected a file of finished rows, or none, got something else", str(path)
                )
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise BlockingIOError(error.errno, "another run is writing here", str(path)) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # a run that finished in between has removed it
