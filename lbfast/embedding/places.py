"""Where files are, if not given one by one: members of tars, cells of tables, what a URL lists, a list of names.

Tables and tars are untrusted: nothing is unpacked or unpickled, and what is in memory at a time is bounded. Paths in a
table are relative to its folder, or absolute, as in training's manifests; URLs there are opened only where URLs are.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
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

BYTES = "bytes"
"""The one that is, although there is one of that name: a column of paths beside bytes says what they are called."""

_LONGEST = 1 << 20  # characters of a line of a table, bytes of a name on the standard input
_GROUP_BYTES = 1 << 30  # of a row group's cells, which are read together
_TYPES = {"Image": "image", "Audio": "audio", "Video": "video"}  # of Hugging Face's features


@dataclass(frozen=True)
class Cell:
    """An encoded file in a table: bytes, or a struct of bytes and path as Hugging Face's datasets have it.

    Attributes:
        table: a Parquet file, or one of Arrow's streams. number: of the row, from 1.
        group, row: where it is: the row group (0 of Arrow's), and its number there.
        name: the path beside it.
    """

    table: str
    column: str
    number: int
    group: int
    row: int
    name: str | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[bytes | str]:
        """The bytes, or the path that stands in their place."""
        name = f"{self.table}#{self.number}"
        try:
            read = _arrow if _is_arrow(self.table) else _group
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
def _arrow(table: str, stamp: int, column: str, group: int) -> Any:
    schema, batches = _arrow_batches(table)
    return pa.Table.from_batches(batches, schema)[column]  # nothing is read yet


def _arrow_batches(table: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Of one of Arrow's files or streams."""
    mapped = pa.memory_map(table)
    if mapped.read(6) == b"ARROW1":
        file = pa.ipc.open_file(mapped)
        return file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
    mapped.seek(0)
    stream = pa.ipc.open_stream(mapped)
    return stream.schema, iter(stream)


@dataclass(frozen=True)
class Row:
    """A row of a table: the text of its cell, or the file in it, and perhaps a modality; or why it has neither.

    Where all are None, the cell is empty.
    """

    number: int
    text: str | None = None
    cell: Cell | None = None
    modality: str | None = None
    error: str | None = None


def is_table(path: str) -> bool:
    """Whether a file is read as a table when it is given by name."""
    return Path(path).suffix.lower() in TABLES or _is_arrow(path)


def _is_arrow(path: str) -> bool:
    return Path(path).suffix.lower() == ".arrow"


def rows_of(table: str, column: str | None) -> Iterator[Row]:
    """The rows of a table; `column` None: the one that holds files, or `path`. One that is wrong hurts no other.

    Raises ValueError where it cannot be read, or has no such column.
    """
    begun = False
    try:
        binary = Path(table).suffix.lower() == ".parquet" or _is_arrow(table)
        for row in (_binary_rows if binary else _text_rows)(table, column):
            begun = True
            yield row
    except pa.ArrowException as error:
        lost = "; what follows is lost" if begun else ""
        raise ValueError(f"a table that cannot be read ({' '.join(str(error).split())[:200]}){lost}") from error


def _binary_rows(table: str, column: str | None) -> Iterator[Row]:
    opened = None if _is_arrow(table) else pq.ParquetFile(table)
    found, batches = _arrow_batches(table) if opened is None else (opened.schema_arrow, None)
    name = _column(found, column)
    kind = found.field(name).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        number = 0
        for batch in opened.iter_batches(columns=[name]) if opened is not None else batches or ():
            for text in batch.column(batch.schema.get_field_index(name)).to_pylist():
                number += 1
                yield Row(number, text=text)
        return
    if not (_is_binary(kind) or _is_file(kind)):
        raise ValueError(f"column {name}: expected text, bytes, or a struct of bytes and path, got {kind}")
    modality, number = _declared(found, name), 0
    paths = f"{name}.path" if _is_file(kind) else PATH if PATH in found.names else None
    groups = [_arrow_names(batches or (), paths)] if opened is None else _group_names(opened, paths)
    for group, names in enumerate(groups):
        for row, was in enumerate(names):
            number += 1
            was = was if isinstance(was, str) else None
            yield Row(number, None, Cell(table, name, number, group, row, was), modality)


def _group_names(file: Any, paths: str | None) -> Iterator[Sequence[Any]]:
    """For each row group the paths beside the bytes, which are not read."""
    for group in range(file.num_row_groups):
        if paths is None:
            yield [None] * file.metadata.row_group(group).num_rows
        else:
            column = file.read_row_group(group, columns=[paths]).column(0).to_pylist()
            yield [row["path"] if isinstance(row, dict) else row for row in column]


def _arrow_names(batches: Iterable[pa.RecordBatch], paths: str | None) -> Iterator[Any]:
    for batch in batches:
        if paths is None:
            yield from [None] * len(batch)
        else:
            name, _, field = paths.rpartition(".") if paths != PATH else (PATH, "", "")
            column = batch.column(batch.schema.get_field_index(name))
            yield from (column.field(field) if field else column).to_pylist()


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
    if BYTES in raw and not files:
        return BYTES
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
    with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if Path(table).suffix.lower() == ".jsonl":
            yield from _json_rows(file, PATH if column is None else column)
            return
        lines = csv.reader(_lines(file), delimiter="\t" if table.lower().endswith(".tsv") else ",")
        names = next(lines, [])
        place = names.index(_named(names, column))
        for number in itertools.count(1):
            try:
                values = next((line for line in lines if line), None)
            except csv.Error as error:
                yield Row(number, error=str(error))
                continue
            if values is None:
                return
            yield Row(number, text=values[place] or None if len(values) > place else None)


def _json_rows(file: IO[str], column: str) -> Iterator[Row]:
    seen = False
    for number, line in enumerate((line for line in _lines(file) if line.strip()), 1):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            seen = True
            yield Row(number, error=f"expected a JSON object, got {type(error).__name__}")
            continue
        value = fields.get(column) if isinstance(fields, dict) else None
        seen = seen or (isinstance(fields, dict) and column in fields)
        if not isinstance(fields, dict) or not isinstance(value, str | None):
            got = type(value if isinstance(fields, dict) else fields).__name__
            yield Row(number, error=f"expected an object with text in {column}, got {got}")
        else:
            yield Row(number, text=value or None)
    if not seen:
        raise ValueError(f"expected a field {column}, got none")


def _lines(file: IO[str]) -> Iterator[str]:
    while line := file.readline(_LONGEST + 1):
        if len(line) > _LONGEST:
            raise ValueError(f"expected lines of at most {_LONGEST:,} characters; what follows is lost")
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
    base = folder.partition("*")[0].rpartition("/")[0] if "*" in folder else folder
    return any(part.startswith(".") for part in name.removeprefix(base).split("/"))


def listed(file: IO[bytes] | None = None) -> Iterator[str]:
    """Names on the standard input, one a line; with a NUL in the first one, they end with NUL instead of a line.

    Raises ValueError for what is no list of names.
    """
    if file is None and sys.stdin is None:
        raise ValueError("inputs: -: expected a list of names on the standard input, which is closed")
    file = sys.stdin.buffer if file is None else file
    rest = b""
    end: bytes | None = None
    while chunk := file.read1(1 << 16) if isinstance(file, io.BufferedReader) else file.read(1 << 16):
        rest += chunk
        if end is None and (b"\0" in rest or b"\n" in rest or len(rest) > _LONGEST):
            end = b"\0" if b"\0" in rest else b"\n"
        *names, rest = rest.split(end) if end else [rest]
        yield from filter(None, (_name(raw, end) for raw in names))
        if len(rest) > _LONGEST:
            raise ValueError(f"inputs: -: expected names of at most {_LONGEST:,} bytes, one a line")
    if name := _name(rest, end):
        yield name


def _name(raw: bytes, end: bytes | None) -> str:
    return os.fsdecode(raw if end == b"\0" else raw.removesuffix(b"\r"))
