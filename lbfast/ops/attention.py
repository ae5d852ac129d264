"""Attention over the tokens of one image, frame, spectrogram or caption, read in place from strided projections."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lbfast import dispatch

_GRID_LIMIT = 65535
"""SDPA's CUDA backends put the batch on a grid axis of this length."""

_PLAIN = torch.backends.cpu.get_cpu_capability() == "DEFAULT" or (
    torch.backends.cpu.get_cpu_capability() == "AVX2" and getattr(torch.cpu, "_is_amx_tile_supported", bool)()
)
"""Fewer vector instructions than the machine has, or none (ATEN_CPU_CAPABILITY): SDPA packs 16 bits for AVX-512 and AMX
even so, and raises."""

_MOST_KEYS = 4096
"""The native kernel keeps the scores of 16 queries against all keys, and the keys, in a second-level cache."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    key_padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention; the result is laid out for the output projection.

        scores = scale * einsum("bnhd,bmhd->bhnm", q, k) + causal_mask + padding_mask
        out = einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)

    Both masks add finfo(float32).min where they mask, as CLIP does: a query none of whose keys is left averages over
    the keys that only one of them masks, and is never NaN.

    Args:
        q: (B, N, H, D), float16, bfloat16, float32 or float64, any strides.
        k, v: (B, M, H, D) of q's dtype and device, any strides: views of one fused projection are read in place.
        causal: query i sees the keys 0..i; needs N == M.
        key_padding_mask: (B, M), bool (True: padding), or float (0: kept, negative, as -inf or finfo.min: padding).
        scale: default D ** -0.5.
        impl: "triton", "native", "torch" (SDPA), "flash_attn" or "xformers"; None chooses among the first three.

    Returns:
        (B, N, H, D), contiguous.

    Raises:
        TypeError: dtypes differ or are not floating point. ValueError: shapes or devices don't fit.
        RuntimeError: `impl` cannot take these inputs; the message has every reason.

    Source: Vaswani et al., arXiv 1706.03762; tiling after Dao, arXiv 2307.08691.
    """
    _check(q, k, v, causal, key_padding_mask)
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        key_padding_mask = key_padding_mask < 0
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    order = in_order(q, k, v, causal, key_padding_mask)
    chosen = dispatch.choose("attention", impl, order, q, k, v, causal, key_padding_mask)
    if chosen == "triton":
        return torch.ops.lbfast.attention_triton(q, k, v, key_padding_mask, causal, scale)[0]
    if chosen == "native":
        return torch.ops.lbfast.attention_native(q, k, v, key_padding_mask, causal, scale)[0]
    q, scale = _positive(q, scale)
    if chosen == "flash_attn":
        return _flash_attn(q, k, v, causal, scale)
    if chosen == "xformers":
        return _xformers(q, k, v, causal, scale)
    return _torch(q, k, v, causal, key_padding_mask, scale)


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, key_padding_mask: torch.Tensor | None
) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"attention: q, k: expected (B, N, H, D), got {tuple(q.shape)}, {tuple(k.shape)}")
    if k.shape != v.shape:
        raise ValueError(f"attention: v: expected k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"attention: k: expected (B, M, H, D) with B, H, D of q {tuple(q.shape)}, got {tuple(k.shape)}"
        )
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(f"attention: q, k, v: expected one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if k.shape[1] == 0:
        raise ValueError("attention: k: expected at least one key, got M=0")
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"attention: causal: expected as many queries as keys, got {q.shape[1]} and {k.shape[1]}")
    if key_padding_mask is not None:
        if key_padding_mask.shape != k.shape[:2]:
            raise ValueError(
                f"attention: key_padding_mask: expected (B, M) = {tuple(k.shape[:2])}, "
                f"got {tuple(key_padding_mask.shape)}"
            )
        if key_padding_mask.dtype != torch.bool and not key_padding_mask.is_floating_point():
            raise TypeError(f"attention: key_padding_mask: expected bool or float, got {key_padding_mask.dtype}")


