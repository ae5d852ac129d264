"""What others compute for the same thing: baselines in plain torch, and packages where they are installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def missing(package: str) -> str:
    """Why a package cannot be measured here; empty where it can."""
    if importlib.util.find_spec(package) is None:
        return f"absent: {package} is not installed"
    return "" if torch.cuda.is_available() else f"absent: {package} needs a GPU"


def absent(package: str) -> Any:
    """A package; raises ImportError, with the word that a bench looks for, where it cannot be imported."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"absent: {package}: {error}") from error


def clip_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """open_clip's ClipLoss on one process, its arithmetic: two dense logit products, two cross-entropies."""
    labels = torch.arange(image.shape[0], device=image.device)
    per_image = scale * image @ text.T
    per_text = scale * text @ image.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def clip_loss_one_product(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The same from one logit product and its transpose, as Hugging Face's CLIP does it."""
    labels = torch.arange(image.shape[0], device=image.device)
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def missing_linear_cross_entropy() -> str:
    """Why torch's linear_cross_entropy cannot be measured here; empty where it can."""
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return ""
    return f"absent: torch {torch.__version__} has no linear_cross_entropy (2.13 has)"


def clip_loss_linear_cross_entropy(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Both directions by torch's own chunks, its options as it chooses them."""
    labels = torch.arange(image.shape[0], device=image.device)
    chunks = torch.nn.LinearCrossEntropyOptions()
    per_image, per_text = (
        F.linear_cross_entropy(scale.to(x.dtype) * x, y, labels, options=chunks)
        for x, y in ((image, text), (text, image))
    )
    return (per_image.float() + per_text.float()) / 2


def missing_auto_chunker() -> str:
    """Why Inductor's auto-chunker cannot be measured here; empty where it can."""
    if not torch.cuda.is_available():
        return "absent: compiled for a GPU only"
    if not hasattr(importlib.import_module("torch._inductor.config"), "auto_chunker"):
        return f"absent: torch {torch.__version__} has no auto-chunker"
    return ""


@functools.cache
def _compiled_in_chunks() -> Any:
    return torch.compile(clip_loss, dynamic=False, options={"auto_chunker.enable": True})


def clip_loss_compiled_in_chunks(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """open_clip's arithmetic under torch.compile, which cuts the logits into chunks by itself."""
    return _compiled_in_chunks()(image, text, scale)


def clip_loss_row_chunked(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, rows: int = 1024
) -> torch.Tensor:
    """Linear memory in plain torch: chunks of rows under checkpoint, a running logsumexp of the columns."""

    def chunk(x: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = (s * x @ y.T).float()
        return logits.logsumexp(1), logits.logsumexp(0)

    row_lse, col_lse = [], None
    for x in image.split(rows):
        row, col = checkpoint(chunk, x, text, scale, use_reentrant=False)
        row_lse.append(row)
        col_lse = col if col_lse is None else torch.logaddexp(col_lse, col)
    positives = (scale * image * text).float().sum(1)
    return ((torch.cat(row_lse) + col_lse) / 2 - positives).mean()


def siglip_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """open_clip's SigLipLoss on one process, its arithmetic."""
    logits = scale * image @ text.T
    logits += bias
    labels = -torch.ones(logits.shape, device=image.device, dtype=image.dtype)
    labels = 2 * torch.eye(len(image), device=image.device, dtype=image.dtype) + labels
    return -F.logsigmoid(labels * logits).sum() / image.shape[0]


def siglip_loss_row_chunked(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, rows: int = 1024
) -> torch.Tensor:
    """Linear memory in plain torch: chunks of rows under checkpoint, a positive apart from its row's negatives."""

    def chunk(x: torch.Tensor, y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, first: int) -> torch.Tensor:
        logits = (s * x @ y.T).float() + b
        positives = logits.diagonal(first)[: len(x)]
        return F.softplus(logits).sum() - positives.sum()  # softplus(-z) = softplus(z) - z

    total = torch.zeros((), device=image.device)
    for i, x in enumerate(image.split(rows)):
        total = total + checkpoint(chunk, x, text, scale, bias, i * rows, use_reentrant=False)
    return total / len(image)


def siglip_kernel_loss(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """siglip-kernel's, as it chooses by itself; it takes the logarithm of the scale."""
    return absent("siglip_kernel").fused_siglip_loss(image, text, scale.log(), bias)


def memeff_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """memeff: its temperature is a number, so `scale` gets no gradient."""
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    return loss(image, text)


def inf_cl_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """inf-cl on one process, both directions; it computes in float32 (tf32)."""
    from inf_cl import cal_flash_loss

    image, text = image.float(), text.float()
    return (cal_flash_loss(image, text, scale=scale) + cal_flash_loss(text, image, scale=scale)).mean() / 2


def languagebind_model(model: Any) -> Any:
    """PyPI's `languagebind` with the weights of one of our models, whose parameters it shares; in eval mode.

    Raises ImportError where it, or one of the many packages it imports, is not there.
    """
    try:
        upstream = importlib.import_module("languagebind")
    except Exception as error:  # it breaks on current versions of what it imports, in many ways
        raise ImportError(f"absent: languagebind: {type(error).__name__}: {error}") from error
    name = model.config.modality.name
    made = upstream.model_dict[name](upstream.config_dict[name].from_dict(model.config.to_dict()))
    missing = made.load_state_dict(model.state_dict(), strict=False, assign=True).missing_keys
    if missing := [key for key in missing if not key.endswith("position_ids")]:
        raise ValueError(f"languagebind: parameters of other names: {', '.join(missing[:3])}")
    return made.eval()


def liger_layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Liger-Kernel's, which knows no residual."""
    if residual is not None:
        raise ValueError("liger: layer norm with a residual is not there")
    if why := missing("liger_kernel"):
        raise ImportError(why)
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, 1e-5)


SCALE = 14.3  # logit scale of CLIP's initial temperature, about 1 / 0.07
