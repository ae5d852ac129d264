"""The Parquet file of a run that is finished: how it is written, and what the next run takes from it.

What a row's file was when it was embedded is no column: it lies between the last row group and the footer, where no
reader of Parquet looks. There the next run, given more files, finds which rows it need not make again.
"""

from __future__ import annotations

import functools
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_ROWS_A_GROUP = 8192
_SETTINGS, _RUN = b"lbfast", b"lbfast.run"
_TAGS = pa.schema([("stamp", pa.string()), ("number", pa.int32()), ("last", pa.bool_())])
_END = struct.Struct("<Q8s")  # bytes of the tags, and a mark, just before the footer
_MARK = b"LBtags1\0"
_FOOTER = struct.Struct("<I4s")


def schema(
    size: int, settings: Mapping[str, Any], run: Mapping[str, Any] | None = None, parts: bool = False
) -> pa.Schema:
    """Columns of the Parquet file; the settings of the run are its metadata, as JSON under "lbfast".

    Under "lbfast.run" is what tells a finished run from another of the same settings. `parts`: with the seconds that a
    row is of, null where it is of a whole file.
    """
    seconds = [("start_sec", pa.float64()), ("end_sec", pa.float64())] if parts else []
    columns = [
        ("id", pa.string()),
        ("modality", pa.string()),
        ("path", pa.string()),
        *seconds,
        ("embedding", pa.list_(pa.float32(), size)),
        ("model", pa.string()),
    ]
    metadata = {_SETTINGS: json.dumps(settings, sort_keys=True)}
    if run is not None:
        metadata[_RUN] = json.dumps(run, sort_keys=True)
    return pa.schema(columns, metadata=metadata)


def settings_of(found: pa.Schema) -> dict[str, Any] | None:
    """The settings in a schema's metadata; None where there are none."""
    try:
        return dict(json.loads((found.metadata or {})[_SETTINGS]))
    except (ValueError, KeyError, TypeError):
        return None


def read_finished(out: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The settings of the run that made a Parquet file, and what `finish` was given; None where no run made it."""
    try:
        metadata = pq.read_schema(out).metadata or {}
        return json.loads(metadata[_SETTINGS]), json.loads(metadata[_RUN])
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return None


@dataclass(frozen=True, slots=True)
class Tag:
    """What the next run must know of a row: its file's stamp; of a part its number, and whether it is the last."""

    stamp: str
    number: int | None = None
    last: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """A row of a finished file: the row group, and its number there."""

    id: str
    modality: str
    path: str
    tag: Tag
    group: int
    row: int


def write(staged: Path, made: pa.Schema, rows: Iterable[tuple[pa.RecordBatch, Tag]]) -> None:
    """Writes a Parquet file of rows, each a batch of one row with the columns of `made`."""
    tags: list[pa.RecordBatch] = []
    left = iter(rows)
    with pa.OSFile(str(staged), "wb") as sink, pq.ParquetWriter(sink, made) as writer:
        while some := [row for _, row in zip(range(_ROWS_A_GROUP), left)]:
            table = pa.Table.from_batches([batch for batch, _ in some]).combine_chunks()
            writer.write_table(table.replace_schema_metadata(made.metadata))
            columns = zip(*((tag.stamp, tag.number, tag.last) for _, tag in some))
            tags.append(pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, _TAGS)], schema=_TAGS))
        packed = pa.BufferOutputStream()
        with pa.ipc.new_stream(packed, _TAGS, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
            for batch in tags:
                stream.write_batch(batch)
        message = packed.getvalue()
        sink.write(message)
        sink.write(_END.pack(message.size, _MARK))


class Finished:
    """The rows of a finished file. ValueError: there are no tags, or they are not of these rows."""

    def __init__(self, out: Path):
        self._file = pq.ParquetFile(out)
        self._tags = _read_tags(out)
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        if [batch.num_rows for batch in self._tags] != counts:
            raise ValueError("tags of other rows")
        self.group = functools.lru_cache(maxsize=2)(self._group)

    def __iter__(self) -> Iterator[Found]:
        for group, tags in enumerate(self._tags):
            table = self._file.read_row_group(group, columns=["id", "modality", "path"])
            columns = [table[name].to_pylist() for name in ("id", "modality", "path")]
            marks = (Tag(*values) for values in zip(*(tags.column(name).to_pylist() for name in _TAGS.names)))
            for row, (name, modality, path, tag) in enumerate(zip(*columns, marks)):
                yield Found(name, modality, path, tag, group, row)

    def _group(self, number: int) -> pa.RecordBatch:
        return self._file.read_row_group(number).combine_chunks().to_batches()[0]

    def __enter__(self) -> Finished:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _read_tags(out: Path) -> list[pa.RecordBatch]:
    try:
        with open(out, "rb") as file:
            end = file.seek(-_FOOTER.size, os.SEEK_END)
            end -= _FOOTER.unpack(file.read(_FOOTER.size))[0]
            file.seek(end - _END.size)
            size, mark = _END.unpack(file.read(_END.size))
            if mark != _MARK or size > end - _END.size:
                raise ValueError("no tags")
            file.seek(end - _END.size - size)
            with pa.ipc.open_stream(file.read(size)) as stream:
                batches = list(stream)
        for batch in batches:
            batch.validate(full=True)
            if not batch.schema.equals(_TAGS):
                raise ValueError("other tags")
        return batches
    except (pa.ArrowException, OSError, EOFError, struct.error) as error:
        raise ValueError(f"no tags: {error}") from error
