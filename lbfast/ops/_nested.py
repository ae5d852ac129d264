"""Nested InfoNCE (Matryoshka): the mean of the losses of the renormalised first d numbers of each row, d in several.

With r_d the reciprocal norms of the first d numbers, the logits of d are

    z_d = scale * r_d(x) * r_d(y) * (x[:, :d] @ y[:, :d].T)

and the products in brackets are partial sums of one: all losses cost one product, and in the backward

    dx[:, s] = sum over d that have s of (G_d) @ y[:, s] - (sum of R_d r_d(x)^2) x[:, s],  G_d = dS_d r_d(x) r_d(y)

where s are the numbers from one d to the next, and R_d, of a row, sums dS_d times the cosine: what the norms owe.
`fused` does that where csrc/cpu/info_nce_nested.cpp serves; elsewhere the losses are those of as many calls.

Exponentials have one shift, a constant of the scale: cosines are at most 1. Positives stay out of their sums: with
r = sum of exp(z - z_positive) over the negatives, a loss is log(1 + r), and its slope r / (1 + r), which no rounding
of a probability near 1 can reach.

Source: Kusupati et al., arXiv 2205.13147.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lbfast.ops import _pairs
from lbfast.ops._pairs import Plan, wide

FEWEST = 4
"""Numbers of a prefix that `fused` takes: the gradient of fewer is what little cancelling leaves of large terms."""
_LARGEST_SCALE = 100.0
_SHIFT = 46 * math.log(2)
"""Of exponents of scales above 60, 46 of the powers of two that the kernel makes."""
_LEAST = 2.0**-90
"""Smaller sums of exponentials are not trusted: what underflows is below 2^-126."""
_EPSILON = 1e-12
"""Shorter rows count as so long, as in F.normalize."""


def prefixes_of(dims: Sequence[int], dim_weights: Sequence[float] | None, d: int) -> dict[int, float]:
    """{first d numbers: share of its loss}, by rising d; shares sum to 1. Raises on what are no prefixes."""
    dims = tuple(dims)
    if not dims or len(set(dims)) != len(dims) or any(isinstance(x, bool) or not isinstance(x, int) for x in dims):
        raise ValueError(f"info_nce: dims: expected integers that differ, got {dims}")
    if min(dims) < 1 or max(dims) > d:
        raise ValueError(f"info_nce: dims: expected numbers from 1 to D = {d}, got {dims}")
    weights = tuple(dim_weights) if dim_weights is not None else (1.0,) * len(dims)
    if len(weights) != len(dims) or not all(0 <= w < float("inf") for w in weights) or not sum(weights) > 0:
        raise ValueError(
            f"info_nce: dim_weights: expected a number of at least 0 for each of dims {dims}, not all 0, got {weights}"
        )
    return {size: float(weight) / sum(weights) for size, weight in sorted(zip(dims, weights)) if weight}


def facts(shares: dict[int, float] | None) -> dict[str, float]:
    """What must be the same on every rank, by the names of `distributed.Shards.agree`."""
    given = shares or {}
    mixed = sum((i + 1) * 1e6 * d + share for i, (d, share) in enumerate(given.items()))
    return {"how many dims": len(given), "dims and dim_weights, mixed": mixed}


@dataclass(frozen=True)
class Sums:
    """Of a fused forward: what its backward needs."""

    ends: list[int]
    shift: float
    y: torch.Tensor
    """(n, D), every rank's."""
    x_factors: torch.Tensor
    y_factors: torch.Tensor
    """(P, m) and (P, n): reciprocal norms."""
    row_ratios: torch.Tensor
    col_ratios: torch.Tensor
    """(P, m) float64: sums of exp(z - z of the positive) over the negatives of the local images, and of their texts."""
    row_weights: torch.Tensor
    col_weights: torch.Tensor
    """(P, m) and (P, n): probabilities are exp(z - shift) times these."""


def fused_sums(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, plan: Plan, dims: Sequence[int]) -> Sums | None:
    """All prefixes' sums from one product, or None where one shift does not serve: other ways then do.

    Every rank of the group calls it and gets an answer of the same kind.
    """
    ends, shards, texts = list(dims), plan.shards, plan.texts
    factor = float(scale)
    shift = 0.0 if abs(factor) <= 60 else _SHIFT
    x, y = x[:, : ends[-1]], texts.gather_rows(y[:, : ends[-1]])
    even = all(end % 2 == 0 for end in ends)
    x_op, y_op = (_pairs.native_operand(e if even else e.float()) for e in (x, y))
    x_factors, y_factors = (torch.ops.lbfast.info_nce_nested_norms(e, ends) for e in (x_op, y_op))
    diag, row_labels, col_labels, _ = plan.where(None)
    rows, cols, cosines = torch.ops.lbfast.info_nce_nested_sums(
        x_op, y_op, factor, shift, x_factors, y_factors, ends, diag, row_labels, col_labels
    )
    cols = shards.sum(cols)
    relative = (shift - factor * cosines.double()).exp()  # 1 / exp(z of the positive - shift)
    row_ratios, col_ratios = rows * relative, plan.paired(cols) * relative
    own = 1 / relative
    row_weights, col_totals = 1 / (rows + own), torch.zeros_like(cols, dtype=torch.float64)
    plan.paired(col_totals).copy_(own)
    col_totals = shards.sum(col_totals) + cols
    for rank, images in enumerate(shards.sizes):  # texts without images have no loss
        col_totals[:, texts.start(rank) + images : texts.span(rank).stop] = torch.inf
    weights = (row_weights.float(), col_totals.reciprocal_().float())
    poor = [abs(factor) > _LARGEST_SCALE or not bool((rows + own >= _LEAST).all())]
    poor.append(not bool((weights[1] <= 1 / _LEAST).all()))
    if float(shards.sum(torch.tensor(float(any(poor))))):
        return None
    return Sums(ends, shift, y_op, x_factors, y_factors, row_ratios, col_ratios, *weights)


