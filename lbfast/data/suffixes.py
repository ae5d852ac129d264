"""Which modality a file's suffix stands for."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

MODALITY_NAMES = ("image", "video", "audio", "depth", "thermal")
LANGUAGE = "language"
ORDER = (*MODALITY_NAMES, LANGUAGE)
"""Rows are sorted by modality, in this order."""

_PICTURE = ("image", "depth", "thermal")
_PICTURES = (
    ".jpg .jpeg .png .webp .bmp .tif .tiff .avif .jpe .jfif .jp2 .j2k .jpx .ppm .pgm .pbm .pnm .dib .tga .qoi .ico"
)
_VIDEOS = (
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .ts .m2ts .mts .3gp .3g2 .ogv .asf .vob .mxf .divx .f4v .qt "
    ".m2v .mpe .mjpeg .mjpg .h264 .264 .hevc .h265 .265 .ivf .nut .apng"
)
_AUDIOS = (
    ".wav .flac .mp3 .ogg .opus .m4a .aac .aiff .wma .oga .aif .aifc .mka .weba .mp2 .m4b .caf .au .snd .amr .ac3 "
    ".eac3 .wv .tta .w64 .spx .ape .dts .3ga .wave .rf64 .voc"
)
_BY_SUFFIX: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_PICTURES.split(), _PICTURE),
    **dict.fromkeys(_VIDEOS.split(), ("video",)),
    **dict.fromkeys(_AUDIOS.split(), ("audio",)),
    ".gif": (*_PICTURE, "video"),
    ".txt": (LANGUAGE,),
}


def suffixes_of(modality: str) -> tuple[str, ...]:
    """File suffixes that may hold a modality: (".wav", ".flac", ...)."""
    return tuple(suffix for suffix, modalities in _BY_SUFFIX.items() if modality in modalities)


def modality_of(path: str, available: Collection[str]) -> str | None:
    """The first modality of the suffix that is available, else the first; None for an unknown suffix."""
    candidates = _BY_SUFFIX.get(Path(path).suffix.lower(), ())
    return next((name for name in candidates if name in available), candidates[0] if candidates else None)
