"""Options that several commands have, each in one place. A command gives the default."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lbfast.data.suffixes import LANGUAGE, MODALITY_NAMES

Modality = Enum("Modality", {name: name for name in (*MODALITY_NAMES, LANGUAGE)})  # type: ignore[misc]
Precision = Enum("Precision", {name: name for name in ("auto", "float32", "bfloat16", "float16")})  # type: ignore[misc]
Products = Enum("Products", {name: name for name in ("int8", "fp8")})  # type: ignore[misc]
"""Of the layers: `precision` of `optimize_for_inference`."""

CHECKPOINT = "[MODALITY=]DIR_OR_NAME"
MODALITY = "MODALITY"  # beside help that names them: in the column of types the names would not fit a line
DTYPE = "DTYPE"

Models = Annotated[
    list[str],
    typer.Option(metavar=CHECKPOINT, help="A checkpoint: local directory, or name on the hub. Once for each modality."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Files, clips or captions at a time.")]
Dtype = Annotated[
    Precision,
    typer.Option(
        metavar=DTYPE,
        help="Of the weights: float32, bfloat16, float16; auto: bfloat16 where the device computes in it.",
    ),
]
OfProducts = Annotated[
    Products | None, typer.Option(help="Of the layers' products: int8 on a CPU, fp8 on a GPU; less exact, faster.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dim = Annotated[
    int | None, typer.Option(min=1, help="Keep the first so many numbers, of unit length again. Default: all.")
]
Split = Annotated[str, typer.Option(help="Where keys of shards end: at the first or last dot of a name.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where downloads are kept.")]
Revision = Annotated[str | None, typer.Option(help="Of checkpoints on the hub.")]
