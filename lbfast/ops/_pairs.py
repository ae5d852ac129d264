"""What the losses over all pairs of images and texts share: arguments, memory, blocks of pairs, products, sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lbfast import dispatch, distributed

_ROUNDING_HEADROOM = 4096.0  # fp16 rounds dS scaled up by this, so that probabilities of 1/B stay normal numbers
_GPU_WORKSPACE_MIB = 256

INTERPRETER_KNOWS_BFLOAT16 = False
"""Tests that have put Triton's interpreter right say so."""


def check(
    op: str, image_embeds: torch.Tensor, text_embeds: torch.Tensor, ids: torch.Tensor | None, workspace_mib: int | None
) -> None:
    """Raises on arguments that are wrong for every loss."""
    for name, x in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
        if not x.is_floating_point():
            raise TypeError(f"{op}: {name}: expected a floating dtype, got {x.dtype}")
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(f"{op}: {name}: expected (B, D), got {tuple(x.shape)}")
    if image_embeds.shape[1] != text_embeds.shape[1] or len(text_embeds) < len(image_embeds):
        raise ValueError(
            f"{op}: text_embeds: expected image_embeds' shape {tuple(image_embeds.shape)}, or more rows, "
            f"got {tuple(text_embeds.shape)}"
        )
    if image_embeds.device != text_embeds.device:
        raise ValueError(f"{op}: text_embeds: expected on {image_embeds.device}, got {text_embeds.device}")
    if ids is not None:
        if ids.is_floating_point() or ids.is_complex():
            raise TypeError(f"{op}: ids: expected integers, got {ids.dtype}")
        if ids.shape != text_embeds.shape[:1]:
            raise ValueError(f"{op}: ids: expected ({text_embeds.shape[0]},), got {tuple(ids.shape)}")
    if workspace_mib is not None and workspace_mib < 1:
        raise ValueError(f"{op}: workspace_mib: expected at least 1, got {workspace_mib}")


