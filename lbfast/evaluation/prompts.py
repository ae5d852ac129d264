"""Sentences that a class name is put into, for each modality."""

from __future__ import annotations

import os
from pathlib import Path

PROMPTS: dict[str, tuple[str, ...]] = {
    "image": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a picture of a {}.",
        "a close-up photo of a {}.",
        "a blurry photo of a {}.",
        "a bright photo of a {}.",
        "a dark photo of a {}.",
    ),
    "video": (
        "a video of {}.",
        "a video of someone {}.",
        "a clip that shows {}.",
        "a person is {}.",
        "this is {}.",
    ),
    "audio": (
        "the sound of {}.",
        "the sound of a {}.",
        "a recording of {}.",
        "one can hear {}.",
    ),
    "depth": (
        "a depth map of a {}.",
        "a depth image of a {}.",
        "a photo of a {}.",
    ),
    "thermal": (
        "a thermal image of a {}.",
        "an infrared photo of a {}.",
        "a photo of a {}.",
    ),
}


def templates_for(modality: str, file: str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """The built-in templates of a modality, or those of a text file, one a line, each with {} for the class.

    Raises:
        FileNotFoundError: no such file. ValueError: it has none, or a line without {}.
    """
    if file is None:
        return PROMPTS[modality]
    return check_templates([line for line in Path(file).read_text(encoding="utf-8-sig").splitlines() if line.strip()])


def check_templates(templates: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """The templates, stripped. ValueError where there is none, or one without {}."""
    if not templates:
        raise ValueError("templates: expected at least one sentence with {}, got none")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"templates: expected {{}} where the class name goes, got {template!r}")
    return tuple(template.strip() for template in templates)
