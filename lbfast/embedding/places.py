"""Where files are, if not given one by one: members of tars, cells of tables, what a URL lists, a list of names.

Tables and tars are untrusted: nothing is unpacked or unpickled, and what is in memory at a time is bounded. Paths in a
table are relative to its folder, or absolute, as in training's manifests; URLs there are opened only where URLs are.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lbfast.data.manifest import SUFFIXES as TABLES
from lbfast.data.sample import Member
from lbfast.data.store import Object
from lbfast.data.tar import BrokenTarError, members
from lbfast.processing.media import MediaError, reason, url_system

PATH = "path"
"""The column of a table that is read where none is named and none holds files."""

_LONGEST = 1 << 20  # characters of a line of a table, bytes of a name on the standard input
_GROUP_BYTES = 1 << 30  # of a row group's cells, which are read together
_TYPES = {"Image": "image", "Audio": "audio", "Video": "video"}  # of Hugging Face's features


@dataclass(frozen=True)
class Cell:
    """An encoded file in a table: bytes, or a struct of bytes and path as Hugging Face's datasets have it.

    Attributes:
        table: a Parquet file, or one of Arrow's streams. number: of the row, from 1.
        group, row: where it is: the row group (0 of a stream), and its number there.
    """

    table: str
    column: str
    number: int
    group: int
    row: int

    @contextlib.contextmanager
    def opened(self) -> Iterator[bytes | str]:
        """The bytes, or the path that stands in their place."""
        name = f"{self.table}#{self.number}"
        try:
            read = _stream if self.table.endswith(".arrow") else _group
            value = read(self.table, os.stat(self.table).st_mtime_ns, self.column, self.group)[self.row].as_py()
        except (pa.ArrowException, IndexError, KeyError) as error:
            raise MediaError(name, "a cell of the table", f"{type(error).__name__} (has it changed?)") from error
        if isinstance(value, dict):
            value = value.get("bytes") if value.get("bytes") is not None else _beside(self.table, value.get("path"))
        if value is None:
            raise MediaError(name, "bytes, or a path", "a cell without either")
        yield value


@functools.lru_cache(maxsize=1)
def _group(table: str, stamp: int, column: str, group: int) -> Any:
    file = pq.ParquetFile(table)
    found = file.metadata.row_group(group)
    columns = [found.column(i) for i in range(found.num_columns)]
    size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == column)
    if size > _GROUP_BYTES:
        raise MediaError(table, f"row groups of at most {_GROUP_BYTES:,} bytes", f"one of {size:,}")
    return file.read_row_group(group, columns=[column])[column]


@functools.lru_cache(maxsize=4)
def _stream(table: str, stamp: int, column: str, group: int) -> Any:
    return pa.ipc.open_stream(pa.memory_map(table)).read_all()[column]  # nothing is read yet


@dataclass(frozen=True)
class Row:
    """A row of a table: the text of its cell, or the file in it with the path it had, and perhaps a modality."""

    number: int
    text: str | None = None
    cell: Cell | None = None
    name: str | None = None
    modality: str | None = None


def is_table(path: str) -> bool:
    """Whether a file is read as a table when it is given by name."""
    return Path(path).suffix.lower() in (*TABLES, ".arrow")


def rows_of(table: str, column: str | None) -> Iterator[Row]:
    """The rows of a table that have something in the column; None: the one that holds files, or `path`.

    Raises ValueError where it cannot be read, or has no such column.
    """
    try:
        suffix = Path(table).suffix.lower()
        yield from (_arrow_rows if suffix in (".parquet", ".arrow") else _text_rows)(table, column)
    except (pa.ArrowException, csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"a table that cannot be read ({' '.join(str(error).split())[:200]})") from error


def _arrow_rows(table: str, column: str | None) -> Iterator[Row]:
    stream = table.endswith(".arrow")
    opened: Any = pa.ipc.open_stream(pa.memory_map(table)) if stream else pq.ParquetFile(table)
    found: pa.Schema = opened.schema if stream else opened.schema_arrow
    name = _column(found, column)
    kind = found.field(name).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        batches = opened if stream else opened.iter_batches(columns=[name])
        number = 0
        for batch in batches:
            for text in batch.column(batch.schema.get_field_index(name)).to_pylist():
                number += 1
                if text is not None:
                    yield Row(number, text=text)
        return
    if not (_is_binary(kind) or _is_file(kind)):
        raise ValueError(f"column {name}: expected text, bytes, or a struct of bytes and path, got {kind}")
    modality, number = _declared(found, name), 0
    for group, names in enumerate([_stream_names(opened, name)] if stream else _group_names(opened, name, kind)):
        for row, was in enumerate(names):
            number += 1
            yield Row(number, None, Cell(table, name, number, group, row), was, modality)


def _group_names(file: Any, name: str, kind: pa.DataType) -> Iterator[Iterator[str | None]]:
    """For each row group the paths beside the bytes, which are not read."""
    for group in range(file.num_row_groups):
        if _is_file(kind):
            column = file.read_row_group(group, columns=[f"{name}.path"])[name]
            yield (None if row is None else row["path"] for row in column.to_pylist())
        else:
            yield iter([None] * file.metadata.row_group(group).num_rows)


def _stream_names(opened: Any, name: str) -> Iterator[str | None]:
    for batch in opened:
        column = batch.column(batch.schema.get_field_index(name))
        yield from column.field("path").to_pylist() if _is_file(column.type) else [None] * len(column)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_file(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind)) and {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}


def _column(found: pa.Schema, column: str | None) -> str:
    if column is not None:
        return _named(found.names, column)
    files = [field.name for field in found if _is_file(field.type)]
    raw = [field.name for field in found if _is_binary(field.type)]
    if len(files) == 1:
        return str(files[0])
    return str(raw[0]) if PATH not in found.names and len(raw) == 1 and not files else _named(found.names, None)


def _named(names: Sequence[str], column: str | None) -> str:
    wanted = PATH if column is None else column
    if names.count(wanted) != 1:
        shown = ", ".join(names[:20]) or "none"
        raise ValueError(f"expected one column {wanted}{' (column names another)' * (column is None)}, got {shown}")
    return wanted


def _declared(found: pa.Schema, name: str) -> str | None:
    """What Hugging Face's features say of a column."""
    try:
        features = json.loads((found.metadata or {})[b"huggingface"])["info"]["features"]
        return _TYPES.get(features[name]["_type"])
    except (KeyError, TypeError, ValueError):
        return None


