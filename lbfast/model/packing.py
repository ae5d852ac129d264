"""Which tokens of a batch there are, and which of them are pooled."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Packing:
    """Captions laid end to end, so that no layer computes padding or what comes after the end of a text.

    Attributes:
        slots: (B, N) int64, the row of each token among the packed; 0 where there is none.
        tokens: (tokens,) int64, b * N + n of each packed row.
        ends: (B,) int64, the row of each caption's pooled token, its last.
        padding: (B, N) bool, True where there is no token.
    """

    slots: torch.Tensor
    tokens: torch.Tensor
    ends: torch.Tensor
    padding: torch.Tensor

    @classmethod
    def of(cls, lengths: torch.Tensor) -> Packing:
        """For captions of these lengths, (B,) int64, each >= 1. Waits for the device: the sizes depend on the data."""
        longest = int(lengths.max())
        valid = torch.arange(longest, device=lengths.device) < lengths[:, None]
        ends = lengths.cumsum(0) - 1
        slots = (valid.flatten().cumsum(0) - 1).view_as(valid) * valid
        return cls(slots, valid.flatten().nonzero()[:, 0], ends, ~valid)

    def to(self, device: torch.device) -> Packing:
        later = device.type != "cpu"
        return Packing(*(getattr(self, field.name).to(device, non_blocking=later) for field in fields(self)))

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, ...) -> (B, N, ...), with some token's values in the padding."""
        return x.index_select(0, self.slots.flatten()).unflatten(0, self.slots.shape)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, ...) -> (tokens, ...)."""
        return x.flatten(0, 1).index_select(0, self.tokens)


@dataclass(frozen=True)
class Padded:
    """Captions below each other, with what comes after their ends: Packing for where no size may depend on the data.

    Attributes:
        ends: (B,) int64, b * N + n of each caption's pooled token.
        padding: (B, N) bool, True after it.
    """

    ends: torch.Tensor
    padding: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor) -> Padded:
        """For captions (B, N), the pooled token of each its first largest id."""
        last = ids.argmax(dim=-1)
        columns = torch.arange(ids.shape[1], device=ids.device)
        rows = torch.arange(0, ids.numel(), ids.shape[1], device=ids.device)
        return cls(rows + last, columns > last[:, None])

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, ...) as it is: attention is causal, so that what comes after a caption's end never reaches it."""
        return x

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        return x


def pooled_tokens(x: torch.Tensor, packing: Packing | Padded | None) -> torch.Tensor:
    """The tokens that are pooled: the first of each row of x (B, N, D), or the captions' ends -> (B, 1, D)."""
    return x[:, :1] if packing is None else x.reshape(-1, x.shape[-1])[packing.ends, None]
