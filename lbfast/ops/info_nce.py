"""Symmetric InfoNCE over a large batch: exact, in memory linear in the batch, on one process or many."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from lbfast import dispatch, distributed
from lbfast.ops import _nested, _pairs
from lbfast.ops._dense import dense_info_nce
from lbfast.ops._pairs import accumulation, sum_wide, wide
from lbfast.ops._smoothing import smoothing_means, smoothing_partners, smoothing_start

_ROWS_AT_ONCE = 4096
"""Of 16-bit embeddings, in the backward: their gradients are summed in float32, and then rounded. Four times as many on
a GPU, which cuts them up as it likes."""

DIRECTIONS = ("both", "image", "text")


def info_nce(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor | float,
    *,
    ids: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    direction: Literal["both", "image", "text"] = "both",
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    group: Any = None,
    gather: Literal["all", "ring"] = "all",
    impl: str | None = None,
    workspace_mib: int | None = None,
) -> torch.Tensor:
    """Contrastive loss of image i against every text and of text i against every image; pair i is the positive.

        logits = logit_scale * image_embeds @ text_embeds.T
        loss = (cross_entropy(logits, arange(B)) + cross_entropy(logits.T[:B], arange(B))) / 2

    The logits are computed in tiles; the backward computes them again from the softmax statistics of each row and
    column, unless there was memory to keep them. Products of 16-bit inputs are accumulated in float32 and never
    rounded back to 16 bits before the softmax. Inputs are not normalised here, nor are 16-bit inputs converted:
    bfloat16 stays bfloat16. Under autocast the embeddings are cast to its dtype, as a matrix product would.

    Args:
        image_embeds, text_embeds: (B, D), floating point, one device, any strides. Of two dtypes the wider is taken.
            Either may need no gradient: its part of the backward is then skipped. text_embeds may have more rows: those
            after the B-th are negatives of every image, hard ones, say, and positives of none.
        logit_scale: the factor itself (not its logarithm): one element that may need a gradient, or a float.
        ids: integers, one for each row of text_embeds, or None; image i has that of text i. Rows that share an id are
            not negatives of each other (a caption that repeats).
        label_smoothing: in [0, 1): this share of the target is spread over the positive and all negatives of a row.
            Only with as many texts as images, both ways.
        direction: "both"; or one half: "image", each image against the texts, or "text", each text against the images.
        dims: of nested embeddings (Matryoshka), numbers of a row: the loss is the mean of those of the first d numbers
            of each row, divided by their length, for each d in dims. It equals the mean of as many calls, and is one
            product on a CPU ("native", without label smoothing or a ring, |logit_scale| up to 100).
        dim_weights: of that mean, one for each of dims, at least 0; None: all alike.
        group: a torch.distributed process group: each rank gives its own rows (any number, at least one in all), and
            the loss is that of the concatenated batch on every rank. Every rank must call forward and backward, with
            the same arguments and the same inputs requiring a gradient. A rank that dies raises on the others
            (RuntimeError, at the latest after the group's own time-out).
        gather: "all" collects every rank's texts on each rank; "ring" passes them round, so that no rank ever holds
            more than two ranks' worth of them.
        impl: "triton", "native" or "torch"; None chooses.
        workspace_mib: bound on the scratch memory for tiles, and on what is kept of them for the backward; speed, not
            results to more than rounding, depends on it. None: 20; on a GPU 256, and of bfloat16 embeddings
            exp(logits) are kept (2 B^2 bytes) where they take at most a quarter of the free memory.

    Returns:
        Scalar mean loss: float32 (float64 for float64 inputs). Gradients are those of this loss for the rank's own
        rows, and the whole gradient for logit_scale. NaN where an input is NaN or infinite.

    Raises:
        TypeError: a dtype is not floating point, or ids are no integers. ValueError: shapes don't fit, or ranks
        disagree about them. RuntimeError: `impl` cannot take these inputs (the message has every reason).

    Source: van den Oord et al., arXiv 1807.03748; CLIP, arXiv 2103.00020; tiles as in Inf-CLIP, arXiv 2410.17243.
    """
    _check_options(label_smoothing, direction, gather)
    _pairs.check("info_nce", image_embeds, text_embeds, ids, workspace_mib)
    device = image_embeds.device
    scale = _pairs.number("info_nce", "logit_scale", logit_scale, device)
    image_embeds, text_embeds = _pairs.alike(image_embeds, text_embeds)
    name = dispatch.choose("info_nce", impl, IMPLEMENTATIONS, image_embeds, text_embeds)
    if dim_weights is not None and dims is None:
        raise ValueError(f"info_nce: dim_weights: expected dims with them, got {tuple(dim_weights)} alone")
    shares = None if dims is None else _nested.prefixes_of(dims, dim_weights, image_embeds.shape[1])
    world = distributed.world(group)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        same = {
            "logit_scale.requires_grad": scale.requires_grad,
            "text_embeds.requires_grad": text_embeds.requires_grad,
            "direction": DIRECTIONS.index(direction),
            "ids given": ids is not None,
            "label_smoothing": label_smoothing,
            "gather='ring'": gather == "ring",
            **_nested.facts(shares),
        }
        shards, texts = distributed.Shards.agree(image_embeds, text_embeds, group, world, **same)
        if shards.total == 0:
            raise ValueError("info_nce: image_embeds: expected at least one row, got none")
        if label_smoothing and shards.sizes != texts.sizes:
            raise ValueError(
                f"info_nce: label_smoothing: expected 0 where there are more texts than images, got {label_smoothing}"
            )
        labels = None if ids is None or dispatch.aten_only() else _pairs.labels_of(ids, texts)
    if shares is not None:
        sums = None
        one_product = name == "native" and not label_smoothing and not dispatch.aten_only()
        one_product = one_product and min(shares) >= _nested.FEWEST
        if one_product and (shards.world == 1 or gather == "all"):
            scratch = _pairs.workspace_bytes(device, workspace_mib, on_cpu=48)
            nested_plan = _pairs.Plan(shards, texts, gather, labels, scratch)
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                sums = _nested.fused_sums(image_embeds, text_embeds, scale, nested_plan, list(shares))
        if sums is not None:
            return _nested.Fused.apply(
                image_embeds, text_embeds, scale, nested_plan, sums, list(shares.values()), direction
            )

        def plain(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return info_nce(
                image,
                text,
                scale,
                ids=ids,
                label_smoothing=label_smoothing,
                direction=direction,
                group=group,
                gather=gather,
                impl=impl,
                workspace_mib=workspace_mib,
            )

        # a CPU multiplies them in float32 anyway
        dtype = image_embeds.dtype if name == "triton" else accumulation(image_embeds.dtype)
        return _nested.composed(image_embeds, text_embeds, shares, dtype, plain)
    if shards.world == 1 and dispatch.aten_only():
        return dense_info_nce(image_embeds, text_embeds, scale, ids, label_smoothing, direction)
    workspace, room = _memory(image_embeds, texts.total, workspace_mib)
    smoothing = label_smoothing if shards.total > 1 else 0.0  # a row by itself has nothing to spread it over
    plan = _Plan(shards, texts, gather, labels, workspace, room, _implementation(name), smoothing, direction)
    return _InfoNCE.apply(image_embeds, text_embeds, scale, plan)


def _check_options(label_smoothing: float, direction: str, gather: str) -> None:
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"info_nce: label_smoothing: expected a number in [0, 1), got {label_smoothing}")
    if direction not in DIRECTIONS:
        raise ValueError(f"info_nce: direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if direction != "both" and label_smoothing:
        raise ValueError(f"info_nce: label_smoothing: expected 0 with one direction, got {label_smoothing}")
    if gather not in ("all", "ring"):
        raise ValueError(f"info_nce: gather: expected 'all' or 'ring', got {gather!r}")


def _memory(x: torch.Tensor, columns: int, workspace_mib: int | None) -> tuple[int, int]:
    """Bytes of scratch, and bytes that may be kept from the forward to the backward, for x (b, D)."""
    workspace = _pairs.workspace_bytes(x.device, workspace_mib)
    wanted = 2 * len(x) * columns
    if workspace_mib or not x.is_cuda or wanted <= workspace or torch.cuda.is_current_stream_capturing():
        return workspace, workspace
    idle = torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
    return workspace, max(workspace, (torch.cuda.mem_get_info(x.device)[0] + idle) // 4)


@dataclass(frozen=True)
class Block(_pairs.Block):
    """One rectangle of the matrix of logits, and what the softmaxes need to know of it."""

    room: int
    """Bytes that may be kept for the backward."""
    target: float
    """What dS has less of positives: 1 of each side; of smoothed targets their share of it."""


class Implementation(Protocol):
    """What computes one block; m rows, n columns, acc = float32 (float64 for float64 inputs)."""

    def stats(
        self, x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, block: Block, keep: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, list[torch.Tensor] | None]:
        """Softmax statistics: rows (2, m), cols (2, n), positives (m,) or None without any, and what was kept.

        Statistics are in acc: [0] a shift near the largest logit, [1] the sum of exp(logit - shift). `keep` says that
        the backward will see this very block, so that something of it may be kept.
        """
        ...

    def grads(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        scale: torch.Tensor,
        rows: torch.Tensor,
        cols: torch.Tensor,
        positives: torch.Tensor,
        block: Block,
        kept: list[torch.Tensor],
        dx: torch.Tensor | None,
        dy: torch.Tensor | None,
    ) -> None:
        """With dS = p_row + p_col - target delta: adds dS @ y to dx (m, D) and dS.T @ x to dy (n, D), both acc."""
        ...


@dataclass(frozen=True)
class _Plan(_pairs.Plan):
    room: int
    """As in Block."""
    implementation: Implementation
    smoothing: float
    direction: str

    @property
    def sides(self) -> int:
        return 2 if self.direction == "both" else 1

    def block(self, owner: int | None) -> Block:
        """The local rows against the texts of rank `owner`; of every rank when None."""
        return Block(*self.where(owner), self.room, self.sides * (1 - self.smoothing))

    def silence(self, rows: torch.Tensor, cols: torch.Tensor) -> None:
        """Makes the probabilities of what is no part of the loss 0: of rows or columns, and of texts without images."""
        if self.direction == "text":
            rows[1] = torch.inf
        if self.direction == "image":
            cols[1] = torch.inf
        for rank, images in enumerate(self.shards.sizes):
            cols[1, self.texts.start(rank) + images : self.texts.span(rank).stop] = torch.inf


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image_embeds, text_embeds, scale, plan):
        shards, texts, implementation = plan.shards, plan.texts, plan.implementation
        with torch.autocast(image_embeds.device.type, enabled=False):
            s = scale.to(accumulation(image_embeds.dtype))
            kept = None
            if plan.whole:
                y = texts.gather_rows(text_embeds)
                keep = any(ctx.needs_input_grad[:3])
                rows, cols, positives, kept = implementation.stats(image_embeds, y, s, plan.block(None), keep)
            else:
                y = text_embeds
                rows, cols, positives = _ring_stats(image_embeds, y, s, plan)
            rows[0].add_(positives, alpha=0)  # NaN where that is infinite, as only infinite numbers make it
            cols = shards.merge_statistics(cols)
            sides = {"image": rows, "text": plan.paired(cols)}
            chosen = [stats for side, stats in sides.items() if plan.direction in (side, "both")]
            shift, tail = torch.stack(chosen, 1)
            total = sum_wide((shift - positives) + tail.log())  # the first two first: where they are near, it is exact
            plan.silence(rows, cols)
            means: list[torch.Tensor] = []
            if plan.smoothing:
                means = [smoothing_means(e, shards, plan.labels) for e in (text_embeds, image_embeds)]
                total += wide(s) * _dot(image_embeds, smoothing_partners(text_embeds, means[0], plan.smoothing))
            loss = shards.sum(total) / (plan.sides * shards.total)
        ctx.plan, ctx.means = plan, len(means)
        ctx.save_for_backward(image_embeds, y, scale, rows, cols, positives, *means, *(kept or ()))
        return loss.to(s.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        image_embeds, y, scale, rows, cols, positives, *others = ctx.saved_tensors
        means, kept = others[: ctx.means], others[ctx.means :]
        plan, (need_x, need_y, need_s) = ctx.plan, ctx.needs_input_grad[:3]
        shards, texts = plan.shards, plan.texts
        with torch.autocast(image_embeds.device.type, enabled=False):
            acc = accumulation(image_embeds.dtype)
            s = scale.to(acc)
            factor = grad.to(acc) / (plan.sides * shards.total)
            slope = factor * s
            dx: Any = None
            dy: Any = None
            own = y[texts.span(texts.rank)] if plan.whole else y
            start: list[Any] = [None, None]
            if means:
                start = [
                    smoothing_start(e, mean, plan.smoothing) if need else None
                    for e, mean, need in ((own, means[0], need_x or not need_y), (image_embeds, means[1], need_y))
                ]
            if need_y:
                dy = y.new_zeros(y.shape, dtype=acc)
                if start[1] is not None:
                    (dy[texts.span(texts.rank)] if plan.whole else dy).copy_(start[1])
            if plan.whole:
                dx, ds = _row_grads(image_embeds, y, s, rows, cols, positives, plan, kept, need_x, dy, slope, start[0])
                if ds is None:
                    ds = _dot(y, dy)
                dy = texts.scatter_rows(dy) if need_y else None
            else:
                if need_x or not need_y:  # the scale's gradient comes from either side's
                    dx = start[0] if means else image_embeds.new_zeros(image_embeds.shape, dtype=acc)
                dy = _ring_grads(image_embeds, y, s, rows, cols, positives, plan, dx, dy)
                ds = _dot(image_embeds, dx) if dx is not None else _dot(y, dy)
                dx = _scaled(dx, slope, image_embeds) if need_x else None
            dy = _scaled(dy, slope, y) if need_y else None
            ds = (shards.sum(ds) * factor).to(scale.dtype) if need_s else None
        return dx, dy, ds, None


def _row_grads(x, y, s, rows, cols, positives, plan, kept, need_x, dy, factor, start):
    """dx (b, D) of x's dtype, times factor, or None; the scale's gradient before it, or None where only dy is made.

    Adds to dy; what is added to dx is start, of s's dtype, or None. Of 16-bit rows only
    so many at a time have their gradient in float32.
    """
    if not need_x and dy is not None:
        plan.implementation.grads(x, y, s, rows, cols, positives, plan.block(None), kept, None, dy)
        return None, None
    exact = x.dtype == s.dtype
    if exact:
        dx = x.new_zeros(x.shape) if start is None else start
    else:
        dx = x.new_empty(x.shape)
    ds = []
    at_once = 4 * _ROWS_AT_ONCE if x.is_cuda else _ROWS_AT_ONCE
    step = max(1, len(x)) if exact or kept else min(len(x), at_once)
    scratch = dx if exact else x.new_empty((step, *x.shape[1:]), dtype=s.dtype)
    for a in range(0, len(x), max(1, step)):
        part = slice(a, a + step)
        dx_c = scratch if exact else scratch[: len(x[part])].zero_()
        if start is not None and not exact:
            dx_c.copy_(start[part])
        some, block = rows[:, part].contiguous(), plan.block(None).rows(part)
        plan.implementation.grads(x[part], y, s, some, cols, positives[part], block, kept, dx_c, dy)
        ds.append(_dot(x[part], dx_c))
        if need_x:
            torch.mul(dx_c, factor, out=dx[part])
    return dx if need_x else None, functools.reduce(torch.add, ds or [_dot(x, dx)])


def _ring_stats(x, y, s, plan):
    """Statistics when the ranks' texts are passed round: rows (2, b), cols (2, total) of local rows only, positives."""
    texts = plan.texts
    rows, positives = _no_statistics(x.shape[0], s), None
    cols = _no_statistics(texts.total, s)
    for owner, y_owner in texts.ring(y):
        more, part, diagonal, _ = plan.implementation.stats(x, y_owner, s, plan.block(owner), False)
        rows = _merge(rows, more)
        cols[:, texts.span(owner)] = part
        positives = diagonal if diagonal is not None else positives
    return rows, cols, positives


def _ring_grads(x, y, s, rows, cols, positives, plan, dx, dy):
    """Gradients when the ranks' texts are passed round; each rank's dy follows its texts and comes home complete."""
    texts = plan.texts
    for owner, y_owner in texts.ring(y):
        own = cols[:, texts.span(owner)].contiguous()
        plan.implementation.grads(x, y_owner, s, rows, own, positives, plan.block(owner), [], dx, dy)
        dy = texts.pass_on(dy, owner) if dy is not None else None
    return dy


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """gradient * factor in the dtype of `like`; in place where it is that already."""
    out = gradient if gradient.dtype == like.dtype else torch.empty_like(gradient, dtype=like.dtype)
    return torch.mul(gradient, factor, out=out)


def _dot(x: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
    """sum(x * dx), some rows at a time: sum(dS * x @ y.T), for dx = dS @ y."""
    rows = 128 if x.device.type == "cpu" else 4 * _ROWS_AT_ONCE  # a CPU's allocator keeps what is freed: little
    return functools.reduce(torch.add, (sum_wide(a * b) for a, b in zip(x.split(rows), dx.split(rows))))


def _merge(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Joins the statistics (2, n) of two sets of logits."""
    shift = torch.maximum(a[0], b[0])
    return torch.stack([shift, a[1] * (a[0] - shift).exp() + b[1] * (b[0] - shift).exp()])


def _no_statistics(n: int, s: torch.Tensor) -> torch.Tensor:
    """Statistics (2, n) of no logits at all."""
    out = s.new_zeros(2, n)
    out[0] = torch.finfo(s.dtype).min
    return out


class _Torch:
    """Row chunks in plain torch, on any device: what serves where nothing else does."""

    def stats(self, x, y, scale, block, keep):
        rows, cols = _no_statistics(x.shape[0], scale), _no_statistics(y.shape[0], scale)
        positives = None if block.diag is None else scale.new_empty(x.shape[0])
        y = _pairs.operand(y)
        for a, b in _pairs.row_spans(len(x), len(y), x.dtype, block.workspace):
            z = self._logits(x[a:b], y, scale, block, a, b)
            if positives is not None:
                positives[a:b] = z.diagonal(block.diag + a)[: b - a]
            top = z.amax(1)
            rows[0, a:b], rows[1, a:b] = top, torch.sub(z, top[:, None]).exp_().sum(1)
            top = torch.maximum(cols[0], z.amax(0))
            cols[1] *= (cols[0] - top).exp_()
            cols[1] += z.sub_(top).exp_().sum(0)
            cols[0] = top
        return rows, cols, positives, None

    def grads(self, x, y, scale, rows, cols, positives, block, kept, dx, dy):
        y = _pairs.operand(_unrounded(y, block))
        for a, b in _pairs.row_spans(len(x), len(y), x.dtype, block.workspace):
            x_c = _pairs.operand(_unrounded(x[a:b], block))
            z = self._logits(x_c, y, scale, block, a, b)
            p = torch.sub(z, rows[0, a:b, None]).exp_().div_(rows[1, a:b, None])
            p += z.sub_(cols[0]).exp_().div_(cols[1])
            if block.diag is not None:
                p.diagonal(block.diag + a)[: b - a].sub_(block.target)
            if dx is not None:
                dx[a:b] += _pairs.product(p, y)
            if dy is not None:
                dy += _pairs.product(p.t(), x_c)

    @staticmethod
    def _logits(x_c, y, scale, block, a, b):
        z = _pairs.product(_pairs.operand(x_c), y.t()).mul_(scale)
        left_out = block.left_out(a, b)
        if left_out is not None:
            z.masked_fill_(left_out, torch.finfo(z.dtype).min)
        return z


def _unrounded(x: torch.Tensor, block: Block) -> torch.Tensor:
    """x in float32 where most of the target is spread: what is left of dS, a probability less its share of the target,
    may be far smaller than the probability, and 16 bits would round that."""
    return x.float() if block.target <= 1 and x.dtype in (torch.float16, torch.bfloat16) else x


_TILE_COLUMNS = 96
"""kCols of csrc/cpu/pairs.h: the logits that it keeps end with a whole tile."""


class _Native:
    """csrc/cpu/info_nce.cpp.

    Logits are kept for the backward where they take half of the workspace at most.
    """

    def stats(self, x, y, scale, block, keep):
        x, y = _pairs.native_operand(x), _pairs.native_operand(y)
        labels = (block.row_labels, block.col_labels)
        diag = -1 if block.diag is None else block.diag
        size = len(x) * -(-len(y) // _TILE_COLUMNS) * _TILE_COLUMNS  # of all logits
        logits = x.new_empty(size, dtype=torch.float32) if keep and 8 * size <= block.workspace else None
        rows, cols, positives = torch.ops.lbfast.info_nce_stats(x, y, float(scale), diag, *labels, logits)
        return rows, cols, None if block.diag is None else positives, None if logits is None else [logits]

    def grads(self, x, y, scale, rows, cols, positives, block, kept, dx, dy):
        x, y = _pairs.native_operand(_unrounded(x, block)), _pairs.native_operand(_unrounded(y, block))
        diag = -1 if block.diag is None else block.diag
        labels = (block.row_labels, block.col_labels)
        logits = kept[0] if kept else None
        numbers = (block.workspace, block.target)
        torch.ops.lbfast.info_nce_grads(x, y, float(scale), rows, cols, diag, *labels, logits, *numbers, dx, dy)


class _Triton:
    """kernels/info_nce.py."""

    def stats(self, x, y, scale, block, keep):
        from lbfast.kernels import info_nce as kernel

        labels = (block.row_labels, block.col_labels)
        room = block.room if keep and _unrounded(x[:0], block).dtype == x.dtype else 0
        rows, cols, positives, *kept = kernel.info_nce_fwd(x, y, scale, block.diag, *labels, block.workspace, room)
        return rows, cols, None if block.diag is None else positives, kept if kept[0] is not None else None

    def grads(self, x, y, scale, rows, cols, positives, block, kept, dx, dy):
        from lbfast.kernels import info_nce_bwd as kernel

        labels = (block.row_labels, block.col_labels)
        numbers = (block.workspace, block.target)
        x, y = _unrounded(x, block), _unrounded(y, block)
        kernel.info_nce_bwd(
            x, y, scale, rows, cols, positives, *(kept or (None, None)), block.diag, *labels, *numbers, dx, dy
        )


def _implementation(name: str) -> Implementation:
    made: dict[str, type[Implementation]] = {"triton": _Triton, "native": _Native, "torch": _Torch}
    return made[name]()


IMPLEMENTATIONS: dict[str, dispatch.Reasons] = dict(_pairs.REASONS)
