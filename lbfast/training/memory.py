"""What a micro-batch holds for its backward, and ways to hold less: recomputing activations, or moving them away."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lbfast.training.recipes import Recipe

MIB = 2**20
CPU_BUDGET_MIB = 2048
GPU_SHARE = 0.6
"""Of the memory that is free: gradients, the optimiser's state and what the backward holds meanwhile need the rest."""

_SMALL = MIB  # not worth a copy


def capacity(device: torch.device) -> int:
    """Bytes that this process can have: of the GPU, or of this machine's memory within the limit of a container."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
        limits.append(free + int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError):
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))  # "max" is none
    return min(limits) if limits else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Offload:
    """Tensors that are saved for the backward wait in the CPU's memory: `with offload(): ...forward...`.

    Parameters stay where they are, and so does what is small or on the CPU already.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self) -> saved_tensors_hooks:
        parameters = _storages(self.module)

        def pack(x: torch.Tensor) -> Any:
            if x.device.type == "cpu" or x.nbytes < _SMALL or x.untyped_storage().data_ptr() in parameters:
                return x.detach()
            kept = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            kept.copy_(x, non_blocking=True)
            return x.device, kept

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            device, kept = packed
            return kept.to(device, non_blocking=True)

        return saved_tensors_hooks(pack, unpack)


def saved_bytes(module: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that run()'s graph keeps for the backward, each tensor's memory once, parameters not counted."""
    parameters = _storages(module)
    seen: dict[int, int] = {}
    alive = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        alive.append(x.detach())  # so that no address is used again
        return alive[-1]  # not x: an output that its own node has saved would never be freed

    with saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(seen.values())


def recompute(encoder: Any, what: str) -> None:
    """Makes a tower's encoder recompute, in the backward, "attention", whole "layers", or "none" of it."""
    encoder.gradient_checkpointing = what == "layers"
    for layer in encoder.layers:
        for attention in (layer.self_attn, getattr(layer, "temporal_attn", None)):
            if attention is None:
                continue
            attention.__dict__.pop("forward", None)
            if what == "attention":
                attention.forward = functools.partial(checkpoint, attention.forward, use_reentrant=False)


def fitting_rows(towers: Any, recipe: Recipe, device: torch.device, arithmetic: Callable[[], Any], most: int) -> int:
    """The largest micro-batch, 1 to `most` rows, whose activations fit the recipe's memory budget.

    Args:
        towers: of the model, on its device, in training mode.
        arithmetic: a context for the forward: autocast.
    """
    if most < 2:
        return 1
    first, each = activations(towers, recipe, device, arithmetic)
    return max(1, min(most, (budget(recipe, device) - first) // each))


def budget(recipe: Recipe, device: torch.device) -> int:
    """Bytes that a micro-batch's activations may take."""
    if recipe.memory_budget_mib is not None:
        return int(recipe.memory_budget_mib * MIB)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * GPU_SHARE)
    return CPU_BUDGET_MIB * MIB


def activations(towers: Any, recipe: Recipe, device: torch.device, arithmetic: Callable[[], Any]) -> tuple[int, int]:
    """(a, b): m rows keep a + b m bytes for their backward; b is 1 at least.

    What one and two rows keep is counted, on rows of zeros; what recomputation holds for a moment is added, a layer's
    worth.
    """
    model = towers.model
    vision, encoder = model.vision_model, model.vision_model.encoder
    channels, height, width = vision.embeddings.pixel_shape
    frames = (model.config.vision_config.num_frames,) if model.config.vision_config.add_time_attn else ()

    def measure(rows: int) -> int:
        pixels = torch.zeros(rows, channels, *frames, height, width, device=device)
        ids = torch.zeros(rows, model.config.text_config.max_position_embeddings, dtype=torch.int64, device=device)
        ids[:, -1] = 1  # the end of a text as long as there can be
        with arithmetic(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            return saved_bytes(towers, lambda: towers(pixels, ids, torch.ones_like(ids), None))

    one, two = measure(1), measure(2)
    offloaded = recipe.offload and device.type != "cpu"
    if recipe.checkpointing != "none" or offloaded:
        recompute(encoder, "none")
        layers = encoder.layers
        try:  # of few layers: all of them may be more than there is memory for
            encoder.layers = layers[:1]
            first = measure(1)
            encoder.layers = layers[:2]
            layer = (measure(1) - first) if len(layers) > 1 else first
        finally:
            encoder.layers = layers
        recompute(encoder, recipe.checkpointing)
        one, two = (0, 0) if offloaded else (one, two)
        one, two = one + layer, two + 2 * layer
    each = max(two - one, 1)
    return one - each, each


def _storages(module: nn.Module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