class Fused(torch.autograd.Function):
    """The weighted mean of the losses, from their sums."""

    @staticmethod
    def forward(ctx, image_embeds, text_embeds, scale, plan, sums, shares, direction):
        ratios = {"image": sums.row_ratios, "text": sums.col_ratios}
        sides = [side for name, side in ratios.items() if direction in (name, "both")]
        share = torch.tensor(shares, dtype=torch.float64)
        total = sum((share @ side.log1p()).sum() for side in sides)
        ctx.plan, ctx.sums, ctx.direction = plan, sums, direction
        ctx.count = len(sides) * plan.shards.total
        ctx.save_for_backward(image_embeds, text_embeds, scale, share)
        return (plan.shards.sum(total) / ctx.count).to(_pairs.accumulation(image_embeds.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, text_embeds, scale, share = ctx.saved_tensors
        plan, sums, direction = ctx.plan, ctx.sums, ctx.direction
        need_x, need_y, need_scale = ctx.needs_input_grad[:3]
        ends, factor = sums.ends, float(scale)
        x_op = _pairs.native_operand(x[:, : ends[-1]].to(sums.y.dtype))
        dx = x.new_zeros(x_op.shape, dtype=torch.float32) if need_x else None
        dy = x.new_zeros(sums.y.shape, dtype=torch.float32) if need_y else None
        by_prefix = share[:, None]
        row_weights, col_weights = (by_prefix * w for w in (sums.row_weights, sums.col_weights))
        exact = torch.zeros_like(sums.row_ratios)
        for name, ratios, weights in (
            ("image", sums.row_ratios, row_weights),
            ("text", sums.col_ratios, col_weights),
        ):
            if direction in (name, "both"):
                exact -= by_prefix * ratios / (1 + ratios)
            else:
                weights.zero_()
        diag, *labels, workspace = plan.where(None)
        row_dots, col_dots = torch.ops.lbfast.info_nce_nested_grads(
            *(x_op, sums.y, factor, sums.shift, sums.x_factors, sums.y_factors, ends),
            *(row_weights.float(), col_weights.float(), exact.float(), diag, *labels, workspace, dx, dy),
        )
        along = grad.float() * factor / ctx.count
        out: list[Any] = []
        for part, operand, factors, dots in (
            (dx, x_op, sums.x_factors, row_dots),
            (dy, sums.y, sums.y_factors, col_dots),
        ):
            if part is not None:
                _owed_by_norms(part, operand, factors, dots, ends)
                part.mul_(along)
            out.append(part)
        if need_y:
            out[1] = plan.texts.scatter_rows(out[1])
        ds = None
        if need_scale:
            ds = (plan.shards.sum(wide(row_dots).sum()) * grad / ctx.count).to(scale.dtype)
        grads = [None if part is None else _widened(part, e) for part, e in zip(out, (x, text_embeds))]
        return (*grads, ds, None, None, None, None)


def _owed_by_norms(
    part: torch.Tensor, x: torch.Tensor, factors: torch.Tensor, dots: torch.Tensor, ends: Sequence[int]
) -> None:
    """Subtracts from a gradient (rows, D) what lengthening a row takes from its cosines."""
    owed = (dots * factors.square()).flip(0).cumsum(0).flip(0)  # (P, rows), of what all wider prefixes have too
    for p, (a, b) in enumerate(zip([0, *ends[:-1]], ends)):
        part[:, a:b].addcmul_(x[:, a:b].to(part.dtype), owed[p][:, None], value=-1)


def _widened(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A gradient of the first numbers as one of all of them, in the embeddings' dtype."""
    if part.shape == like.shape:
        return part.to(like.dtype)
    out = torch.zeros_like(like)
    out[:, : part.shape[1]] = part
    return out


def composed(x: torch.Tensor, y: torch.Tensor, shares: dict[int, float], dtype: torch.dtype, loss: Any) -> torch.Tensor:
    """The weighted mean of loss(first d numbers of x, of y), renormalised, in `dtype`."""

    def prefix(e: torch.Tensor, d: int) -> torch.Tensor:
        part = e[:, :d].to(_pairs.accumulation(e.dtype))  # both parts of its gradient cancel where it is normed
        if d == 1:  # a sign, which no gradient moves: none is left to cancel
            return torch.where(part.abs() > _EPSILON, part.detach().sign(), part / _EPSILON).to(dtype)
        norm = torch.linalg.vector_norm(part, dim=1, keepdim=True)
        return (part / norm.clamp(min=_EPSILON)).to(dtype)

    parts = [share * loss(prefix(x, d), prefix(y, d)) for d, share in shares.items()]
    return torch.stack(parts).sum()
