"""`accelerate` on live models: the eager baseline stands in for upstream's, with its names; peft wraps the encoder."""

import types

import pytest
import torch
from torch import nn

import lbfast
from lbfast import testing
from lbfast.model.lora import LoraLinear
from lbfast.reference import languagebind as reference
from tests.test_model import inputs, load


def live(case):
    """Something with the attributes of an upstream model: modules with upstream's names, each with its config."""
    ours = load(case)
    model = reference.like(ours)
    model.config = ours.config
    model.vision_model.config, model.text_model.config = ours.config.vision_config, ours.config.text_config
    return model


@pytest.mark.parametrize("case", ["image", "audio", "depth", "video_ft", "video_tube"])
def test_shares_every_parameter(case):
    model = live(case).train()
    ours = lbfast.accelerate(model)
    assert type(ours) is lbfast.model_dict[case.split("_")[0]] and ours.training
    theirs = dict(model.named_parameters())
    assert all(parameter is theirs[name] for name, parameter in ours.named_parameters())
    tensors = inputs(case)
    with torch.no_grad():
        out, want = ours(**tensors), model(**tensors)
    assert testing.relative_error(out.image_embeds, want["image_embeds"]) < 2e-5
    ours(**tensors, return_loss=True).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert lbfast.accelerate(ours) is ours


@pytest.mark.parametrize("case", ["image", "audio", "video_ft", "video_tube"])
def test_vision_model_alone(case):
    model = live(case)
    tower = lbfast.accelerate(model.vision_model)
    assert tower.post_layernorm.weight is model.vision_model.post_layernorm.weight
    pixels = inputs(case)["pixel_values"]
    with torch.no_grad():
        got, want = tower(pixels)[1], model.vision_model(pixels)["pooler_output"]
    assert testing.relative_error(got, want) < 2e-5


@pytest.mark.parametrize("case", ["thermal_lora", "video_lora"])
def test_adapters_of_peft_are_shared(case):
    peft = pytest.importorskip("peft")
    model = live(case)
    parent = "temporal_attn" if case == "video_lora" else ""
    targets = [f"{parent}.{name}".lstrip(".") for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, bias="none")
    model.vision_model.encoder = peft.get_peft_model(model.vision_model.encoder, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    ours = lbfast.accelerate(model)
    shared = [module for module in ours.modules() if isinstance(module, LoraLinear)]
    assert len(shared) == 8
    ids = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in ids for parameter in ours.parameters())
    tensors = inputs(case)
    with torch.no_grad():
        got, plain = ours(**tensors).image_embeds, load(case)(**tensors).image_embeds
        want = model.visual_projection(model.vision_model(tensors["pixel_values"])["pooler_output"])
    assert testing.relative_error(got, want / want.norm(dim=-1, keepdim=True)) < 2e-5
    assert testing.relative_error(got, plain) > 1e-3  # the adapters count


def test_all_modalities_at_once():
    image, video = live("image"), live("video_ft")
    model = nn.Module()
    model.use_temp = True
    model.modality_encoder = nn.ModuleDict(
        {"image": image.vision_model, "video": video.vision_model, "language": video.text_model}
    )
    model.modality_proj = nn.ModuleDict(
        {"image": image.visual_projection, "video": video.visual_projection, "language": video.text_projection}
    )
    model.modality_scale = {"image": image.logit_scale, "video": video.logit_scale}
    model.modality_config = {"image": image.config, "video": video.config}
    ours = lbfast.accelerate(model.eval())
    assert isinstance(ours, lbfast.LanguageBind) and not ours.training
    assert ours.modality_proj["video"].weight is video.visual_projection.weight
    assert ours.modality_encoder["language"].final_layer_norm.weight is video.text_model.final_layer_norm.weight
    with torch.no_grad():
        out = ours({"video": {"pixel_values": inputs("video_ft")["pixel_values"]}})
    want = video(**inputs("video_ft"))["image_embeds"] * video.logit_scale.exp()
    assert testing.relative_error(out["video"], want) < 2e-5


def test_other_modules_are_refused():
    with pytest.raises(
        TypeError, match=r"model: expected upstream's LanguageBind.* got torch\.nn\.modules\.linear\.Linear"
    ):
        lbfast.accelerate(nn.Linear(2, 2))
    strange = live("image")
    strange.config = types.SimpleNamespace(model_type="CLIP", vision_config=None)
    with pytest.raises(TypeError, match=r"model: expected one of image, .* got model_type CLIP"):
        lbfast.accelerate(strange)
