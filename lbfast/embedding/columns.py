"""Batches as engines hand them over, columns by name, and what each row of them asks for."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lbfast.data.decode import Task, Undecodable
from lbfast.data.suffixes import LANGUAGE, MODALITY_NAMES, modality_of
from lbfast.embedding.items import LONGEST_CAPTION, url_path
from lbfast.messages import shown
from lbfast.processing.media import is_url

CONTENT = ("data", "bytes", "path", "text")
"""Columns that say what is to be embedded; of a row the first that is not None."""
HEAVY = ("data", "bytes")
"""Those that hold it themselves."""

Columns = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """What a row asks for: a file or data to decode, or a text; or why not.

    Attributes:
        modality: None where it cannot be told.
    """

    modality: str | None
    task: Task | None = None
    text: str | None = None
    error: str | None = None


def checked(batch: Any) -> tuple[Columns, int]:
    """The columns of a batch as they are, and how many rows they have. TypeError, ValueError: it is none."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch: expected a dict of columns, got {type(batch).__name__}")
    lengths = {}
    for name, column in batch.items():
        if isinstance(column, str | bytes | Mapping | Set) or not hasattr(column, "__len__"):
            raise TypeError(f"batch[{name!r}]: expected a column, a value for each row, got {type(column).__name__}")
        lengths[name] = len(column)
    if not set(lengths) & set(CONTENT):
        raise ValueError(
            f"batch: expected a column of {', '.join(CONTENT)}, got {', '.join(map(str, batch)) or 'none'}"
        )
    if len(set(lengths.values())) > 1:
        raise ValueError(f"batch: expected columns of one length, got {lengths}")
    return dict(batch), next(iter(lengths.values()))


def rows_of(batch: Columns, count: int, available: Collection[str]) -> list[Row]:
    """What the rows ask for; `available`: the modalities that there is a model for."""
    names = [*CONTENT, "modality", "start_sec", "end_sec"]
    columns = {name: present(batch[name]) for name in names if name in batch}
    return [_row({name: values[i] for name, values in columns.items()}, available) for i in range(count)]


def present(column: Iterable[Any]) -> list[Any]:
    """The values of a column, as Python's own where they are scalars; None for what stands for nothing in a table."""
    return [_present(value) for value in column]


