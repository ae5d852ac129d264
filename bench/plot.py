"""Bars as SVG, the same bytes each time: a picture that a test can compare."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, LABEL, BAR, LINE = 860, 330, 380, 20  # pixels
OURS, THEIRS = "#1f6f8b", "#b9bec6"


def bars(title: str, groups: Sequence[tuple[str, Sequence[tuple[str, float, bool]]]], unit: str) -> str:
    """A bar for each (label, value, ours) of each named group; lengths are relative within a group."""
    lines, y = [], 30
    for name, items in groups:
        longest = max((value for _, value, _ in items), default=0) or 1.0
        lines.append(_text(10, y + 14, name, weight="bold"))
        y += LINE
        for label, value, ours in items:
            length = round(BAR * value / longest, 1)
            lines.append(_text(LABEL - 8, y + 14, label, anchor="end"))
            colour = OURS if ours else THEIRS
            lines.append(f'<rect x="{LABEL}" y="{y + 3}" width="{length}" height="{LINE - 6}" fill="{colour}"/>')
            lines.append(_text(LABEL + length + 6, y + 14, f"{value:.4g} {unit}"))
            y += LINE
        y += LINE // 2
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" font-family="sans-serif" font-size="12">'
    )
    back = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, back, _text(10, 18, title, weight="bold"), *lines, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
