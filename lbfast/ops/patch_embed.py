"""Patch embedding of images, frames, spectrograms and tubes: only the patches that are kept are computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lbfast import dispatch
from lbfast.ops.layer_norm import layer_norm
from lbfast.products import linear, product

CENTRE = 128
"""uint8 pixels are embedded as x - 128, exact in bfloat16; the bias of that shift stays small."""
PIECE_BYTES = 1 << 28
"""What gathered patches may take on a GPU, unless one clip's take more: larger batches go in pieces. 32 clips of 8
frames at L/14 take 78 MB in 16 bits."""


def patch_embed(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    *,
    class_embedding: torch.Tensor,
    position_embedding: torch.Tensor,
    kept: torch.Tensor | None = None,
    mean: torch.Tensor | Sequence[float] | None = None,
    std: torch.Tensor | Sequence[float] | None = None,
    pre_norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Non-overlapping convolution, class token, position embedding, patch dropout and pre-norm.

        patches = conv(pixels, weight, stride=kernel).flatten(2).mT          (B*T', Gh*Gw, D)
        tokens = cat([class_embedding, patches], 1) + position_embedding     then tokens[:, [0, *(1 + kept)]]

    uint8 pixels stand for (pixels / 255 - mean) / std: that is folded into the weight and a bias, in float32, before
    the weight is rounded. Pixels to the right of and below the last whole patch are ignored, as a convolution does.
    Kept for the backward: the inputs.

    Args:
        pixels: (B, C, H, W) or (B, C, T, H, W), any strides; uint8, or floating point, cast to weight's dtype.
        weight: (D, C, P, P), each frame for itself, or (D, C, tube, P, P) with T % tube == 0; floating point; inside
            autocast, cast to its dtype.
        class_embedding: (D,), or (T', D), one for each of the T' = T / tube frames. Cast to weight's dtype.
        position_embedding: (1 + Gh*Gw, D), Gh = H // P, Gw = W // P; row 0 is the class token's. Cast likewise.
        kept: (B, K), int64: distinct patches in 0..Gh*Gw - 1, counted row by row, the same for every frame of a clip;
            None: all. On a GPU their range is not checked.
        mean, std: (C,), for uint8 pixels, of values in 0..1.
        pre_norm: (weight, bias, eps) of a layer norm over the tokens. With "triton" and all patches it is also what
            adds the position embedding, as it reads the tokens anyway.
        impl: "triton", "native" (the CPU), which gather the patches for the library's matrix product, or "torch";
            None chooses.

    Returns:
        (B*T', 1 + K, D), contiguous, of weight's dtype; frames of a clip follow each other.

    Raises:
        TypeError: a dtype that is not as above. ValueError: shapes that don't fit, or mean/std missing or not wanted.
        RuntimeError: `impl` cannot take these inputs; the message has every reason.

    Source: Dosovitskiy et al., arXiv 2010.11929; patch dropout: Li et al., arXiv 2212.00794.
    """
    weight = weight.to(dispatch.autocast_dtype(pixels.device) or weight.dtype)
    _check_pixels(pixels, weight, mean, std)
    _check_tokens(pixels, weight, class_embedding, position_embedding, kept)
    class_embedding, position_embedding = class_embedding.to(weight.dtype), position_embedding.to(weight.dtype)
    if mean is not None and std is not None:
        mean = torch.as_tensor(mean, dtype=torch.float32).to(pixels.device)
        std = torch.as_tensor(std, dtype=torch.float32).to(pixels.device)
    if not torch.compiler.is_compiling():  # a compiled graph chooses when it runs
        impl = dispatch.choose("patch_embed", impl, IMPLEMENTATIONS, pixels, weight, kept)
    norm_adds = pre_norm is not None and kept is None and (pixels.is_cuda if impl is None else impl == "triton")
    position = None if norm_adds else position_embedding
    tokens = torch.ops.lbfast.patch_embed(pixels, weight, class_embedding, position, kept, mean, std, impl)
    if pre_norm is None:
        return tokens
    if not norm_adds:
        return layer_norm(tokens, *pre_norm)
    return layer_norm(tokens, *pre_norm, residual=position_embedding, keep_total=False)


