"""Which parameters a recipe trains, and in which groups of the optimiser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lbfast.model.languagebind import LanguageBindModel
from lbfast.model.lora import add_lora, lora_modules
from lbfast.training.recipes import Recipe

BIAS = "logit_bias"
"""Parameter of a model that is trained with a sigmoid loss; no checkpoint of a model has it."""
FIRST_BIAS = -10.0


def prepare(model: LanguageBindModel, recipe: Recipe) -> LanguageBindModel:
    """Puts adapters into the vision tower where the recipe asks for them, and chooses what is trained. In place.

    Trained: the adapters, or all of the vision tower; its class embedding, temporal embeddings and norms, last norm and
    projection; the temperature, and the bias of a sigmoid loss; the text tower if asked. Never the position embedding;
    with lock_image neither the patch embedding nor the norm after it.

    Raises ValueError where the model has adapters of another rank, or is of another modality.
    """
    if model.config.modality.name != recipe.modality:
        raise ValueError(
            f"model: expected one for {recipe.modality}, as the recipe says, got {model.config.modality.name}"
        )
    vision, fields = model.vision_model, model.config.vision_config
    encoder = vision.encoder
    if recipe.lora_r and not fields.lora_r:
        fields.lora_r, fields.lora_alpha, fields.lora_dropout = recipe.lora_r, recipe.lora_alpha, recipe.lora_dropout
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            add_lora(encoder, recipe.lora_r, recipe.lora_alpha, recipe.lora_dropout, fields.add_time_attn)
    if (recipe.lora_r or 0) != (fields.lora_r or 0):
        raise ValueError(f"lora_r: expected {fields.lora_r}, the rank of the model's adapters, got {recipe.lora_r}")

    model.requires_grad_(False)
    vision.requires_grad_(not recipe.lora_r)
    for _, module in lora_modules(encoder):
        module.lora_A.requires_grad_(True)
        module.lora_B.requires_grad_(True)
    for name, parameter in encoder.named_parameters():
        if ".temporal_layer_norm" in name:
            parameter.requires_grad_(True)
        elif name.endswith(".temporal_embedding"):
            parameter.requires_grad_(fields.num_frames > vision.embeddings.tube_size)  # one frame has none
    for part in (vision.embeddings, vision.pre_layrnorm):
        part.requires_grad_(not recipe.lock_image)
    vision.embeddings.position_embedding.requires_grad_(False)
    vision.embeddings.class_embedding.requires_grad_(True)
    vision.post_layernorm.requires_grad_(True)
    model.visual_projection.requires_grad_(True)
    for text in (model.text_model, model.text_projection):
        text.requires_grad_(recipe.train_text)
    model.logit_scale.requires_grad_(recipe.learn_temperature)
    if recipe.loss == "sigmoid" and not hasattr(model, BIAS):
        model.register_parameter(BIAS, nn.Parameter(torch.full_like(model.logit_scale, FIRST_BIAS)))
    vision.patch_dropout.prob = fields.force_patch_dropout = recipe.patch_dropout
    return training_mode(model)


def training_mode(model: LanguageBindModel) -> LanguageBindModel:
    """Training mode, but for a text tower that is not trained."""
    model.train()
    model.text_model.train(any(p.requires_grad for p in model.text_model.parameters()))
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups for AdamW: adapters have the recipe's lr, others lr * coef_lr; what has one dimension does not decay.

    With layer_decay d, what lies n layers below a tower's end has d ** n of that.
    """
    found: dict[tuple[bool, bool, bool, int], dict[str, Any]] = {}
    for name, parameter in trained(model).items():
        adapter = ".lora_" in name
        decays = parameter.ndim > 1 and not name.endswith("logit_scale")
        sharded = isinstance(parameter, DTensor)
        below = 0 if recipe.layer_decay == 1 else _layers_above(model, name)
        group = found.setdefault(
            (adapter, decays, sharded, below),
            {
                "params": [],
                "names": [],
                "share": (1.0 if adapter else recipe.coef_lr) * recipe.layer_decay**below,  # of the scheduled lr
                "weight_decay": recipe.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(found.values())


def _layers_above(model: nn.Module, name: str) -> int:
    """Of a parameter of a tower, with its end counted as one; 0 for what belongs to none, or to the end."""
    tower, _, rest = name.partition(".")
    if tower not in ("vision_model", "text_model") or rest.startswith(("post_layernorm.", "final_layer_norm.")):
        return 0
    layers = len(model.get_submodule(f"{tower}.encoder").layers)  # type: ignore[arg-type]
    return layers - int(rest.split(".")[2]) if rest.startswith("encoder.layers.") else layers + 1


def local(x: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def gradient_norm(parameters: Iterable[nn.Parameter], group: Any) -> torch.Tensor:
    """The 2-norm of all gradients, float32, on every process of the group."""
    import torch.distributed as dist

    whole: list[torch.Tensor] = []
    sharded: list[torch.Tensor] = []
    for parameter in parameters:
        if parameter.grad is not None:
            (sharded if isinstance(parameter.grad, DTensor) else whole).append(local(parameter.grad))
    total = _squares(whole)
    if sharded:
        part = _squares(sharded)
        dist.all_reduce(part, group=group)
        total = total.to(part.device) + part
    return total.sqrt()


def _squares(tensors: list[torch.Tensor]) -> torch.Tensor:
    if not tensors:
        return torch.zeros(())
    return torch.stack(torch._foreach_norm(tensors)).float().square().sum()