def number(op: str, name: str, x: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """A factor or an offset as a tensor of no dimensions on the embeddings' device. Raises on anything else."""
    if not isinstance(x, torch.Tensor):
        x = torch.tensor(float(x), dtype=torch.float64)
    if x.numel() != 1:
        raise ValueError(f"{op}: {name}: expected one element, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name}: expected a floating dtype, got {x.dtype}")
    return x.reshape(()).to(device)


def alike(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the wider of their dtypes; under autocast in its dtype, as a matrix product would be."""
    dtype = torch.promote_types(image_embeds.dtype, text_embeds.dtype)
    if dtype != torch.float64:
        dtype = dispatch.autocast_dtype(image_embeds.device) or dtype
    return image_embeds.to(dtype), text_embeds.to(dtype)


def labels_of(ids: torch.Tensor, shards: distributed.Shards) -> torch.Tensor:
    """(total,) int32 on every rank: equal where ids are."""
    every = shards.gather_rows(ids.to(torch.int64)[:, None])[:, 0]
    return torch.unique(every, return_inverse=True)[1].to(torch.int32)


def workspace_bytes(device: torch.device, workspace_mib: int | None, on_cpu: int = 20) -> int:
    """Bytes of scratch; where none are asked for, `on_cpu` MiB, or what serves a GPU."""
    return (workspace_mib or (_GPU_WORKSPACE_MIB if device.type == "cuda" else on_cpu)) << 20


@dataclass(frozen=True)
class Block:
    """One rectangle of the matrix of logits: local images against some texts."""

    diag: int | None
    """Column of row 0's positive (row i's is diag + i); None where the rectangle holds no positives."""
    row_labels: torch.Tensor | None
    col_labels: torch.Tensor | None
    """(m,) and (n,) int32: a pair with equal labels that is no positive is left out."""
    workspace: int
    """Scratch memory, bytes."""

    def rows(self, part: slice) -> Block:
        """The same for some of the rows."""
        diag = None if self.diag is None else self.diag + part.start
        labels = None if self.row_labels is None else self.row_labels[part]
        return dataclasses.replace(self, diag=diag, row_labels=labels)

    def left_out(self, a: int, b: int) -> torch.Tensor | None:
        """(b - a, n) bool: what is left out of some rows; None without labels."""
        if self.row_labels is None or self.col_labels is None:
            return None
        same = self.row_labels[a:b, None] == self.col_labels
        if self.diag is not None:
            same.diagonal(self.diag + a)[: b - a].fill_(False)
        return same


@dataclass(frozen=True)
class Plan:
    """Who holds which rows, and how they meet."""

    shards: distributed.Shards
    """Of the images."""
    texts: distributed.Shards
    gather: str
    labels: torch.Tensor | None
    """(texts,) int32 on every rank."""
    workspace: int
    """As in Block."""

    @property
    def whole(self) -> bool:
        """Whether each rank has every rank's texts at once."""
        return self.shards.world == 1 or self.gather == "all"

    def where(self, owner: int | None) -> tuple[int | None, torch.Tensor | None, torch.Tensor | None, int]:
        """Of the local rows against the texts of rank `owner`, of every rank when None: what a Block begins with."""
        if owner is None:
            diag: int | None = self.texts.start(self.texts.rank)
            columns = slice(0, self.texts.total)
        else:
            diag = 0 if owner == self.texts.rank else None
            columns = self.texts.span(owner)
        if self.labels is None:
            return diag, None, None, self.workspace
        return diag, self.paired(self.labels), self.labels[columns], self.workspace

    def paired(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., texts) -> that of the texts of the local images, (..., images)."""
        start = self.texts.start(self.texts.rank)
        return x[..., start : start + self.shards.sizes[self.shards.rank]]


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """What sums are in: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in float64, where the device has it."""
    return x if x.device.type == "mps" else x.double()


def sum_wide(x: torch.Tensor) -> torch.Tensor:
    """Sum of x in float64, where the device has it."""
    return x.sum() if x.device.type == "mps" else x.sum(dtype=torch.float64)


def row_spans(m: int, n: int, dtype: torch.dtype, workspace: int) -> Iterator[tuple[int, int]]:
    """Rows at a time whose logits against n columns, four times over, fit into the workspace."""
    step = max(1, workspace // max(1, 4 * n * torch.finfo(accumulation(dtype)).bits // 8))
    return ((a, min(a + step, m)) for a in range(0, m if n else 0, step))


def operand(x: torch.Tensor) -> torch.Tensor:
    """CPU: 16-bit inputs in float32, for torch has no product of 16-bit matrices with a float32 result there."""
    return x if x.is_cuda or x.dtype == torch.float64 else x.float()


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32 (float64), whatever b's dtype; a is rounded to b's."""
    if b.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=torch.float32)
    if b.dtype == torch.float16:
        return torch.mm(a.mul(_ROUNDING_HEADROOM).half(), b, out_dtype=torch.float32).div_(_ROUNDING_HEADROOM)
    return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)


def native_operand(x: torch.Tensor) -> torch.Tensor:
    """For csrc/cpu/pairs.h: bfloat16 where the machine multiplies it (D even); other 16-bit inputs in float32."""
    pairs = x.dtype == torch.bfloat16 and x.shape[1] % 2 == 0 and torch.ops.lbfast.has_bf16_gemm()
    return x.contiguous() if pairs else x.float().contiguous()


def _why_not_triton(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> list[str]:
    reasons = dispatch.why_not_triton(image_embeds, text_embeds)
    if image_embeds.dtype == torch.float64:
        reasons = [*reasons, "float64 is computed by the torch implementation"]
    if image_embeds.dtype == torch.bfloat16 and dispatch.triton_interpreted() and not INTERPRETER_KNOWS_BFLOAT16:
        reasons = [*reasons, "Triton's interpreter multiplies bfloat16 wrongly"]
    return reasons


def _why_not_native(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> list[str]:
    reasons = dispatch.why_not_native(image_embeds, text_embeds)
    if image_embeds.dtype == torch.float64:
        reasons = [*reasons, "float64 is computed by the torch implementation"]
    return reasons


def _why_not_torch(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> list[str]:
    return []


REASONS: dict[str, dispatch.Reasons] = {
    "triton": _why_not_triton,
    "native": _why_not_native,
    "torch": _why_not_torch,
}
"""In order of preference; of (image_embeds, text_embeds)."""
