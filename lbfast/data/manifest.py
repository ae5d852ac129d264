"""Manifests: a parquet, jsonl, csv or tsv file, a row a sample: the path of a file, and columns of captions."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lbfast.data.sample import Remote, Sample
from lbfast.data.store import beside, local_copy, suffix_of
from lbfast.processing.media import is_url

SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv")
_CHUNK = 100_000  # rows that are Python objects at a time


class Manifest:
    """The rows of a manifest that have a path and at least one caption.

    Args:
        file: .parquet, .jsonl, .csv or .tsv (with a line of column names), or the URL of one.
        path: column with the media's path, relative to the manifest's folder or absolute; of a URL, below its folder.
        captions: columns with captions; each row needs text in at least one. Empty: none are read or needed.

    Attributes:
        skipped: "FILE, row N" (from 1, the line of names not counted) -> why the row is none of the samples.

    Raises:
        FileNotFoundError: no such file. ValueError: it cannot be read, has no such columns, or has no rows.
    """

    def __init__(self, file: str | os.PathLike[str], path: str = "path", captions: Sequence[str] = ("caption",)):
        self.file, self._path, self._captions = os.fspath(file), path, tuple(captions)
        self._remote = is_url(self.file)
        if not self._remote and not os.path.isfile(self.file):
            raise FileNotFoundError(2, "manifest: no such file", self.file)
        self._suffix = suffix_of(self.file)
        if self._suffix not in SUFFIXES:
            raise ValueError(f"{file}: expected a manifest ({', '.join(SUFFIXES)}), got {self._suffix or 'no suffix'}")
        self.skipped: dict[str, str] = {}
        with local_copy(self.file) if self._remote else contextlib.nullcontext(Path(self.file)) as here:
            self._columns = self._read(here)
        total = len(self._columns[path])
        if total == 0:
            raise ValueError(f"{file}: expected rows with columns {', '.join(self._names)}, got an empty manifest")
        self._rows = self._usable(total)

    @property
    def _names(self) -> list[str]:
        return list(dict.fromkeys((self._path, *self._captions)))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Sample:
        row = int(self._rows[index])
        path = self._columns[self._path][row].as_py()
        texts = {name: self._columns[name][row].as_py() for name in self._captions}
        return Sample(path, self.beside(path), {k: v for k, v in texts.items() if v})

    def beside(self, path: str) -> str | Remote:
        """What a path of a row names: of a manifest at a URL, what lies below that one's folder."""
        if self._remote:
            return Remote(beside(self.file, path))
        return os.path.join(os.path.dirname(self.file), path)

    def fingerprint(self) -> str:
        """Changes with the paths and captions of the rows, as they are written, and their order."""
        import pyarrow.compute as pc

        key = hashlib.sha256()
        for name in self._names:
            column = pc.fill_null(self._columns[name], "\0").take(self._rows)
            _, offsets, text = column.buffers()
            ends = np.frombuffer(offsets, np.int64, len(column) + 1)
            key.update(f"{name} {len(column)} ".encode() + ends.tobytes())
            key.update(memoryview(text or b"")[: int(ends[-1])])
        return key.hexdigest()

    def _skip(self, row: int, why: str) -> None:
        self.skipped[f"{self.file}, row {row + 1}"] = why

    def _check_columns(self, found: Sequence[str]) -> None:
        missing = [name for name in self._names if name not in found]
        if missing:
            raise ValueError(
                f"{self.file}: expected columns {', '.join(self._names)}, got {', '.join(found) or 'none'} "
                f"(missing: {', '.join(missing)})"
            )

    def _read(self, here: Path) -> dict[str, Any]:
        """Column -> array of strings or nulls. Rows that cannot be read are nulls, and put down in `skipped`."""
        if self._suffix == ".parquet":
            return self._read_parquet(here)
        import pyarrow as pa

        chunks: dict[str, list[Any]] = {name: [] for name in self._names}
        rows: list[tuple[str | None, ...]] = []

        def flush() -> None:
            for name, values in zip(self._names, zip(*rows)):
                chunks[name].append(pa.array(values, pa.large_string()))
            rows.clear()

        try:
            for row in self._rows_of_json(here) if self._suffix == ".jsonl" else self._rows_of_csv(here):
                rows.append(row)
                if len(rows) == _CHUNK:
                    flush()
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{self.file}: expected UTF-8 text in rows, cannot read it: {error}") from error
        flush()
        return {name: pa.chunked_array(c, pa.large_string()).combine_chunks() for name, c in chunks.items()}

    def _read_parquet(self, here: Path) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self._check_columns(pq.read_schema(here).names)
            table = pq.read_table(here, columns=self._names)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.file}: expected a Parquet file, cannot read it: {error}") from error
        columns = {}
        for name in self._names:
            try:
                columns[name] = table[name].cast(pa.large_string()).combine_chunks()
            except pa.ArrowException as error:
                raise ValueError(f"{self.file}: {name}: expected text, got {table[name].type}") from error
        return columns

    def _rows_of_csv(self, here: Path) -> Iterator[tuple[str | None, ...]]:
        delimiter = "\t" if self._suffix == ".tsv" else ","
        with open(here, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            header = next(reader, None)
            if header is None:
                return
            self._check_columns(header)
            places = [header.index(name) for name in self._names]
            for number, row in enumerate(row for row in reader if row):
                if len(row) != len(header):
                    self._skip(
                        number, f"{len(row)} fields, expected {len(header)} (is a text with {delimiter!r} unquoted?)"
                    )
                    yield (None,) * len(places)
                else:
                    yield tuple(row[place] for place in places)

    def _rows_of_json(self, here: Path) -> Iterator[tuple[str | None, ...]]:
        """Values that are no text count as missing."""
        seen: set[str] = set()
        nothing = (None,) * len(self._names)
        with open(here, encoding="utf-8-sig") as file:
            for row, line in enumerate(line for line in file if line.strip()):
                try:
                    fields = json.loads(line)
                except ValueError as error:
                    fields = None
                    self._skip(row, f"no JSON: {error}")
                else:
                    if not isinstance(fields, dict):
                        self._skip(row, f"expected a JSON object, got {type(fields).__name__}")
                        fields = None
                if fields is None:
                    yield nothing
                    continue
                seen.update(fields)
                values = [fields.get(name) for name in self._names]
                yield tuple(value if isinstance(value, str) else None for value in values)
        if seen:
            self._check_columns(sorted(seen))

    def _usable(self, total: int) -> np.ndarray:
        """Numbers of the rows with a path and a caption; the others are put down in `skipped`."""
        import pyarrow.compute as pc

        def present(name: str) -> np.ndarray:
            trimmed = pc.utf8_trim_whitespace(self._columns[name])
            return pc.fill_null(pc.not_equal(trimmed, ""), False).to_numpy(zero_copy_only=False).astype(bool)

        path = present(self._path)
        text = np.zeros(total, dtype=bool) if self._captions else np.ones(total, dtype=bool)
        for name in self._captions:
            text |= present(name)
        for row in np.flatnonzero(~(path & text)).tolist():
            if f"{self.file}, row {row + 1}" not in self.skipped:
                self._skip(row, f"no {self._path}" if not path[row] else f"no caption in {', '.join(self._captions)}")
        rows = np.flatnonzero(path & text)
        return np.array([row for row in rows.tolist() if self._lies_below(row)], np.int64) if self._remote else rows

    def _lies_below(self, row: int) -> bool:
        try:
            self.beside(self._columns[self._path][row].as_py())
        except ValueError as error:
            self._skip(row, str(error))
            return False
        return True


def caption_columns(views: Mapping[str, float] | None) -> tuple[str, ...]:
    """The columns that views ask for: those of weight above 0; without views, `caption`."""
    return ("caption",) if views is None else tuple(name for name, weight in views.items() if weight > 0)
