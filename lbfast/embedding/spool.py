"""What there is of each item, on disk: what is to be embedded, in order, and where the finished rows are.

In memory is a page cache of fixed size, however many items there are. The tables are in files without a name beside the
output, which the system takes back when the run ends, however that is: the next one lists its inputs again, and finds
the finished rows in the journal.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import pickle
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lbfast.data.decode import Task
from lbfast.data.suffixes import ORDER
from lbfast.embedding.items import Item, Marks

_CACHE_KIB = 32 << 10
_AT_ONCE = 2048  # rows that are read together
_COLUMNS = "modality, id, path, stamp, text, data"


def key(name: str) -> bytes:
    """What an id is found by: 16 bytes."""
    return hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=16).digest()


def _rank(modality: str) -> int:
    """Of fused rows after all others."""
    return ORDER.index(modality) if modality in ORDER else len(ORDER)


class Tables:
    """A database that nobody else sees and that outlives nothing; any thread may use it."""

    def __init__(self, folder: Path, *tables: str):
        self._lock = threading.Lock()
        handle, name = tempfile.mkstemp(prefix=".lbfast-", dir=folder if os.access(folder, os.W_OK) else None)
        os.close(handle)
        try:
            self._database = sqlite3.connect(name, isolation_level=None, check_same_thread=False)
            for setting in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "temp_store=MEMORY"):
                self._database.execute(f"PRAGMA {setting}")
            self._database.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
            self._database.execute("BEGIN")  # never ended: what is written need not be kept
            for table in tables:
                self._database.execute(table)
        finally:
            os.unlink(name)

    def run(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows that a statement gives. OSError: there is no room for it."""
        with self._lock, _room():
            return self._database.execute(statement, values).fetchall()

    def fill(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """Runs a statement for each of the rows."""
        with self._lock, _room():
            self._database.executemany(statement, rows)

    def new(self, statement: str, values: Sequence[Any]) -> bool:
        """Whether an "INSERT OR IGNORE" inserts."""
        with self._lock, _room():
            return self._database.execute(statement, values).rowcount > 0

    def close(self) -> None:
        with self._lock:
            self._database.close()


@contextlib.contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(f"the list of what is to be embedded cannot be kept beside the output ({error})") from error


class Spool:
    """Items, sorted by modality, in the order in which they came.

    Args:
        folder: where there is room for them.
        cut: modalities whose items are cut.
        accept: which items are taken; the others are passed over.

    Attributes:
        counts: items by modality.
    """

    def __init__(self, folder: Path, cut: Collection[str] = (), accept: Callable[[Item], bool] | None = None):
        self._cut, self._accept = frozenset(cut), accept
        self._tables = Tables(
            folder,
            f"CREATE TABLE items (rank INTEGER, seq INTEGER, {_COLUMNS}, PRIMARY KEY (rank, seq)) WITHOUT ROWID",
            "CREATE TABLE seen (key BLOB PRIMARY KEY, stamp TEXT) WITHOUT ROWID",
            "CREATE TABLE marks (key BLOB PRIMARY KEY) WITHOUT ROWID",
            "CREATE TABLE lines (number INTEGER PRIMARY KEY, line BLOB)",
            f"CREATE TABLE todo (number INTEGER PRIMARY KEY, {_COLUMNS})",
        )
        self.counts: dict[str, int] = {}
        self._numbers = itertools.count()
        self._todo = itertools.count()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self._tables.close()

    def __len__(self) -> int:
        return sum(self.counts.values())

    def extend(self, items: Iterable[Item]) -> None:
        """Adds items; one whose id is there already is left out."""
        rows = []
        for item in items if self._accept is None else filter(self._accept, items):
            if self._tables.new("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key(item.id), item.stamp)):
                self.counts[item.modality] = self.counts.get(item.modality, 0) + 1
                rows.append((_rank(item.modality), next(self._numbers), *_fields(item)))
        self._tables.fill("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def append(self, item: Item) -> None:
        self.extend([item])

    def stamp(self, name: str) -> str | None:
        """The stamp of the item of an id; None: there is none."""
        found = self._tables.run("SELECT stamp FROM seen WHERE key = ?", (key(name),))
        return found[0][0] if found else None

    def names(self) -> list[str]:
        """The modalities of the items, sorted."""
        return sorted(self.counts, key=_rank)

    def __iter__(self) -> Iterator[Item]:
        return itertools.chain.from_iterable(self.of(name) for name in self.names())

    def of(self, name: str) -> Iterator[Item]:
        """Those of a modality."""
        at = -1
        which = "rank = ? AND seq > ? AND modality = ?"
        select = f"SELECT seq, {_COLUMNS} FROM items WHERE {which} ORDER BY seq LIMIT {_AT_ONCE}"
        while rows := self._tables.run(select, (_rank(name), at, name)):
            for row in rows:
                yield _item(row[1:], self._cut)
            at = rows[-1][0]

    @property
    def marks(self) -> Marks:
        """A set of names."""
        return _Marks(self._tables)

    def keep(self, lines: Iterable[str]) -> Iterable[str]:
        """Lines that can be gone through more than once."""
        encoded = ((None, os.fsencode(line)) for line in lines)
        while some := list(itertools.islice(encoded, _AT_ONCE)):
            self._tables.fill("INSERT INTO lines VALUES (?, ?)", some)
        return _Lines(self._tables)

    def todo(self, items: Iterable[Item]) -> Todo:
        """A list of items of its own; filled at once."""
        numbered = ((next(self._todo), *_fields(item)) for item in items)
        first = last = None
        while rows := list(itertools.islice(numbered, _AT_ONCE)):
            self._tables.fill("INSERT INTO todo VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            first, last = rows[0][0] if first is None else first, rows[-1][0] + 1
        return Todo(self._tables, self._cut, first or 0, last or 0)


class _Marks:
    def __init__(self, tables: Tables):
        self._tables = tables

    def add(self, name: str) -> None:
        self._tables.run("INSERT OR IGNORE INTO marks VALUES (?)", (key(name),))

    def __contains__(self, name: object) -> bool:
        return bool(self._tables.run("SELECT 1 FROM marks WHERE key = ?", (key(str(name)),)))


class Chained:
    """Several lists as one that can be gone through more than once."""

    def __init__(self, *lists: Iterable[str]):
        self._lists = lists

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(*self._lists)


class _Lines:
    def __init__(self, tables: Tables):
        self._tables = tables

    def __iter__(self) -> Iterator[str]:
        at = 0
        select = f"SELECT number, line FROM lines WHERE number > ? ORDER BY number LIMIT {_AT_ONCE}"
        while rows := self._tables.run(select, (at,)):
            yield from (os.fsdecode(line) for _, line in rows)
            at = rows[-1][0]


class Todo(Sequence[Task]):
    """Items as tasks: `tasks[i]`, and `item(i)`."""

    def __init__(self, tables: Tables, cut: frozenset[str], first: int, last: int):
        self._tables, self._cut, self._first, self._count = tables, cut, first, last - first

    def __len__(self) -> int:
        return self._count

    def item(self, number: int) -> Item:
        select = f"SELECT {_COLUMNS} FROM todo WHERE number = ?"
        return _item(self._tables.run(select, (self._first + number,))[0], self._cut)

    def items(self, first: int, count: int) -> list[Item]:
        """Those from `first` on."""
        select = f"SELECT {_COLUMNS} FROM todo WHERE number >= ? AND number < ? ORDER BY number"
        begin = self._first + first
        return [_item(row, self._cut) for row in self._tables.run(select, (begin, begin + count))]

    def __getitem__(self, number: Any) -> Any:
        item = self.item(number)
        return Task(item.modality, item.path, item.data)


def _fields(item: Item) -> tuple[Any, ...]:
    data = None if item.data is None else pickle.dumps(item.data)  # read by this process alone
    return item.modality, item.id, item.path, item.stamp, item.text, data


def _item(row: Sequence[Any], cut: frozenset[str]) -> Item:
    modality, name, path, stamp, text, data = row
    return Item(name, modality, path, stamp, text, None if data is None else pickle.loads(data), modality in cut)
