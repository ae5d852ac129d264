"""What lbfast-mini can do, measured: retrieval among 100 scenes that it has not seen, with text and between senses."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from lbfast.data.manifest import Manifest
from lbfast.embeds import unit
from lbfast.evaluation.encoder import Encoder
from lbfast.evaluation.retrieval import retrieve
from lbfast.mini.files import write_world
from lbfast.mini.world import BLOCK

TARGETS: dict[tuple[str, str], float] = {
    ("text", "image"): 0.9,
    ("text", "video"): 0.9,
    ("text", "depth"): 0.9,
    ("text", "thermal"): 0.9,
    ("text", "audio"): 0.8,
    ("video", "audio"): 0.2,
    ("depth", "thermal"): 0.2,
}
"""(query, gallery) -> the R@1 it has to reach. The last two were never trained together."""


BATCH = 50


@dataclass(frozen=True)
class Row:
    """Recalls among 100, of one query and gallery, for each draw: R@1, R@1 of the way back, R@5, R@1 by the first
    quarter of an embedding's numbers."""

    there: list[float]
    back: list[float]
    five: list[float]
    quarter: list[float]


Rows = dict[tuple[str, str], Row]


def measure(models: Mapping[str, Path], draws: int = 5, seed: int = 0, precision: str | None = None) -> Rows:
    """Retrieval of every row of `TARGETS` whose modalities are in `models`.

    Args:
        models: modality -> checkpoint.
        draws: of 100 scenes of the test split each.
        seed: of the first; the others follow.
        precision: None, in float32; or one of `lbfast.optimize_for_inference`, in bfloat16 otherwise.

    Raises ValueError where a file cannot be embedded.
    """
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    dtype = "float32" if precision is None else "bfloat16"
    encoders = {
        name: Encoder.open(f"{name}={where}", dtype=dtype, batch_size=BATCH, precision=precision)
        for name, where in models.items()
    }
    rows = {pair: Row([], [], [], []) for pair in TARGETS if set(pair) <= {"text", *models}}
    for number in range(draws):
        media, texts = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            manifest = write_world(folder, BLOCK, "test", seed + number, tuple(models))
            for name, encoder in encoders.items():
                source = Manifest(manifest, path=name, captions=(f"{name}_caption",))
                samples = [source[i] for i in range(len(source))]
                media[name], kept = encoder.media(samples)
                if len(kept) < BLOCK:
                    raise ValueError(f"{name}: expected {BLOCK} embeddings, got {len(kept)}")
                texts[name] = encoder.texts([text for sample in samples for text in sample.texts.values()])
        for (first, second), row in rows.items():
            queries, gallery = texts[second] if first == "text" else media[first], media[second]
            there, back = retrieve(queries, gallery)
            row.there.append(there.recall[1])
            row.back.append(back.recall[1])
            row.five.append(there.recall[5])
            nested = [unit(embeds, embeds.shape[1] // 4) for embeds in (queries, gallery)]
            row.quarter.append(retrieve(*nested)[0].recall[1])
    return rows


def show(rows: Rows, draws: int, beside: Mapping[str, Rows] | None = None) -> Table:
    """The table that `lbfast eval mini` prints; beside: by its precision, what else was measured on the same scenes."""
    beside = beside or {}
    table = Table(
        title="lbfast-mini: retrieval among 100 scenes not seen in training",
        caption=f"means of {draws} draws (lowest-highest); back: the other way; ¼: by the first quarter of "
        "an embedding's numbers; chance: 1; *: never trained together",
    )
    table.add_column("query -> gallery", no_wrap=True)
    for name in ("R@1", *(f"{precision} R@1" for precision in beside), "back", "R@5", "¼ R@1", "wanted"):
        table.add_column(f"{name} %", justify="right", no_wrap=True)
    for (first, second), row in rows.items():
        mark = "" if first == "text" else " *"
        firsts = [row.there, *(other[first, second].there for other in beside.values())]
        means = [f"{100 * statistics.mean(ones):.1f} ({100 * min(ones):.0f}-{100 * max(ones):.0f})" for ones in firsts]
        means += [f"{100 * statistics.mean(shares):.1f}" for shares in (row.back, row.five, row.quarter)]
        table.add_row(f"{first} -> {second}{mark}", *means, f"{100 * TARGETS[first, second]:.0f}")
    return table
