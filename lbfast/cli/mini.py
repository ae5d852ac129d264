"""`lbfast mini` and `lbfast eval mini`: the small model and its world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lbfast.cli.app import app, errors, plain_errors, say
from lbfast.cli.evaluate import evaluate
from lbfast.cli.options import MODALITY, Modality, Products

mini = typer.Typer(
    no_args_is_help=True, help="The small model that comes with lbfast, and the world it was trained in."
)
app.add_typer(mini, name="mini")


@mini.command()
def make(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Gets manifest.jsonl and a folder for each modality.")],
    samples: Annotated[int, typer.Option(min=1, help="Scenes.")] = 100,
    split: Annotated[str, typer.Option(help="train or test: no caption of one is in the other.")] = "test",
    seed: Annotated[int, typer.Option(min=0, help="Another draw of scenes.")] = 0,
    modality: Annotated[
        list[Modality] | None,
        typer.Option(metavar=MODALITY, help="Which files to write; may be repeated. Default: all five."),
    ] = None,
) -> None:
    """Writes scenes of the small world to a folder: pictures, clips, sounds, depth maps, heat, captions.

    Example: lbfast mini make scenes --samples 8
    """
    from lbfast.mini.files import write_world
    from lbfast.mini.world import SEES

    senses = tuple(item.value for item in modality) if modality else tuple(SEES)
    with plain_errors():
        say(str(write_world(out, samples, split, seed, senses)))


@mini.command()
def train(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where data, runs and weights go.")],
) -> None:
    """Makes lbfast-mini again in a folder: data, seven runs of [bold]lbfast train[/], weights; prints what it can do.

    Example: lbfast mini train --out mini
    """
    from lbfast.mini import recipe

    with plain_errors():
        weights = recipe.train(out, errors)
    _print_table(weights, draws=5)


@evaluate.command("mini")
def table(
    weights: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With a folder for each modality. Default: those of the package.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Of 100 scenes each.")] = 5,
    precision: Annotated[
        Products | None, typer.Option(help="Beside float32: int8 on a CPU; fp8, which a CPU emulates.")
    ] = None,
) -> None:
    """Prints a table of retrieval among unseen scenes: with text, and between senses never trained together.

    Example: lbfast eval mini --draws 1
    """
    from lbfast.mini import WEIGHTS

    folder = weights or WEIGHTS
    with plain_errors():
        found = {path.name: path for path in sorted(folder.iterdir()) if (path / "config.json").is_file()}
        if not found:
            raise ValueError(f"{folder}: expected folders of checkpoints, found none")
        _print_table(found, draws, precision.value if precision else None)


def _print_table(weights: dict[str, Path], draws: int, precision: str | None = None) -> None:
    from lbfast.mini.table import measure, show

    with plain_errors():
        rows = measure(weights, draws)
        beside = {precision: measure(weights, draws, precision=precision)} if precision else None
    Console().print(show(rows, draws, beside))
