"""Readies a model for inference: precision, weights laid out for the machine's products, CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar, cast

import torch
from torch import nn

from lbfast import tokenwise
from lbfast.model.calibration import calibrate
from lbfast.model.checkpoint import check_fits, parse_dtype
from lbfast.model.frozen import (
    Float8Linear,
    Freezable,
    FrozenLinear,
    PackedLinear,
    PanelLinear,
    check_float8,
    check_int8,
)
from lbfast.model.frozen_tokens import FrozenTokens
from lbfast.model.graphs import Graphs
from lbfast.model.layers import MLP, Attention, Encoder, EncoderLayer, TemporalAttention
from lbfast.model.lora import merge_lora
from lbfast.model.plain import are_linear, parts, plain, wholly_plain
from lbfast.model.running import Running
from lbfast.model.spans import Spans
from lbfast.model.towers import TextTransformer, VisionTransformer

PRECISIONS = ("fp8", "int8")

M = TypeVar("M", bound=nn.Module)


def best_dtype(device: torch.device | str) -> torch.dtype:
    """The fastest dtype whose embeddings keep a cosine over 0.999 to float32's: bfloat16 where the device has it.

    A CPU has it with AVX512-bf16 or AMX. GPUs before Ampere take float16; every other device float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    tests = (getattr(torch.cpu, f"_is_{name}_supported", lambda: False) for name in ("avx512_bf16", "amx_tile"))
    return torch.bfloat16 if device.type == "cpu" and any(test() for test in tests) else torch.float32


def optimize_for_inference(
    model: M,
    *,
    dtype: torch.dtype | str | None = "auto",
    precision: str | None = None,
    pack_weights: bool = True,
    cuda_graphs: bool = True,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
) -> M:
    """Readies a model for inference, in place, on the device where it is: the same calls, the same embeddings, sooner.

    Adapters are merged, queries, keys and values are projected by one product, and parameters take no gradients. On a
    CPU weights are laid out once as oneDNN's products want them, instead of at every call, and the MLP's activation
    becomes the end of its first product. On a GPU the towers' launches are recorded as CUDA graphs, one for each batch
    size, and of captions for each of a few lengths, at its first use; CPU inputs are copied through pinned memory while
    the batch before is computed. Where launching takes no longer than computing, captions are packed instead.

    The weights can't be saved, moved, copied or trained any more. Modules that have hooks, or adapters that are not
    lbfast's, stay as they are. The number of threads is left alone.

    Args:
        model: LanguageBind, LanguageBind{Image,Video,Audio,Depth,Thermal}, or a tower of one.
        dtype: of the weights: "auto" (`best_dtype` of the device), a floating dtype or its name, or None to keep what
            they have. Float pixels are cast to it.
        precision: of the products of all layers but the last. "fp8": float8 e4m3, a scale for each row of both, summed
            in float32 (Hopper and later; emulated, slowly, on a CPU). "int8": on a CPU with AVX512-VNNI, AVX-VNNI or
            AMX, weights with a scale for each output, inputs with a scale and an offset for each token, found as they
            are made; sums are exact; channels are evened out before, by `calibrate`. None: in `dtype`.
        pack_weights: on a CPU, lay out the weights. False leaves them plain, as torch.compile wants them.
        cuda_graphs: on a GPU, record the towers. False for torch.compile, and where memory is short.
        batch_sizes: the sizes recorded; a batch is padded to the next, larger ones go in pieces.

    Returns:
        The model, in eval mode.

    Raises:
        TypeError: another kind of model. ValueError: an unknown dtype or precision, or batch_sizes that are none.
        RuntimeError: the device has no such products.
    """
    if not isinstance(model, Freezable):
        raise TypeError(
            f"model: expected a LanguageBind model or one of its towers, got {type(model).__name__}; a live upstream "
            "model becomes one by lbfast.accelerate"
        )
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision: expected None or one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes: expected positive numbers, got {tuple(batch_sizes)}")
    device = next(model.parameters()).device
    if precision == "fp8":
        check_float8(device)
    if precision == "int8":
        check_int8(device, pack_weights)
    wanted = best_dtype(device) if dtype == "auto" else None if dtype is None else parse_dtype(dtype)
    towers = [m for m in model.modules() if isinstance(m, (VisionTransformer, TextTransformer))]
    if any(isinstance(module, FrozenLinear) for module in model.modules()):
        raise ValueError("model: expected one that is not optimized yet")
    for tower in towers:
        if merge_lora(tower):
            tower.config.lora_r = 0
    model.eval().requires_grad_(False)
    if precision == "int8":
        for tower in towers:
            if not tower.calibrated:
                calibrate(tower)
    if wanted is not None:
        check_fits(dict(model.named_parameters()), wanted, "model")
        nn.Module.to(model, wanted)
    for tower in towers:
        frames = tower.frames if isinstance(tower, VisionTransformer) else 1
        tower.encoder.running = _freeze(tower.encoder, frames, precision, pack_weights and device.type == "cpu")
        if tower.encoder.running is None:
            continue
        tower.parts = parts(tower)
        if isinstance(tower, VisionTransformer) and isinstance(tower.encoder.running, Spans):
            tower.frozen_tokens = _frozen_tokens(tower)
        if cuda_graphs and device.type == "cuda":
            tower.graphs = _graphs(tower, batch_sizes)
    return model