def _text_rows(table: str, column: str | None) -> Iterator[Row]:
    with open(table, encoding="utf-8-sig", newline="") as file:
        if Path(table).suffix.lower() == ".jsonl":
            yield from _json_rows(file, PATH if column is None else column)
            return
        lines = csv.reader(_lines(file), delimiter="\t" if table.lower().endswith(".tsv") else ",")
        names = next(lines, [])
        place = names.index(_named(names, column))
        for number, values in enumerate((line for line in lines if line), 1):
            if len(values) > place and values[place]:
                yield Row(number, text=values[place])


def _json_rows(file: IO[str], column: str) -> Iterator[Row]:
    seen = False
    for number, line in enumerate((line for line in _lines(file) if line.strip()), 1):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: expected a JSON object, got {type(error).__name__}") from error
        value = fields.get(column) if isinstance(fields, dict) else None
        seen = seen or value is not None
        if isinstance(value, str) and value:
            yield Row(number, text=value)
    if not seen:
        raise ValueError(f"expected a field {column}, got none")


def _lines(file: IO[str]) -> Iterator[str]:
    while line := file.readline(_LONGEST + 1):
        if len(line) > _LONGEST:
            raise ValueError(f"expected lines of at most {_LONGEST:,} characters")
        yield line


def _beside(table: str, path: Any) -> str | None:
    return os.path.join(os.path.dirname(table), path) if isinstance(path, str) and path else None


def beside(table: str, path: str) -> str:
    """A path in a table, as it is from here."""
    return path if "://" in path else os.path.join(os.path.dirname(table), path)


def dataset_files(folder: str) -> list[str] | None:
    """The Arrow streams of a folder that Hugging Face's `save_to_disk` made; None: it is another. ValueError."""
    splits, state = os.path.join(folder, "dataset_dict.json"), os.path.join(folder, "state.json")
    try:
        if os.path.isfile(splits):
            names = [_bare(name) for name in _json(splits)["splits"]]
            return [file for name in names for file in dataset_files(os.path.join(folder, name)) or ()]
        if not os.path.isfile(state):
            return None
        return [os.path.join(folder, _bare(each["filename"])) for each in _json(state)["_data_files"]]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a dataset whose files cannot be told ({type(error).__name__}: {error})") from error


def _bare(name: str) -> str:
    if not name or name != os.path.basename(name) or name in (".", ".."):
        raise ValueError(f"expected a name in the folder, got {name!r}")
    return name


def _json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.loads(file.read(_LONGEST))


def tar_files(tar: str | Object, broken: dict[str, str]) -> Iterator[Member]:
    """The regular files in a tar, hidden ones passed over; what is wrong with it is put into `broken`."""
    try:
        for name, offset, size in members(tar):
            if not name.rpartition("/")[2].startswith("."):
                yield Member(tar, name, offset, size)
    except BrokenTarError as error:
        broken[os.fspath(tar)] = f"{error}; what follows is lost"


def lists_files(url: str) -> bool:
    """Whether a URL stands for several files: it ends with a slash, or has an asterisk."""
    return url.endswith("/") or "*" in url


def url_files(url: str) -> list[str]:
    """The files that a URL lists: all of a folder, or those that fit its wildcards. OSError: it cannot be reached."""
    try:
        system, path = url_system(url)
        if "*" in path:
            found = [name for name, info in system.glob(path, detail=True).items() if info.get("type") != "directory"]
        else:
            found = system.find(path)
        return sorted(system.unstrip_protocol(name) for name in found if not _hidden(name, path))
    except ImportError:
        raise
    except Exception as error:
        raise OSError(f"a URL that cannot be listed ({reason(error)})") from error


def _hidden(name: str, folder: str) -> bool:
    return any(part.startswith(".") for part in name.removeprefix(folder).split("/"))


def listed(file: IO[bytes] | None = None) -> Iterator[str]:
    """Names on the standard input, one a line; with a NUL in the first one, they end with NUL instead of a line.

    Raises ValueError for what is no list of names.
    """
    file = sys.stdin.buffer if file is None else file
    rest = b""
    end: bytes | None = None
    while chunk := file.read1(1 << 16) if isinstance(file, io.BufferedReader) else file.read(1 << 16):
        rest += chunk
        if end is None and (b"\0" in rest or b"\n" in rest or len(rest) > _LONGEST):
            end = b"\0" if b"\0" in rest else b"\n"
        *names, rest = rest.split(end) if end else [rest]
        yield from filter(None, map(_name, names))
        if len(rest) > _LONGEST:
            raise ValueError(f"inputs: -: expected names of at most {_LONGEST:,} bytes, one a line")
    if name := _name(rest):
        yield name


def _name(raw: bytes) -> str:
    return os.fsdecode(raw.removesuffix(b"\r"))
