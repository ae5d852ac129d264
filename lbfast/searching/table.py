"""Rows of Parquet files of embeddings, block by block: a file, or a folder of parts that are one table."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROWS = 1 << 14
"""Of a block: 48 MiB of 768 float32."""
Block = tuple[np.ndarray, np.ndarray]
"""(n,) row numbers and (n, size) float32."""

_WHOLE = 64 << 20  # bytes of a group of rows up to which it is read as a whole
_MOST_THREADS = 4
_BUFFER = 1 << 20
_SETTINGS = b"lbfast"
_DETAILS = ("id", "modality", "path", "model", "start_sec", "end_sec")


@dataclass(frozen=True)
class Part:
    """A Parquet file, and the number of its first row in the whole."""

    path: Path
    first: int
    metadata: pq.FileMetaData

    def opened(self) -> pq.ParquetFile:
        """The file, for one thread."""
        return pq.ParquetFile(self.path, metadata=self.metadata, buffer_size=_BUFFER, pre_buffer=False)

    def groups(self) -> Iterator[Group]:
        first = self.first
        for number in range(self.metadata.num_row_groups):
            group = Group(self, number, first, self.metadata.row_group(number).num_rows)
            yield group
            first += group.rows


@dataclass(frozen=True)
class Group:
    """Rows of a part that lie together: its number there, and that of its first row in the whole."""

    part: Part
    number: int
    first: int
    rows: int

    def batches(self, names: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Its rows in pieces, each with the number of its first. ValueError: they cannot be read."""
        first = self.first
        try:
            for batch in self.part.opened().iter_batches(ROWS, row_groups=[self.number], columns=list(names)):
                yield first, batch
                first += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{self.part.path}: expected a Parquet file that can be read, got {_line(error)}"
            ) from error

    def blocks(self, size: int, modality: str | None) -> Iterator[Block]:
        if modality is not None and not any(_is(batch, modality).true_count for _, batch in self.batches(["modality"])):
            return  # without a look at its embeddings, nor at its statistics: damaged ones end the process
        for first, batch in self.batches(["embedding"] if modality is None else ["embedding", "modality"]):
            numbers, column = np.arange(first, first + len(batch)), batch.column("embedding")
            keep = pc.is_valid(column)
            if modality is not None:
                keep = pc.and_(keep, _is(batch, modality))
            if not pc.all(keep).as_py():
                column, numbers = column.filter(keep), numbers[keep.to_numpy(zero_copy_only=False)]
            if len(numbers):
                yield numbers, _matrix(column, self.part.path, size)


