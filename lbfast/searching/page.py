"""A page of what was found, in one file that needs neither a server nor the network: pictures are part of it."""

from __future__ import annotations

import base64
import errno
import html
import io
import os
import warnings
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lbfast.data.suffixes import LANGUAGE, suffixes_of
from lbfast.messages import plain
from lbfast.processing.audio import AudioTransform, load_and_transform_audio
from lbfast.processing.image import open_image
from lbfast.processing.media import is_url
from lbfast.processing.threads import one_thread
from lbfast.processing.video import read_frames
from lbfast.searching.find import Found, Hit

SIDE = 240
"""Pixels of a picture's longer side."""
_LONGEST = 300  # characters of a caption

MARK = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="lbfast search">
"""
"""What a page begins with: only a file that does is one that another page may take the place of."""

_HEAD = """\
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lbfast search</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .8rem; display: flex; gap: .8rem; align-items: center; }
h2 img { height: 4.5rem; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 1rem; }
ol { grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }
li { border: 1px solid #8884; border-radius: .5rem; overflow: hidden; }
figure { margin: 0; }
.seen { height: 10rem; background: #8882; display: flex; align-items: center; justify-content: center; }
.seen img { max-width: 100%; max-height: 100%; }
.seen q, .seen span { padding: 0 .8rem; overflow-wrap: anywhere; max-height: 100%; overflow: hidden; }
.seen span { opacity: .6; }
figcaption { padding: .5rem .7rem; font-size: .85rem; overflow-wrap: anywhere; }
b { font-size: 1rem; }
</style></head><body>
<h1>lbfast search</h1>
"""


def check_place(out: Path, table: Path, queries: Iterable[Path] = ()) -> bool:
    """Whether a page is there already, which another may take the place of.

    Args:
        out: where a page is to be written: nothing is there, a page, or a pipe or terminal.
        table: the file or folder that is searched; queries: files that it is searched with.

    Raises:
        IsADirectoryError, NotADirectoryError, FileNotFoundError: it cannot be a file there. FileExistsError: it would
        take the place of something else, or lie among what is searched.
    """
    place, searched = Path(os.path.realpath(out)), Path(os.path.realpath(table))
    if place.is_dir():
        raise IsADirectoryError(errno.EISDIR, "html: expected the name of a file, got a folder", str(out))
    if not place.parent.is_dir():
        kind = NotADirectoryError if place.parent.exists() else FileNotFoundError
        raise kind(errno.ENOENT, "html: expected a file in a folder that is there", str(out))
    if place == searched or searched in place.parents:
        raise FileExistsError(errno.EEXIST, "html: expected a file that is not what is searched, nor in it", str(out))
    if place in {Path(os.path.realpath(query)) for query in queries}:
        raise FileExistsError(errno.EEXIST, "html: expected a file that is not searched with", str(out))
    if not place.exists() or place.is_char_device() or place.is_fifo():
        return False
    if place.is_file():
        with open(place, "rb") as file:
            if file.read(len(MARK)) == MARK.encode():
                return True
    raise FileExistsError(
        errno.EEXIST, "html: expected a new file, or a page of lbfast search to replace, got another file", str(out)
    )


def page(found: Sequence[Found], where: str) -> str:
    """The HTML. What names and files hold is shown, never obeyed.

    Args:
        where: what was searched.
    """
    parts = [MARK, _HEAD, f"<p>in {_text(where)}</p>\n"]
    for each in found:
        query = each.query
        shown = f"<q>{_text(query)}</q>" if isinstance(query, str) else _text(_name(query))
        picture = thumbnail(None, os.fspath(query)) if isinstance(query, os.PathLike) else None
        parts.append(f"<section><h2>{_image(picture) if picture else ''}<span>{shown}</span></h2>\n<ol>\n")
        parts += [_card(rank, hit) for rank, hit in enumerate(each.hits, start=1)]
        parts.append("</ol>\n" + ("" if each.hits else "<p>nothing found</p>\n") + "</section>\n")
    return "".join([*parts, "</body></html>\n"])


def _card(rank: int, hit: Hit) -> str:
    if hit.modality == LANGUAGE:
        caption = caption_of(hit)
        seen = f"<q>{_text(caption)}</q>" if caption else "<span>no such caption there</span>"
    else:
        picture = thumbnail(hit.modality, hit.path, hit.start_sec, hit.end_sec)
        seen = _image(picture) if picture else f"<span>{_text(hit.modality or 'no file')}: not to be seen here</span>"
    return (
        f'<li><figure><div class="seen">{seen}</div><figcaption>{rank}. <b>{hit.score:.3f}</b> '
        f"{_text(hit.modality)}<br>{_text(place_of(hit))}</figcaption></figure></li>\n"
    )


def _name(query: Any) -> str:
    return os.fspath(query) if isinstance(query, os.PathLike) else f"query of {type(query).__name__}"


def place_of(hit: Hit) -> str:
    """Where a hit is: the path, the caption's line, the seconds."""
    line = hit.id.rpartition("#")[2] if hit.modality == LANGUAGE and "#" in hit.id else ""
    part = "" if hit.start_sec is None else f" {hit.start_sec:g}-{'' if hit.end_sec is None else f'{hit.end_sec:g}'} s"
    return (hit.path or hit.id or f"row {hit.row}") + (f"#{line}" if line else "") + part


def caption_of(hit: Hit) -> str:
    """The line of a caption, as the file has it now; "" where it cannot be read, or is of no text file.

    A table is others' word for where a caption is: of what else there is on this machine it shows nothing.
    """
    line = hit.id.rpartition("#")[2]
    number = int(line) if line.isdecimal() and line.isascii() and len(line) < 10 else 0
    if not number or not hit.path.lower().endswith(suffixes_of(LANGUAGE)) or not os.path.isfile(hit.path):
        return ""
    try:
        with open(hit.path, encoding="utf-8-sig", errors="replace") as file:
            found = next(islice(iter(lambda: file.readline(1_000_000), ""), number - 1, None), "").strip()
    except OSError:
        return ""
    return found if len(found) <= _LONGEST else found[:_LONGEST] + "..."


def thumbnail(
    modality: str | None, path: str, start_sec: float | None = None, end_sec: float | None = None
) -> Image.Image | None:
    """A small picture of a file of this machine: a frame of a clip, a spectrogram of a sound. None: there is none.

    Args:
        modality: None: what its content turns out to be.
    """
    if not path or is_url(path) or not os.path.isfile(path):
        return None
    kinds = [modality.split("+")[0]] if modality else ["image", "video", "audio"]
    for kind in kinds:
        try:
            with warnings.catch_warnings(), one_thread():
                warnings.simplefilter("ignore")
                picture = _picture(kind, path, start_sec, end_sec)
        except Exception:  # whatever is wrong with the file, the page is of others too
            continue
        picture.thumbnail((SIDE, SIDE))
        return picture
    return None


def _picture(kind: str, path: str, start_sec: float | None, end_sec: float | None) -> Image.Image:
    if kind == "video":
        frames = read_frames(path, 3, start_sec or 0.0, end_sec)
        return Image.fromarray(frames[1].numpy())
    if kind == "audio":
        mels = load_and_transform_audio(path, AudioTransform())[1]  # (bins, time), of the middle
        return Image.fromarray(_grey(mels.flip(0))).resize((SIDE, SIDE // 2))
    picture = open_image(path)
    if picture.mode == "F" or picture.mode.startswith("I"):
        return Image.fromarray(_grey(torch.from_numpy(np.array(picture, dtype=np.float32))))
    return picture.convert("RGB")


def _grey(values: torch.Tensor) -> np.ndarray:
    """(H, W) of any range as uint8."""
    values = torch.nan_to_num(values.float())
    low, high = values.min(), values.max()
    return (255 * (values - low) / (high - low).clamp(min=1e-6)).to(torch.uint8).numpy()


def _image(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _text(given: object) -> str:
    return html.escape(plain(given))
