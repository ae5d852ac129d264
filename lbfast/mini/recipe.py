"""How lbfast-mini is made: data of the small world, runs of `lbfast train`, nested projections, half precision."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from lbfast import files
from lbfast.mini import world
from lbfast.mini.files import write_world
from lbfast.mini.nested import nest
from lbfast.mini.vocabulary import learn_merges
from lbfast.model.config import LanguageBindConfig, config_dict
from lbfast.model.languagebind import model_dict
from lbfast.processing.text import LanguageBindImageTokenizer, write_vocabulary
from lbfast.signals import Stopped

SAMPLES: dict[str, int] = {"image": 16000, "depth": 8000, "thermal": 12000, "audio": 12000, "video": 8000}
"""Training scenes of each modality: every modality has its own."""

STAGES: dict[str, tuple[str, str | None]] = {
    "sight": ("image", None),
    "language": ("image", "sight"),
    "image": ("image", "language"),
    "depth": ("depth", "language"),
    "thermal": ("thermal", "language"),
    "audio": ("audio", "language"),
    "video": ("video", "language"),
}
"""Runs in order: the modality, and the run it starts from."""

PIXELS, PATCH = 48, 8
_PARTS = ("start", "data", "runs", "weights")
_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")


def start(folder: str | os.PathLike[str], seed: int = 0) -> Path:
    """Writes the checkpoint that training starts from: small towers of random weights, and a vocabulary of the world.

    Positions, which training leaves as they are, are sines and cosines of row and column.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = world.scenes("train", 2000, seed)
    write_vocabulary(folder, learn_merges(world.caption(scene, sense) for scene in scenes for sense in world.SEES))
    last = len(LanguageBindImageTokenizer.from_pretrained(folder)) - 1
    torch.manual_seed(seed)
    model = model_dict["image"](_config(last))
    with torch.no_grad():
        embeddings = model.text_model.embeddings
        embeddings.token_embedding.weight.normal_()
        embeddings.token_embedding.weight[-2:] *= 0.02  # the specials' own: a caption's embedding is to be of its words
        embeddings.position_embedding.weight.normal_(std=0.02)
        model.vision_model.embeddings.position_embedding.weight.copy_(
            positions(PIXELS // PATCH, model.config.vision_config.hidden_size)
        )
    model.save_pretrained(folder)
    return folder


def _config(last_token: int) -> LanguageBindConfig:
    """Towers of 0.43 M (vision) and 0.15 M parameters (text, for a vocabulary that ends with the token given)."""
    common = {"hidden_act": "gelu", "projection_dim": 64}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {
        "vocab_size": last_token + 1,
        "bos_token_id": last_token - 1,
        "eos_token_id": last_token,
        "pad_token_id": last_token,
    }
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    pixels = {"image_size": PIXELS, "patch_size": PATCH, "lora_r": 0}
    return config_dict["image"](
        text_config={**common, **text, **tokens}, vision_config={**common, **vision, **pixels}, projection_dim=64
    )


def positions(side: int, width: int) -> torch.Tensor:
    """(1 + side * side, width): zeros for the class token, then of each patch sines and cosines of row and column."""
    rates = torch.pi / 2 * torch.arange(1, width // 4 + 1) * 4 / width * side / 2
    at = (torch.arange(side) + 0.5) / side * 2 - 1
    waves = torch.cat([torch.sin(at[:, None] * rates), torch.cos(at[:, None] * rates)], dim=1)  # [side, width / 2]
    rows = waves[:, None].expand(-1, side, -1)
    columns = waves[None].expand(side, -1, -1)
    table = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return torch.cat([torch.zeros(1, width), 0.3 * table])


def recipe_file(stage: str) -> Path:
    """The recipe of a stage, in the package."""
    return Path(__file__).parent / "recipes" / f"{stage}.yaml"


def command(stage: str, out: Path) -> list[str]:
    """The `lbfast train` of a stage, below the folder of a whole run."""
    modality, after = STAGES[stage]
    options = {
        "--recipe": recipe_file(stage),
        "--model": out / "runs" / after / "model" if after else out / "start",
        "--data": out / "data" / modality / "manifest.jsonl",
        "--media": modality,
        "--out": out / "runs" / stage,
        "--workers": 1,
    }
    listed = ["lbfast", "train", *(str(part) for pair in options.items() for part in pair)]
    return listed if modality == "audio" else [*listed, "--raw"]


def train(out: str | os.PathLike[str], console: Console, samples: Mapping[str, int] = SAMPLES) -> dict[str, Path]:
    """Makes lbfast-mini from nothing: start/, data/, runs/ and weights/ below `out`. Goes on where it was interrupted.

    Args:
        samples: training scenes by modality.

    Returns:
        modality -> directory of its weights, float16.

    Raises RuntimeError where a run ends without a model.
    """
    out, begin = Path(out), time.perf_counter()
    with files.claimed(out, "mini", _PARTS):
        return _train(out, console, samples, begin)


def _train(out: Path, console: Console, samples: Mapping[str, int], begin: float) -> dict[str, Path]:
    if not (out / "start" / "config.json").is_file():  # which is written last
        start(out / "start")
    for seed, (modality, count) in enumerate(samples.items()):
        folder = out / "data" / modality
        if not (folder / "manifest.jsonl").is_file():
            write_world(folder, count, "train", seed, (modality,), processes=os.cpu_count() or 1)
    console.print(f"data: {time.perf_counter() - begin:.0f} s", highlight=False)
    weights = {}
    for stage, (modality, _) in STAGES.items():
        line = command(stage, out)
        console.print(shlex.join(line), highlight=False, soft_wrap=True)
        ended = _run([sys.executable, "-m", *line])
        model = out / "runs" / stage / "model"
        if ended or not model.is_dir():
            raise RuntimeError(f"lbfast train: {stage}: exit status {ended}; the same command goes on")
        weights[modality] = halve(modality, model, out / "weights" / modality)
        console.print(f"{stage}: after {time.perf_counter() - begin:.0f} s", highlight=False)
    nest(weights, {name: out / "data" / name / "manifest.jsonl" for name in weights})
    console.print(f"projections: after {time.perf_counter() - begin:.0f} s", highlight=False)
    return weights


def _run(line: Sequence[str]) -> int:
    """Exit status of a command, which is told of our end, once, and has the time that it needs for its own.

    In a session of its own: what a terminal sends reaches it through us alone.
    """
    with subprocess.Popen(line, start_new_session=True) as process:
        try:
            return process.wait()
        except Stopped as stopped:
            process.send_signal(stopped.number)
            raise


def halve(modality: str, model: Path, folder: Path) -> Path:
    """Writes a trained model in float16, with its tokenizer, and returns the folder."""
    made = model_dict[modality].from_pretrained(model)
    made.half().save_pretrained(folder)
    for name in _FILES:
        files.write(folder / name, (model / name).read_bytes())
    return folder
