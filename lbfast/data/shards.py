"""Shards as webdataset writes them: uncompressed tars whose members of one basename are a sample, read by offset."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from lbfast.data import tar
from lbfast.data.sample import Member, Sample

_TEXT = ("txt", "json")


class Shard:
    """The samples of one tar, indexed once: only headers are read, and what is between them is passed over.

    A sample is what members named "KEY.SUFFIX" have together: media, and a txt or json (or both) with captions. As
    webdataset has it, the key ends at the first dot of the file name; where dots are part of the names ("clip_0.5.jpg")
    several samples fall together so, of which one is read and the others are put down in `skipped`: `split="last"`
    reads them all. A tar that breaks off, or has a broken header, gives the samples that are whole before it.

    Args:
        file: an uncompressed tar, or the URL of one.
        suffixes: of the media that are wanted, such as (".jpg", ".png"), in order of preference where a sample has
            several.
        captions: whether samples need a txt or json.
        split: at which dot of a name its key ends, "first" or "last".

    Attributes:
        skipped: what is lost -> why: members or samples as "TAR/NAME", the rest of a broken tar as "TAR".

    Raises:
        FileNotFoundError: no such file. ValueError: compressed; another `split`.
    """

    def __init__(
        self, file: str | os.PathLike[str], suffixes: Collection[str], captions: bool = True, split: str = "first"
    ):
        if split not in ("first", "last"):
            raise ValueError(f"split: expected 'first' or 'last', got {split!r}")
        self.file = os.fspath(file)
        self._tar = tar.find(self.file)
        self.skipped: dict[str, str] = {}
        self._collect([suffix.lower().lstrip(".") for suffix in suffixes], captions, split)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int, /) -> Sample:
        key = self._keys[index].as_py()
        parts = self._parts[index]  # [3, 3]: media, txt, json; each suffix number, offset, size

        def member(part: np.ndarray) -> Member:
            number, offset, size = part.tolist()
            return Member(self._tar, f"{key}.{self._suffixes[number]}", offset, size)

        texts = tuple(member(part) for part in parts[1:] if part[0] >= 0)
        return Sample(f"{self.file}/{key}", member(parts[0]), members=texts)

    def fingerprint(self) -> str:
        """Changes with the keys of the samples, and the names, places and sizes of their members."""
        key = hashlib.sha256(repr(self._suffixes).encode() + self._parts.tobytes())
        for name in self._keys:
            key.update(name.as_buffer())
            key.update(b"\0")
        return key.hexdigest()

    def _collect(self, wanted: list[str], captions: bool, split: str) -> None:
        import pyarrow as pa

        suffixes: dict[str, int] = {}
        groups: dict[str, dict[str, tuple[int, int]]] = {}
        for name, offset, size in self._members(wanted):
            key, suffix = _split(name, split)
            group = groups.setdefault(key, {})
            if suffix in group:
                self.skipped[f"{self.file}/{name}"] = "the tar has two members of this name; the first is used"
            else:
                group[suffix] = (offset, size)
        keys: list[str] = []
        parts: list[list[tuple[int, int, int]]] = []
        known: dict[tuple[str, ...], _Roles] = {}  # by the suffixes of a sample
        for key, group in groups.items():
            roles = known.get(tuple(group)) or known.setdefault(tuple(group), _roles(tuple(group), wanted))
            if roles.media is None:
                self.skipped[f"{self.file}/{key}"] = f"no media: it has {', '.join(group)} only"
                continue
            for suffix in roles.lost:
                self.skipped[f"{self.file}/{key}.{suffix}"] = (
                    f"of the sample {key} {roles.media} is read (if dots are part of the names: split='last')"
                )
            if captions and roles.texts == (None, None):
                self.skipped[f"{self.file}/{key}"] = f"no caption: it has {', '.join(group)}, neither txt nor json"
                continue
            keys.append(key)
            parts.append(
                [
                    (-1, 0, 0) if s is None else (suffixes.setdefault(s, len(suffixes)), *group[s])
                    for s in (roles.media, *roles.texts)
                ]
            )
        self._keys = pa.array(keys, pa.large_string())
        self._parts = np.array(parts, dtype=np.int64).reshape(-1, 3, 3)
        self._suffixes = list(suffixes)

    def _members(self, wanted: list[str]) -> Iterator[tuple[str, int, int]]:
        """(name, offset, size) of the members that are whole; hidden ones are passed over, links put down if wanted."""
        others: dict[str, str] = {}
        try:
            for name, offset, size in tar.members(self._tar, others):
                if not name.rpartition("/")[2].startswith("."):
                    yield name, offset, size
        except tar.BrokenTarError as error:
            self.skipped[self.file] = f"{error}; what follows is lost"
        last = {_last(suffix) for suffix in (*wanted, *_TEXT)}
        for name, kind in others.items():
            if _last(name.rpartition("/")[2]) in last:
                self.skipped[f"{self.file}/{name}"] = f"{kind}, which holds no data that is read here"


@dataclass(frozen=True)
class _Roles:
    """Which suffixes of a sample are what; `lost`: those that look like the parts of another sample."""

    media: str | None
    texts: tuple[str | None, str | None]
    lost: tuple[str, ...] = ()


def _split(name: str, split: str) -> tuple[str, str]:
    """ "a/b.seg.png" -> ("a/b", "seg.png"), or ("a/b.seg", "png")."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".") if split == "first" or "." not in base else base.rpartition(".")
    return folder + slash + stem, suffix


