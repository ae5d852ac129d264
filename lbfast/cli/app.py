"""The application, and how its commands speak: errors a user can mend are one line on stderr.

A terminal breaks long lines where it ends, within a word or a path: what is printed there is broken between them.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.text import Text

import lbfast
from lbfast.messages import plain
from lbfast.signals import Signals

app = typer.Typer(
    help="LanguageBind, faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class Lines(Console):
    """A console whose lines are broken between words on a terminal, and nowhere else."""

    def render_str(self, text: str, **options: Any) -> Text:
        made = super().render_str(text, **options)
        return between_words(made, self.width) if self.file.isatty() else made


def between_words(text: Text, width: int) -> Text:
    """`text` with line breaks instead of spaces where a line would be wider than `width` cells.

    A word that is wider than a line is left to the terminal, which copies it as one.
    """
    lines: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        cuts, column = [], 0
        for word in re.finditer(r"^\s+|\S+\s*", line.plain):
            cells = cell_len(word[0].rstrip())
            if column and cells <= width < column + cells:
                cuts.append(word.start())
                column = 0
            column += cells
            column = column if column <= width else (column - 1) % width + 1  # where the terminal has broken it
            column += cell_len(word[0]) - cells
        pieces = line.divide(cuts)
        for piece in pieces[:-1]:
            piece.rstrip()
        lines += pieces
    return Text("\n").join(lines)


errors = Lines(stderr=True, soft_wrap=True)


def say(line: str) -> None:
    """A line on stdout, as it is; on a terminal broken between words."""
    if sys.stdout.isatty():
        Lines(soft_wrap=True).print(line, markup=False, highlight=False, emoji=False)
    else:
        typer.echo(line)


def say_if_compiling() -> None:
    from lbfast import native

    if native.will_compile():
        errors.print("compiling the native CPU kernels, once for each version: this takes a minute")


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """What a user can mend is one line on stderr and exit status 1; the rest is a fault of ours, with its traceback.

    A warning is a line there too, without the place in our sources.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warned
            yield
    except typer.Exit:  # a RuntimeError to Python
        raise
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (the reader of a pipe left; nothing more can be said there)
        raise typer.Exit(1) from None
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        Signals.check()  # then it is not the error's to say
        errors.print(f"[bold red]error:[/] {escape(plain(_message(error)))}")
        raise typer.Exit(1) from error


def _warned(message: Warning | str, *_: Any, **__: Any) -> None:
    errors.print(f"[yellow]warning:[/] {escape(plain(message))}", highlight=False)


def _message(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lbfast {lbfast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
