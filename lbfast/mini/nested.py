"""The last step of lbfast-mini: projections that make a quarter of an embedding's numbers serve by themselves.

The towers stay as their runs have left them; the projections of language and of all modalities are trained together, by
nested InfoNCE, on what the towers make of scenes of their training. No modality meets another: each has its captions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lbfast import ops
from lbfast.data.manifest import Manifest
from lbfast.evaluation.encoder import Encoder
from lbfast.model.languagebind import model_dict, normalised

DIMS, DIM_WEIGHTS = (64, 16), (1.0, 3.0)
SCENES, EPOCHS, BATCH, RATE, SCALE = 8000, 40, 500, 4e-3, 25.0


@dataclass(frozen=True)
class Pairs:
    """n scenes as the towers see them.

    Attributes:
        media, texts: (n, width) of a tower, before its projection, of unit length.
        ids: (n,) int64, equal where captions are.
    """

    media: torch.Tensor
    texts: torch.Tensor
    ids: torch.Tensor


def nest(
    folders: Mapping[str, Path], manifests: Mapping[str, Path], scenes: int = SCENES, epochs: int = EPOCHS
) -> None:
    """Trains the projections of checkpoints, and writes them there in half precision.

    Args:
        folders: modality -> checkpoint; of one language, all of them.
        manifests: modality -> what `write_world` has written for its training.
        scenes: of each modality, at most; fewer where it has fewer. epochs: over them.
    """
    models = {name: model_dict[name].from_pretrained(folder).float() for name, folder in folders.items()}
    pairs = {name: towers(name, folder, manifests[name], scenes) for name, folder in folders.items()}
    text = next(iter(models.values())).text_projection.weight.detach().clone()
    media = {name: model.visual_projection.weight.detach().clone() for name, model in models.items()}
    turned = axes(torch.cat([found.texts for found in pairs.values()]), text)
    text = turned @ text
    media = {name: turned @ weight for name, weight in media.items()}
    train(text, media, pairs, epochs)
    with torch.no_grad():
        for name, model in models.items():
            model.text_projection.weight.copy_(text)
            model.visual_projection.weight.copy_(media[name])
            model.half().save_pretrained(folders[name])


def towers(modality: str, folder: Path, manifest: Path, scenes: int) -> Pairs:
    """What a checkpoint's towers make of the first scenes of a world."""
    encoder = Encoder.open(f"{modality}={folder}", dtype="float32", batch_size=100)
    encoder.model.visual_projection = encoder.model.text_projection = nn.Identity()
    source = Manifest(manifest, path=modality, captions=(f"{modality}_caption",))
    samples = [source[number] for number in range(min(scenes, len(source)))]
    captions = [caption for sample in samples for caption in sample.texts.values()]
    numbers = {caption: number for number, caption in enumerate(captions)}
    media, kept = encoder.media(samples)
    texts = encoder.texts(captions)[kept]
    return Pairs(media, texts, torch.tensor([numbers[captions[number]] for number in kept]))


def axes(texts: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """(E, E): turns embeddings so that their first numbers are those in which captions differ most; cosines stay."""
    embeds = normalised(texts @ projection.T)
    return torch.linalg.eigh(embeds.T @ embeds)[1].flip(1).T


def train(text: torch.Tensor, media: Mapping[str, torch.Tensor], pairs: Mapping[str, Pairs], epochs: int) -> None:
    """Trains projections in place: of texts (E, width), of each modality (E, its width)."""
    generator = torch.Generator().manual_seed(0)
    weights = [text.requires_grad_(), *(weight.requires_grad_() for weight in media.values())]
    optimizer = torch.optim.Adam(weights)
    steps = max(1, min(len(found.ids) for found in pairs.values()) // BATCH)
    for step in range(epochs * steps):
        if step % steps == 0:
            orders = {name: torch.randperm(len(found.ids), generator=generator) for name, found in pairs.items()}
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / (epochs * steps)))
        optimizer.zero_grad()
        for name, found in pairs.items():
            rows = orders[name][step % steps * BATCH :][:BATCH]
            image, words = normalised(found.media[rows] @ media[name].T), normalised(found.texts[rows] @ text.T)
            ops.info_nce(image, words, SCALE, ids=found.ids[rows], dims=DIMS, dim_weights=DIM_WEIGHTS).backward()
        optimizer.step()
    for weight in weights:
        weight.requires_grad_(False)
