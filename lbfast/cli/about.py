"""`lbfast doctor` and `lbfast demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lbfast.cli.app import app, plain_errors


@app.command()
def doctor() -> None:
    """Shows versions, devices, and which implementation each op takes where, with the reasons against the others."""
    from lbfast.doctor import examine

    with plain_errors():
        examine(Console())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the files it makes.")] = Path("demo-out"),
) -> None:
    """Makes files of five modalities, embeds them with the small model of the package, and shows who finds whom."""
    from lbfast.demo import run, show

    with plain_errors():
        console = Console()
        show(console, run(out, console))
