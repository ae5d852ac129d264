"""Rows as they are finished, on disk: what makes an interrupted run go on where it stopped.

`OUT.partial` is an Arrow IPC stream that only grows: the schema with the settings, then one record batch for each batch
of embeddings. A run that is killed leaves whole batches and at most one torn one, which the next run cuts off. `finish`
sorts the rows into a Parquet file beside it and moves that to OUT: OUT is complete or absent.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lbfast.embedding.items import Item

_SYNC_SECONDS = 1.0
_ROWS_A_GROUP = 8192


def schema(size: int, settings: Mapping[str, Any]) -> pa.Schema:
    """Columns of the Parquet file; the settings of the run are its metadata, as JSON under "lbfast"."""
    columns = [
        ("id", pa.string()),
        ("modality", pa.string()),
        ("path", pa.string()),
        ("embedding", pa.list_(pa.float32(), size)),
        ("model", pa.string()),
    ]
    return pa.schema(columns, metadata={"lbfast": json.dumps(settings, sort_keys=True)})


@dataclass(frozen=True)
class _Place:
    """Where a row is: the offset of its record batch in the journal, and its number there."""

    stamp: str
    offset: int
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
        self._file = _open_locked(self.path)
        try:
            self._resume(restart)
        except BaseException:
            self._file.close()
            raise

    def _resume(self, restart: bool) -> None:
        """Reads what an earlier run left, and cuts off a torn end."""
        end = 0
        source = pa.memory_map(str(self.path)) if os.fstat(self._file.fileno()).st_size else None
        if source is not None:
            with source:
                written = self._read_schema(source)
                if written is not None and not written.equals(self._schema, check_metadata=True):
                    if not restart:
                        raise ValueError(self._differences(written))
                    written = None
                if written is not None:
                    end = source.tell()
                    for offset, batch in _batches(source, self._schema):
                        self._index(batch.column("id"), batch.column("stamp"), offset)
                        end = source.tell()
        self._file.truncate(end)
        self._file.seek(end)
        if end == 0:
            self._write(self._schema.serialize())

    def _read_schema(self, source: Any) -> pa.Schema | None:
        """The schema that the journal begins with; None where the run stopped before it was whole."""
        try:
            written = pa.ipc.read_schema(pa.ipc.read_message(source))
        except (EOFError, pa.ArrowInvalid, OSError):
            source.seek(0)
            if self._schema.serialize().to_pybytes().startswith(source.read()):
                return None
            written = pa.schema([])
        if b"lbfast" not in (written.metadata or {}):
            raise ValueError(f"{self.path}: expected the rows of an unfinished run, got something else; move it away")
        return written

    def _differences(self, written: pa.Schema) -> str:
        theirs = json.loads((written.metadata or {}).get(b"lbfast", b"{}"))
        ours = json.loads(json.dumps(self._settings))
        named = [
            f"{key}: {theirs.get(key)} then, {ours.get(key)} now"
            for key in sorted({*theirs, *ours})
            if theirs.get(key) != ours.get(key)
        ]
        return (
            f"{self.path}: an unfinished run with other settings ({'; '.join(named) or 'another layout'}). "
            "Finish it with its own settings, or overwrite it"
        )

    def _index(self, ids: Any, stamps: Any, offset: int) -> None:
        for row, (name, stamp) in enumerate(zip(ids.to_pylist(), stamps.to_pylist())):
            self._places[name] = _Place(stamp, offset, row)

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
        offset = self._file.tell()
        self._write(batch.serialize())
        self._index(batch.column("id"), batch.column("stamp"), offset)

    def _write(self, message: pa.Buffer) -> None:
        left = memoryview(message)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:  # without a name from Python
            raise OSError(error.errno, f"{error.strerror}; what is finished is kept", str(self.path)) from error
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def finish(self, items: Sequence[Item]) -> None:
        """Writes `out` with the rows of `items`, all of them finished, in this order; then removes the journal."""
        staged = self.out.with_name(self.out.name + ".tmp")
        try:
            with (
                pa.memory_map(str(self.path)) as source,
                open(staged, "wb") as sink,
                pq.ParquetWriter(sink, schema(self._size, self._settings)) as writer,
            ):
                read = functools.lru_cache(maxsize=256)(functools.partial(_batch_at, source, self._schema))
                for start in range(0, len(items), _ROWS_A_GROUP):
                    rows = [self._places[item.id] for item in items[start : start + _ROWS_A_GROUP]]
                    slices = [read(place.offset).slice(place.row, 1) for place in rows]
                    writer.write_table(pa.Table.from_batches(slices).select(writer.schema.names).combine_chunks())
                writer.close()
                sink.flush()
                os.fsync(sink.fileno())
            os.replace(staged, self.out)
        finally:
            with contextlib.suppress(FileNotFoundError):
                staged.unlink()
        self.path.unlink()
        self._file.close()

    def close(self) -> None:
        """Lets go of the file and the lock. The rows stay for the next run; a journal without any does not."""
        if not self._places and not self._file.closed:
            self.path.unlink(missing_ok=True)
        self._file.close()


def partial_path(out: Path) -> Path:
    """Where the finished rows of an unfinished run are kept."""
    return out.with_name(out.name + ".partial")


def _open_locked(path: Path) -> Any:
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise BlockingIOError(error.errno, "another run is writing here", str(path)) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # a run that finished in between has removed it


def _batches(source: Any, written: pa.Schema) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(offset, record batch) up to the end or the first torn one."""
    while True:
        offset = source.tell()
        try:
            batch = _batch_at(source, written, offset)
        except (EOFError, pa.ArrowInvalid, OSError):
            return
        yield offset, batch


def _batch_at(source: Any, written: pa.Schema, offset: int) -> pa.RecordBatch:
    source.seek(offset)
    return pa.ipc.read_record_batch(pa.ipc.read_message(source), written)