class Table:
    """Embeddings in a Parquet file, or in the Parquet files of a folder, by name.

    Attributes:
        size: numbers of an embedding; None where the files do not say (lists of any length).
        rows: how many there are.
        settings: of the run of `lbfast embed` that made them; {} where none did.

    Raises:
        FileNotFoundError: it is not there. ValueError: no Parquet file, or without such a column.
    """

    def __init__(self, where: str | os.PathLike[str]):
        self.where = Path(where)
        self._parts: list[Part] = []
        self.settings: dict[str, Any] = {}
        self.rows = 0
        sizes = set()
        for path in _files(self.where):
            try:
                file = pq.ParquetFile(path)
                schema = file.schema_arrow
                sizes.add(_check_schema(path, schema))
            except (pa.ArrowException, OSError, UnicodeError) as error:
                if isinstance(error, OSError) and error.errno:  # of the system: the file may be as it should
                    raise
                raise ValueError(f"{path}: expected a Parquet file, got {_line(error)}") from error
            self._parts.append(Part(path, self.rows, file.metadata))
            self.rows += file.metadata.num_rows
            self.settings = self.settings or _settings(schema)
        if len(sizes) > 1:
            found = ", ".join(map(str, sorted(sizes, key=str)))
            raise ValueError(f"{self.where}: expected files whose embeddings have one size, got {found}")
        self.size = sizes.pop()

    def blocks(self, size: int, modality: str | None = None) -> Iterator[Block]:
        """All rows in their order that have an embedding, of one modality or of all.

        Several threads read ahead where groups of rows are small, as those of `lbfast embed` are.

        ValueError: an embedding of another size, a damaged file, or no column to choose a modality by.
        """
        threads = min(os.cpu_count() or 1, _MOST_THREADS)
        ahead: collections.deque[Future[list[Block]]] = collections.deque()
        with ThreadPoolExecutor(threads, "lbfast-read") as pool:
            for part in self._parts:
                if modality is not None:
                    _check_modality(part)
                for group in part.groups():
                    if 4 * size * group.rows > _WHOLE:
                        while ahead:
                            yield from ahead.popleft().result()
                        yield from group.blocks(size, modality)
                        continue
                    ahead.append(pool.submit(lambda group=group: list(group.blocks(size, modality))))  # type: ignore[misc]
                    if len(ahead) > threads:
                        yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()

    def details(self, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
        """By row number: the columns besides the embedding that are there, id, modality, path and more."""
        found: dict[int, dict[str, Any]] = {number: {} for number in numbers}
        for part in self._parts:
            names = [name for name in _DETAILS if name in part.metadata.schema.to_arrow_schema().names]
            for group in part.groups() if names else ():
                mine = [n for n in found if group.first <= n < group.first + group.rows]
                for first, batch in group.batches(names) if mine else ():
                    for number in (n for n in mine if first <= n < first + len(batch)):
                        found[number] = _row(batch, number - first, part.path)
        return found


def _row(batch: pa.RecordBatch, number: int, path: Path) -> dict[str, Any]:
    try:
        return batch.slice(number, 1).to_pylist()[0]
    except UnicodeError as error:
        raise ValueError(f"{path}: expected columns of UTF-8, got {_line(error)}") from error


def _is(batch: pa.RecordBatch, modality: str) -> pa.BooleanArray:
    return pc.fill_null(pc.equal(batch.column("modality").cast(pa.string()), modality), False)


def _files(where: Path) -> list[Path]:
    if not where.exists():
        raise FileNotFoundError(2, "embeddings: no such file or folder", str(where))
    if not where.is_dir():
        if not where.is_file():
            raise ValueError(f"{where}: expected a Parquet file, got something that is no regular file")
        return [where]
    found = sorted(path for path in where.rglob("*.parquet") if path.is_file() and not path.name.startswith("."))
    if not found:
        raise ValueError(f"{where}: expected a folder with Parquet files, got none in it")
    return found


def _check_schema(path: Path, schema: pa.Schema) -> int | None:
    """The size of the embeddings, where the type says it."""
    names = schema.names
    if names.count("embedding") != 1:
        columns = ", ".join(map(str, names[:8])) or "none"
        raise ValueError(f"{path}: expected one column embedding, got the columns {columns}")
    kind = schema.field("embedding").type
    fixed = pa.types.is_fixed_size_list(kind)
    if not (fixed or pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_floating(
        kind.value_type
    ):
        raise ValueError(f"{path}: embedding: expected lists of floats, got {kind}")
    return kind.list_size if fixed else None


def _check_modality(part: Part) -> None:
    schema = part.metadata.schema.to_arrow_schema()
    kind = schema.field("modality").type if schema.names.count("modality") == 1 else None
    plain = kind.value_type if kind is not None and pa.types.is_dictionary(kind) else kind
    if plain is None or not (pa.types.is_string(plain) or pa.types.is_large_string(plain)):
        raise ValueError(f"{part.path}: expected a column modality of strings to choose by, got {kind or 'none'}")


def _settings(schema: pa.Schema) -> dict[str, Any]:
    try:
        settings = json.loads((schema.metadata or {})[_SETTINGS])
    except (KeyError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _matrix(column: pa.Array, path: Path, size: int) -> np.ndarray:
    """(n, size) float32 of n lists, none of them null."""
    if not pa.types.is_fixed_size_list(column.type):
        lengths = pc.unique(pc.list_value_length(column)).to_pylist()
        if lengths != [size]:
            raise ValueError(f"{path}: embedding: expected lists of {size} numbers, got of {lengths[:5]}")
    values = column.flatten()  # nulls among them become NaN
    return values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(-1, size)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def models_of(settings: Mapping[str, Any]) -> list[str]:
    """The names of the checkpoints that made a table, the one that embeds texts last; [] where it does not say."""
    try:
        named = [str(name) for name, _ in settings["models"].values()]
        last = str(settings["language"][0])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return []
    return [*(name for name in named if name != last), last]
