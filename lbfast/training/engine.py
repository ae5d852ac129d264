"""Processes: their start under torchrun, and the engines that keep their parameters equal or sharded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lbfast.training.parameters import BIAS
from lbfast.training.step import Towers

Engine = Literal["auto", "ddp", "fsdp"]


@dataclass(frozen=True)
class Place:
    """This process among those that train together; group is None where it is alone."""

    rank: int
    world: int
    device: torch.device
    group: Any

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[Place]:
    """Joins the processes that torchrun started, if it did: nccl on GPUs, gloo on CPUs.

    Raises ValueError for a device that is not there.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that is there, got {device!r}: PyTorch sees no GPU")
    alone = "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2
    if kind == "cuda":
        kind = f"cuda:{0 if alone else os.environ.get('LOCAL_RANK', '0')}"
    if kind.startswith("cuda"):
        torch.cuda.set_device(kind)
    if alone:
        yield Place(0, 1, torch.device(kind), None)
        return
    dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
    try:
        yield here(torch.device(kind))
    finally:
        dist.destroy_process_group()


def here(device: torch.device) -> Place:
    """The place of this process in the default process group, if there is one."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Place(0, 1, device, None)
    return Place(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD)


def wrap(towers: Towers, engine: Engine, place: Place) -> nn.Module:
    """The towers as the engine runs them: alone, averaging gradients (ddp), or with sharded parameters (fsdp)."""
    if engine not in ("auto", "ddp", "fsdp"):
        raise ValueError(f"engine: expected auto, ddp or fsdp, got {engine!r}")
    if place.group is None:
        return towers
    if engine == "fsdp":
        return _shard(towers, place)
    return nn.parallel.DistributedDataParallel(
        towers,
        device_ids=[place.device] if place.device.type == "cuda" else None,
        process_group=place.group,
        gradient_as_bucket_view=True,
    )


def _shard(towers: Towers, place: Place) -> nn.Module:
    """FSDP2, a unit for each encoder layer; a text tower that is not trained stays whole, and so does the scale."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    model = towers.model
    mesh = DeviceMesh.from_group(place.group, place.device.type)
    whole = {p for p in (model.logit_scale, getattr(model, BIAS, None)) if p is not None}  # no dimension to shard
    encoders = [model.vision_model.encoder]
    if towers.text_trained:
        encoders.append(model.text_model.encoder)
    else:
        whole |= {*model.text_model.parameters(), *model.text_projection.parameters()}
    for encoder in encoders:
        for layer in encoder.layers:
            fully_shard(layer, mesh=mesh)
            for method in ("packed", "pooled"):
                register_fsdp_forward_method(layer, method)
    fully_shard(towers, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    if place.device.type == "cpu":
        for unit in towers.modules():
            if isinstance(unit, FSDPModule):
                unit.set_force_sum_reduction_for_comms(True)  # the gloo of PyTorch 2.8 takes a mean for a sum
    return towers


def full(x: torch.Tensor) -> torch.Tensor:
    """All of a tensor; of a sharded one on every process, which all must call."""
    x = x.detach()
    return x.full_tensor().clone() if isinstance(x, DTensor) else x  # what was gathered may be one buffer of many


def as_part_of(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor placed and sharded as `like`."""
    x = x.to(like.device)
    return distribute_tensor(x, like.device_mesh, like.placements) if isinstance(like, DTensor) else x


def agreed(value: int, place: Place) -> int:
    """The largest `value` of any process."""
    if place.group is None:
        return value
    every = torch.tensor([value], device=place.device)
    dist.all_reduce(every, op=dist.ReduceOp.MAX, group=place.group)
    return int(every)
