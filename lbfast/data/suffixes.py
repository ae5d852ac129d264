"""Which modality a file's suffix stands for."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

MODALITY_NAMES = ("image", "video", "audio", "depth", "thermal")
LANGUAGE = "language"

_PICTURE = ("image", "depth", "thermal")
_BY_SUFFIX: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"), _PICTURE),
    **dict.fromkeys((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv"), ("video",)),
    **dict.fromkeys((".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aiff", ".wma"), ("audio",)),
    ".txt": (LANGUAGE,),
}


def suffixes_of(modality: str) -> tuple[str, ...]:
    """File suffixes that may hold a modality: (".wav", ".flac", ...)."""
    return tuple(suffix for suffix, modalities in _BY_SUFFIX.items() if modality in modalities)


def modality_of(path: str, available: Collection[str]) -> str | None:
    """The first modality of the suffix that is available, else the first; None for an unknown suffix."""
    candidates = _BY_SUFFIX.get(Path(path).suffix.lower(), ())
    return next((name for name in candidates if name in available), candidates[0] if candidates else None)
