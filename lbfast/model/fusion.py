"""One embedding for an item that several modalities show."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lbfast.messages import shown


def fuse(embeddings: Mapping[str, torch.Tensor], weights: Mapping[str, float] | None = None) -> torch.Tensor:
    """The unit sum of unit embeddings: normalise(sum_m w_m e_m / ||e_m||), as MTEB's wrapper of LanguageBind fuses.

    Args:
        embeddings: modality -> (..., E), all of one shape; what LanguageBind gives, temperatures cancel.
        weights: modality -> a positive number; None: all equal.

    Returns:
        (..., E) of unit length, summed in at least float32, in the dtype that the embeddings promote to.

    Raises:
        ValueError: none given, shapes that differ, weights of other modalities or not positive, an embedding that is
        zero or not finite, or a sum that is zero: it points nowhere.
    """
    if not isinstance(embeddings, Mapping) or not embeddings:
        raise ValueError(f"embeddings: expected a mapping of modality to (..., E), got {shown(embeddings)}")
    shapes = {name: tuple(value.shape) for name, value in embeddings.items()}
    if len(set(shapes.values())) > 1 or () in shapes.values():
        raise ValueError(f"embeddings: expected one shape (..., E), got {shapes}")
    if odd := [name for name, value in embeddings.items() if not value.is_floating_point()]:
        raise TypeError(f"embeddings: expected floats, got {embeddings[odd[0]].dtype} for {odd[0]}")
    if weights is None:
        weights = dict.fromkeys(embeddings, 1.0)
    if weights.keys() != embeddings.keys() or not all(0 < weight < float("inf") for weight in weights.values()):
        wanted = f"a positive number for each of {', '.join(embeddings)}"
        raise ValueError(f"weights: expected {wanted}, got {dict(weights)}")
    total: torch.Tensor | None = None
    out = torch.float32
    for number, (name, value) in enumerate(embeddings.items()):
        out = value.dtype if number == 0 else torch.promote_types(out, value.dtype)
        part = _unit(value.to(torch.promote_types(value.dtype, torch.float32)), f"embeddings: {name}") * weights[name]
        total = part if total is None else total + part
    assert total is not None
    return _unit(total, "the sum of embeddings").to(out)


def _unit(x: torch.Tensor, what: str) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"{what}: expected finite vectors that are not zero, got others")
    return torch.nn.functional.normalize(x / scale, dim=-1)
