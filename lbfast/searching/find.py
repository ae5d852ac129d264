"""`lbfast.search`: texts and files -> the rows of a table that are nearest, exactly."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lbfast.embedding.embedder import Embedder, check_count
from lbfast.searching.table import Table, models_of

_SHORT = 1e-16
"""Rows that are shorter have squares that float32 rounds, or loses; their cosines are float64's."""


@dataclass(frozen=True)
class Hit:
    """A row that was found.

    Attributes:
        score: its cosine with the query, -1 to 1.
        row: its number in the table, from 0.
        id, modality, path, model: as the table has them; "" where it has none.
        start_sec, end_sec: the part of the file; None: all of it.
    """

    score: float
    row: int
    id: str = ""
    modality: str = ""
    path: str = ""
    model: str = ""
    start_sec: float | None = None
    end_sec: float | None = None


@dataclass(frozen=True)
class Found:
    """A query, and what is nearest to it, the nearest first."""

    query: Any
    hits: list[Hit]


def search(
    embeddings: str | os.PathLike[str],
    queries: Any,
    *,
    models: Sequence[str | os.PathLike[str]] | Embedder | None = None,
    query_modality: str | None = None,
    modality: str | None = None,
    top: int = 10,
    device: str = "auto",
) -> list[Found]:
    """Finds the rows of a table of embeddings that are nearest to texts, files, or embeddings.

    Exact: every row is compared, block by block, in memory that does not grow with the table. Of rows that are equally
    near the first comes first. Rows without an embedding, or with one that is zero or not finite, are never found.

    Args:
        embeddings: a Parquet file of `lbfast embed`, or any with a column `embedding` of lists of floats; or a folder
            of them.
        queries: a text, a Path, or a list of what `Embedder.encode` takes; or embeddings, (q, E).
        models: to embed the queries with: checkpoints, or an `Embedder`. None: those that made the table.
        query_modality: of all queries, see `Embedder.encode`.
        modality: find rows of this one only.
        top: how many for each query.
        device: for the model; the search itself is the CPU's.

    Returns:
        For each query its hits, the nearest first; fewer than `top` where there are no more.

    Raises:
        FileNotFoundError, ValueError: no such table, or no embeddings in it. TypeError, ValueError: an argument is
        wrong, the table does not say its models, or theirs are of another size. BadFileError: a query cannot be
        embedded.
    """
    check_count("top", top, 1)
    table = Table(embeddings)
    if isinstance(queries, np.ndarray | torch.Tensor):
        items: list[Any] = list(range(len(queries)))
        vectors = np.asarray(queries, dtype=np.float32)
        if vectors.ndim != 2 or not np.isfinite(vectors).all():
            raise ValueError(f"queries: expected finite embeddings (q, E), got shape {vectors.shape}")
    else:
        if isinstance(queries, Set | Mapping):
            raise TypeError(f"queries: expected a text, a path, or a list, got {type(queries).__name__}")
        items = [queries] if isinstance(queries, str | bytes | os.PathLike) else list(queries)
        if not items:
            raise ValueError("queries: expected at least one, got none")
        for number, item in enumerate(items):
            if isinstance(item, str):
                check_text(f"queries[{number}]", item)
        embedder = models if isinstance(models, Embedder) else embedder_of(table, models, device)
        vectors = embedder.encode(items, query_modality)
    scores, numbers = nearest(table, vectors, top, modality)
    details = table.details([number for row in numbers for number in row.tolist()])
    return [
        Found(item, [_hit(score, number, details[number]) for score, number in zip(s.tolist(), n.tolist())])
        for item, s, n in zip(items, scores, numbers)
    ]


def check_text(name: str, text: str) -> None:
    """Raises ValueError where a text to search for says nothing."""
    if not text.strip():
        raise ValueError(f"{name}: expected a text to search for, got {'an empty one' if not text else 'only spaces'}")


