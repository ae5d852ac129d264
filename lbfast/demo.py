"""`lbfast demo`: files of five modalities and captions -> embeddings -> who finds whom.

The weights are lbfast-mini's, the scenes are of the split that training never saw.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lbfast import mini, native
from lbfast.evaluation.retrieval import retrieve
from lbfast.mini.files import write_world
from lbfast.mini.world import SEES
from lbfast.model.languagebind import LanguageBind
from lbfast.processing.processor import transform_dict
from lbfast.processing.text import LanguageBindImageTokenizer

SCENES, SHOWN = 100, 2
PAIRS = (
    *((name, "language") for name in ("video", "image", "depth", "audio", "thermal")),
    ("video", "audio"),
    ("image", "depth"),
    ("image", "thermal"),
)
"""The tables that upstream's README prints."""
FINDS = (*(("language", name) for name in SEES), ("video", "audio"), ("depth", "thermal"))
"""Who is asked to find whom among all the scenes. The last two were never trained together."""


@dataclass(frozen=True)
class Demo:
    """What a demo made.

    Attributes:
        files: modality -> a file of each scene.
        captions: modality -> what is said of each.
        embeddings: modality -> (SCENES, E), as LanguageBind gives them.
        language: modality -> (SCENES, E), of its captions.
    """

    files: dict[str, list[Path]]
    captions: dict[str, list[str]]
    embeddings: dict[str, torch.Tensor]
    language: dict[str, torch.Tensor]


def run(folder: Path, console: Console) -> Demo:
    """Makes files below `folder`, and embeds them as upstream's README does."""
    with console.status("drawing scenes"):
        manifest = write_world(folder / "files", SCENES)
    rows = [json.loads(line) for line in manifest.read_text("utf-8").splitlines()]
    files = {name: [manifest.parent / row[name] for row in rows] for name in SEES}
    captions = {name: [row[f"{name}_caption"] for row in rows] for name in SEES}
    with console.status("compiling the native kernels, once" if native.will_compile() else "embedding"):
        model = LanguageBind({name: f"lbfast-mini/{name}" for name in SEES}, use_temp=True).eval()
        tokenizer = LanguageBindImageTokenizer.from_pretrained(mini.checkpoint("image"))
        inputs = {name: transform_dict[name](model.modality_config[name])(paths) for name, paths in files.items()}
        sentences = [caption for name in SEES for caption in captions[name]]
        inputs["language"] = dict(
            tokenizer(sentences, max_length=77, padding="max_length", truncation=True, return_tensors="pt")
        )
        with torch.inference_mode():
            embeddings = model(inputs)
    language = dict(zip(SEES, embeddings.pop("language").split(SCENES)))
    return Demo(files, captions, embeddings, language)


def show(console: Console, demo: Demo) -> None:
    """Prints the similarity tables of the first scenes, softmax over each row's candidates, and who found whom."""
    for rows, columns in PAIRS:
        if columns == "language":
            others, names = demo.language[rows][:SHOWN], demo.captions[rows][:SHOWN]
        else:
            others, names = demo.embeddings[columns][:SHOWN], _names(demo.files[columns])
        similarity = torch.softmax(demo.embeddings[rows][:SHOWN] @ others.T, dim=-1)
        title = f"{rows.capitalize()} x {'Text' if columns == 'language' else columns.capitalize()}"
        console.print(_similarities(title, _names(demo.files[rows]), names, similarity))
    console.print(_finds(demo))


def _names(files: list[Path]) -> list[str]:
    return [f"{path.parent.name}/{path.name}" for path in files[:SHOWN]]


def _similarities(title: str, rows: list[str], columns: list[str], values: torch.Tensor) -> Table:
    table = Table("", *columns, title=title, title_justify="left")
    for name, row in zip(rows, values.tolist()):
        table.add_row(name, *(f"{value:.4f}" for value in row))
    return table


def _finds(demo: Demo) -> Table:
    """How often a query finds its own among all the scenes."""
    table = Table(
        title=f"Retrieval among {SCENES} scenes not seen in training; *: never trained together", title_justify="left"
    )
    for name in ("query -> gallery", "R@1", "R@5"):
        table.add_column(name, justify="left" if "->" in name else "right", no_wrap=True)
    for first, second in FINDS:
        queries = demo.language[second] if first == "language" else demo.embeddings[first]
        recall = retrieve(queries, demo.embeddings[second])[0].recall
        name = f"text -> {second}" if first == "language" else f"{first} -> {second} *"
        table.add_row(name, f"{100 * recall[1]:.0f} %", f"{100 * recall[5]:.0f} %")
    return table