def _positive(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """q and scale with scale > 0: libraries take the largest score before they scale, or mask with -inf."""
    if scale < 0:
        return -q, -scale
    smallest = torch.finfo(torch.promote_types(q.dtype, torch.float32)).tiny
    return (q * 0.0, 1.0) if scale < smallest else (q, scale)


def apart(x: torch.Tensor) -> torch.Tensor:
    """x, copied on a CPU where its numbers share memory: SDPA's backends raise there in 16 bits, or read others."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return x
    span = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size > 1):
        if stride < span:
            return x.contiguous()
        span += (size - 1) * stride
    return x


def _torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    padded: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """SDPA over transposed views; the batch goes in chunks where a CUDA backend's grid would end."""
    if q.device.type != "cpu" and q.shape[0] > _GRID_LIMIT:
        masks = [None] * len(q.split(_GRID_LIMIT)) if padded is None else padded.split(_GRID_LIMIT)
        parts = zip(q.split(_GRID_LIMIT), k.split(_GRID_LIMIT), v.split(_GRID_LIMIT), masks)
        return torch.cat([_torch(*part[:3], causal, part[3], scale) for part in parts])
    q, k, v = apart(q), apart(k), apart(v)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, N, D)
    plainly = _PLAIN and q.device.type == "cpu" and q.dtype in (torch.float16, torch.bfloat16)
    if padded is None and not plainly and not (needs_grad and k.shape[2] == 1):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        return out.transpose(1, 2).contiguous()
    if padded is None:  # of one key the softmax is 1, and its gradient 0: SDPA's is a rounding error
        padded = torch.zeros((len(k), k.shape[2]), dtype=torch.bool, device=k.device)
    mask = _additive_mask(padded, q.shape[2], causal, q.dtype)
    if needs_grad or q.device.type != "cpu" or plainly:
        # SDPA saves log(sum(exp)), which finfo.min absorbs: the gradient of a query with no key left would be wrong.
        # And its CUDA backends want the mask in q's dtype, where float16's finfo.min does not absorb a score.
        if q.dtype == torch.float16:  # whose largest number a score passes soon
            scores = q.float() * scale @ k.float().transpose(-2, -1) + mask
        else:
            scores = (q * scale @ k.transpose(-2, -1)).to(mask.dtype) + mask
        out = scores.softmax(-1).to(q.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).contiguous()


