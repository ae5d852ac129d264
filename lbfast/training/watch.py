"""Evaluation while a model is trained: what `lbfast eval` would print for the model of this step, to the last digit."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from lbfast.checkpoints import pick_dtype, ready
from lbfast.data.manifest import SUFFIXES, Manifest, caption_columns
from lbfast.data.sample import Sample
from lbfast.data.store import suffix_of
from lbfast.evaluation.encoder import Encoder
from lbfast.evaluation.report import Report
from lbfast.evaluation.retrieval import retrieve_files
from lbfast.evaluation.zero_shot import classify_files
from lbfast.model.languagebind import LanguageBindModel, model_dict
from lbfast.processing.media import is_url
from lbfast.processing.processor import transform_dict
from lbfast.training.engine import Place, full
from lbfast.training.recipes import Recipe

RAW, AVERAGES = "eval", "ema"
"""What the names of numbers begin with: those of the model, and of its weights' averages."""

T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated during a run, and when.

    Attributes:
        data: a folder with a folder a class or a manifest with labels, for zero-shot classification; manifests or
            shards with captions, for retrieval.
        tokenizer: for captions, that of the model.
        every: steps between evaluations; one is made at the end too. None: at the end alone.
        best: name of a number, such as "R@1", "text-depth/R@1", "top-1" or "ema/R@1": the checkpoint where it was
            largest is kept besides the last ones. None: none is.
        captions, media, split: of the data, as in `retrieve_files`.
        batch_size, workers, dtype: as in `lbfast eval`.
    """

    data: Sequence[str]
    tokenizer: Any
    every: int | None = None
    best: str | None = None
    captions: Mapping[str, float] | None = None
    media: str | None = None
    split: str = "first"
    batch_size: int = 32
    workers: int = 0
    dtype: str = "auto"


class Watch:
    """Evaluates the model of a run, on all processes together: each embeds a part, and all rank.

    Args:
        averages: whether the numbers of averaged weights are wanted too.

    Attributes:
        best: full name of the number that decides, or None.

    Raises:
        ValueError, FileNotFoundError: no such data, or no such number. Embeddings of language that is not trained are
        kept, and computed once.
    """

    def __init__(self, wanted: Evaluation, recipe: Recipe, place: Place, averages: bool):
        if wanted.every is not None and wanted.every < 1:
            raise ValueError(f"eval_every: expected at least 1, got {wanted.every}")
        self.wanted, self._place, self._frozen_text = wanted, place, not recipe.train_text
        self.task = task_of(wanted.data, wanted.captions, wanted.media)
        self._texts: dict[tuple[str, ...], torch.Tensor] = {}
        self.best = None if wanted.best is None else self._full_name(wanted.best, recipe, averages)

    def due(self, step: int, last: int) -> bool:
        """Whether an evaluation belongs to this step."""
        return step == last or (self.wanted.every is not None and step % self.wanted.every == 0)

    def __call__(self, model: LanguageBindModel, prefix: str) -> dict[str, float]:
        """Numbers by name, the same on every process, all of which call; the model stays as it is."""
        begun, wanted = time.perf_counter(), self.wanted
        with torch.random.fork_rng([self._place.device] if self._place.device.type == "cuda" else []):
            encoder = self._encoder(model)
            if self.task == "zero-shot":
                report = classify_files(encoder, wanted.data[0])
            else:
                report = retrieve_files(
                    encoder, list(wanted.data), captions=wanted.captions, media=wanted.media, split=wanted.split
                )
        del encoder
        gc.collect()
        found = {f"{prefix}/{name}": value for name, value in numbers(report).items()}
        if report.skipped:
            found[f"{prefix}/skipped"] = len(report.skipped)
        return {**found, f"{prefix}/seconds": round(time.perf_counter() - begun, 3)}

    def _encoder(self, model: LanguageBindModel) -> _Shared:
        """Of a copy, made as a checkpoint is opened."""
        wanted, place = self.wanted, self._place
        state = {name: full(value) for name, value in model.state_dict().items()}
        config: Any = copy.deepcopy(model.config)
        modality = config.modality.name
        dtype = pick_dtype(wanted.dtype, place.device)
        loaded = model_dict[modality].from_pretrained(None, config=config, state_dict=state, torch_dtype=dtype)
        return _Shared(
            ready(loaded, place.device, wanted.batch_size),
            transform_dict[modality](config),
            wanted.tokenizer,
            batch_size=wanted.batch_size,
            workers=wanted.workers,
            place=place,
            known=self._texts if self._frozen_text else None,
        )

    def _full_name(self, best: str, recipe: Recipe, averages: bool) -> str:
        known = names(self.task, recipe.modality)
        prefix, slash, rest = best.partition("/")
        found = best if slash and prefix in (RAW, AVERAGES) else f"{RAW}/{best}"
        prefix, _, rest = found.partition("/")
        if rest not in known:
            raise ValueError(f"best: expected one of {', '.join(known)} for {self.task}, got {best!r}")
        if prefix == AVERAGES and not averages:
            raise ValueError(f"best: expected a recipe with ema for {best!r}, got one without")
        return found


def task_of(
    data: Sequence[str], captions: Mapping[str, float] | None, media: str | None = None
) -> Literal["retrieval", "zero-shot"]:
    """Zero-shot where the data is a folder without shards or manifests, or a manifest with labels and no captions.

    Raises what opening a manifest does.
    """
    if not data:
        raise ValueError("eval: expected data, got none")
    path, remote = Path(data[0]), is_url(data[0])
    if len(data) > 1:
        return "retrieval"
    if not remote and path.is_dir():
        files = [file.suffix.lower() for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
        return "retrieval" if {".tar", *SUFFIXES} & set(files) else "zero-shot"
    if suffix_of(data[0]) in SUFFIXES and (remote or path.is_file()):
        try:
            Manifest(data[0], media or "path", caption_columns(captions))
        except ValueError:
            if captions is not None or media is not None:
                raise
            Manifest(data[0], captions=("label",))
            return "zero-shot"
    return "retrieval"


def numbers(report: Report) -> dict[str, float]:
    """The numbers of a report by name: recalls of both directions and their mean, or accuracies; median ranks."""
    found: dict[str, float] = {}
    if report.task == "zero-shot":
        (ranking,) = report.rankings.values()
        return {f"top-{k}": share for k, share in ranking.recall.items()}
    rankings = {name.replace(" -> ", "-"): ranking for name, ranking in report.rankings.items()}
    for k in next(iter(rankings.values())).recall:
        found[f"R@{k}"] = sum(ranking.recall[k] for ranking in rankings.values()) / len(rankings)
    for name, ranking in rankings.items():
        found |= {f"{name}/R@{k}": share for k, share in ranking.recall.items()}
        found[f"{name}/median rank"] = ranking.median_rank
    return found


def told(found: Mapping[str, float]) -> str:
    """Those that are worth a line: "R@1 94.0 %, R@5 99.1 %, 2.5 s, ema/R@1 94.4 %"."""
    parts = []
    for name, value in found.items():
        prefix, _, short = name.partition("/")
        of = "" if prefix == RAW else f"{prefix}/"
        if short == "seconds":
            parts.append(f"{value:.1f} s")
        elif short == "skipped":
            parts.append(f"{of}skipped {value:.0f}")
        elif "/" not in short:
            parts.append(f"{of}{short} {100 * value:.1f} %")
    return ", ".join(parts)


def names(task: str, modality: str) -> list[str]:
    """Of the numbers whose largest is the best."""
    if task == "zero-shot":
        return ["top-1", "top-5"]
    recalls = [f"R@{k}" for k in (1, 5, 10)]
    return [*recalls, *(f"{way}/{recall}" for way in (f"{modality}-text", f"text-{modality}") for recall in recalls)]


class _Shared(Encoder):
    """An encoder whose batches are spread over processes, each batch the one that a single process would make.

    Args:
        known: embeddings of texts that were asked for before, to be kept; None where they change.
    """

    def __init__(
        self, *arguments: Any, place: Place, known: dict[tuple[str, ...], torch.Tensor] | None, **options: Any
    ):
        super().__init__(*arguments, **options)
        self._place, self._known = place, known

    def media(
        self, samples: Sequence[Sample], on_skip: Callable[[str, str], None] | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        start, end = self._part(len(samples))
        skipped: list[tuple[str, str]] = []

        def embed() -> tuple[torch.Tensor, list[int], list[tuple[str, str]]]:
            rows, kept = super(_Shared, self).media(samples[start:end], lambda key, why: skipped.append((key, why)))
            return rows, [start + number for number in kept], skipped

        parts = self._together(embed)
        if on_skip is not None:
            for _, _, found in parts:
                for key, why in found:
                    on_skip(key, why)
        return torch.cat([rows for rows, _, _ in parts]), [number for _, kept, _ in parts for number in kept]

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        key = tuple(texts)
        if self._known is not None and key in self._known:
            return self._known[key]
        start, end = self._part(len(texts))
        embeds = torch.cat(self._together(lambda: super(_Shared, self).texts(texts[start:end])))
        if self._known is not None:
            self._known[key] = embeds
        return embeds

    def _part(self, count: int) -> tuple[int, int]:
        """This process's share of so many: whole batches."""
        batches, rank, world = -(-count // self.batch_size), self._place.rank, self._place.world
        edges = [min(count, batches * r // world * self.batch_size) for r in (rank, rank + 1)]
        return edges[0], edges[1]

    def _together(self, work: Callable[[], T]) -> list[T]:
        """What work() gave on each process, in their order. Where it fails on one, all of them raise."""
        if self._place.group is None:
            return [work()]
        found, failure = None, None
        try:
            found = work()
        except Exception as error:
            failure = error
        every: list[Any] = [None] * self._place.world
        told = None if failure is None else f"{type(failure).__name__}: {failure}"
        dist.all_gather_object(every, (found, told), group=self._place.group)
        if failure is not None:
            raise failure
        for rank, (_, said) in enumerate(every):
            if said is not None:
                raise RuntimeError(f"evaluation: process {rank} failed: {said}")
        return [part for part, _ in every]
