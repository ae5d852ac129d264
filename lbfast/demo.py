"""`lbfast demo`: files of five modalities and captions -> embeddings -> similarity tables, all made on the spot."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lbfast import native, samples
from lbfast.model.config import MODALITIES, published_config
from lbfast.model.languagebind import LanguageBind, model_dict
from lbfast.processing.processor import transform_dict
from lbfast.processing.text import LanguageBindImageTokenizer, write_clip_vocabulary

LAYERS = 2
RANDOM = "The weights are random until a trained small model ships: the similarities mean nothing, the plumbing does."
PAIRS = (
    *((name, "language") for name in ("video", "image", "depth", "audio", "thermal")),
    ("video", "audio"),
    ("image", "depth"),
    ("image", "thermal"),
)
"""The tables that upstream's README prints."""


@dataclass(frozen=True)
class Demo:
    """What a demo made.

    Attributes:
        files: modality -> its sample files.
        checkpoints: modality -> directory.
        inputs: modality (and language) -> what its encoder takes.
        embeddings: modality (and language) -> (B, E), as LanguageBind gives them; captions in the order of `files`.
    """

    files: dict[str, list[Path]]
    checkpoints: dict[str, Path]
    inputs: dict[str, dict[str, torch.Tensor]]
    embeddings: dict[str, torch.Tensor]


def make_checkpoints(folder: Path, layers: int = LAYERS) -> dict[str, Path]:
    """A checkpoint for each modality: the layers of L/14, a few of them, with random weights and one text tower.

    Kept in bfloat16, 0.8 GB in all; those that are there already are not made again.
    """
    found = {name: folder / f"{name}-{layers}-layers" for name in MODALITIES}
    text: dict[str, torch.Tensor] = {}
    for seed, (name, where) in enumerate(found.items()):
        if where.is_dir():
            continue
        torch.manual_seed(seed)
        config = published_config(name, num_hidden_layers=layers)
        config.text_config.num_hidden_layers = layers
        model = model_dict[name](config)
        torch.manual_seed(len(found))
        text = text or _random_text(model)
        model.load_state_dict(text, strict=False)
        staged = where.with_name(where.name + ".tmp")
        shutil.rmtree(staged, ignore_errors=True)
        model.bfloat16().save_pretrained(staged)
        write_clip_vocabulary(staged)
        staged.rename(where)
    return found


def _random_text(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if key.startswith("text_")}


def run(folder: Path, console: Console) -> Demo:
    """Makes files and checkpoints below `folder`, and embeds them as upstream's README does."""
    files = samples.make_samples(folder / "files")
    with console.status("making checkpoints, once"):
        checkpoints = make_checkpoints(folder / "checkpoints")
    with console.status("compiling the native kernels, once" if native.will_compile() else "embedding"):
        model = LanguageBind({name: str(where) for name, where in checkpoints.items()}, use_temp=True).eval()
        tokenizer = LanguageBindImageTokenizer.from_pretrained(checkpoints["image"])
        captions = [caption for name in files for caption in samples.CAPTIONS[name]]
        inputs = {name: transform_dict[name](model.modality_config[name])(paths) for name, paths in files.items()}
        inputs["language"] = dict(
            tokenizer(captions, max_length=77, padding="max_length", truncation=True, return_tensors="pt")
        )
        with torch.inference_mode():
            embeddings = model(inputs)
    return Demo(files, checkpoints, inputs, embeddings)


def show(console: Console, demo: Demo) -> None:
    """Prints the similarity tables: softmax over each row's candidates."""
    start = 0
    captions: dict[str, slice] = {}
    for name, paths in demo.files.items():
        captions[name] = slice(start, start := start + len(paths))
    for rows, columns in PAIRS:
        if columns == "language":
            others, names = demo.embeddings["language"][captions[rows]], list(samples.CAPTIONS[rows])
        else:
            others, names = demo.embeddings[columns], [path.name for path in demo.files[columns]]
        similarity = torch.softmax(demo.embeddings[rows] @ others.T, dim=-1)
        title = f"{rows.capitalize()} x {'Text' if columns == 'language' else columns.capitalize()}"
        console.print(_table(title, [path.name for path in demo.files[rows]], names, similarity))
    console.print(RANDOM, style="bold yellow", soft_wrap=True)


def _table(title: str, rows: list[str], columns: list[str], values: torch.Tensor) -> Table:
    table = Table("", *columns, title=title, title_justify="left")
    for name, row in zip(rows, values.tolist()):
        table.add_row(name, *(f"{value:.4f}" for value in row))
    return table