def _additive_mask(padded: torch.Tensor, n: int, causal: bool, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, 1, M), or (B, 1, N, M) where causal: finfo(float32).min for each mask that masks; two may sum to -inf."""
    dtype = torch.promote_types(dtype, torch.float32)
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(padded.shape, dtype=dtype, device=padded.device).masked_fill(padded, lowest)[:, None, None, :]
    if not causal:
        return mask
    return mask + torch.full((n, n), lowest, dtype=dtype, device=padded.device).triu(1)


def _flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, softmax_scale=scale, causal=causal)


def _xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    from xformers import ops

    bias = ops.LowerTriangularMask() if causal else None
    return ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale).contiguous()


# Two library ops of one signature: what torch.compile and torch.export see. The second result is what the backward
# wants of each row's softmax: Triton's log2(sum(exp2)), (B, H, N), or the native kernel's shift and sum, (B, H, N, 2).
# The native kernels are in csrc/cpu/attention.cpp, which dispatch loads.

_library = torch.library.Library("lbfast", "FRAGMENT")


def _define(name: str, statistics: tuple[int, ...]) -> None:
    """Defines lbfast::name and lbfast::name_bwd, with their fakes and autograd."""
    tags = (torch.Tag.pt2_compliant_tag,)
    _library.define(
        f"{name}(Tensor q, Tensor k, Tensor v, Tensor? padded, bool causal, float scale) -> (Tensor, Tensor)", tags=tags
    )
    _library.define(
        f"{name}_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? padded, Tensor o, Tensor stats, bool causal, "
        "float scale) -> (Tensor, Tensor, Tensor)",
        tags=tags,
    )

    @torch.library.register_fake(f"lbfast::{name}", lib=_library)
    def _fake(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        b, n, h, _d = q.shape
        dtype = torch.promote_types(q.dtype, torch.float32)
        return q.new_empty(q.shape), q.new_empty((b, h, n, *statistics), dtype=dtype)

    @torch.library.register_fake(f"lbfast::{name}_bwd", lib=_library)
    def _fake_bwd(
        do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        *tensors, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, do: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        if do is None:
            return (None,) * 6
        bwd = getattr(torch.ops.lbfast, f"{name}_bwd")
        return (*bwd(do, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None, None)

    torch.library.register_autograd(f"lbfast::{name}", backward, setup_context=setup, lib=_library)


_define("attention_triton", ())
_define("attention_native", (2,))


def _triton_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padded: torch.Tensor | None, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from lbfast.kernels import attention as kernel

    return kernel.attention_fwd(q, k, v, padded, causal, scale)


def _triton_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    padded: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from lbfast.kernels import attention_bwd as kernel

    return kernel.attention_bwd(do, q, k, v, padded, o, lse, causal, scale)


for _device in ("CUDA", "CPU"):  # the latter for the interpreter
    _library.impl("attention_triton", _triton_fwd, _device)
    _library.impl("attention_triton_bwd", _triton_bwd, _device)


def _why_not_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, padded: torch.Tensor | None
) -> list[str]:
    reasons = dispatch.why_not_triton(q, k, v, *([] if padded is None else [padded]))
    if reasons:
        return reasons
    from lbfast.kernels import attention as kernel

    return kernel.why_not(q)


def _why_not_native(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, padded: torch.Tensor | None
) -> list[str]:
    reasons = []
    if q.dtype not in (torch.float32, torch.bfloat16):
        reasons.append(f"the native kernel takes float32 and bfloat16, not {q.dtype}")
    if k.shape[1] > _MOST_KEYS or q.shape[3] % 2:
        reasons.append(f"the native kernel takes M <= {_MOST_KEYS} and even D, not M={k.shape[1]}, D={q.shape[3]}")
    return reasons or dispatch.why_not_native(q, k, v, *([] if padded is None else [padded]))


def _why_not_torch(*_: object) -> list[str]:
    return []


def _why_not_library(module: str, extra: str) -> dispatch.Reasons:
    """The reasons of an attention library that takes half-precision GPU tensors and no padding."""

    def why_not(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, padded: torch.Tensor | None
    ) -> list[str]:
        reasons = []
        if not dispatch.installed(module):
            reasons.append(f"{module} is not installed (pip install lbfast[{extra}])")
        if q.device.type != "cuda":
            reasons.append("the tensors are not on a GPU")
        if q.dtype not in (torch.float16, torch.bfloat16):
            reasons.append(f"{module} takes float16 and bfloat16, not {q.dtype}")
        if padded is not None:
            reasons.append(f"{module} takes no key_padding_mask here")
        return reasons

    return why_not


IMPLEMENTATIONS: dict[str, dispatch.Reasons] = {
    "triton": _why_not_triton,
    "native": _why_not_native,
    "torch": _why_not_torch,
    "flash_attn": _why_not_library("flash_attn", "flash-attn"),
    "xformers": _why_not_library("xformers", "xformers"),
}

_SDPA_FIRST = {"torch": IMPLEMENTATIONS["torch"], **IMPLEMENTATIONS}


def in_order(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, padded: torch.Tensor | None
) -> dict[str, dispatch.Reasons]:
    """The implementations, the quickest for these inputs first.

    float32 goes on a GPU to SDPA, which multiplies it on tensor cores, three times over; with our kernels, which don't,
    whole encoders took up to 1.2 times upstream's time on an H200. With gradients ours stay: they give the same ones
    each time.
    """
    if q.dtype != torch.float32 or not q.is_cuda or causal or padded is not None:
        return IMPLEMENTATIONS
    learnt = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return IMPLEMENTATIONS if learnt else _SDPA_FIRST
