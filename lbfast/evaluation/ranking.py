"""At which rank a query finds what belongs to it: exact, without ever holding the matrix of similarities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

TIE = 1e-9
"""Cosines this near, computed in float64, are equal: the order of summation decides nothing."""


@dataclass(frozen=True)
class Ranking:
    """What a set of queries found.

    Attributes:
        queries, gallery: how many there were.
        recall: k -> share of the queries with a match among the first k.
        median_rank, mean_rank: of each query's first match; 1 is the best.
    """

    queries: int
    gallery: int
    recall: dict[int, float]
    median_rank: float
    mean_rank: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON: {"queries", "gallery", "recall": {"1": ...}, "median_rank", "mean_rank"}."""
        return {**asdict(self), "recall": {str(k): value for k, value in self.recall.items()}}


def ranks(
    queries: torch.Tensor, gallery: torch.Tensor, matches: torch.Tensor | None = None, *, chunk: int = 1024
) -> torch.Tensor:
    """The rank of each query's best match: 1 + the non-matches that are at least as similar.

    A tie with what is no match counts against the query. Other matches of the same query never do. Similarity is the
    cosine, in float64. Memory is linear in rows: chunk x chunk similarities at a time.

    Args:
        queries: (Q, E), gallery: (G, E): floating point, on one device; normalised here.
        matches: (P, 2) integers, pairs (query, gallery) in any order; a query may have several. None: Q = G, and query
            i's match is i.
        chunk: rows at a time.

    Returns:
        (Q,) int64; 0 where a query has no match.

    Raises:
        TypeError: dtypes. ValueError: shapes, indices, or embeddings that are not finite or zero.
    """
    matches = _check(queries, gallery, matches)
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    matches = matches[matches[:, 0].argsort(stable=True)]
    best = torch.full((len(queries),), -torch.inf, dtype=torch.float64, device=queries.device)
    for part in matches.split(chunk):
        cosines = (_unit(queries[part[:, 0]]) * _unit(gallery[part[:, 1]])).sum(-1)
        best.scatter_reduce_(0, part[:, 0], cosines, "amax")
    ahead = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    starts = torch.arange(0, len(queries) + chunk, chunk, device=queries.device)
    ends = torch.searchsorted(matches[:, 0].contiguous(), starts).tolist()
    for number, first in enumerate(range(0, len(queries), chunk)):
        block = _unit(queries[first : first + chunk])
        enough = best[first : first + chunk, None] - TIE
        mine = matches[ends[number] : ends[number + 1]]
        for left in range(0, len(gallery), chunk):
            cosines = block @ _unit(gallery[left : left + chunk]).T
            here = mine[(mine[:, 1] >= left) & (mine[:, 1] < left + chunk)]
            cosines[here[:, 0] - first, here[:, 1] - left] = -torch.inf
            ahead[first : first + chunk] += (cosines >= enough).sum(1)
    return torch.where(best == -torch.inf, 0, ahead + 1)


def summarise(found: torch.Tensor, gallery: int, ks: Sequence[int] = (1, 5, 10)) -> Ranking:
    """Recalls, median and mean of `ranks`; queries without a match (0) do not count. ValueError where none has one."""
    found = found[found > 0].sort().values
    if not len(found):
        raise ValueError("matches: expected at least one query with a match, got none")
    middle = found[(len(found) - 1) // 2 : len(found) // 2 + 1].double().mean()
    recall = {k: (found <= k).double().mean().item() for k in ks}
    return Ranking(len(found), gallery, recall, middle.item(), found.double().mean().item())


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows.double(), dim=-1)


def _check(queries: torch.Tensor, gallery: torch.Tensor, matches: torch.Tensor | None) -> torch.Tensor:
    for name, rows in (("queries", queries), ("gallery", gallery)):
        if not rows.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {rows.dtype}")
        if rows.dim() != 2:
            raise ValueError(f"{name}: expected (rows, E), got shape {tuple(rows.shape)}")
        for number, part in enumerate(rows.split(1 << 16)):
            good = torch.isfinite(part).all(-1) & part.any(-1)
            if not good.all():
                row = (number << 16) + int((~good).nonzero()[0])
                raise ValueError(f"{name}: expected finite embeddings other than zero, got another in row {row}")
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"gallery: expected embeddings of size {queries.shape[1]}, got {gallery.shape[1]}")
    if matches is None:
        if len(queries) != len(gallery):
            raise ValueError(f"gallery: expected {len(queries)} rows, as many as queries, got {len(gallery)}")
        return torch.arange(len(queries), device=queries.device)[:, None].expand(-1, 2)
    if matches.is_floating_point() or matches.dim() != 2 or matches.shape[1] != 2:
        raise ValueError(f"matches: expected integers (P, 2), got {matches.dtype} {tuple(matches.shape)}")
    matches = matches.to(queries.device, torch.int64)
    limits = torch.tensor([len(queries), len(gallery)], device=queries.device)
    if ((matches < 0) | (matches >= limits)).any():
        raise ValueError(f"matches: expected indices below {limits.tolist()}, got others")
    return matches
