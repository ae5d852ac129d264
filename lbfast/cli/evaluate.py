"""`lbfast eval zero-shot` and `lbfast eval retrieval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lbfast.cli.app import app, errors, plain_errors, say_if_compiling
from lbfast.cli.embed import progress_bars
from lbfast.cli.options import CHECKPOINT, BatchSize, Device, Dim, Dtype, OfProducts, Precision, Products, Split
from lbfast.messages import plain

if TYPE_CHECKING:
    from lbfast.checkpoints import Checkpoint
    from lbfast.evaluation.encoder import Encoder, Progress
    from lbfast.evaluation.report import Report

evaluate = typer.Typer(no_args_is_help=True, help="Zero-shot classification and retrieval on your files.")
app.add_typer(evaluate, name="eval")

Workers = Annotated[int, typer.Option(min=0, help="Processes that decode ahead. 0: none.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results there too.")]


@evaluate.command("zero-shot")
def zero_shot(
    model: Annotated[str, typer.Option(metavar=CHECKPOINT, help="A checkpoint: directory or hub name.")],
    data: Annotated[Path, typer.Option(help="A folder with one folder a class, or a manifest: path,label.")],
    templates: Annotated[Path | None, typer.Option(help="Text file: one sentence a line, {} for the class.")] = None,
    classes: Annotated[Path | None, typer.Option(help="Text file: every class, one a line. Else: the data's.")] = None,
    batch_size: BatchSize = 32,
    workers: Workers = 0,
    dtype: Dtype = Precision["auto"],
    precision: OfProducts = None,
    device: Device = "auto",
    dim: Dim = None,
    json: Json = None,
) -> None:
    """Prints top-1 and top-5 accuracy of zero-shot classification; --json writes it too.

    A class is the mean of its prompts' embeddings.

    Example: lbfast eval zero-shot --model LanguageBind_Image --data photos/
    """
    from lbfast.checkpoints import open_checkpoints
    from lbfast.evaluation.prompts import templates_for
    from lbfast.evaluation.report import check_place
    from lbfast.evaluation.zero_shot import classify_files

    with plain_errors():
        if json is not None:
            check_place(json)
        (checkpoint,) = open_checkpoints([model]).values()
        prompts = templates_for(checkpoint.modality, templates)
        named = None if classes is None else [line.strip() for line in classes.read_text("utf-8-sig").splitlines()]
        with progress_bars() as (progress, _):
            encoder = _open(checkpoint, batch_size, workers, dtype, precision, device, dim, progress)
            report = classify_files(
                encoder, data, templates=prompts, classes=None if named is None else [name for name in named if name]
            )
        _show(report, json, data=str(data), models={checkpoint.modality: checkpoint.name})


@evaluate.command()
def retrieval(
    model: Annotated[
        list[str],
        typer.Option(
            metavar=CHECKPOINT,
            help="A checkpoint: between its modality and text. Two: between their modalities, from a manifest with a "
            "column of paths named after each.",
        ),
    ],
    data: Annotated[list[str], typer.Option(help="Manifest (path,caption), shards, folder or URL; may be repeated.")],
    caption: Annotated[
        list[str] | None, typer.Option(help="Column or field with captions; repeated: each is one more caption.")
    ] = None,
    media: Annotated[str | None, typer.Option(help="Column of paths, or suffix of a shard's members.")] = None,
    split: Split = "first",
    batch_size: BatchSize = 32,
    workers: Workers = 0,
    dtype: Dtype = Precision["auto"],
    precision: OfProducts = None,
    device: Device = "auto",
    dim: Dim = None,
    json: Json = None,
) -> None:
    """Prints R@1, R@5, R@10, median and mean rank, in both directions; --json writes them too.

    Example: lbfast eval retrieval --model LanguageBind_Video_FT --data msrvtt.csv

    Rows with one file are one item of several captions. A query's rank is its best match's, after what ties with it.
    """
    from lbfast.checkpoints import open_checkpoints
    from lbfast.evaluation.report import check_place
    from lbfast.evaluation.retrieval import pair_files, retrieve_files

    with plain_errors():
        if json is not None:
            check_place(json)
        opened = open_checkpoints(model)
        if len(opened) > 2:
            raise ValueError(f"model: expected one or two, got {len(opened)}")
        if len(opened) == 2 and (len(data) > 1 or caption or media):
            raise ValueError("data, caption, media: expected one manifest and no columns with two models")
        with progress_bars() as (progress, _):

            def encoder(modality: str) -> Encoder:
                return _open(opened[modality], batch_size, workers, dtype, precision, device, dim, progress)

            if len(opened) == 2:
                report = pair_files(list(opened), encoder, data[0])
            else:
                views = dict.fromkeys(caption, 1.0) if caption else None
                report = retrieve_files(encoder(*opened), data, captions=views, media=media, split=split)
        _show(report, json, data=data, models={name: checkpoint.name for name, checkpoint in opened.items()})


def _open(
    checkpoint: Checkpoint,
    batch_size: int,
    workers: int,
    dtype: Precision,
    precision: Products | None,
    device: str,
    dim: int | None,
    progress: Progress,
) -> Encoder:
    from lbfast.evaluation.encoder import Encoder

    say_if_compiling()
    return Encoder.open(
        checkpoint,
        device=device,
        dtype=dtype.value,
        precision=precision.value if precision else None,
        batch_size=batch_size,
        workers=workers,
        dim=dim,
        progress=progress,
    )


def _show(report: Report, json: Path | None, **more: object) -> None:
    """The table on stdout; what was skipped on stderr."""
    from rich.table import Table

    for key, reason in report.skipped.items():
        said = reason if key in reason else f"{key}: {reason}"
        errors.print(f"[yellow]skipped[/] {escape(plain(said))}", highlight=False)
    counts = ", ".join(f"{count} {name}" for name, count in report.counts.items())
    table = Table(title=report.task, caption=f"{counts}, {len(report.skipped)} skipped")
    classified = report.task == "zero-shot"
    ks = list(next(iter(report.rankings.values())).recall)
    table.add_column("", no_wrap=True)
    for k in ks:
        table.add_column(f"top-{k}" if classified else f"R@{k}", justify="right")
    for name in ("median rank", "mean rank", "queries"):
        table.add_column(name, justify="right")
    for name, ranking in report.rankings.items():
        cells = [f"{100 * ranking.recall[k]:.1f} %" for k in ks]
        cells += [f"{ranking.median_rank:g}", f"{ranking.mean_rank:.1f}", str(ranking.queries)]
        table.add_row("accuracy" if classified else name, *cells)
    Console().print(table)
    if json is not None:
        report.write(json, **more)
