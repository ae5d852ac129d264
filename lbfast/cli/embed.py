"""`lbfast embed`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from lbfast.cli.app import app, errors, plain_errors, say, say_if_compiling
from lbfast.cli.options import (
    MODALITY,
    BatchSize,
    CacheDir,
    Dim,
    Dtype,
    Modality,
    Models,
    OfProducts,
    Precision,
    Revision,
)
from lbfast.importing import importing
from lbfast.messages import plain
from lbfast.signals import Signals, Stopped

if TYPE_CHECKING:
    from lbfast.embedding import Failure, Summary
    from lbfast.embedding.run import Progress

MANY = "Many machines"
Engine = Enum("Engine", {"ray": "ray"})  # type: ignore[misc]


@app.command(
    help="Writes the embeddings of files and captions to one Parquet file, and prints how many.\n\n"
    "Example: lbfast embed clips/ captions.txt --model LanguageBind_Video_FT --out clips.parquet\n\n"
    "Its rows are [bold]id, modality, path, embedding, model[/]; embeddings are float32 of unit length. Captions come "
    "from text files, one a line. With --segment videos and sounds have rows of parts: [bold]start_sec, end_sec[/].\n\n"
    "A run that was interrupted goes on where it stopped when the same command is given again. A bad file is reported "
    "and skipped. A run that was finished, with the same inputs and settings, has nothing left to do: exit status 0; "
    "with other inputs FILE takes in what is new or changed. Exit status otherwise: 0; 1 if nothing could be embedded, "
    "FILE is of other settings, or the run had to stop; 130 if interrupted, 143 after SIGTERM, 129 after SIGHUP."
)
def embed(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES_OR_FOLDERS",
            help="Or tables, tars, and [bold]-[/] for a list on stdin. Each may be MODALITY=PATH, as depth=maps/.",
        ),
    ],
    model: Models,
    out: Annotated[Path, typer.Option(metavar="FILE.parquet", help="Where the embeddings go.")],
    modality: Annotated[
        Modality | None,
        typer.Option(
            metavar=MODALITY,
            help="What every file is, whatever its type: image, video, audio, depth, thermal; language: one caption a "
            "line.",
        ),
    ] = None,
    segment: Annotated[
        str | None, typer.Option(metavar="SECONDS", help="A row for each so many seconds of videos and sounds, as 10s.")
    ] = None,
    hop: Annotated[
        str | None, typer.Option(metavar="SECONDS", help="From one part's beginning to the next. Default: the same.")
    ] = None,
    fuse: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODALITY+MODALITY",
            help="A row more for files of one stem, as video+audio; [bold]segments[/]: for the mean of a file's parts.",
        ),
    ] = None,
    dim: Dim = None,
    column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of tables: paths, bytes of files, or captions of language=TABLE."),
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only share I, from 1, of N: one for each machine, and its FILE.")
    ] = None,
    batch_size: BatchSize = 8,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Processes that decode. Default: beside a GPU one less than the cores, else half; for a file none.",
        ),
    ] = None,
    dtype: Dtype = Precision["auto"],
    precision: OfProducts = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N; several as cuda:0,cuda:1, a process each.")
    ] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad or damaged file.")] = False,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Open URLs of files and folders, by fsspec.")
    ] = False,
    decoder: Annotated[
        str, typer.Option(help="Of videos: ffmpeg, or torchcodec-cuda (cuda:N), a GPU's; see docs/files.md.")
    ] = "ffmpeg",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace FILE, and an unfinished run with other settings.")
    ] = False,
    cache_dir: CacheDir = None,
    revision: Revision = None,
    engine: Annotated[
        Engine | None,
        typer.Option(rich_help_panel=MANY, help="ray: on a Ray cluster; FILE is then a folder of Parquet parts."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(rich_help_panel=MANY, help="Of the cluster, or auto. Default: one of this machine, for the run."),
    ] = None,
) -> None:
    try:
        with plain_errors(), progress_bars() as (progress, on_failure):
            with importing():
                import lbfast.model.config  # noqa: F401  (transformers: what a checkpoint's settings are)
                from lbfast.embedding import embed_files

            embed_all: Callable[..., Summary] = embed_files
            if engine is not None:
                from lbfast.embedding.ray import embed_files as on_ray

                embed_all = functools.partial(on_ray, address=address)
            elif address is not None:
                raise ValueError(f"address: expected --engine ray with it, got {address} alone")
            say_if_compiling()
            summary = embed_all(
                files,
                model,
                out,
                modality=modality.value if modality else None,
                fuse=fuse or None,
                segment=segment,
                hop=hop,
                shard=shard,
                column=column,
                dim=dim,
                batch_size=batch_size,
                workers=workers,
                dtype=dtype.value,
                precision=precision.value if precision else None,
                device=device,
                strict=strict,
                allow_urls=allow_urls,
                decoder=decoder,
                overwrite=overwrite,
                cache_dir=cache_dir,
                revision=revision,
                on_failure=on_failure,
                progress=progress,
            )
    except Stopped as stopped:
        errors.print("interrupted; what is finished is kept: the same command goes on from here")
        raise typer.Exit(128 + stopped.number) from None
    _summarise(summary)


def _summarise(summary: Summary) -> None:
    """One line on stdout, and what was ignored on stderr. Exit status 1 where there is no output."""
    for reason, count in sorted(summary.ignored.items()):
        errors.print(f"ignored {count} {'file' if count == 1 else 'files'}: {escape(reason)}", highlight=False)
    if summary.kept:
        errors.print(f"kept {summary.kept} rows of files that are not among these", highlight=False)
    if summary.gone:
        errors.print(f"removed {summary.gone} rows of files that are no longer there", highlight=False)
    by_modality = ", ".join(f"{count} {name}" for name, count in summary.embedded.items())
    line = f"{sum(summary.embedded.values())} embedded" + (f" ({by_modality})" if by_modality else "")
    if summary.finished:
        whose = (
            "earlier runs of the same settings" if summary.kept else "an earlier run of the same inputs and settings"
        )
        line = f"nothing left to do: {line} by {whose}"
        say(f"{line}, {summary.failed} failed -> {summary.out}")
        return
    if summary.resumed:
        line += f", {summary.resumed} of them by an earlier run"
    line += f", {len(summary.failures)} failed"
    say(line + (f" -> {summary.out}" if summary.out else "; nothing was written"))
    if summary.out is None:
        raise typer.Exit(1)


@contextlib.contextmanager
def progress_bars() -> Iterator[tuple[Progress, Callable[[Failure], None]]]:
    """A bar for each modality on stderr, where that is a terminal; failures are printed above them either way."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=errors,
        disable=not errors.is_terminal,
    )
    tasks: dict[str, TaskID] = {}

    def progress(modality: str, done: int, total: int) -> None:
        Signals.check()
        if modality not in tasks:
            tasks[modality] = bars.add_task(f"{modality:>8}", total=total, completed=done, rate="")
        speed = bars.tasks[tasks[modality]].speed
        rate = f"{speed:.1f}/s" if speed else ""
        bars.update(tasks[modality], completed=done, total=total, rate=rate)

    def on_failure(failure: Failure) -> None:
        reason = failure.reason if failure.path in failure.reason else f"{failure.path}: {failure.reason}"
        errors.print(f"[yellow]skipped[/] {escape(plain(reason))}", highlight=False)

    with bars:
        yield progress, on_failure
