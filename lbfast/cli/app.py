"""The application, and how its commands speak: errors a user can mend are one line on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from enum import Enum
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import lbfast
from lbfast.data.suffixes import ORDER
from lbfast.messages import plain
from lbfast.signals import Signals

app = typer.Typer(
    help="LanguageBind, faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
errors = Console(stderr=True, soft_wrap=True)

Modality = Enum("Modality", {name: name for name in ORDER})  # type: ignore[misc]
Precision = Enum("Precision", {name: name for name in ("auto", "float32", "bfloat16", "float16")})  # type: ignore[misc]
Products = Enum("Products", {name: name for name in ("int8", "fp8")})  # type: ignore[misc]
"""Of the layers: `precision` of `optimize_for_inference`."""


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """What a user can mend is one line on stderr and exit status 1; the rest is a fault of ours, with its traceback."""
    try:
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
