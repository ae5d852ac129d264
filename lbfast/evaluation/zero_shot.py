"""Zero-shot classification: the class whose prompts are nearest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from lbfast.data.manifest import SUFFIXES, Manifest
from lbfast.data.sample import Sample
from lbfast.data.suffixes import suffixes_of
from lbfast.evaluation.encoder import Encoder
from lbfast.evaluation.prompts import check_templates, templates_for
from lbfast.evaluation.ranking import Ranking, ranks, summarise
from lbfast.evaluation.report import Report, nothing_left
from lbfast.processing.media import is_url


def class_embeddings(texts: torch.Tensor) -> torch.Tensor:
    """Prompts' embeddings (C, T, E) of C classes in T templates -> (C, E): each normalised, their mean normalised."""
    if texts.dim() != 3 or not texts.is_floating_point():
        raise ValueError(f"texts: expected floats (C, T, E), got {texts.dtype} {tuple(texts.shape)}")
    return torch.nn.functional.normalize(torch.nn.functional.normalize(texts, dim=-1).mean(1), dim=-1)


def classify(
    items: torch.Tensor, classes: torch.Tensor, labels: torch.Tensor, ks: Sequence[int] = (1, 5), *, chunk: int = 1024
) -> Ranking:
    """Top-k accuracies of items (N, E) against class embeddings (C, E), with labels (N,) in 0..C-1.

    An item whose class ties with another counts as wrong where it is the k-th. See `ranks` for errors.
    """
    if labels.shape != (len(items),):
        raise ValueError(f"labels: expected shape ({len(items)},), got {tuple(labels.shape)}")
    labels = labels.to(items.device)
    matches = torch.stack([torch.arange(len(items), device=items.device), labels], dim=1)
    return summarise(ranks(items, classes, matches, chunk=chunk), len(classes), ks)


def classify_files(
    encoder: Encoder,
    data: str | os.PathLike[str],
    *,
    templates: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    ks: Sequence[int] = (1, 5),
) -> Report:
    """Zero-shot top-k accuracy on files. Those that cannot be read are skipped and counted.

    Args:
        encoder: of the modality.
        data: a folder with one folder a class, or a manifest with columns path and label.
        templates: sentences with {} for the class name, underscores of which are read as spaces; None: those of
            `lbfast.evaluation.prompts`.
        classes: every class there is; None: those of the data, by name.
        ks: which top-k.

    Raises:
        FileNotFoundError, ValueError: no such data, none in it that can be read, or a label that is none of `classes`.
    """
    chosen = templates_for(encoder.modality) if templates is None else check_templates(tuple(templates))
    samples, names, skipped = find_labelled(data, encoder.modality)
    classes = sorted(set(names)) if classes is None else list(classes)
    number = {name: i for i, name in enumerate(classes)}
    unknown = sorted(set(names) - set(number))
    if unknown:
        raise ValueError(f"classes: expected every label of {data} among them, got none for {', '.join(unknown[:5])}")
    prompts = [template.replace("{}", name.replace("_", " ")) for name in classes for template in chosen]
    texts = encoder.texts(prompts)
    embeds, kept = encoder.media(samples, skipped.__setitem__)
    if not kept:
        raise nothing_left(data, skipped)
    labels = torch.tensor([number[names[i]] for i in kept])
    ranking = classify(embeds, class_embeddings(texts.reshape(len(classes), len(chosen), -1)), labels, ks)
    counts = {"items": len(kept), "classes": len(classes), "templates": len(chosen)}
    return Report("zero-shot", {"top": ranking}, counts, skipped)


def find_labelled(data: str | os.PathLike[str], modality: str) -> tuple[list[Sample], list[str], dict[str, str]]:
    """The samples, their labels, and rows that are none with the reason."""
    folder, remote = Path(data), is_url(os.fspath(data))
    if not remote and not folder.exists():
        raise FileNotFoundError(2, "data: no such folder or manifest", str(data))
    if remote or not folder.is_dir():
        manifest = Manifest(data, captions=("label",))
        samples = [manifest[i] for i in range(len(manifest))]
        if not samples:
            raise ValueError(f"{data}: expected rows with path and label, got none")
        return samples, [sample.texts["label"].strip() for sample in samples], dict(manifest.skipped)
    suffixes = suffixes_of(modality)
    samples, labels = [], []
    for sub in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for file in sorted(sub.rglob("*")):
            if file.is_file() and file.suffix.lower() in suffixes and not file.name.startswith("."):
                samples.append(Sample(str(file), str(file)))
                labels.append(sub.name)
    if not samples:
        raise ValueError(
            f"{data}: expected a folder for each class with {modality} files ({', '.join(suffixes)}), or a manifest "
            f"({', '.join(SUFFIXES)}) with columns path and label, got a folder without"
        )
    return samples, labels, {}
