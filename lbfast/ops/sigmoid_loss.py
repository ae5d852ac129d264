"""The sigmoid loss of pairs (SigLIP) over a large batch: exact, in memory linear in it, on one process or many."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F

from lbfast import dispatch, distributed
from lbfast.ops import _pairs
from lbfast.ops._dense import dense_sigmoid_loss
from lbfast.ops._pairs import Block, Plan, accumulation, wide

_ROWS_AT_ONCE = 4096
"""Of 16-bit embeddings: their gradients are summed in float32, and then rounded. Four times as many on a GPU."""


def sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float,
    *,
    ids: torch.Tensor | None = None,
    group: Any = None,
    gather: Literal["all", "ring"] = "all",
    impl: str | None = None,
    workspace_mib: int | None = None,
) -> torch.Tensor:
    """Each pair of an image and a text by itself: does it belong together? Pair i does, all others don't.

        logits = logit_scale * image_embeds @ text_embeds.T + logit_bias
        loss = -logsigmoid((2 * eye(B) - 1) * logits).sum() / B

    The logits are computed in tiles and never stored. No pair needs to know another, so that the forward computes the
    gradients with them, where any is needed: three products in all, not four, and nothing of them is computed again.
    The backward multiplies by what comes in. Products of 16-bit inputs are accumulated in float32 and never rounded
    back before the sigmoid. Inputs are not normalised here. Under autocast the embeddings are cast to its dtype.

    Args:
        image_embeds, text_embeds: (B, D), floating point, one device, any strides. Of two dtypes the wider is taken.
            Either may need no gradient: its product is then skipped. text_embeds may have more rows: those after the
            B-th are negatives of every image and positives of none.
        logit_scale, logit_bias: one element each that may need a gradient, or a float; the scale is the factor itself
            (not its logarithm). SigLIP begins with 10 and -10.
        ids: integers, one for each row of text_embeds, or None; image i has that of text i. Pairs that share an id are
            no negatives (a caption that repeats): they are left out, but for the pair i itself.
        group: a torch.distributed process group: each rank gives its own rows (any number, at least one in all), and
            the loss is that of the concatenated batch on every rank. Every rank must call, with the same arguments and
            the same inputs requiring a gradient; backward needs no other rank, and every rank's gradients are those of
            the whole loss times what its own backward was given.
        gather: "all" collects every rank's texts on each rank; "ring" passes them round, so that no rank ever holds
            more than two ranks' worth of them.
        impl: "triton", "native" or "torch"; None chooses.
        workspace_mib: bound on the scratch memory for tiles. None: 48; on a GPU 256.

    Returns:
        Scalar: float32 (float64 for float64 inputs). Gradients are those of this loss for the rank's own rows, and the
        whole gradients for logit_scale and logit_bias. NaN where an input is NaN; not defined for infinite ones.

    Raises:
        TypeError: a dtype is not floating point, or ids are no integers. ValueError: shapes don't fit, or ranks
        disagree about them. RuntimeError: `impl` cannot take these inputs (the message has every reason).

    Source: Zhai et al., arXiv 2303.15343.
    """
    if gather not in ("all", "ring"):
        raise ValueError(f"sigmoid_loss: gather: expected 'all' or 'ring', got {gather!r}")
    _pairs.check("sigmoid_loss", image_embeds, text_embeds, ids, workspace_mib)
    device = image_embeds.device
    scale = _pairs.number("sigmoid_loss", "logit_scale", logit_scale, device)
    bias = _pairs.number("sigmoid_loss", "logit_bias", logit_bias, device)
    image_embeds, text_embeds = _pairs.alike(image_embeds, text_embeds)
    name = dispatch.choose("sigmoid_loss", impl, IMPLEMENTATIONS, image_embeds, text_embeds)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        same = {
            "logit_scale.requires_grad": scale.requires_grad,
            "logit_bias.requires_grad": bias.requires_grad,
            "text_embeds.requires_grad": text_embeds.requires_grad,
            "ids given": ids is not None,
            "gather='ring'": gather == "ring",
        }
        shards, texts = distributed.Shards.agree(image_embeds, text_embeds, group, distributed.world(group), **same)
        if shards.total == 0:
            raise ValueError("sigmoid_loss: image_embeds: expected at least one row, got none")
        labels = None if ids is None or dispatch.aten_only() else _pairs.labels_of(ids, texts)
    if shards.world == 1 and dispatch.aten_only():
        return dense_sigmoid_loss(image_embeds, text_embeds, scale, bias, ids)
    plan = Plan(shards, texts, gather, labels, _pairs.workspace_bytes(device, workspace_mib, on_cpu=48))
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (image_embeds, text_embeds)]
    return _SigmoidLoss.apply(image_embeds, text_embeds, scale, bias, plan, _implementation(name), *needs)


class Implementation(Protocol):
    """What computes one block; m rows, n columns, acc = float32 (float64 for float64 inputs)."""

    def sums(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        block: Block,
        dx: torch.Tensor | None,
        dy: torch.Tensor | None,
    ) -> torch.Tensor:
        """Adds dS @ y to dx (m, D) and dS.T @ x to dy (n, D), both acc, and returns three sums over the pairs, float64.

        With p = x @ y.T and z = scale p + bias: of log(1 + e^z), for positives e^-z; of dS, which is sigmoid(z), for
        positives -sigmoid(-z); and of dS p.
        """
        ...


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image_embeds, text_embeds, scale, bias, plan, implementation, need_x, need_y):
        x, dtype = image_embeds, image_embeds.dtype
        acc = accumulation(dtype)
        with torch.autocast(x.device.type, enabled=False):
            numbers = (scale.to(acc), bias.to(acc))
            dx = x.new_zeros(x.shape, dtype=_kept(dtype)) if need_x else None
            if plan.whole:
                y = plan.texts.gather_rows(text_embeds)
                dy = y.new_zeros(y.shape, dtype=acc) if need_y else None
                sums = _rows(implementation, x, y, numbers, Block(*plan.where(None)), dx, dy)
                dy = plan.texts.scatter_rows(dy) if dy is not None else None
            else:
                wide_dx = dx if dx is None or dx.dtype == acc else dx.to(acc)
                dy = text_embeds.new_zeros(text_embeds.shape, dtype=acc) if need_y else None
                sums = 0
                for owner, y_owner in plan.texts.ring(text_embeds):
                    block = Block(*plan.where(owner))
                    sums = sums + implementation.sums(x, y_owner, *numbers, block, wide_dx, dy)
                    dy = plan.texts.pass_on(dy, owner) if dy is not None else None
                dx = None if wide_dx is None else wide_dx.to(_kept(dtype))
            sums = plan.shards.sum(sums) / plan.shards.total
        ctx.total, ctx.dtype = plan.shards.total, dtype
        ctx.save_for_backward(scale, bias, sums, dx, None if dy is None else dy.to(_kept(dtype)))
        return sums[0].to(acc)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        scale, bias, sums, *parts = ctx.saved_tensors
        need_scale, need_bias = ctx.needs_input_grad[2:4]
        with torch.autocast(grad.device.type, enabled=False):
            factor = grad * scale.to(grad.dtype) / ctx.total
            dx, dy = (None if part is None else torch.mul(part, factor).to(ctx.dtype) for part in parts)
            ds = (sums[2] * grad).to(scale.dtype) if need_scale else None
            db = (sums[1] * grad).to(bias.dtype) if need_bias else None
        return dx, dy, ds, db, None, None, None, None


def _kept(dtype: torch.dtype) -> torch.dtype:
    """What gradients of embeddings wait for the backward in, before the scale: float16 might not hold their sums."""
    return dtype if dtype == torch.bfloat16 else accumulation(dtype)


def _rows(implementation, x, y, numbers, block, dx, dy):
    """The sums; adds to dx (b, D), or of bfloat16 fills it, only so many rows at a time having sums in float32."""
    if dx is None or dx.dtype == accumulation(x.dtype):
        return implementation.sums(x, y, *numbers, block, dx, dy)
    step = 4 * _ROWS_AT_ONCE if x.is_cuda else _ROWS_AT_ONCE
    scratch = x.new_empty((min(len(x), step), x.shape[1]), dtype=accumulation(x.dtype))
    total: Any = wide(numbers[0].new_zeros(3))
    for a in range(0, len(x), step):
        part = slice(a, a + step)
        dx_c = scratch[: len(x[part])].zero_()
        total = total + implementation.sums(x[part], y, *numbers, block.rows(part), dx_c, dy)
        dx[part] = dx_c
    return total


class _Torch:
    """Row chunks in plain torch, on any device: what serves where nothing else does."""

    def sums(self, x, y, scale, bias, block, dx, dy):
        total = wide(scale.new_zeros(3))
        y = _pairs.operand(y)
        for a, b in _pairs.row_spans(len(x), len(y), x.dtype, block.workspace):
            x_c = _pairs.operand(x[a:b])
            p = _pairs.product(x_c, y.t())
            z = torch.addcmul(bias, p, scale)
            positives = None if block.diag is None else z.diagonal(block.diag + a)[: b - a]
            if positives is not None:
                positives.neg_()
            left_out = block.left_out(a, b)
            if left_out is not None:
                z.masked_fill_(left_out, -torch.inf)
            losses = F.logsigmoid(-z)
            ds = z.sigmoid_()
            if block.diag is not None:
                ds.diagonal(block.diag + a)[: b - a].neg_()
            total -= torch.stack([wide(losses.sum()), -wide(ds.sum()), -wide((ds * p).sum())])
            if dx is not None:
                dx[a:b] += _pairs.product(ds, y)
            if dy is not None:
                dy += _pairs.product(ds.t(), x_c)
        return total


class _Native:
    """csrc/cpu/sigmoid_loss.cpp."""

    def sums(self, x, y, scale, bias, block, dx, dy):
        diag = -1 if block.diag is None else block.diag
        where = (diag, block.row_labels, block.col_labels, block.workspace)
        x, y = _pairs.native_operand(x), _pairs.native_operand(y)
        return torch.ops.lbfast.sigmoid_loss_pass(x, y, float(scale), float(bias), *where, dx, dy)


class _Triton:
    """kernels/sigmoid_loss.py."""

    def sums(self, x, y, scale, bias, block, dx, dy):
        from lbfast.kernels import sigmoid_loss as kernel

        where = (block.diag, block.row_labels, block.col_labels, block.workspace)
        return kernel.sigmoid_loss_pass(x, y, scale, bias, *where, dx, dy)


def _implementation(name: str) -> Implementation:
    made: dict[str, type[Implementation]] = {"triton": _Triton, "native": _Native, "torch": _Torch}
    return made[name]()


IMPLEMENTATIONS: dict[str, dispatch.Reasons] = dict(_pairs.REASONS)
