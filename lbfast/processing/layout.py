"""Which axis of an array is which: told by `layout`, else by sizes, and refused where sizes leave two readings."""

from __future__ import annotations

from collections.abc import Sequence

from lbfast.processing.media import MediaError

_SMALLEST = 4  # pixels; sides below are those of no picture, where another reading has larger ones


def resolve(
    source: str, shape: Sequence[int], layouts: Sequence[str], channels: Sequence[int], asked: str | None
) -> str:
    """The layout of an array: one letter an axis, C for colours, H and W for the picture's sides, T for time.

    Args:
        source: what the array is, for errors.
        shape: of the array.
        layouts: those that an array of this modality may have, of any number of axes.
        channels: numbers of colours.
        asked: the layout that the caller names, or None: the one that fits. A picture's sides of fewer than 4 pixels
            fit where no other layout has larger ones.

    Raises:
        ValueError: `asked` is none of `layouts`.
        MediaError: no layout fits, or more than one does.
    """
    if asked is not None and asked not in layouts:
        raise ValueError(f"layout: expected one of {', '.join(layouts)}, got {asked!r}")
    shape = tuple(shape)
    expected = " or ".join(map(_written, layouts if asked is None else [asked]))
    expected += f" with C of {' or '.join(map(str, channels))}"
    fitting = [
        layout
        for layout in layouts
        if len(layout) == len(shape) and asked in (None, layout) and _colours(layout, shape) in (None, *channels)
    ]
    if not fitting or 0 in shape:
        raise MediaError(source, expected, f"shape {shape}")
    if len(fitting) > 1:
        pictures = [layout for layout in fitting if min(_sides(layout, shape)) >= _SMALLEST]
        fitting = pictures if len(pictures) == 1 else fitting
    if len(fitting) > 1:
        readings = " and ".join(f"{_written(layout)} of {_counted(layout, shape)}" for layout in fitting)
        raise MediaError(source, "a shape that can be read in one way", f"{shape}: {readings}; layout= chooses")
    return fitting[0]


def axes(layout: str, order: str) -> list[int]:
    """Where each letter of `order` is in `layout`: what `permute` takes."""
    return [layout.index(letter) for letter in order]


def _written(layout: str) -> str:
    return f"({', '.join(layout)})"


def _colours(layout: str, shape: Sequence[int]) -> int | None:
    return shape[layout.index("C")] if "C" in layout else None


def _sides(layout: str, shape: Sequence[int]) -> tuple[int, int]:
    return shape[layout.index("H")], shape[layout.index("W")]


def _counted(layout: str, shape: Sequence[int]) -> str:
    height, width = _sides(layout, shape)
    frames = f"{shape[layout.index('T')]} frames of " if "T" in layout else ""
    return f"{frames}{height} x {width} pixels"