def _present(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if type(value).__module__.startswith("pyarrow"):
        value = value.as_py()
    return None if isinstance(value, float) and math.isnan(value) else value


def _row(values: Mapping[str, Any], available: Collection[str]) -> Row:
    modality = values.get("modality")
    known = isinstance(modality, str) and modality in (*MODALITY_NAMES, LANGUAGE)
    if modality is not None and (not known or modality not in (*available, LANGUAGE)):
        there = ", ".join([*available, LANGUAGE])
        return Row(
            modality if known else None,
            error=f"modality: expected one that there is a model for ({there}), got {shown(modality)}",
        )
    given = ("text",) if modality == LANGUAGE else CONTENT
    kind = next((name for name in given if values.get(name) is not None), None)
    if kind is None:
        return Row(modality, error=f"expected {' or '.join(given)}, got none")
    if kind == "text":
        if modality not in (None, LANGUAGE):
            return Row(modality, error=f"expected {', '.join(CONTENT[:-1])} of modality {modality}, got a text")
        wrong = wrong_text(values["text"])
        return Row(LANGUAGE, error=wrong) if wrong else Row(LANGUAGE, text=values["text"])
    part = {name: values.get(name) for name in ("start_sec", "end_sec")}
    wrong = _wrong_value(kind, values) or _wrong_part(**part)
    path = os.fspath(values["path"]) if values.get("path") is not None and not wrong else ""
    found = modality or _modality_of(kind, values[kind], path, available)
    if wrong or isinstance(found, Undecodable):
        return Row(modality, error=wrong or found.reason)  # type: ignore[union-attr]
    return Row(found, Task(found, path, None if kind == "path" else values[kind], **part))


def _wrong_value(kind: str, values: Mapping[str, Any]) -> str:
    """Why what a row names is nothing to read; "" where it may be."""
    path, data = values.get("path"), values[kind]
    if path is not None and not isinstance(path, str | os.PathLike):
        return f"path: expected a string, got {type(path).__name__}"
    if path is not None and "\0" in os.fspath(path):
        return "path: expected the name of a file, got one with a null character"
    if kind == "bytes" and not isinstance(data, bytes | bytearray | memoryview):
        return f"bytes: expected the bytes of a file, got {type(data).__name__}"
    return ""


def _wrong_part(start_sec: Any, end_sec: Any) -> str:
    for name, value in (("start_sec", start_sec), ("end_sec", end_sec)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e12
        ):
            return f"{name}: expected seconds of at least 0, got {shown(value)}"
    if end_sec is not None and end_sec <= (start_sec or 0):
        return f"end_sec: expected more than start_sec, {start_sec or 0:g}, got {end_sec:g}"
    return ""


def wrong_text(text: Any) -> str:
    """Why something is no text to embed; "" where it is."""
    if not isinstance(text, str):
        return f"text: expected a string, got {type(text).__name__}"
    if len(text) > LONGEST_CAPTION:
        return f"text: expected at most {LONGEST_CAPTION:,} characters, got {len(text):,}"
    try:
        text.encode()
    except UnicodeError:
        return "text: expected Unicode, got half of a surrogate pair"
    return ""


def _modality_of(kind: str, value: Any, path: str, available: Collection[str]) -> str | Undecodable:
    """The modality of a row that names none."""
    found = modality_of(url_path(path), available) if path else None
    if found is None and kind != "path":
        found = next(iter(available)) if len(available) == 1 else _modality_of_data(value, available)
    if found is not None and found in available:
        return found
    if found is not None:
        why = "a text file: its captions are rows with a text" if found == LANGUAGE else f"no model for {found}"
        return Undecodable(f"{path}: {why}" if path else why)
    where = f"{path}: " if path else ""
    return Undecodable(f"{where}modality: expected one of {', '.join(available)}: it cannot be told from {kind}")


def _modality_of_data(value: Any, available: Collection[str]) -> str | None:
    """Of what is in memory: pictures and sounds with their rate are told apart, arrays and encoded files are not."""
    if isinstance(value, Image.Image):
        return modality_of("a.png", available)
    if isinstance(value, Mapping):
        if value.get("array") is not None:
            return "audio"
        return modality_of(url_path(str(value["path"])), available) if value.get("path") else None
    pair = isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[1], numbers.Real)
    return "audio" if pair else None


def column(values: Sequence[Any]) -> np.ndarray:
    """(n,) of objects, whatever they are."""
    made = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        made[i] = value
    return made


def columns_of(items: Sequence[Any], modality: str | None) -> Columns:
    """Files, bytes, data and texts in one list -> columns. A string is a file where it names one or looks as if."""
    rows = [_content(item, modality) for item in items]
    made: Columns = {name: column([value if kind == name else None for kind, value in rows]) for name in CONTENT}
    made["modality"] = column([modality] * len(rows))
    return made


def _content(item: Any, modality: str | None) -> tuple[str, Any]:
    if isinstance(item, str) and modality is None:
        return ("path" if looks_like_a_file(item) else "text"), item
    if isinstance(item, str):
        return ("text" if modality == LANGUAGE else "path"), item
    if isinstance(item, os.PathLike):
        return "path", item
    return ("bytes" if isinstance(item, bytes | bytearray | memoryview) else "data"), item


def looks_like_a_file(text: str) -> bool:
    """Whether a string is meant as a file: a URL, what ends in a suffix of one, or the name of one that is there."""
    if is_url(text) or modality_of(url_path(text), ()) is not None:
        return True
    try:
        return os.path.isfile(text)
    except ValueError:  # a null character
        return False
