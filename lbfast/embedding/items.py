"""What is to be embedded: files and captions, each with its modality, in a fixed order."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TextIO

from lbfast.data.sample import Member
from lbfast.data.suffixes import LANGUAGE, ORDER, modality_of
from lbfast.data.tar import find as find_tar
from lbfast.embedding import places
from lbfast.processing.media import is_url, url_stamp

_QUERY = re.compile(r"[?#]|::")  # what may follow a URL's path

_NOT_ALLOWED = "a URL: allow_urls (--allow-urls) opens it"
_UNTOLD = "bytes that do not say what they are: give the table as MODALITY=TABLE"

LONGEST_CAPTION = 1_000_000
"""Characters of a line; what is longer is no file of captions, and may not fit into memory."""

MOST_SHARES = 1_000_000


@dataclass(frozen=True)
class Item:
    """A file, or a caption of a text file.

    Attributes:
        id: unique in a run, and the same in the next: "video:clips/a.mp4", "language:captions.txt#3".
        modality: one of ORDER.
        path: as given, or found below the folder given.
        stamp: changes with the content: size and time of a file, or a hash of the caption.
        text: the caption.
        data: where it is, if not in the file `path`; see `lbfast.data.decode.Lazy`.
        cut: it is embedded in parts, each a `Piece`.
    """

    id: str
    modality: str
    path: str
    stamp: str
    text: str | None = None
    data: Any = None
    cut: bool = False


@dataclass(frozen=True)
class Piece(Item):
    """A part of a recording: "video:a.mp4#10-20".

    Attributes:
        number: from 0.
        start_sec, end_sec: seconds.
        last: whether it is the last one of its file.
    """

    number: int = 0
    start_sec: float = 0.0
    end_sec: float = 0.0
    last: bool = False


def piece_of(item: Item, number: int, start: float, end: float, last: bool) -> Piece:
    """A part of an item that is cut."""
    name = f"{item.id}#{_seconds(start)}-{_seconds(end)}"
    return Piece(name, item.modality, item.path, item.stamp, None, None, False, number, start, end, last)


def mean_of(item: Item) -> Item:
    """The row of an item that is cut which is the mean of its parts."""
    return replace(item, cut=False)


def in_order(items: Iterable[Item]) -> list[Item]:
    """Sorted by modality; fused ones last."""
    return sorted(items, key=lambda item: ORDER.index(item.modality) if item.modality in ORDER else len(ORDER))


def share_of(given: str) -> Callable[[str], bool]:
    """Which names are in a share: "2/5", the second of five, by a hash. ValueError."""
    number, _, count = given.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) <= MOST_SHARES):
        raise ValueError(f"shard: expected I/N with I from 1 to N, as 2/5, got {given!r}")

    def is_in(name: str) -> bool:
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % int(count) == int(number) - 1

    return is_in


def _seconds(at: float) -> str:
    """Of a time, to the millisecond: "10", "1.5"."""
    return f"{at:.3f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Failure:
    """A file that is not embedded, and why."""

    path: str
    reason: str


class Items(Protocol):
    """Where a listing goes: a list, or something that holds more."""

    def append(self, item: Item, /) -> None: ...

    def extend(self, items: Iterable[Item], /) -> None: ...

    def __iter__(self) -> Iterator[Item]: ...

    def __len__(self) -> int: ...


class Marks(Protocol):
    """Names that were met: a set, or something that holds more."""

    def add(self, name: str, /) -> None: ...

    def __contains__(self, name: object, /) -> bool: ...


@dataclass
class Listing:
    """What `find_items` found.

    Attributes:
        items: sorted by modality; within one, in the order given, folders by name.
        failures: inputs, and what is in them, that cannot be listed or embedded.
        ignored: what folders held besides, counted by reason.
    """

    items: Items = field(default_factory=list[Item])
    failures: list[Failure] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)


def url_path(path: str) -> str:
    """A URL without what may follow its path; any other path as it is."""
    return _QUERY.split(path)[0] if is_url(path) else path


def split_modality(given: str) -> tuple[str | None, str]:
    """ "depth=maps/" -> ("depth", "maps/"); what does not begin with a modality and "=", or is there, is left whole."""
    modality, equals, rest = given.partition("=")
    return (modality, rest) if equals and modality in ORDER and not os.path.lexists(given) else (None, given)


def find_items(
    inputs: Iterable[str | os.PathLike[str]],
    available: Collection[str],
    modality: str | None,
    allow_urls: bool = False,
    column: str | None = None,
    into: Items | None = None,
    marks: Marks | None = None,
) -> Listing:
    """Lists the files and captions to embed.

    The modality of a file is the one that its input names ("depth=maps/"), else `modality`, else that of its suffix:
    pictures are images, or depth maps or thermal pictures where only such a model is available. A file that one input
    names a modality for is not guessed at in another. A folder's files of other types, of modalities that are not
    available, and hidden ones are ignored; files given by name fail instead.

    A tar stands for the files in it, its name for their folder. A table (parquet, csv, tsv, jsonl), or a folder that
    Hugging Face's `save_to_disk` made, stands for what a column holds: paths, relative to the table's folder, or bytes
    of files, "image:table.parquet#3" in row 3, captions where its modality is language. In folders neither is opened.

    Args:
        inputs: files, folders, tables, tars, and URLs of files, of folders (ending with a slash) or with an asterisk,
            each optionally as MODALITY=PATH.
        available: modalities that there is a model for; language always is.
        modality: of every file whose input names none.
        allow_urls: list URLs; else they fail.
        column: of tables; None: the one of bytes, or `path`.
        into: where the items go, which keeps them sorted; None: a list.
        marks: what remembers the files that are in it; None: a set.

    Raises:
        ValueError: `modality` is unknown or not available. ImportError: fsspec, which opens URLs, is not installed.
    """
    available = {*available, LANGUAGE}
    if modality is not None and modality not in available:
        raise ValueError(
            f"modality: expected one that there is a model for ({', '.join(sorted(available))}), got {modality!r}"
        )
    finder = _Finder(available, allow_urls, column, Listing() if into is None else Listing(into), marks)
    for named in (True, False):  # those with a modality of their own first
        for own, path in (split_modality(os.fspath(given)) for given in inputs):
            if (own is not None) == named:
                finder.add(path, own or modality, named)
    if into is None:
        finder.listing.items = in_order(finder.listing.items)
    return finder.listing


class _Finder:
    """A listing in the making, and the files that are in it already."""

    def __init__(
        self, available: Collection[str], allow_urls: bool, column: str | None, listing: Listing, marks: Marks | None
    ):
        self.listing = listing
        self._marks: Marks = set() if marks is None else marks
        self._available, self._allow_urls, self._column = available, allow_urls, column
        media = [name for name in available if name != LANGUAGE]
        self._only = media[0] if len(media) == 1 else None

    def add(self, path: str, wanted: str | None, named: bool) -> None:
        """Adds a file, or the files of a folder. `named`: the input itself says that they are `wanted`."""
        if wanted is not None and wanted not in self._available:
            self._fail(path, f"no model for {wanted}")
        elif os.path.isdir(path):
            self._add_folder(path, wanted, named)
        elif is_url(path) and self._allow_urls and places.lists_files(path):
            self._add_urls(path, wanted, named)
        elif places.is_table(path) and os.path.isfile(path):
            self._add_table(path, wanted, named)
        elif url_path(path).lower().endswith(".tar") and (os.path.isfile(path) or is_url(path)):
            self._add_tar(path, wanted)
        else:
            self._add_alone(path, wanted, named)

    def _add_alone(self, path: str, wanted: str | None, named: bool) -> None:
        found = wanted or modality_of(url_path(path), self._available)
        if found is not None and found in self._available:
            self._add_file(path, found, named)
        elif not is_url(path) and not os.path.lexists(path):
            self._fail(path, os.strerror(errno.ENOENT))
        else:
            self._fail(path, _why_not(path, found))

    def _add_urls(self, url: str, wanted: str | None, named: bool) -> None:
        try:
            files = places.url_files(url)
        except OSError as error:
            self._fail(url, str(error))
            return
        if not files:
            self._fail(url, "a URL that lists no files")
        for file in files:
            self._add_listed(file, wanted, named)

    def _add_table(self, table: str, wanted: str | None, named: bool) -> None:
        stamp = _stamp(os.stat(table))
        try:
            for row in places.rows_of(table, self._column):
                try:
                    self._add_row(table, stamp, row, wanted, named)
                except UnicodeError:
                    self._fail(f"{table}#{row.number}", "the text is not UTF-8")
                except (ValueError, OSError) as error:
                    self._fail(f"{table}#{row.number}", str(error))
        except (ValueError, OSError) as error:
            self._fail(table, str(error))

    def _add_row(self, table: str, stamp: str, row: places.Row, wanted: str | None, named: bool) -> None:
        name = f"{table}#{row.number}"
        if row.cell is not None:
            was = row.cell.name or ""
            found = wanted or row.modality or modality_of(was, self._available) or self._only
            if found is None or found == LANGUAGE or found not in self._available:
                self._fail(name, _why_not(was or name, found) if found else _UNTOLD)
            else:
                self.listing.items.append(Item(f"{found}:{name}", found, name, stamp, data=row.cell))
        elif row.error is not None:
            self._fail(name, row.error)
        elif row.text is None or not row.text.strip():
            self._ignore("an empty row of a table")
        elif wanted == LANGUAGE:
            self.listing.items.append(_caption(name, table, row.text.strip()))
        else:
            self._add_alone(places.beside(table, row.text), wanted, named)

    def _add_tar(self, tar: str, wanted: str | None) -> None:
        mark = f"{wanted or ''}={tar if is_url(tar) else os.path.abspath(tar)}/"
        if not self._is_new(mark):
            return
        broken = dict[str, str]()
        if is_url(tar) and not self._allow_urls:
            self._fail(tar, _NOT_ALLOWED)
            return
        try:
            found_tar = find_tar(tar)
            stamp = _stamp(os.stat(tar)) if isinstance(found_tar, str) else f"url:{found_tar.size}:{found_tar.version}"
            for member in places.tar_files(found_tar, broken):
                name = os.fspath(member)
                if not self._is_new(f"{mark}/{member.name}"):
                    self._fail(name, "the tar has two members of this name; the first is used")
                    continue
                found = self._modality_of(name, wanted)
                if found == LANGUAGE:
                    self._add_captions_of(member, name)
                elif found in self._available:
                    own = f"{stamp}:{member.offset}:{member.size}"
                    self.listing.items.append(Item(f"{found}:{name}", str(found), name, own, data=member))
                else:
                    self._ignore(_why_not(name, found))
        except (ValueError, OSError) as error:
            self._fail(tar, str(error))
        for name, why in broken.items():
            self._fail(name, why)

    def _add_captions_of(self, member: Member, name: str) -> None:
        try:
            with member.opened() as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as file:
                self.listing.items.extend(_captions(name, file))
        except UnicodeDecodeError:
            self._fail(name, "the text is not UTF-8")
        except (OSError, ValueError) as error:
            self._fail(name, str(error))

    def _is_new(self, mark: str) -> bool:
        """Whether it was not met before; now it is."""
        if mark in self._marks:
            return False
        self._marks.add(mark)
        return True

    def _fail(self, path: str, reason: str) -> None:
        self.listing.failures.append(Failure(_shown(path), reason))

    def _add_folder(self, folder: str, wanted: str | None, named: bool) -> None:
        def unreadable(error: OSError) -> None:
            self._fail(str(error.filename or folder), error.strerror or str(error))

        try:
            files = places.dataset_files(folder)
        except (ValueError, OSError) as error:
            self._fail(folder, str(error))
            return
        for table in files or ():
            self._add_table(table, wanted, named)
        for path in _walk(folder, unreadable) if files is None else ():
            self._add_listed(path, wanted, named)

    def _add_listed(self, path: str, wanted: str | None, named: bool) -> None:
        """A file that was not given by name."""
        found = self._modality_of(url_path(path), wanted)
        if found is not None and found in self._available:
            self._add_file(path, found, named)
        else:
            self._ignore(_why_not(path, found))

    def _modality_of(self, path: str, wanted: str | None) -> str | None:
        found = modality_of(path, self._available)
        if wanted is not None and found is not None:
            found = wanted if (found == LANGUAGE) == (wanted == LANGUAGE) else None
        return found

    def _ignore(self, reason: str) -> None:
        self.listing.ignored[reason] = self.listing.ignored.get(reason, 0) + 1

    def _add_file(self, path: str, modality: str, named: bool) -> None:
        where = path if is_url(path) else os.path.abspath(path)
        mark, of_a_name = f"{modality}={where}", f"={where}"
        if mark in self._marks or (not named and of_a_name in self._marks):
            return
        self._marks.add(mark)
        if named:
            self._marks.add(of_a_name)
        try:
            path.encode()
            if is_url(path):
                items = [self._remote(path, modality)]
            else:
                status = os.stat(path)
                if modality == LANGUAGE:
                    with _opened(path) as file:
                        items = _captions(path, file)
                else:
                    items = [Item(f"{modality}:{path}", modality, path, _stamp(status))]
        except UnicodeError as error:
            reason = "the text is not UTF-8" if isinstance(error, UnicodeDecodeError) else "the name is not UTF-8"
            self._fail(path, reason)
            return
        except (OSError, ValueError) as error:  # the latter of a name with NUL
            self._fail(path, getattr(error, "strerror", None) or str(error))
            return
        if not items:
            self._fail(path, "no captions: expected one a line")
        self.listing.items.extend(items)

    def _remote(self, url: str, modality: str) -> Item:
        if modality == LANGUAGE:
            raise OSError("a URL: captions are read from local files")
        if not self._allow_urls:
            raise OSError(_NOT_ALLOWED)
        return Item(f"{modality}:{url}", modality, url, f"url:{url_stamp(url)}")


def _walk(folder: str, on_error: Callable[[OSError], None]) -> Iterator[str]:
    for parent, folders, files in os.walk(folder, onerror=on_error):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in sorted(files) if not name.startswith("."))


def _why_not(path: str, found: str | None) -> str:
    if found is None:
        return f"unknown type {Path(path).suffix or '(no suffix)'}"
    return f"no model for {found}"


def _shown(path: str) -> str:
    """A name as text that can be printed and written."""
    try:
        return path.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:
        return path.encode(errors="backslashreplace").decode()


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size}:{status.st_mtime_ns}"


def _captions(path: str, file: TextIO) -> list[Item]:
    """One caption a line; empty lines are passed over, line numbers count from 1."""
    items: list[Item] = []
    number = 0
    while line := file.readline(LONGEST_CAPTION + 1):
        number += 1
        if len(line.rstrip("\n")) > LONGEST_CAPTION:
            raise OSError(f"line {number}: expected a caption of at most {LONGEST_CAPTION:,} characters")
        if text := line.strip():
            items.append(_caption(f"{path}#{number}", path, text))
    return items


def _caption(name: str, path: str, text: str) -> Item:
    stamp = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Item(f"{LANGUAGE}:{name}", LANGUAGE, path, stamp, text)


def _opened(path: str) -> TextIO:
    """A regular file of UTF-8, which is not waited for: pipes, and some files of /proc, may never say anything."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"not a regular file: {path}")
    return open(handle, encoding="utf-8-sig")