def _check_pixels(pixels: torch.Tensor, weight: torch.Tensor, mean: object, std: object) -> None:
    if pixels.dim() not in (4, 5):
        raise ValueError(f"patch_embed: pixels: expected (B, C, H, W) or (B, C, T, H, W), got {tuple(pixels.shape)}")
    if weight.dim() not in (4, 5) or weight.shape[1] != pixels.shape[1] or weight.shape[-1] != weight.shape[-2]:
        raise ValueError(
            f"patch_embed: weight: expected (D, {pixels.shape[1]}, [tube,] P, P) for pixels {tuple(pixels.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    frames, tube = (1 if pixels.dim() == 4 else pixels.shape[2]), _tube(weight)
    if frames % tube:
        raise ValueError(
            f"patch_embed: pixels: expected a number of frames that the weight's tube of {tube} divides, got {frames}"
        )
    if not weight.is_floating_point():
        raise TypeError(f"patch_embed: weight: expected a floating dtype, got {weight.dtype}")
    if pixels.dtype == torch.uint8:
        if mean is None or std is None:
            raise ValueError("patch_embed: mean, std: expected both with uint8 pixels, got None")
        for name, value in (("mean", mean), ("std", std)):
            shape = tuple(torch.as_tensor(value).shape)
            if shape != (pixels.shape[1],):
                raise ValueError(f"patch_embed: {name}: expected ({pixels.shape[1]},), got {shape}")
    elif not pixels.is_floating_point():
        raise TypeError(f"patch_embed: pixels: expected uint8 or a floating dtype, got {pixels.dtype}")
    elif mean is not None or std is not None:
        raise ValueError(f"patch_embed: mean, std: expected None with {pixels.dtype} pixels: they are for uint8")


def _check_tokens(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    class_embedding: torch.Tensor,
    position_embedding: torch.Tensor,
    kept: torch.Tensor | None,
) -> None:
    width, frames = weight.shape[0], _frames(pixels, weight)
    rows, columns = _grid(pixels, weight)
    if tuple(class_embedding.shape) not in ((width,), (frames, width)):
        raise ValueError(
            f"patch_embed: class_embedding: expected ({width},) or ({frames}, {width}), got "
            f"{tuple(class_embedding.shape)}"
        )
    if position_embedding.shape != (1 + rows * columns, width):
        raise ValueError(
            f"patch_embed: position_embedding: expected ({1 + rows * columns}, {width}) for {rows} x {columns} patches "
            f"of {pixels.shape[-2]} x {pixels.shape[-1]} pixels, got {tuple(position_embedding.shape)}"
        )
    for name, tensor in (("class_embedding", class_embedding), ("position_embedding", position_embedding)):
        if not tensor.is_floating_point():
            raise TypeError(f"patch_embed: {name}: expected a floating dtype, got {tensor.dtype}")
    if kept is not None:
        if kept.dtype != torch.int64:
            raise TypeError(f"patch_embed: kept: expected int64, got {kept.dtype}")
        if kept.dim() != 2 or kept.shape[0] != pixels.shape[0]:
            raise ValueError(f"patch_embed: kept: expected ({pixels.shape[0]}, K), got {tuple(kept.shape)}")


def _tube(weight: torch.Tensor) -> int:
    return weight.shape[2] if weight.dim() == 5 else 1


def _frames(pixels: torch.Tensor, weight: torch.Tensor) -> int:
    """T'."""
    return 1 if pixels.dim() == 4 else pixels.shape[2] // _tube(weight)


def _grid(pixels: torch.Tensor, weight: torch.Tensor) -> torch.Size:
    """(Gh, Gw)."""
    return torch.Size((pixels.shape[-2] // weight.shape[-1], pixels.shape[-1] // weight.shape[-1]))


def fold(
    weight: torch.Tensor, mean: torch.Tensor | None, std: torch.Tensor | None, native: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight as a matrix, and the bias, that take x - 128 of uint8 pixels x where mean and std are given.

    weight (D, C, ...) -> (D, C*...), of weight's dtype; bias (D,), float32 (float64 for float64), or None.
    """
    if mean is None or std is None:
        return weight.flatten(1), None
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale, offset = 1 / (255 * std.to(wide)), (CENTRE / 255 - mean.to(wide)) / std.to(wide)
    planes = weight.flatten(2)  # (D, C, tube*P*P)
    if native:
        return torch.ops.lbfast.patch_fold(planes.contiguous(), scale, offset)
    planes = planes.to(wide)
    return (planes * scale[:, None]).to(weight.dtype).flatten(1), planes.sum(2) @ offset


def unfold_fold(
    dfolded: torch.Tensor, dbias: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """Backward of `fold`: gradients of its matrix (D, C*...) and bias (D,) -> that of weight, in float32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = 1 / (255 * std.to(wide))
    offset = (CENTRE / 255 - mean.to(wide)) / std.to(wide)
    grad = dfolded.to(wide).view(weight.shape[0], weight.shape[1], -1) * scale[:, None]
    return grad + (dbias.to(wide)[:, None] * offset)[:, :, None]


def _patches(pixels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A view of the pixels as (B, Gh, Gw, T', C, tube, P, P)."""
    tube, patch = _tube(weight), weight.shape[-1]
    if pixels.dim() == 4:
        pixels = pixels.unsqueeze(2)
    view = pixels.unfold(2, tube, tube).unfold(3, patch, patch).unfold(4, patch, patch)
    return view.permute(0, 3, 4, 2, 1, 5, 6, 7)


def _index(patches: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What picks the kept patches (B, K) out of `_patches`."""
    batch = torch.arange(len(kept), device=kept.device)[:, None]
    return batch, kept // patches.shape[2], kept % patches.shape[2]


def _rows(pixels: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor | None, native: bool = False) -> torch.Tensor:
    """The GEMM's left side, of weight's dtype: (B*T', 1 + K, C*tube*P*P); the class token's row is zero."""
    if native:
        clips = pixels.unsqueeze(2) if pixels.dim() == 4 else pixels
        kept = None if kept is None else kept.contiguous()
        return torch.ops.lbfast.patch_rows(clips, kept, _tube(weight), weight.shape[-1], weight.dtype)
    patches = _patches(pixels, weight)
    picked = patches.flatten(1, 2) if kept is None else patches[_index(patches, kept)]  # (B, K, T', C, tube, P, P)
    picked = picked.transpose(1, 2)
    b, t, k = picked.shape[:3]
    rows = torch.empty((b, t, 1 + k, *picked.shape[3:]), dtype=weight.dtype, device=pixels.device)
    rows[:, :, 0] = 0
    rows[:, :, 1:] = picked
    if pixels.dtype == torch.uint8:
        rows[:, :, 1:] -= CENTRE
    return rows.view(b * t, 1 + k, rows.shape[3:].numel())


def _torch_fwd(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    class_embedding: torch.Tensor,
    position_embedding: torch.Tensor | None,
    kept: torch.Tensor | None,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    native: bool,
) -> torch.Tensor:
    """One GEMM onto the class token and the position embeddings."""
    rows = _rows(pixels, weight, kept, native)
    folded, bias = fold(weight, mean, std, native)
    if position_embedding is None:
        position_embedding = weight.new_zeros((1 + _grid(pixels, weight).numel(), len(weight)))
    position = position_embedding[1:] if bias is None else (position_embedding[1:] + bias).to(weight.dtype)
    tokens = torch.empty((*rows.shape[:2], len(weight)), dtype=weight.dtype, device=weight.device)
    clips = tokens.unflatten(0, (pixels.shape[0], _frames(pixels, weight)))  # (B, T', 1 + K, D)
    clips[:, :, 0] = class_embedding + position_embedding[0]
    clips[:, :, 1:] = position if kept is None else position[kept][:, None]
    return linear(rows.flatten(0, 1), folded, plus=tokens.view(-1, len(weight))).view(tokens.shape)


def _torch_bwd_weight(
    dtokens: torch.Tensor, pixels: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor | None, native: bool = False
) -> torch.Tensor:
    """The gradient of the folded weight, (D, C*tube*P*P)."""
    return product(dtokens.flatten(0, 1).T, _rows(pixels, weight, kept, native).flatten(0, 1))


def _pieces(
    pixels: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Images, and their patches by Triton, (images * (1 + K), KP): as many clips at a time as PIECE_BYTES hold."""
    from lbfast.kernels import patch_embed as kernel

    frames = _frames(pixels, weight)
    patches = _grid(pixels, weight).numel() if kept is None else kept.shape[1]
    clip = frames * (1 + patches) * kernel.padded(weight[0].numel()) * weight.element_size()
    step = max(1, PIECE_BYTES // max(1, clip))
    for i in range(0, max(1, len(pixels)), step):
        rows = kernel.patch_rows(pixels[i : i + step], weight, None if kept is None else kept[i : i + step])
        yield slice(i * frames, i * frames + len(rows)), rows.flatten(0, 1)


def _triton_fwd(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    class_embedding: torch.Tensor,
    position_embedding: torch.Tensor | None,
    kept: torch.Tensor | None,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
) -> torch.Tensor:
    """GEMMs, onto the position embeddings where there are any; the bias is a part of them."""
    from lbfast.kernels import patch_embed as kernel

    matrix = kernel.matrix(weight, mean, std)
    clips, frames = pixels.shape[0], _frames(pixels, weight)
    patches = _grid(pixels, weight).numel() if kept is None else kept.shape[1]
    tokens = torch.empty((clips * frames, 1 + patches, len(weight)), dtype=weight.dtype, device=weight.device)
    by_clip = tokens.unflatten(0, (clips, frames))  # (B, T', 1 + K, D)
    first = class_embedding
    if position_embedding is not None:
        first = class_embedding + position_embedding[0]
        by_clip[:, :, 1:] = position_embedding[1:] if kept is None else position_embedding[1:][kept][:, None]
    for images, rows in _pieces(pixels, weight, kept):
        tokens[images].flatten(0, 1).addmm_(rows, matrix.T, beta=int(position_embedding is not None))
    by_clip[:, :, 0] = first
    return tokens


def _triton_bwd_weight(
    dtokens: torch.Tensor, pixels: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the folded weight, (D, C*tube*P*P), and of the bias, (D,)."""
    parts = [product(dtokens[images].flatten(0, 1).T, rows) for images, rows in _pieces(pixels, weight, kept)]
    wide = torch.promote_types(weight.dtype, torch.float32)
    dmatrix = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0, dtype=wide)
    width = weight[0].numel()
    return dmatrix[:, :width], dmatrix[:, width]


def _torch_bwd_pixels(
    dtokens: torch.Tensor, pixels: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor | None
) -> torch.Tensor:
    """The gradient of float pixels; zero where no kept patch lies."""
    dpixels = torch.zeros(pixels.shape, dtype=pixels.dtype, device=pixels.device)
    patches = _patches(dpixels, weight)
    drows = product(dtokens.flatten(0, 1), weight.flatten(1)).view(*dtokens.shape[:2], weight[0].numel())
    drows = drows.unflatten(0, (pixels.shape[0], _frames(pixels, weight)))
    drows = drows[:, :, 1:]  # (B, T', K, C*tube*P*P)
    drows = drows.unflatten(3, patches.shape[4:]).transpose(1, 2).to(pixels.dtype)
    if kept is None:
        patches.copy_(drows.unflatten(1, patches.shape[1:3]))
    else:
        patches.index_put_(_index(patches, kept), drows)
    return dpixels


def _torch_bwd_position(dtokens: torch.Tensor, clips: int, kept: torch.Tensor | None, patches: int) -> torch.Tensor:
    """dtokens (B*T', 1 + K, D) -> (1 + patches, D), summed in float32 in an order that does not change."""
    wide = torch.promote_types(dtokens.dtype, torch.float32)
    if kept is None:
        return dtokens.sum(0, dtype=wide)
    summed = dtokens.unflatten(0, (clips, len(dtokens) // max(1, clips))).sum(1, dtype=wide)  # (B, 1 + K, D)
    dposition = torch.zeros((1 + patches, dtokens.shape[-1]), dtype=wide, device=dtokens.device)
    dposition[0] = summed[:, 0].sum(0)
    return dposition.index_put_((1 + kept,), summed[:, 1:], accumulate=True)


# The library ops: what torch.compile and torch.export see.

torch.library.define(
    "lbfast::patch_embed",
    "(Tensor pixels, Tensor weight, Tensor class_embedding, Tensor? position_embedding, Tensor? kept, Tensor? mean, "
    "Tensor? std, str? impl) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "lbfast::patch_embed_bwd",
    "(Tensor dtokens, Tensor pixels, Tensor weight, Tensor? kept, Tensor? mean, Tensor? std, SymInt[] class_shape, "
    "bool[] mask, str? impl) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("lbfast::patch_embed", "CompositeExplicitAutograd")
def _patch_embed(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    class_embedding: torch.Tensor,
    position_embedding: torch.Tensor | None,
    kept: torch.Tensor | None,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    impl: str | None,
) -> torch.Tensor:
    inputs = (pixels, weight, class_embedding, position_embedding, kept, mean, std)
    chosen = dispatch.choose("patch_embed", impl, IMPLEMENTATIONS, pixels, weight, kept)
    return _triton_fwd(*inputs) if chosen == "triton" else _torch_fwd(*inputs, native=chosen == "native")


@torch.library.register_fake("lbfast::patch_embed")
def _patch_embed_fake(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    class_embedding: torch.Tensor,
    position_embedding: torch.Tensor | None,
    kept: torch.Tensor | None,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    impl: str | None,
) -> torch.Tensor:
    frames = _frames(pixels, weight)
    patches = _grid(pixels, weight).numel() if kept is None else kept.shape[1]
    return weight.new_empty((pixels.shape[0] * frames, 1 + patches, weight.shape[0]))


@torch.library.impl("lbfast::patch_embed_bwd", "CompositeExplicitAutograd")
def _patch_embed_bwd(
    dtokens: torch.Tensor,
    pixels: torch.Tensor,
    weight: torch.Tensor,
    kept: torch.Tensor | None,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    class_shape: Sequence[int],
    mask: Sequence[bool],
    impl: str | None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of pixels, weight, class_embedding and position_embedding; those that `mask` leaves out are empty."""
    need_pixels, need_weight, need_class, need_position = mask
    chosen = dispatch.choose("patch_embed", impl, IMPLEMENTATIONS, pixels, weight, kept)
    dpixels, dweight, dclass, dposition = (weight.new_empty(0) for _ in mask)
    clips, patches = pixels.shape[0], _grid(pixels, weight).numel()
    if need_position or (need_weight and mean is not None and chosen != "triton"):
        if chosen == "triton" and kept is not None:
            from lbfast.kernels import patch_embed as kernel

            positions = kernel.bwd_position(dtokens, clips, kept, patches)
        else:
            positions = _torch_bwd_position(dtokens, clips, kept, patches)
        if need_position:
            dposition = positions.to(weight.dtype)
    if need_weight:
        dbias: torch.Tensor | None
        if chosen == "triton":
            dfolded, dbias = _triton_bwd_weight(dtokens, pixels, weight, kept)
        else:
            dfolded = _torch_bwd_weight(dtokens, pixels, weight, kept, native=chosen == "native")
            dbias = None if mean is None else positions[1:].sum(0)
        if mean is not None and std is not None and dbias is not None:
            dfolded = unfold_fold(dfolded, dbias, weight, mean, std)
        dweight = dfolded.to(weight.dtype).contiguous().view(weight.shape)
    if need_class:
        dclass = dtokens[:, 0].unflatten(0, (clips, _frames(pixels, weight)))
        dclass = dclass.sum((0, 1) if len(class_shape) == 1 else 0)
    if need_pixels:
        dpixels = _torch_bwd_pixels(dtokens, pixels, weight, kept)
    return dpixels, dweight, dclass, dposition


@torch.library.register_fake("lbfast::patch_embed_bwd")
def _patch_embed_bwd_fake(
    dtokens: torch.Tensor,
    pixels: torch.Tensor,
    weight: torch.Tensor,
    kept: torch.Tensor | None,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    class_shape: Sequence[int],
    mask: Sequence[bool],
    impl: str | None,
) -> Any:
    patches = _grid(pixels, weight).numel()
    return (
        pixels.new_empty(pixels.shape if mask[0] else 0),
        weight.new_empty(weight.shape if mask[1] else 0),
        weight.new_empty(tuple(class_shape) if mask[2] else 0),
        weight.new_empty((1 + patches, weight.shape[0]) if mask[3] else 0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    pixels, weight, class_embedding, _, kept, mean, std, ctx.impl = inputs
    ctx.class_shape = class_embedding.shape
    ctx.save_for_backward(pixels, weight, kept, mean, std)


def _backward(ctx: Any, dtokens: torch.Tensor) -> tuple[Any, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    grads = torch.ops.lbfast.patch_embed_bwd(dtokens, *ctx.saved_tensors, ctx.class_shape, wanted, ctx.impl)
    return (*(grad if want else None for grad, want in zip(grads, wanted)), None, None, None, None)


torch.library.register_autograd("lbfast::patch_embed", _backward, setup_context=_setup)


def _why_not_triton(pixels: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor | None) -> list[str]:
    return dispatch.why_not_triton(*(t for t in (pixels, weight, kept) if t is not None))


def _why_not_native(pixels: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor | None) -> list[str]:
    reasons = dispatch.why_not_native(*(t for t in (pixels, weight, kept) if t is not None))
    for name, tensor, taken in (("pixels", pixels, (torch.uint8, *_NATIVE)), ("weight", weight, _NATIVE)):
        if tensor.dtype not in taken:
            reasons.append(f"{name} of {tensor.dtype}: expected {' or '.join(map(str, taken))}")
    return reasons


def _why_not_torch(*_: object) -> list[str]:
    return []


_NATIVE = (torch.float32, torch.bfloat16)
IMPLEMENTATIONS: dict[str, dispatch.Reasons] = {
    "triton": _why_not_triton,
    "native": _why_not_native,
    "torch": _why_not_torch,
}
