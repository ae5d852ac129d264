"""`lbfast search`."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from lbfast.cli.app import app, errors, plain_errors
from lbfast.cli.options import CHECKPOINT
from lbfast.data.suffixes import LANGUAGE
from lbfast.messages import plain

if TYPE_CHECKING:
    from lbfast.searching.find import Found

_FILE = "A file to search with; may be given again."


_ARGUMENTS = "lbfast.arguments"


class _InOrder(TyperCommand):
    """Keeps the arguments as they were given, for their order."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = [*args]
        return super().parse_args(ctx, args)


@app.command(
    cls=_InOrder,
    help="Prints a table of the rows of a Parquet file of embeddings that are nearest to texts and files.\n\n"
    'Example: lbfast search embeddings.parquet "a dog in the rain" --image dog.jpg --top 5 --html found.html\n\n'
    "Every row is compared, in memory that does not grow with the file: the score is the cosine. Queries are embedded "
    "by the models that made the file, which it names, or by those of --model. A folder of such files is one table.\n\n"
    "Exit status: 0; 1 if there is nothing to search with or in.",
)
def search(
    context: typer.Context,
    embeddings: Annotated[Path, typer.Argument(metavar="FILE.parquet", help="Of lbfast embed; or a folder of them.")],
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="What to search for.")] = None,
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
        typer.Option(metavar=CHECKPOINT, help="Instead of the models that made the file."),
    ] = None,
    device: Annotated[str, typer.Option(help="For the model: auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    files = {"image": image, "video": video, "audio": audio, "depth": depth, "thermal": thermal}
    with plain_errors():
        import numpy as np

        from lbfast import files as writing
        from lbfast.searching.find import Found, check_text, embedder_of, search as found_by
        from lbfast.searching.page import check_place, page
        from lbfast.searching.table import Table as Rows

        given: dict[str, list[Any]] = {name: [*paths] for name, paths in files.items() if paths}
        for number, text in enumerate(texts or ()):
            check_text(f"text {number + 1}", text)
        if texts:
            given[LANGUAGE] = [*texts]
        if not given:
            raise ValueError("expected something to search for: a text, or --image FILE and the like")
        queried = [path for name, paths in given.items() if name != LANGUAGE for path in paths]
        if html is not None:
            check_place(html, embeddings, queried)
        embedder = embedder_of(Rows(embeddings), model, device)
        rows = {name: iter(embedder.encode(items, name)) for name, items in given.items()}
        items = {name: iter(each) for name, each in given.items()}
        kinds = [*_in_order(context.meta[_ARGUMENTS], given)]
        vectors = np.stack([next(rows[name]) for name in kinds])
        found = [
            Found(next(items[name]), each.hits)
            for name, each in zip(kinds, found_by(embeddings, vectors, modality=modality, top=top))
        ]
        if not any(each.hits for each in found):
            raise ValueError(f"{embeddings}: no embeddings" + (f" of modality {modality}" if modality else ""))
        console = Console()
        for each in found:
            console.print(_table(each))
        if html is not None:
            with writing.replacing(html, new=not check_place(html, embeddings, queried)) as staged:
                staged.write_text(page(found, str(embeddings)), encoding="utf-8")
            errors.print(f"wrote {escape(plain(html))}", highlight=False)


def _in_order(arguments: Sequence[str], given: Container[str]) -> Iterator[str]:
    """The modalities of the queries as they follow each other in the arguments: each option has one value."""
    words, texts = iter(arguments), -1  # the first that is no option is the table
    for word in words:
        name, equals, _ = word.partition("=")
        if name == "--":
            yield from [LANGUAGE for _ in [*words][max(0, -texts) :]]
        elif name.startswith("--"):
            if not equals:
                next(words)
            if name[2:] in given:
                yield name[2:]
        else:
            texts += 1
            if texts > 0:
                yield LANGUAGE


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
