"""Parsers of what benches take: their help fits a terminal and names the command by which the bench was called."""

from __future__ import annotations

import argparse
import contextlib
import re
import textwrap

INSTALLED = __name__.startswith("lbfast.")
"""Then a bench is run by `lbfast bench`, where a checkout also has `python -m bench.bench_...`."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with a bench's docstring: paragraphs, and commands that begin with `python -m`."""
    text = description or ""
    name = re.search(r"python -m bench\.bench_(\w+)", text)
    if INSTALLED:
        text = re.sub(r"python -m bench\.bench_(?=\w)", "lbfast bench ", text)
    prog = None if name is None else f"{'lbfast bench ' if INSTALLED else 'python -m bench.bench_'}{name[1]}"
    return argparse.ArgumentParser(prog, description=text, formatter_class=_Flowing)


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A number that is 0, for what takes the least, or more."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number of seconds from 0, got {text!r}")


class _Flowing(argparse.HelpFormatter):
    """Fills paragraphs; a line with a command stays one, what is said behind two spaces goes below it for want of room.

    Words that are wider than a line stay whole.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        shown = []
        for paragraph in re.split(r"\n\s*\n", text.strip()):
            lines = [line.strip() for line in paragraph.splitlines()]
            if re.match(r"python -m |lbfast ", lines[0]):
                shown.append("\n".join(_command(line, width) for line in lines))
            else:
                shown.append(_filled(" ".join(lines), width))
        return textwrap.indent("\n\n".join(shown), indent)


def _command(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    parts = re.split(r"\s{2,}", line, maxsplit=1)
    return "\n".join([_filled(parts[0], width, "    "), *(_filled(part, width, "    ", "    ") for part in parts[1:])])


def _filled(text: str, width: int, later: str = "", first: str = "") -> str:
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )
