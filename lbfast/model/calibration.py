"""Makes what int8 products read easy to round: channels are shifted and scaled, their readers take it back, exactly.

CLIP has a few channels 50 to 100 times the rest, much the same in every token. A token's scale would be theirs, and the
others would be rounded away. With c the middle of a channel and s a scale of it,

    x @ w.T + b = ((x - c) / s) @ (w s).T + (b + w @ c)

and (x - c) / s costs nothing where x is a norm's output, weight / s and (bias - c) / s, or what attention makes of
values: its rows sum to 1, so that the values' projection takes it. Sources: Xiao et al., arXiv 2211.10438 (scales);
Wei et al., arXiv 2304.09145 (shifts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from lbfast.model.frozen import FrozenLinear
from lbfast.model.layers import MLP, Attention, EncoderLayer
from lbfast.model.plain import plain
from lbfast.model.running import steps_of
from lbfast.model.towers import TextTransformer, VisionTransformer

Tower = VisionTransformer | TextTransformer
Range = tuple[torch.Tensor, torch.Tensor]
"""The least and the greatest value of each channel, (D,) float32."""


def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Any]] | None = None) -> None:
    """Readies a model for `optimize_for_inference(model, precision="int8")`, which does it itself where nobody has.

    Channels are shifted and scaled by what they hold, in place; what the model computes stays the same, but for
    rounding. Layers that are hooked, adapted or replaced are left as they are, and so is the last of each tower.

    Args:
        model: LanguageBind, LanguageBind{Image,Video,Audio,Depth,Thermal}, or a tower of one, before it is optimized.
        batches: inputs as the model takes them: {"video": {"pixel_values": ...}, "language": {"input_ids": ...}} of
            LanguageBind, keyword arguments of others, {"pixel_values": ...}. A few hundred items are enough. None: made
            up, which finds what the weights alone put into channels.

    Raises TypeError for another kind of model; ValueError where it is optimized, or batches are empty.
    """
    towers = [m for m in model.modules() if isinstance(m, (VisionTransformer, TextTransformer))]
    if not towers:
        raise TypeError(f"model: expected a LanguageBind model or one of its towers, got {type(model).__name__}")
    if any(isinstance(module, FrozenLinear) for module in model.modules()):
        raise ValueError("model: expected one that is not optimized yet")
    ranges: dict[str, Range] = {}
    places = {f"{number}.{name}": reads for number, tower in enumerate(towers) for name, reads in _places(tower)}
    training = model.training
    with ExitStack() as watched, torch.no_grad():
        watched.callback(model.train, training)
        model.eval()
        for name, reads in places.items():
            watched.callback(reads.watch(_keeping(ranges, name)).remove)
        for call in _made_up(towers) if batches is None else _fed(model, batches):
            call()
    if places and not ranges:
        raise ValueError("batches: expected at least one, got none")
    with torch.no_grad():
        for name, reads in places.items():
            if name in ranges:
                reads.fold(*ranges[name])
    for tower in towers:
        tower.calibrated = True


def _fed(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Iterator[Callable[[], Any]]:
    for batch in batches:
        if hasattr(model, "modality_encoder"):
            yield partial(model, batch)
        elif isinstance(model, (VisionTransformer, TextTransformer)):
            yield partial(model, **batch)
        else:
            text = {name: value for name, value in batch.items() if name != "pixel_values"}
            if "pixel_values" in batch:
                yield partial(cast(Any, model).get_image_features, batch["pixel_values"])
            if text:
                yield partial(cast(Any, model).get_text_features, **text)


def _made_up(towers: list[Tower]) -> Iterator[Callable[[], Any]]:
    for tower in towers:
        yield partial(tower, **made_up(tower))


def made_up(tower: Tower) -> dict[str, torch.Tensor]:
    """Inputs of a tower that are like none: noise, or ids at random up to the end-of-text token."""
    like = next(tower.parameters())
    generator = torch.Generator().manual_seed(0)
    if isinstance(tower, TextTransformer):
        rows, columns = 8, tower.config.max_position_embeddings
        ids = torch.randint(tower.config.vocab_size - 1, (rows, columns), generator=generator)
        ends = torch.randint(1, columns, (rows, 1), generator=generator)
        ids = torch.where(torch.arange(columns) < ends, ids, tower.config.vocab_size - 1)
        return {"input_ids": ids.to(like.device)}
    channels, height, width = tower.embeddings.pixel_shape
    frames = (tower.config.num_frames,) if tower.config.add_time_attn else ()
    items = 1 if frames else 4
    pixels = torch.randn(items, channels, *frames, height, width, generator=generator)
    return {"pixel_values": pixels.to(like.device, like.dtype)}


class _Reads:
    """A tensor that linear layers read, and who makes it: `maker`'s weight and bias, a norm's or a projection's."""

    def __init__(self, maker: nn.Module, readers: list[nn.Linear], watched: nn.Module, of_input: bool):
        self.maker, self.readers, self.watched, self.of_input = maker, readers, watched, of_input

    def watch(self, keep: Callable[[torch.Tensor], None]) -> Any:
        if self.of_input:
            return self.watched.register_forward_pre_hook(lambda _, args: keep(args[0]))
        return self.watched.register_forward_hook(lambda _, __, out: keep(out))

    def fold(self, low: torch.Tensor, high: torch.Tensor) -> None:
        middle, reach = ((high + low) / 2).double(), ((high - low) / 2).double()
        weights = torch.stack([reader.weight.abs().amax(0).double() for reader in self.readers]).amax(0)
        floor = 1e-3 * float(reach.median())
        scale = (reach.clamp(min=floor) / weights.clamp(min=1e-3 * float(weights.median()))).sqrt()
        scale = scale / scale.log().mean().exp()
        if not bool(torch.isfinite(scale).all() & (scale > 0).all() & torch.isfinite(middle).all()):
            return  # constant channels, or none that are finite
        for reader in self.readers:
            weight = reader.weight.double()
            _replace(reader, "bias", reader.bias.double() + weight @ middle)
            _replace(reader, "weight", weight * scale)
        maker = self.maker
        weight, bias = cast(torch.Tensor, maker.weight).double(), cast(torch.Tensor, maker.bias).double()
        _replace(maker, "bias", (bias - middle) / scale)
        _replace(maker, "weight", weight / (scale if weight.dim() == 1 else scale[:, None]))


def _replace(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """A new parameter: the old one may be shared with another model."""
    old = cast(nn.Parameter, getattr(module, name))
    setattr(module, name, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))


def _places(tower: Tower) -> Iterator[tuple[str, _Reads]]:
    """What int8 products of a tower read and can be shifted; the last layer has none."""
    for depth, layer in enumerate(cast(list[EncoderLayer], list(tower.encoder.layers))[:-1]):
        if not plain(layer):
            continue
        for index, step in enumerate(steps_of(layer)):
            reader, norm = cast("Attention | MLP", step.reader), step.norm
            linears = [reader.fc1] if isinstance(reader, MLP) else [*reader.products]
            # hooks of ours are on norms and out_proj while watching, so that the readers alone are asked
            if not all(type(linear) is nn.Linear and linear.bias is not None for linear in linears):
                continue
            yield f"{depth}.{index}.norm", _Reads(norm, cast(list[nn.Linear], linears), norm, of_input=False)
            if isinstance(reader, Attention) and type(reader.out_proj) is nn.Linear:
                out, value = cast(nn.Linear, reader.out_proj), cast(nn.Linear, reader.v_proj)
                yield f"{depth}.{index}.values", _Reads(value, [out], out, of_input=True)


def _keeping(ranges: dict[str, Range], name: str) -> Callable[[torch.Tensor], None]:
    def keep(x: torch.Tensor) -> None:
        low, high = x.detach().float().flatten(0, -2).aminmax(dim=0)
        if name in ranges:
            low, high = torch.minimum(low, ranges[name][0]), torch.maximum(high, ranges[name][1])
        ranges[name] = low, high

    return keep