def _last(suffix: str) -> str:
    return suffix.rpartition(".")[2].lower()


def _before(suffix: str) -> str:
    """ "seg" of "seg.png"; "" of "png"."""
    return suffix.rpartition(".")[0]


def _is_name(before: str) -> bool:
    """Whether it names a part of a sample, as "seg" or "depth" do; "5" and "2_0001" are pieces of other keys."""
    return re.fullmatch(r"[A-Za-z_.-]*", before) is not None


def _roles(group: tuple[str, ...], wanted: list[str]) -> _Roles:
    media = _choose(group, wanted)
    if media is None:
        return _Roles(None, (None, None))
    own, asked = _before(media), media.lower() in wanted
    near = [s for s in group if _before(s) in ("", own) or (_is_name(_before(s)) and _is_name(own))]
    texts = (_choose(near, ["txt"]), _choose(near, ["json"]))
    media_kinds = {_last(suffix) for suffix in wanted}
    captioned = {_before(s) for s in group if _last(s) in _TEXT}
    lost = tuple(
        s
        for s in group
        if s not in (media, *texts)
        and _before(s) not in ("", own)
        and (_last(s) in media_kinds or _last(s) in _TEXT)
        and (not _is_name(_before(s)) or not asked or _before(s) in captioned)
    )
    return _Roles(media, texts, lost)


def _choose(group: Collection[str], wanted: list[str]) -> str | None:
    """Of a sample's suffixes, the first that is wanted: as a whole ("depth.png"), else by its last part ("png")."""
    for want in wanted:
        for suffix in group:
            if suffix.lower() == want:
                return suffix
    return next((s for s in group if s.rpartition(".")[2].lower() in wanted), None)


def expand_braces(pattern: str) -> list[str]:
    """ "a-{00..02}.tar" -> a-00.tar, a-01.tar, a-02.tar; "{x,y}.tar" -> x.tar, y.tar. Without braces, itself."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    inside, head, tail = found[1], pattern[: found.start()], pattern[found.end() :]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span is None and "," not in inside:
        return [head + found[0] + rest for rest in expand_braces(tail)]
    if span is None:
        choices = inside.split(",")
    else:
        first, last = int(span[1]), int(span[2])
        if last < first:
            raise ValueError(f"data: expected {{FIRST..LAST}} with FIRST <= LAST, got {found[0]} in {pattern}")
        choices = [str(number).zfill(len(span[1])) for number in range(first, last + 1)]
    return [name for choice in choices for name in expand_braces(head + choice + tail)]