def _frozen_tokens(tower: VisionTransformer) -> FrozenTokens | None:
    """None where panels have not the tower's dtype, or modules are more than their parameters."""
    embeddings, norm = tower.embeddings, tower.pre_layrnorm
    if _why_no_spans(tower.encoder, norm.weight.dtype) or not (wholly_plain(embeddings) and plain(norm)):
        return None
    return FrozenTokens(embeddings, norm)


def _graphs(tower: VisionTransformer | TextTransformer, batch_sizes: Sequence[int]) -> Graphs:
    if isinstance(tower, TextTransformer):
        return Graphs(tower.pooled_padded, batch_sizes)
    return Graphs(lambda pixels: tower.pooled_clips(pixels, 0 if pixels.ndim == 4 else len(pixels)), batch_sizes)


def _fold_scale(attention: Attention) -> None:
    """Multiplies queries by the softmax's scale through their weights, where that is a power of two: exactly."""
    if isinstance(attention, TemporalAttention) or math.frexp(attention.scale)[0] != 0.5:
        return
    with torch.no_grad():
        for name in ("weight", "bias"):
            scaled = getattr(attention.q_proj, name).detach() * attention.scale  # it may be shared with another model
            setattr(attention.q_proj, name, nn.Parameter(scaled, requires_grad=False))
    attention.scale = 1.0


def _freeze(encoder: Encoder, frames: int, precision: str | None, pack: bool) -> Running | Spans | None:
    """Puts frozen products in the places of an encoder's Linears, one by one: no two copies of all weights at once.

    None where modules are hooked, adapted or replaced: these stay, and all are called.
    """
    dtype = next(encoder.parameters()).dtype
    weights = torch.int8 if precision == "int8" else dtype
    spanned = pack and precision in (None, "int8")
    if spanned and (reasons := _why_no_spans(encoder, weights)):
        if precision == "int8":
            raise RuntimeError(f"precision: int8 can't run here: {'; '.join(reasons)}")
        spanned = False
    exact = PackedLinear if pack and PackedLinear.takes(dtype) else FrozenLinear
    if spanned:
        _replace_by_panels(encoder, weights, exact)
    else:
        for layer in encoder.layers:
            kind = Float8Linear if precision == "fp8" and layer is not encoder.layers[-1] else exact
            _replace_products(encoder, layer, partial(_made, kind))
    if not wholly_plain(encoder) or any(isinstance(module, nn.Linear) for module in encoder.modules()):
        return None
    return Spans(encoder, frames) if spanned and len(encoder.layers) > 1 else Running(encoder, frames)


def _why_no_spans(encoder: Encoder, weights: torch.dtype) -> list[str]:
    return tokenwise.why_not(encoder.config.hidden_size, encoder.config.intermediate_size, weights)


def _replace_by_panels(encoder: Encoder, weights: torch.dtype, exact: type[FrozenLinear]) -> None:
    """PanelLinear, of `weights` in all layers but the last, which keeps its dtype; all of them on large pages.

    Where panels have not that dtype the last layer is `exact`.
    """
    dtype = next(encoder.parameters()).dtype
    *layers, last = encoder.layers
    dtypes = dict.fromkeys(layers, weights)
    if not _why_no_spans(encoder, dtype):
        dtypes[last] = dtype
    room = tokenwise.Room(
        sum(
            tokenwise.panel_bytes(module.out_features, module.in_features, dtype)
            for layer, dtype in dtypes.items()
            for module in layer.modules()
            if isinstance(module, nn.Linear) and are_linear(module)
        )
    )
    for layer, dtype in dtypes.items():
        _replace_products(encoder, layer, partial(_in_panels, dtype, room))
    if last not in dtypes:
        _replace_products(encoder, last, partial(_made, exact))


def _made(kind: type[FrozenLinear], name: str, *linears: nn.Linear) -> FrozenLinear:
    return kind(*linears)


def _in_panels(dtype: torch.dtype, room: tokenwise.Room, name: str, *linears: nn.Linear) -> FrozenLinear:
    return PanelLinear(*linears, weights=dtype, chunk=tokenwise.CHUNK if name == "fc2" else None, room=room)


def _replace_products(encoder: Encoder, layer: nn.Module, kind: Callable[..., FrozenLinear]) -> None:
    """The plain Linears of a layer by kind(name, *linears)."""
    last = cast(EncoderLayer, encoder.layers[-1])
    for module in layer.modules():
        if isinstance(module, Attention):
            if not plain(module) or not are_linear(*module.products):
                continue
            if module is last.self_attn:  # only one query is wanted
                module.kv = kind("kv", module.k_proj, module.v_proj)
            else:
                _fold_scale(module)
                module.qkv = kind("qkv", module.q_proj, module.k_proj, module.v_proj)
                del module.q_proj
            del module.k_proj, module.v_proj
        if isinstance(module, (Attention, MLP)):
            for name, child in list(module.named_children()):
                if are_linear(child):
                    setattr(module, name, kind(name, child))
