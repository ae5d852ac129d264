"""peft's own tests of feature extraction on LanguageBindImage, and on CLIPModel beside it.

PEFT_TESTS=peft-0.x/tests python -m pytest -o addopts= tests/peers/test_peft.py
"""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from lbfast import LanguageBindImage, LanguageBindImageConfig
from tests.peers.packages import peers_module

pytest.importorskip("peft")
pytest.importorskip("datasets")
if "diffusers" not in sys.modules:  # imported by peft's tests of other models
    sys.modules["diffusers"] = ModuleType("diffusers")
    sys.modules["diffusers"].StableDiffusionPipeline = object  # type: ignore[attr-defined]
suite: Any = peers_module("peft_tests", "PEFT_TESTS", "test_feature_extraction_models")

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 98, "bos_token_id": 97, "projection_dim": 32}
VISION = {k: v for k, v in TEXT.items() if k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
VISION |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 8, "projection_dim": 32}
FOLDER = Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
TARGETS = ["q_proj", "v_proj"]

suite.PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST[:] = [str(FOLDER / "clip"), str(FOLDER / "lbfast")]
for _, options in suite.ALL_CONFIGS:  # of models that peft has no table for; its task's call CLIPModel cannot take
    if options.get("task_type") == "FEATURE_EXTRACTION":
        options["task_type"] = None
    if "target_modules" in options:
        options["target_modules"] = TARGETS
    if "feedforward_modules" in options:
        options["feedforward_modules"] = []


def _write() -> None:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"text_config": TEXT, "projection_dim": 32}
    CLIPModel(CLIPConfig(vision_config=VISION, **fields)).save_pretrained(FOLDER / "clip")
    config = LanguageBindImageConfig(vision_config={**VISION, "lora_r": 0}, **fields)
    LanguageBindImage(config).save_pretrained(FOLDER / "lbfast")


_write()


class Either:
    """In the place of AutoModel."""

    @staticmethod
    def from_pretrained(where: str, **options: Any) -> Any:
        return (CLIPModel if where.endswith("clip") else LanguageBindImage).from_pretrained(where, **options)


class TestFeatureExtraction(suite.TestPeftFeatureExtractionModel):
    transformers_class = Either

    def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[1, 5, 98], [1, 2, 98]])
        generator = torch.Generator().manual_seed(0)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.rand(2, 3, 32, 32, generator=generator),
        }