def _hit(score: float, number: int, details: dict[str, Any]) -> Hit:
    known: dict[str, Any] = {name: str(details.get(name) or "") for name in ("id", "modality", "path", "model")}
    for name in ("start_sec", "end_sec"):
        value = details.get(name)
        known[name] = float(value) if isinstance(value, int | float) else None
    return Hit(score, number, **known)


def embedder_of(table: Table, models: Sequence[str | os.PathLike[str]] | None = None, device: str = "auto") -> Embedder:
    """The embedder of a table's queries: its models, and as many numbers in the same precision.

    Args:
        models: instead of those that the table names.
    """
    named = models_of(table.settings)
    if not models and not named:
        raise ValueError(f"models: expected some, for {table.where} does not say which have made it")
    dtype = table.settings.get("dtype")
    dim = table.settings.get("dim")
    made = Embedder(
        list(models or named),
        dtype=dtype if dtype in ("float32", "bfloat16", "float16") else "auto",
        dim=dim if isinstance(dim, int) else None,
        device=device,
    )
    if not models:
        _check_unchanged(table, made)
    return made


def _check_unchanged(table: Table, embedder: Embedder) -> None:
    """Warns where a model's files are others than those that made the table."""
    for name, (_, before) in table.settings["models"].items():
        now = embedder.checkpoints.get(name)
        if now is not None and now.fingerprint() != before:
            warnings.warn(
                f"{now.name}: its files have another size, time or configuration than when {table.where} was made",
                stacklevel=3,
            )


def nearest(
    table: Table, queries: np.ndarray, top: int, modality: str | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each query the scores, float32, and numbers of the rows with the highest cosines, the highest first.

    Args:
        queries: (q, E) float32, of any length but zero.

    Raises ValueError where E is not the table's.
    """
    size = queries.shape[1]
    if table.size is not None and table.size != size:
        raise ValueError(f"{table.where}: expected embeddings of {size} numbers, as the queries', got {table.size}")
    given = torch.from_numpy(np.array(queries, dtype=np.float64))
    wanted = torch.nn.functional.normalize(given, dim=-1, eps=1e-300).float()
    none = (np.empty(0, np.float32), np.empty(0, np.int64))
    best = [none for _ in range(len(queries))]
    for numbers, rows in table.blocks(size, modality):
        cosines = _cosines(rows, wanted).numpy()
        best = [_merged(kept, scores, numbers, top) for kept, scores in zip(best, cosines)]
    return [scores for scores, _ in best], [numbers for _, numbers in best]


def _cosines(rows: np.ndarray, queries: torch.Tensor) -> torch.Tensor:
    """(n, E) and (q, E) of unit length -> (q, n); -inf for rows that are zero or not finite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory that is not to be written to
        block = torch.from_numpy(rows)
    lengths = torch.linalg.vector_norm(block, dim=-1)
    cosines = (queries @ block.T) / lengths
    odd = ~((lengths >= _SHORT) & (lengths < torch.inf))
    if odd.any():
        exact = block[odd].double()
        exact_lengths = torch.linalg.vector_norm(exact, dim=-1)
        found = (queries.double() @ exact.T / exact_lengths).float()
        cosines[:, odd] = found.masked_fill_(exact_lengths == 0, -torch.inf)
    return cosines.masked_fill_(~torch.isfinite(cosines), -torch.inf)


def _merged(
    kept: tuple[np.ndarray, np.ndarray], scores: np.ndarray, numbers: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best of what was kept and of a block: the highest scores, and of equal ones the lowest numbers."""
    least = kept[0][-1] if len(kept[0]) == top else -np.inf
    if len(scores) > top:
        least = max(least, np.partition(scores, -top)[-top])
    candidates = np.flatnonzero((scores >= least) & (scores > -np.inf))
    if not len(candidates):
        return kept
    both = np.concatenate([kept[0], scores[candidates]]), np.concatenate([kept[1], numbers[candidates]])
    order = np.lexsort((both[1], -both[0]))[:top]
    return both[0][order], both[1][order]
