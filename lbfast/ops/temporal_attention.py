"""Attention over the T frames of a clip at each token position, without moving the frames together first."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lbfast import dispatch
from lbfast.ops.attention import apart

_GRID_LIMIT = 65535
_INT32_LIMIT = 2**31


def temporal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention over the frames of each token position and head.

        scores = scale * einsum("btnhd,bsnhd->bnhts", q, k)
        out = einsum("bnhts,bsnhd->btnhd", scores.softmax(-1), v)

    Args:
        q, k, v: (B, T, N, H, D), float16, bfloat16, float32 or float64, of one shape, dtype and device, any strides:
            views of one fused projection are read in place. T is at most 32 for "triton" and "native".
        scale: default D ** -0.5.
        impl: "triton", "native" or "torch"; None chooses.

    Returns:
        (B, T, N, H, D), contiguous.

    Raises:
        TypeError: dtypes differ or are not floating point. ValueError: shapes don't fit.
        RuntimeError: `impl` cannot take these inputs; the message has every reason.

    Source: divided space-time attention, Bertasius et al., arXiv 2102.05095; LanguageBind, arXiv 2310.01852.
    """
    _check(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = dispatch.choose("temporal_attention", impl, IMPLEMENTATIONS, q, k, v)
    if chosen == "triton":
        return torch.ops.lbfast.temporal_attention_triton(q, k, v, scale)
    if chosen == "native":
        return torch.ops.lbfast.temporal_attention_native(q, k, v, scale)
    return _torch(q, k, v, scale)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.dim() != 5:
        raise ValueError(f"temporal_attention: q: expected (B, T, N, H, D), got {tuple(q.shape)}")
    if q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"temporal_attention: k, v: expected q's shape {tuple(q.shape)}, got {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(
            f"temporal_attention: q, k, v: expected one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )


def _torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """SDPA with (position, head) as its heads: no copies where the two fold, as in separate projections."""
    if q.numel() == 0:  # SDPA of PyTorch 2.11 divides by zero on the CPU
        return (q + k + v).contiguous()
    q, k, v = apart(q), apart(k), apart(v)
    if scale < 0:  # CUDA backends take the largest score before they scale
        q, scale = -q, -scale
    if q.device.type != "cpu":  # SDPA's CUDA backends index in 32 bits, and pad T to 128 in their backward
        _, t, n, h, d = q.shape
        limit = max(1, min(_GRID_LIMIT, (_INT32_LIMIT - 1) // (n * h * d * max(t, 128))))
        if q.shape[0] > limit:
            parts = zip(q.split(limit), k.split(limit), v.split(limit))
            return torch.cat([_torch(*part, scale) for part in parts])
    fq, fk, fv = (x.permute(0, 2, 3, 1, 4).flatten(1, 2) for x in (q, k, v))  # (B, N*H, T, D)
    if q.shape[1] == 1 and torch.is_grad_enabled():  # the softmax is 1, its gradient 0: SDPA's is a rounding error
        out = (fq * scale @ fk.mT).softmax(-1) @ fv
    else:
        out = F.scaled_dot_product_attention(fq, fk, fv, scale=scale)
    return out.transpose(1, 2).unflatten(2, q.shape[2:4]).contiguous()


# Two library ops of one signature: what torch.compile and torch.export see. The backward keeps q, k, v and no more.
# The kernels of the native one are in csrc/cpu/temporal_attention.cpp, which dispatch loads.

_library = torch.library.Library("lbfast", "FRAGMENT")


def _define(name: str) -> None:
    """Defines lbfast::name and lbfast::name_bwd, with their fakes and autograd."""
    tags = (torch.Tag.pt2_compliant_tag,)
    _library.define(f"{name}(Tensor q, Tensor k, Tensor v, float scale) -> Tensor", tags=tags)
    _library.define(
        f"{name}_bwd(Tensor do, Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor, Tensor)", tags=tags
    )

    @torch.library.register_fake(f"lbfast::{name}", lib=_library)
    def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return q.new_empty(q.shape)

    @torch.library.register_fake(f"lbfast::{name}_bwd", lib=_library)
    def _fake_bwd(
        do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        bwd = getattr(torch.ops.lbfast, f"{name}_bwd")
        return (*bwd(do, *ctx.saved_tensors, ctx.scale), None)

    torch.library.register_autograd(f"lbfast::{name}", backward, setup_context=setup, lib=_library)


_define("temporal_attention_triton")
_define("temporal_attention_native")


def _triton_fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    from lbfast.kernels import temporal_attention as kernel

    return kernel.temporal_attention_fwd(q, k, v, scale)


def _triton_bwd(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from lbfast.kernels import temporal_attention as kernel

    return kernel.temporal_attention_bwd(do, q, k, v, scale)


for _device in ("CUDA", "CPU"):  # the latter for the interpreter
    _library.impl("temporal_attention_triton", _triton_fwd, _device)
    _library.impl("temporal_attention_triton_bwd", _triton_bwd, _device)


def _why_not_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[str]:
    reasons = dispatch.why_not_triton(q, k, v)
    if reasons:
        return reasons
    from lbfast.kernels import temporal_attention as kernel

    return kernel.why_not(q)


def _why_not_native(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[str]:
    reasons = []
    if q.dtype not in (torch.float32, torch.bfloat16):
        reasons.append(f"the native kernel takes float32 and bfloat16, not {q.dtype}")
    if q.shape[1] > 32 or q.shape[4] > 128:
        reasons.append(f"the native kernel takes T <= 32 and D <= 128, not T={q.shape[1]}, D={q.shape[4]}")
    return reasons or dispatch.why_not_native(q, k, v)


def _why_not_torch(*_: object) -> list[str]:
    return []


IMPLEMENTATIONS: dict[str, dispatch.Reasons] = {
    "triton": _why_not_triton,
    "native": _why_not_native,
    "torch": _why_not_torch,
}
