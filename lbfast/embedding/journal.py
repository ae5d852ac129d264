"""Rows as they are finished, on disk: what makes an interrupted run go on where it stopped.

`OUT.partial` only grows: a frame with the schema and the settings, then one with a record batch for each batch of
embeddings. A run that is killed leaves whole frames and at most one torn one. The next run cuts the file at the first
that is not as it was written, and embeds those rows again. `finish` sorts the rows into a Parquet file beside it and
moves that to OUT: OUT is complete or absent.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lbfast import files
from lbfast.embedding import frames
from lbfast.embedding.frames import Frame
from lbfast.embedding.items import Item

_SYNC_SECONDS = 1.0
_ROWS_A_GROUP = 8192
_SETTINGS, _RUN = b"lbfast", b"lbfast.run"


def schema(size: int, settings: Mapping[str, Any], run: Mapping[str, Any] | None = None) -> pa.Schema:
    """Columns of the Parquet file; the settings of the run are its metadata, as JSON under "lbfast".

    Under "lbfast.run" is what tells a finished run from another of the same settings.
    """
    columns = [
        ("id", pa.string()),
        ("modality", pa.string()),
        ("path", pa.string()),
        ("embedding", pa.list_(pa.float32(), size)),
        ("model", pa.string()),
    ]
    metadata = {_SETTINGS: json.dumps(settings, sort_keys=True)}
    if run is not None:
        metadata[_RUN] = json.dumps(run, sort_keys=True)
    return pa.schema(columns, metadata=metadata)


def read_finished(out: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The settings of the run that made a Parquet file, and what `finish` was given; None where no run made it."""
    try:
        metadata = pq.read_schema(out).metadata or {}
        return json.loads(metadata[_SETTINGS]), json.loads(metadata[_RUN])
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return None


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The settings that are not equal: "dtype: float32 then, bfloat16 now"; empty where all are."""
    ours = json.loads(json.dumps(ours))
    return "; ".join(
        f"{key}: {theirs.get(key)} then, {ours.get(key)} now"
        for key in sorted({*theirs, *ours})
        if theirs.get(key) != ours.get(key)
    )


@dataclass(frozen=True)
class _Place:
    """Where a row is: the frame of its record batch in the journal, and its number there."""

    stamp: str
    frame: Frame
    row: int


class Journal:
    """The finished rows of a run that writes `out`. Holds a lock: one run at a time.

    Args:
        out: the Parquet file to make. Its folder exists.
        size: dimensions of an embedding.
        settings: what the rows depend on besides the files; a journal of other settings is not mixed in.
        restart: throw a journal of other settings away instead of refusing it.

    Raises:
        ValueError: there is a journal of other settings, or something else under its name.
        BlockingIOError: another run is writing it. OSError: it cannot be written.
    """

    def __init__(self, out: Path, size: int, settings: Mapping[str, Any], restart: bool = False):
        self.out, self.path = out, partial_path(out)
        self._schema = schema(size, settings).append(pa.field("stamp", pa.string()))
        self._size, self._settings = size, dict(settings)
        self._places: dict[str, _Place] = {}
        self._synced = time.monotonic()
        self._end, self._checksum = 0, frames.FIRST
        self._file = _open_locked(self.path)
        try:
            self._resume(restart)
        except BaseException:
            self._file.close()
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
        return written if _SETTINGS in (written.metadata or {}) else None

    def _is_ours(self, written: pa.Schema, restart: bool) -> bool:
        """Whether a journal is of this run. ValueError where it is of another, unless that is to be thrown away."""
        if written.equals(self._schema, check_metadata=True):
            return True
        if restart:
            return False
        named = differences(json.loads(written.metadata[_SETTINGS]), self._settings)
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
        pairs = zip(batch.column("id").to_pylist(), batch.column("stamp").to_pylist())
        for row, (name, stamp) in enumerate(pairs):
            self._places[name] = _Place(stamp, frame, row)

    def __contains__(self, item: Item) -> bool:
        """Whether the item is finished, and its content has not changed since."""
        place = self._places.get(item.id)
        return place is not None and place.stamp == item.stamp

    def append(self, items: Sequence[Item], embeddings: np.ndarray, model: str) -> None:
        """Adds finished rows. They survive the process at once, and the machine within a second.

        Args:
            items: n of them.
            embeddings: (n, size) float32.
            model: name of the checkpoint.
        """
        flat = pa.array(np.ascontiguousarray(embeddings, dtype=np.float32).reshape(-1))
        columns = [
            pa.array([item.id for item in items]),
            pa.array([item.modality for item in items]),
            pa.array([item.path for item in items]),
            pa.FixedSizeListArray.from_arrays(flat, self._size),
            pa.array([model] * len(items)),
            pa.array([item.stamp for item in items]),
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
        """(n, size) float32 of finished items, in this order."""
        read = functools.lru_cache(maxsize=256)(self._again)
        places = [self._places[item.id] for item in items]
        rows = [read(place.frame).column("embedding")[place.row].values.to_numpy() for place in places]
        return np.stack(rows) if rows else np.empty((0, self._size), np.float32)

    def finish(self, items: Sequence[Item], run: Mapping[str, Any], replaces: Signature | None = None) -> None:
        """Writes `out` with the rows of `items`, all of them finished, in this order; then removes the journal.

        Args:
            run: what `read_finished` gives back.
            replaces: the signature of the file at `out` that may be replaced; None: there is none.

        Raises FileExistsError where there is another file by now, OSError where rows are not as they were written.
        """
        made = schema(self._size, self._settings, run)
        try:
            with files.replacing(self.out, new=replaces is None) as staged:
                self._write_rows(staged, made, items)
                if signature(self.out) != replaces:
                    raise FileExistsError
        except FileExistsError:
            raise FileExistsError(errno.EEXIST, CHANGED, str(self.out)) from None
        self.remove()

    def _write_rows(self, staged: Path, made: pa.Schema, items: Sequence[Item]) -> None:
        with pq.ParquetWriter(staged, made) as writer:
            read = functools.lru_cache(maxsize=256)(self._again)
            for start in range(0, len(items), _ROWS_A_GROUP):
                rows = [self._places[item.id] for item in items[start : start + _ROWS_A_GROUP]]
                slices = [read(place.frame).slice(place.row, 1) for place in rows]
                table = pa.Table.from_batches(slices).select(made.names).combine_chunks()
                writer.write_table(table.replace_schema_metadata(made.metadata))

    def _again(self, frame: Frame) -> pa.RecordBatch:
        message = frames.read(self._file.fileno(), frame)
        batch = None if message is None else self._read_batch(message)
        if batch is None:
            raise OSError(errno.EIO, "finished rows are not as they were written; call again", str(self.path))
        return batch

    def remove(self) -> None:
        """Removes the journal, whose rows are in `out`."""
        self.path.unlink()
        self._file.close()

    def close(self) -> None:
        """Lets go of the file and the lock. The rows stay for the next run; a journal without any does not."""
        if not self._places and not self._file.closed:
            self.path.unlink(missing_ok=True)
        self._file.close()


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
