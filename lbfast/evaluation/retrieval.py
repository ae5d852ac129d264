"""Retrieval in both directions: a modality and its captions, or two modalities."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from lbfast.data.manifest import Manifest
from lbfast.data.reader import check_views, open_sources
from lbfast.data.sample import Sample, candidates
from lbfast.evaluation.encoder import Encoder
from lbfast.evaluation.ranking import Ranking, ranks, summarise
from lbfast.evaluation.report import Report, nothing_left

KS = (1, 5, 10)


def retrieve(
    first: torch.Tensor,
    second: torch.Tensor,
    matches: torch.Tensor | None = None,
    *,
    ks: Sequence[int] = KS,
    chunk: int = 1024,
) -> tuple[Ranking, Ranking]:
    """Retrieval of `second` by `first`, and of `first` by `second`.

    Args:
        first: (M, E), second: (N, E): embeddings; normalised here.
        matches: (P, 2) pairs (first, second): an item may have several captions, and a caption several items; a query's
            rank is that of its best match. None: M = N, and row i belongs to row i.
        ks: recalls.
        chunk: rows at a time; memory is linear in M, N and P.

    Raises:
        See `ranks`; ValueError where there is no match at all.
    """
    back = None if matches is None else matches.flip(1)
    there = summarise(ranks(first, second, matches, chunk=chunk), len(second), ks)
    return there, summarise(ranks(second, first, back, chunk=chunk), len(first), ks)


def retrieve_files(
    encoder: Encoder,
    data: Any,
    *,
    captions: Mapping[str, float] | None = None,
    media: str | None = None,
    split: str = "first",
    ks: Sequence[int] = KS,
) -> Report:
    """Retrieval between media and captions. What cannot be read is skipped and counted.

    Rows with the same file are one item with several captions; rows with the same caption, one caption of several
    items. Every view that `captions` gives a weight above 0 is a caption.

    Args:
        encoder: of the modality.
        data, captions, media, split: manifests or shards, as in `lbfast.training.batches.Batches`.

    Raises:
        FileNotFoundError, ValueError: no such data, or none in it that can be used.
    """
    check_views(captions)
    sources = open_sources(data, encoder.modality, captions=captions, media=media, split=split)
    skipped = {key: reason for source in sources for key, reason in source.skipped.items()}
    items: dict[Hashable, Sample] = {}
    links: list[tuple[Hashable, str]] = []
    for source in sources:
        for index in range(len(source)):
            sample = source[index]
            try:
                texts = [text for text, _ in candidates(sample.captions(), captions)]
            except ValueError as error:
                skipped[sample.path] = str(error)
                continue
            if not texts:
                skipped[sample.path] = "no caption"
                continue
            items.setdefault(sample.media, sample)
            links += [(sample.media, text) for text in texts]
    embeds, place = _embed(encoder, items, skipped)
    links = [(item, text) for item, text in links if item in place]
    if not links:
        raise nothing_left(data, skipped)
    known = {text: i for i, text in enumerate(dict.fromkeys(text for _, text in links))}
    matches = torch.tensor(sorted({(place[item], known[text]) for item, text in links}))
    there, back = retrieve(embeds, encoder.texts(list(known)).to(embeds.device), matches, ks=ks)
    counts = {"items": len(embeds), "captions": len(known), "pairs": len(matches)}
    name = encoder.modality
    return Report("retrieval", {f"{name} -> text": there, f"text -> {name}": back}, counts, skipped)


def pair_files(
    modalities: Sequence[str],
    open_encoder: Callable[[str], Encoder],
    data: str | os.PathLike[str],
    *,
    ks: Sequence[int] = KS,
) -> Report:
    """Retrieval between two modalities, from a manifest with a column of paths named after each.

    A file in several rows is one item with several matches.

    Args:
        modalities: two of them.
        open_encoder: modality -> its encoder; one is held at a time.
        data: the manifest.

    Raises:
        FileNotFoundError, ValueError: no such manifest or columns, or no pair of which both can be read.
    """
    if len(set(modalities)) != 2 or len(modalities) != 2:
        raise ValueError(f"modalities: expected two, got {', '.join(modalities) or 'none'}")
    manifest = Manifest(data, path=modalities[0], captions=(modalities[1],))
    skipped = dict(manifest.skipped)
    links: list[tuple[Any, Any]] = []
    for index in range(len(manifest)):
        sample = manifest[index]
        links.append((sample.media, manifest.beside(sample.texts[modalities[1]])))
    embeds: list[torch.Tensor] = []
    places: list[dict[Hashable, int]] = []
    for side, modality in enumerate(modalities):
        items: dict[Hashable, Sample] = {link[side]: Sample(os.fspath(link[side]), link[side]) for link in links}
        rows, place = _embed(open_encoder(modality), items, skipped)
        embeds.append(rows)
        places.append(place)
        links = [link for link in links if link[side] in place]
    if not links:
        raise nothing_left(data, skipped)
    matches = torch.tensor(sorted({(places[0][a], places[1][b]) for a, b in links}))
    there, back = retrieve(embeds[0], embeds[1], matches, ks=ks)
    first, second = modalities
    counts = {first: len(embeds[0]), second: len(embeds[1]), "pairs": len(matches)}
    return Report("retrieval", {f"{first} -> {second}": there, f"{second} -> {first}": back}, counts, skipped)


def _embed(
    encoder: Encoder, items: Mapping[Hashable, Sample], skipped: dict[str, str]
) -> tuple[torch.Tensor, dict[Hashable, int]]:
    """Embeddings (n, E) of the items that can be embedded, on the encoder's device, and the row of each."""
    embeds, kept = encoder.media(list(items.values()), skipped.__setitem__)
    names = list(items)
    return embeds.to(encoder.device), {names[number]: row for row, number in enumerate(kept)}
