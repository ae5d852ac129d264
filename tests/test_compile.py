"""torch.compile without a graph break, torch.export, and autocast: what users put around the towers."""

import pytest
import torch

from lbfast import testing
from lbfast.reference import languagebind as reference
from tests.test_model import expected, inputs, load


@pytest.mark.parametrize("case", ["image", "video_ft"])
def test_vision_tower_compiles_without_a_break(case):
    tower, pixels = load(case).vision_model, inputs(case)["pixel_values"]
    compiled = torch.compile(tower, fullgraph=True)
    out = compiled(pixels)
    assert testing.relative_error(out.pooler_output, expected(case)["vision_pooler_output"]) <= 2e-5
    out.pooler_output.sum().backward()
    got = [p.grad.clone() for p in tower.parameters()]
    tower.zero_grad()
    tower(pixels).pooler_output.sum().backward()
    for (name, parameter), gradient in zip(tower.named_parameters(), got):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_text_tower_compiles_without_a_break():
    tower, tensors = load("image").text_model, inputs("image")
    compiled = torch.compile(tower, fullgraph=True)
    with torch.no_grad():
        out = compiled(tensors["input_ids"], tensors["attention_mask"])
    assert testing.relative_error(out.pooler_output, expected("image")["text_pooler_output"]) <= 2e-5


@pytest.mark.parametrize("case", ["image", "video_tube"])
def test_vision_tower_exports(case):
    tower, pixels = load(case).vision_model, inputs(case)["pixel_values"]
    with torch.no_grad():
        program = torch.export.export(tower, (pixels,), {"return_dict": False})
        got = program.module()(pixels, return_dict=False)[1]
    assert testing.relative_error(got, expected(case)["vision_pooler_output"]) <= 2e-5


@pytest.mark.parametrize("case", ["image", "video_ft"])
def test_autocast_trains(case):
    """float32 parameters under bfloat16 autocast: embeddings and gradients as near to float32's as the reference's."""
    model, want = load(case), expected(case)
    baseline = reference.like(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs(case), return_loss=True)
        rough = baseline(**inputs(case))["loss"]
    out.loss.backward()
    cosine = torch.cosine_similarity(out.image_embeds.float(), want["image_embeds"])
    assert cosine.min() > 0.999
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    got = model.get_parameter(name).grad
    (theirs,) = torch.autograd.grad(rough, baseline.get_parameter(name))
    away = [1 - torch.cosine_similarity(x.flatten(), want[f"grad.{name}"].flatten(), dim=0) for x in (got, theirs)]
    assert away[0] < 2 * away[1] + 1e-3
