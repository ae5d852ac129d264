"""`lbfast doctor` and `lbfast demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lbfast.cli.app import app, plain_errors


@app.command()
def doctor(
    why: Annotated[bool, typer.Option("--why", help="Also the reasons against what is not taken.")] = False,
) -> None:
    """Prints versions, devices, and which implementation each op takes on each, by precision.

    Example: lbfast doctor --why
    """
    from lbfast.doctor import examine

    with plain_errors():
        examine(Console(), why)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the files it makes.")] = Path("demo-out"),
) -> None:
    """Makes files of five modalities in a folder, embeds them with lbfast-mini, and prints who finds whom.

    Example: lbfast demo --out demo-out
    """
    from lbfast.demo import run, show

    with plain_errors():
        console = Console()
        show(console, run(out, console))
