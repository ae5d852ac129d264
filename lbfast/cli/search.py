"""`lbfast search`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lbfast.cli.app import app, errors, plain_errors
from lbfast.data.suffixes import LANGUAGE
from lbfast.messages import plain

if TYPE_CHECKING:
    from lbfast.searching.find import Found

_FILE = "A file to search with; may be given again."


@app.command(
    help="Prints a table of the rows of a Parquet file of embeddings that are nearest to texts and files.\n\n"
    'Example: lbfast search embeddings.parquet "a dog in the rain" --image dog.jpg --top 5 --html found.html\n\n'
    "Every row is compared, in memory that does not grow with the file: the score is the cosine. Queries are embedded "
    "by the models that made the file, which it names, or by those of --model. A folder of such files is one table.\n\n"
    "Exit status: 0; 1 if there is nothing to search with or in."
)
def search(
    embeddings: Annotated[Path, typer.Argument(metavar="FILE.parquet", help="Of lbfast embed; or a folder of them.")],
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="What to search for.")] = None,
    image: Annotated[list[Path] | None, typer.Option(metavar="FILE", help=_FILE)] = None,
    video: Annotated[list[Path] | None, typer.Option(metavar="FILE", help=_FILE)] = None,
    audio: Annotated[list[Path] | None, typer.Option(metavar="FILE", help=_FILE)] = None,
    depth: Annotated[list[Path] | None, typer.Option(metavar="FILE", help=_FILE)] = None,
    thermal: Annotated[list[Path] | None, typer.Option(metavar="FILE", help=_FILE)] = None,
    top: Annotated[int, typer.Option(min=1, help="Rows for each query.")] = 10,
    modality: Annotated[
        str | None, typer.Option(help="Find rows of this one only: video, language, video+audio...")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="PAGE.html", help="Also write a page with thumbnails, whole in one file.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="[MODALITY=]DIR_OR_NAME", help="Instead of the models that made the file."),
    ] = None,
    device: Annotated[str, typer.Option(help="For the model: auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    files = {"image": image, "video": video, "audio": audio, "depth": depth, "thermal": thermal}
    with plain_errors(), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: errors.print(f"[yellow]warning[/] {escape(plain(message))}")
        from lbfast import files as writing
        from lbfast.searching.find import embedder_of, search as found_by
        from lbfast.searching.table import Table as Rows

        queries = {name: [*(paths or ())] for name, paths in files.items() if paths} | (
            {LANGUAGE: texts} if texts else {}
        )
        if not queries:
            raise ValueError("expected something to search for: a text, or --image FILE and the like")
        embedder = embedder_of(Rows(embeddings), model, device)
        found = [
            each
            for name, items in queries.items()
            for each in found_by(embeddings, items, models=embedder, query_modality=name, modality=modality, top=top)
        ]
        console = Console()
        for each in found:
            console.print(_table(each))
        if not any(each.hits for each in found):
            raise ValueError(f"{embeddings}: no embeddings" + (f" of modality {modality}" if modality else ""))
        if html is not None:
            from lbfast.searching.page import page

            with writing.replacing(html) as staged:
                staged.write_text(page(found, str(embeddings)), encoding="utf-8")
            errors.print(f"wrote {escape(plain(html))}", highlight=False)


def _table(found: Found) -> Table:
    from lbfast.searching.page import caption_of, place_of

    table = Table(title=escape(plain(found.query, 300)), title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("modality", no_wrap=True)
    table.add_column("where", overflow="fold")
    for rank, hit in enumerate(found.hits, start=1):
        where = place_of(hit)
        if hit.modality == LANGUAGE and (caption := caption_of(hit)):
            where += f": {caption}"
        table.add_row(str(rank), f"{hit.score:.4f}", escape(plain(hit.modality)), escape(plain(where)))
    return table
