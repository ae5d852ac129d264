"""lbfast-mini: a tiny LanguageBind that comes with the package, and the small procedural world it was trained in.

    from lbfast import LanguageBind, mini
    model = LanguageBind({name: mini.checkpoint(name) for name in ("video", "audio")})

`lbfast-mini/video` and the like are names of the same directories wherever a checkpoint is asked for.
"""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def checkpoint(modality: str) -> Path:
    """The directory of a modality's weights, with a tokenizer, as every `from_pretrained` takes it.

    Raises ValueError for an unknown modality.
    """
    folder = WEIGHTS / modality
    known = sorted(path.name for path in WEIGHTS.iterdir())
    if modality not in known:
        raise ValueError(f"modality: expected one of {', '.join(known)}, got {modality!r}")
    return folder
