"""Rows sharded over the ranks of a process group, any number on each: gather, scatter, ring, sums.

Without a group every function is the identity of one process. Errors of torch.distributed (a peer that died, a
time-out) pass through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


def world(group: Any) -> tuple[int, int]:
    """(rank, number of ranks) of `group`; (0, 1) for None."""
    if group is None:
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


@dataclass(frozen=True)
class Shards:
    """Who holds which rows of the concatenated batch."""

    group: Any
    rank: int
    sizes: tuple[int, ...]

    @classmethod
    def agree(
        cls, x: torch.Tensor, y: torch.Tensor, group: Any, place: tuple[int, int], **arguments: bool | float
    ) -> tuple[Shards, Shards]:
        """Learns every rank's number of rows of x (b, D) and of y (c, D).

        Args:
            arguments: what must be the same on every rank besides, by the name that an error gives it.

        Raises:
            ValueError: on every rank, when the ranks differ in D, in dtype or in `arguments`.
        """
        rank, ranks = place
        if ranks == 1:
            return cls(None, 0, (x.shape[0],)), cls(None, 0, (y.shape[0],))
        alike = {
            "D": x.shape[1],
            "bytes of the dtype": x.dtype.itemsize,
            "bfloat16": x.dtype == torch.bfloat16,
            "image_embeds.requires_grad": x.requires_grad,
            **arguments,
        }
        facts = torch.tensor([float(value) for value in (len(x), len(y), *alike.values())], dtype=torch.float64)
        facts = facts.view(torch.int64).to(x.device)  # their bits: no device needs to have float64
        every = [torch.empty_like(facts) for _ in range(ranks)]
        dist.all_gather(every, facts, group=group)
        table = torch.stack(every).cpu().view(torch.float64).tolist()
        differ = [
            f"{name} {', '.join(f'{row[i]:g}' for row in table)}"
            for i, name in enumerate(alike, start=2)
            if any(row[i] != table[0][i] for row in table)
        ]
        if differ:
            raise ValueError(
                f"group: expected the same D, dtype, arguments and inputs that require a gradient on every rank, got "
                f"on ranks 0 to {ranks - 1}: {'; '.join(differ)}"
            )
        return tuple(cls(group, rank, tuple(int(row[i]) for row in table)) for i in (0, 1))  # type: ignore[return-value]

    @property
    def world(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def start(self, rank: int) -> int:
        """First row of `rank` in the concatenated batch."""
        return sum(self.sizes[:rank])

    def span(self, rank: int) -> slice:
        """Rows of `rank` in the concatenated batch."""
        return slice(self.start(rank), self.start(rank) + self.sizes[rank])

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of x over the ranks, on every rank. x may be overwritten."""
        if self.world > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """(b, D) of every rank -> (total, D) on every rank."""
        if self.world == 1:
            return x
        longest = max(self.sizes)
        padded = x.new_zeros(longest, x.shape[1])
        padded[: x.shape[0]] = x
        out = x.new_empty(self.world, longest, x.shape[1])
        dist.all_gather(list(out.unbind(0)), padded, group=self.group)
        if min(self.sizes) == longest:
            return out.flatten(0, 1)
        return torch.cat([part[:size] for part, size in zip(out, self.sizes)])

    def scatter_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks of (total, D); each rank gets its own rows (b, D)."""
        if self.world == 1:
            return x
        if dist.get_backend(self.group) == "gloo":  # has no reduce-scatter on every version
            return self.sum(x)[self.span(self.rank)]
        longest = max(self.sizes)
        if min(self.sizes) != longest:
            parts = x.new_zeros(self.world, longest, x.shape[1])
            for part, rank in zip(parts, range(self.world)):
                part[: self.sizes[rank]] = x[self.span(rank)]
            x = parts.flatten(0, 1)
        out = x.new_empty(longest, x.shape[1])
        dist.reduce_scatter_tensor(out, x, group=self.group)
        return out[: self.sizes[self.rank]]

    def merge_statistics(self, stats: torch.Tensor) -> torch.Tensor:
        """Joins the softmax statistics (2, total) that each rank has of its own logits: [0] shift, [1] sum."""
        if self.world == 1:
            return stats
        shift = stats[0].clone()
        dist.all_reduce(shift, op=dist.ReduceOp.MAX, group=self.group)
        return torch.stack([shift, self.sum(stats[1] * (stats[0] - shift).exp())])

    def ring(self, x: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Passes x (b, D) round: yields (owner, the owner's x), the local one first, fetching the next meanwhile."""
        held = x.contiguous()
        for step in range(self.world):
            owner = (self.rank + step) % self.world
            if step + 1 == self.world:
                yield owner, held
                return
            coming, works = self._exchange(held, (owner + 1) % self.world)
            yield owner, held
            _wait(works)
            held = coming

    def pass_on(self, x: torch.Tensor, owner: int) -> torch.Tensor:
        """Sends x, which belongs to `owner`, one rank on along the ring; returns what came, that of the next owner."""
        if self.world == 1:
            return x
        coming, works = self._exchange(x, (owner + 1) % self.world)
        _wait(works)
        return coming

    def _exchange(self, x: torch.Tensor, next_owner: int) -> tuple[torch.Tensor, list[Any]]:
        """Starts sending x to the rank before this one and receiving `next_owner`'s from the rank after it."""
        coming = x.new_empty(self.sizes[next_owner], *x.shape[1:])
        to, source = ((self.rank + d) % self.world for d in (-1, 1))
        # the group is named by global ranks, except in p2p_ops's own arguments
        operations = []
        if x.numel():
            operations.append(dist.P2POp(dist.isend, x, dist.get_global_rank(self.group, to), self.group))
        if coming.numel():
            operations.append(dist.P2POp(dist.irecv, coming, dist.get_global_rank(self.group, source), self.group))
        return coming, dist.batch_isend_irecv(operations) if operations else []


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()
