"""The application, and how its commands speak: errors a user can mend are one line on stderr."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import lbfast
from lbfast.embedding.items import ORDER
from lbfast.messages import plain

INTERRUPTED = 130


class Stopped(BaseException):
    """A signal asked this process to end. No error: nothing but the command itself takes notice of it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


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
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        errors.print(f"[bold red]error:[/] {escape(plain(_message(error)))}")
        raise typer.Exit(1) from error


class Signals:
    """Within it SIGINT, SIGTERM and SIGHUP raise Stopped, once; a second one ends the process on the spot.

    A signal that the process was started deaf to (by nohup, in the background of a script) stays without effect.
    """

    def __init__(self) -> None:
        self._seen = 0
        self._before: dict[int, Any] = {}
        self._unraisable: Any = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._stop)
            self._unraisable, sys.unraisablehook = sys.unraisablehook, self._lost
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._unraisable is not None:
            sys.unraisablehook = self._unraisable
        if self._seen and isinstance(error, Exception):  # a library has made an error of its own of it
            raise Stopped(self._seen) from None

    def check(self) -> None:
        """Raises Stopped again where the first was raised in a place that no exception leaves."""
        if self._seen:
            raise Stopped(self._seen)

    def _stop(self, number: int, frame: object) -> None:
        if self._seen:
            os._exit(128 + number)
        self._seen = number
        raise Stopped(number)

    def _lost(self, unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Stopped):
            self._unraisable(unraisable)


def _message(error: Exception) -> str:
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
