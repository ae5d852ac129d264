"""Contrastive losses as modules: open_clip's call, and one for every modality against language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from lbfast.ops import info_nce, sigmoid_loss


class InfoNCELoss(nn.Module):
    """open_clip's ClipLoss, constructor and call, in linear memory; see ops.info_nce for what is computed.

        loss = InfoNCELoss(rank=rank, world_size=world_size)
        losses = loss(image_features, text_features, logit_scale, output_dict=True)   # {"contrastive_loss": ...}

    Over several ranks the loss is that of the whole batch, and the features' gradients are multiplied by the number
    of ranks: DistributedDataParallel, which averages, then gives every parameter the gradient of one process with the
    whole batch. logit_scale's gradient is whole on every rank, and so is its average.

    Args:
        local_loss, gather_with_grad, cache_labels: open_clip's choices between ways to the loss; they change nothing
            here: the gradients are whole. open_clip's are with gather_with_grad=True; with False, its default, it
            drops what other ranks' losses owe to a rank's features.
        rank, world_size: world_size > 1 without `group` takes the default process group. `rank` is not needed.
        use_horovod: must be False.
        label_smoothing, direction, dims, dim_weights, group, gather, impl, workspace_mib: as in ops.info_nce.
        averaged: gradients are averaged over the ranks afterwards, as DistributedDataParallel does. False: features
            get the plain gradient of the loss.

    Raises:
        ValueError: `use_horovod`.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        label_smoothing: float = 0.0,
        direction: Literal["both", "image", "text"] = "both",
        dims: Sequence[int] | None = None,
        dim_weights: Sequence[float] | None = None,
        group: Any = None,
        gather: Literal["all", "ring"] = "all",
        averaged: bool = True,
        impl: str | None = None,
        workspace_mib: int | None = None,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("InfoNCELoss: use_horovod: expected False (torch.distributed only), got True")
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod
        self.label_smoothing = label_smoothing
        self.direction: Literal["both", "image", "text"] = direction
        self.dims, self.dim_weights = dims, dim_weights
        self.group = group
        self.gather: Literal["all", "ring"] = gather
        self.averaged = averaged
        self.impl = impl
        self.workspace_mib = workspace_mib

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor | None = None,
        output_dict: bool = False,
        *,
        ids: torch.Tensor | None = None,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """(B, D), (B, D) and the factor (not its logarithm) -> scalar, or {"contrastive_loss": scalar}.

        text_features may have more rows: those after the B-th are hard negatives of every image.

        logit_bias, one number added to every logit, changes no softmax: it is accepted and gets a gradient of zero.
        ids: integers, one a row of text_features; rows that share one are not negatives of each other.
        """
        group = _group(self.group, self.world_size)
        if self.averaged and group is not None:
            image_features, text_features = _times_ranks(group, image_features, text_features)
        loss = info_nce(
            image_features,
            text_features,
            logit_scale,
            ids=ids,
            label_smoothing=self.label_smoothing,
            direction=self.direction,
            dims=self.dims,
            dim_weights=self.dim_weights,
            group=group,
            gather=self.gather,
            impl=self.impl,
            workspace_mib=self.workspace_mib,
        )
        if logit_bias is not None:
            loss = loss + 0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """open_clip's SigLipLoss, constructor and call, in linear memory; see ops.sigmoid_loss for what is computed.

        loss = SigLipLoss(rank=rank, world_size=world_size)
        losses = loss(image_features, text_features, logit_scale, logit_bias, output_dict=True)

    Over several ranks the loss is that of the whole batch, where open_clip's is that of the rank's own images, whose
    mean it is. The features' gradients are multiplied by the number of ranks: DistributedDataParallel, which averages,
    then gives every parameter the gradient of one process with the whole batch, as with open_clip's.

    Args:
        cache_labels, dist_impl, chunk_size: open_clip's choices between ways to the loss; they change nothing here:
            logits are never stored. `gather` says how texts travel, `workspace_mib` how large a tile is.
        rank, world_size: world_size > 1 without `group` takes the default process group. `rank` is not needed.
        group, gather, impl, workspace_mib: as in ops.sigmoid_loss.
        averaged: as in InfoNCELoss.

    Raises:
        ValueError: dist_impl is none of open_clip's, or chunk_size no number of rows.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        group: Any = None,
        gather: Literal["all", "ring"] = "all",
        averaged: bool = True,
        impl: str | None = None,
        workspace_mib: int | None = None,
    ) -> None:
        super().__init__()
        known = ("bidir", "shift", "reduce", "gather")
        if dist_impl is not None and dist_impl not in known:
            raise ValueError(f"SigLipLoss: dist_impl: expected one of {', '.join(known)}, or None, got {dist_impl!r}")
        if type(chunk_size) is not int or chunk_size < 0:
            raise ValueError(f"SigLipLoss: chunk_size: expected 0 (none) or a number of rows, got {chunk_size!r}")
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.dist_impl, self.chunk_size = dist_impl or known[0], chunk_size
        self.group = group
        self.gather: Literal["all", "ring"] = gather
        self.averaged = averaged
        self.impl = impl
        self.workspace_mib = workspace_mib

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor | None,
        output_dict: bool = False,
        *,
        ids: torch.Tensor | None = None,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """(B, D), (B, D), the factor (not its logarithm) and the bias -> scalar, or {"contrastive_loss": scalar}.

        text_features may have more rows: those after the B-th are hard negatives of every image. No bias is one of 0.
        ids: integers, one a row of text_features; rows that share one are not negatives of each other.
        """
        group = _group(self.group, self.world_size)
        if self.averaged and group is not None:
            image_features, text_features = _times_ranks(group, image_features, text_features)
        loss = sigmoid_loss(
            image_features,
            text_features,
            logit_scale,
            0.0 if logit_bias is None else logit_bias,
            ids=ids,
            group=group,
            gather=self.gather,
            impl=self.impl,
            workspace_mib=self.workspace_mib,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class LanguageBindLoss(nn.Module):
    """Every modality against language: sum over modalities m of weight_m * InfoNCE(embeds[m], embeds["language"]).

        loss = LanguageBindLoss()
        loss({"video": v, "audio": a, "language": t}, logit_scale)

    Args:
        weights: {modality: factor}; 1 for those not named.
        language: the key of the language embeddings.
        options: keyword arguments of InfoNCELoss.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, language: str = "language", **options: Any) -> None:
        super().__init__()
        self.weights = dict(weights or {})
        self.language = language
        self.info_nce = InfoNCELoss(**options)

    def forward(
        self,
        embeds: Mapping[str, torch.Tensor | Mapping[str, torch.Tensor]],
        logit_scale: torch.Tensor | Mapping[str, torch.Tensor],
        output_dict: bool = False,
        *,
        ids: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """{modality: (B, D), language: (B, D)} -> scalar, or {"<modality>_loss": weighted scalar}, whose sum it is.

        embeds[language], logit_scale and ids may each be a mapping {modality: ...} where modalities come with
        captions, factors or ids of their own.

        Raises:
            ValueError: language, or every other modality, is missing.
        """
        if self.language not in embeds:
            raise ValueError(f"LanguageBindLoss: embeds: expected the key {self.language!r}, got {sorted(embeds)}")
        modalities = [name for name in embeds if name != self.language]
        if not modalities:
            raise ValueError(f"LanguageBindLoss: embeds: expected a modality beside {self.language!r}, got none")
        losses = {}
        for name in modalities:
            texts, scale, rows = (_of(x, name) for x in (embeds[self.language], logit_scale, ids))
            losses[f"{name}_loss"] = self.weights.get(name, 1.0) * self.info_nce(embeds[name], texts, scale, ids=rows)
        return losses if output_dict else torch.stack(list(losses.values())).sum()


def _of(value: Any, modality: str) -> Any:
    """The modality's own, where `value` is a mapping."""
    if not isinstance(value, Mapping):
        return value
    if modality not in value:
        raise ValueError(f"LanguageBindLoss: expected an entry for {modality!r}, got {sorted(value)}")
    return value[modality]


def _group(group: Any, world_size: int) -> Any:
    """The group given; the default one where there is none and there are ranks."""
    return dist.group.WORLD if group is None and world_size > 1 else group


def _times_ranks(group: Any, *features: torch.Tensor) -> list[torch.Tensor]:
    """The features, whose gradients are multiplied by the number of ranks."""
    return [_scale_gradient(x, dist.get_world_size(group)) for x in features]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def _scale_gradient(x: torch.Tensor, factor: int) -> torch.Tensor:
    """x, whose gradient is multiplied by `factor`."""
    return x if factor == 1 or not x.requires_grad else _ScaleGradient.apply(x, factor)
