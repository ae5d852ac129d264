"""What a run is made of: recipes, the model it starts from, what is trained, adapters in peft's format."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from lbfast.model.checkpoint import CheckpointError
from lbfast.model.languagebind import model_dict
from lbfast.training import recipes
from lbfast.training.exporter import export
from lbfast.training.parameters import prepare, trained
from lbfast.training.recipes import RECIPES, Recipe, recipe
from lbfast.training.start import initial_model, tokenizer_of
from tests import tiny, trainees

# UPSTREAM's table: rank, patch dropout, lr, epochs, global batch, warm-up
PAPER = {
    "video-lora": (16, 0.3, 1e-4, 16, 640, 2000),
    "video-full": (0, 0.3, 1e-4, 6, 1024, 2000),
    "audio": (16, 0.1, 1e-3, 16, 1024, 2000),
    "depth": (2, 0.5, 5e-4, 1, 1024, 200),
    "thermal": (2, 0.5, 1e-4, 1, 1024, 200),
}
SMALL = {"micro_batch": 2, "batch_size": 4}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes(name):
    plan = recipe(name)
    assert (plan.lora_r, plan.patch_dropout, plan.lr, plan.epochs, plan.batch_size, plan.warmup) == PAPER[name]
    assert (plan.beta1, plan.beta2, plan.eps, plan.weight_decay, plan.temperature) == (0.9, 0.98, 1e-6, 0.2, 0.07)
    assert plan.lora_alpha == 16 and not plan.train_text and plan.lock_image
    assert plan.coef_lr == (1e-3 if name in ("depth", "thermal") else 1)
    assert plan.modality == name.split("-")[0]
    assert RECIPES.keys() == PAPER.keys() | {"image"}


def test_recipe_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: depth\nlr: 1e-3\nvision: {num_frames: 1}\nclip_norm: 1\n")
    plan = recipe(path, epochs=3)
    assert (plan.lr, plan.clip_norm, plan.epochs, plan.vision) == (1e-3, 1.0, 3, {"num_frames": 1})
    assert plan == dataclasses.replace(recipe("depth"), lr=1e-3, clip_norm=1.0, epochs=3, vision={"num_frames": 1})
    recipes.write(plan, tmp_path / "written.yaml")
    assert recipe(tmp_path / "written.yaml") == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modality: depth\nlearning_rate: 1\n", "unknown field 'learning_rate'"),
        ("modality: depth\nwarm_up: 1\n", "unknown field 'warm_up'; did you mean warmup"),
        ("lr: 1\n", "expected a modality"),
        ("modality: smell\n", "modality: expected one of image, video"),
        ("modality: depth\nlr: fast\n", "lr: expected a number, got 'fast'"),
        ("modality: depth\nepochs: 1.5\n", "epochs: expected a whole number, got 1.5"),
        ("modality: depth\ntrain_text: maybe\n", "train_text: expected true or false, got 'maybe'"),
        ("modality: depth\nprecision: int8\n", "precision: expected one of auto, float32"),
        ("modality: depth\nbatch_size: 0\n", "batch_size: expected a number of at least 1, got 0"),
        ("modality: depth\npatch_dropout: 1\n", "patch_dropout: expected a number of at least 0 and below 1, got 1"),
        ("modality: depth\nlr: .nan\n", "lr: expected a number of at least 0, got nan"),
        ("modality: depth\nvision: 3\n", "vision: expected a mapping, got 3"),
        ("base: deth\n", "base: expected one of image, video-lora"),
        ("- depth\n", "expected a YAML mapping of fields to values, got list"),
        ("a: [\n", "expected a YAML file, cannot read it"),
        ("", "got NoneType"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        recipe(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_recipes_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"recipe: expected one of image, video-lora, .* or a .yaml file, got 'video'"):
        recipe("video")
    with pytest.raises(FileNotFoundError):
        recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("modality", ["depth", "video"])
def test_what_is_trained(modality, lora):
    names = set(trained(trainees.trainee(trainees.plan(modality, lora_r=lora))))
    layers = "vision_model.encoder.layers."
    always = {
        "logit_scale",
        "visual_projection.weight",
        "vision_model.embeddings.class_embedding",
        "vision_model.post_layernorm.weight",
        "vision_model.post_layernorm.bias",
    }
    assert always <= names
    if lora:
        where = "temporal_attn" if modality == "video" else "self_attn"
        inside = {name for name in names if name.startswith(layers)}
        own = {name for name in inside if ".lora_" in name}
        assert {name.split(".")[4] for name in own} == {where} and len(own) == 2 * 4 * 2
        temporal = {name for name in inside if ".temporal_embedding" in name or ".temporal_layer_norm1." in name}
        assert inside - own == temporal and bool(temporal) == (modality == "video")
    locked = ("text_model.", "text_projection.", "vision_model.embeddings.p", "vision_model.pre_layrnorm.")
    assert not any(name.startswith(locked) for name in names)
    free = trainees.trainee(trainees.plan(modality, lora_r=lora, lock_image=False, train_text=True))
    wider = set(trained(free))
    assert "vision_model.embeddings.patch_embedding.weight" in wider and "vision_model.pre_layrnorm.weight" in wider
    assert "text_projection.weight" in wider and "vision_model.embeddings.position_embedding.weight" not in wider
    assert "logit_scale" not in trained(trainees.trainee(trainees.plan(modality, learn_temperature=False)))


def test_models_that_do_not_fit_the_recipe():
    with pytest.raises(ValueError, match="expected one for depth, as the recipe says, got image"):
        prepare(tiny.model("image"), trainees.plan())
    model = prepare(tiny.model("depth"), trainees.plan(lora_r=4))
    with pytest.raises(ValueError, match="lora_r: expected 4, the rank of the model's adapters, got 2"):
        prepare(model, trainees.plan(lora_r=2))


def test_video_from_an_image_checkpoint(tmp_path):
    """Temporal weights are copies of the spatial ones, embeddings over time drawn, tubes spread from frames."""
    where = tiny.checkpoint(tmp_path, "image")
    source = dict(model_dict["image"].from_pretrained(where).state_dict())
    plan = trainees.plan("video", lora_r=0, vision={"add_time_attn": True, "num_frames": 4, "hidden_size": 32})
    model = initial_model(where, plan)
    layer, spatial = model.vision_model.encoder.layers[1], "vision_model.encoder.layers.1."
    for name, parameter in layer.temporal_attn.named_parameters():
        assert torch.equal(parameter, source[f"{spatial}self_attn.{name}"]), name
    assert torch.equal(layer.temporal_layer_norm1.weight, source[f"{spatial}layer_norm1.weight"])
    assert layer.temporal_embedding.shape == (1, 4, 32)
    assert layer.temporal_embedding.std().item() == pytest.approx(32**-0.5, rel=0.3)
    assert torch.equal(model.text_projection.weight, source["text_projection.weight"])
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    again = initial_model(where, plan)
    assert trainees.same(trainees.weights(model), trainees.weights(again))
    other = initial_model(where, plan.replace(seed=1))
    assert not torch.equal(other.vision_model.encoder.layers[1].temporal_embedding, layer.temporal_embedding)

    tubes = initial_model(where, plan.replace(vision={**plan.vision, "clip_type": "vl_new", "tube_size": 2}))
    weight = tubes.vision_model.embeddings.patch_embedding.weight
    assert weight.shape == (32, 3, 2, 16, 16)
    torch.testing.assert_close(weight.sum(2), source["vision_model.embeddings.patch_embedding.weight"])
    assert tubes.vision_model.embeddings.class_embedding.shape == (2, 32)


def test_a_still_clip_looks_like_its_picture(tmp_path):
    """Frames that are equal, with no embedding over time: tubes begin as the image model they were made from."""
    where = tiny.checkpoint(tmp_path, "image")
    vision = {"add_time_attn": True, "num_frames": 4, "clip_type": "vl_new", "tube_size": 2}
    model = initial_model(where, trainees.plan("video", lora_r=0, vision=vision)).eval()
    image = model_dict["image"].from_pretrained(where)
    for layer in model.vision_model.encoder.layers:
        layer.temporal_embedding.data.zero_()
        layer.temporal_attn.out_proj.weight.data.zero_()
        layer.temporal_attn.out_proj.bias.data.zero_()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        clip = model.get_image_features(pixels[:, :, None].expand(-1, -1, 4, -1, -1))
        torch.testing.assert_close(clip, image.get_image_features(pixels), rtol=1e-4, atol=1e-5)


def test_audio_from_an_image_checkpoint(tmp_path):
    where = tiny.checkpoint(tmp_path, "image")
    vision = {"num_mel_bins": 32, "target_length": 112}
    model = initial_model(where, trainees.plan("audio", vision=vision))
    table = model.vision_model.embeddings.position_embedding.weight
    source = model_dict["image"].from_pretrained(where).vision_model.embeddings.position_embedding.weight
    assert table.shape == (1 + 2 * 7, 32)
    assert torch.equal(table[0], source[0])
    assert model.config.vision_config.lora_r == 2 and model.training and not model.text_model.training


def test_starts_from_clip_from_text_and_at_random(tmp_path):
    where = tiny.checkpoint(tmp_path, "image")
    config = json.loads((where / "config.json").read_text())
    config["model_type"] = "clip"
    (where / "config.json").write_text(json.dumps(config))
    plan = trainees.plan()
    model = initial_model(where, plan)
    assert type(model) is model_dict["depth"]

    other = tiny.checkpoint(tmp_path / "other", "video", seed=5)
    mixed = initial_model(where, plan, text=other)
    source = model_dict["video"].from_pretrained(other)
    for name, parameter in mixed.text_model.named_parameters():
        assert torch.equal(parameter, source.text_model.get_parameter(name)), name
    assert torch.equal(mixed.text_projection.weight, source.text_projection.weight)
    assert torch.equal(mixed.visual_projection.weight, model.visual_projection.weight)

    (tmp_path / "only.json").write_text(json.dumps(config))
    plan = plan.replace(seed=1)  # the tiny checkpoint was drawn from 0
    drawn = initial_model(tmp_path / "only.json", plan, random=True, text=other)
    assert not torch.equal(drawn.visual_projection.weight, model.visual_projection.weight)
    assert torch.equal(drawn.text_projection.weight, source.text_projection.weight)
    assert trainees.same(
        trainees.weights(drawn), trainees.weights(initial_model(tmp_path / "only.json", plan, random=True, text=other))
    )


def test_starts_that_fail(tmp_path):
    plan = trainees.plan()
    with pytest.raises(FileNotFoundError, match=r"expected a config.json in this directory"):
        initial_model(tmp_path, plan)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"expected the configuration of a LanguageBind or CLIP model: .*'bert'"):
        initial_model(tmp_path, plan)
    where = tiny.checkpoint(tmp_path, "image")
    with pytest.raises(CheckpointError, match="misshapen"):
        initial_model(where, trainees.plan(vision={"hidden_size": 64, "num_attention_heads": 2}))
    with pytest.raises(CheckpointError, match=r"missing: vision_model.encoder.layers.2"):
        initial_model(where, trainees.plan(vision={"num_hidden_layers": 3}))
    small = tiny.model("image", size=8)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"misshapen: text_projection.weight"):
        initial_model(where, plan, text=tmp_path / "small")


def test_tokenizers(tmp_path):
    from lbfast.processing.text import write_clip_vocabulary

    with pytest.raises(
        FileNotFoundError, match=r"expected a tokenizer, vocab\.json and merges\.txt or tokenizer\.json"
    ):
        tokenizer_of(tmp_path, "depth")
    config = tmp_path / "config.json"
    config.write_text('{"text_config": {"vocab_size": 1000}}')
    for where in (tmp_path, config):
        with pytest.raises(FileNotFoundError, match="expected a tokenizer"):
            tokenizer_of(where, "depth")
    config.write_text('{"text_config": {"vocab_size": 49408}}')
    for where in (tmp_path, config):  # a model with CLIP's vocabulary
        tokenizer, files = tokenizer_of(where, "depth")
        assert not files and tokenizer("a cat")["input_ids"] == [49406, 320, 2368, 49407]
    write_clip_vocabulary(tmp_path)
    for where in (tmp_path, tmp_path / "config.json"):
        tokenizer, files = tokenizer_of(where, "depth")
        assert {file.name for file in files} == {"vocab.json", "merges.txt", "tokenizer_config.json"}
        assert tokenizer("a cat")["input_ids"] == [49406, 320, 2368, 49407]


@pytest.mark.parametrize("whole", [True, False], ids=["model", "encoder"])
@pytest.mark.parametrize("modality", ["depth", "video"])
def test_peft_loads_our_adapters(tmp_path, modality, whole, recwarn):
    """On the encoder, as upstream has them, or on the whole model, whose text tower stays without."""
    peft = pytest.importorskip("peft")
    plan = trainees.plan(modality, lora_r=4)
    model = trainees.trainee(plan).eval()
    export(model, tmp_path / "adapter", "peft")
    base = model_dict[modality](tiny.config(modality)).eval()
    own = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
    base.load_state_dict(own)
    pixels = trainees.rows(modality, 2).pixel_values
    with torch.no_grad():
        before = base.get_image_features(pixels)
        if whole:
            base = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).get_base_model()
            assert not any("lora_" in name for name, _ in base.text_model.named_parameters())
        else:
            base.vision_model.encoder = peft.PeftModel.from_pretrained(
                base.vision_model.encoder, str(tmp_path / "adapter")
            ).get_base_model()
        assert not [w for w in recwarn if "missing" in str(w.message)]
        adapted = base.get_image_features(pixels)
        torch.testing.assert_close(adapted, model.get_image_features(pixels), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, adapted, atol=1e-3)


def test_we_load_pefts_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    where = tiny.checkpoint(tmp_path, "depth")
    base = model_dict["depth"].from_pretrained(where)
    wanted = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=wanted, init_lora_weights=False)
    wrapped = peft.get_peft_model(base.vision_model.encoder, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    plan = trainees.plan(lora_r=4)
    model = initial_model(where, plan, adapter=tmp_path / "adapter").eval()
    pixels = trainees.rows("depth", 2).pixel_values
    with torch.no_grad():
        base.vision_model.encoder = wrapped.get_base_model()
        torch.testing.assert_close(
            model.get_image_features(pixels), base.eval().get_image_features(pixels), rtol=1e-4, atol=1e-5
        )


def test_adapters_come_back(tmp_path):
    where = tiny.checkpoint(tmp_path, "depth")
    plan = trainees.plan(lora_r=4, temperature=None)
    model = initial_model(where, plan)
    for parameter in trained(model).values():
        torch.nn.init.normal_(parameter)
    export(model, tmp_path / "adapter", "peft")
    again = initial_model(where, plan, adapter=tmp_path / "adapter")
    assert trainees.same(trainees.weights(model), trainees.weights(again))
    with pytest.raises(CheckpointError, match="misshapen"):
        initial_model(where, plan.replace(lora_r=2), adapter=tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"expected adapters for 0 layers"):
        initial_model(where, plan.replace(lora_r=0), adapter=tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match=r"expected adapter_config.json and adapter_model"):
        initial_model(where, plan, adapter=where)


def test_exports(tmp_path):
    model = trainees.trainee(trainees.plan(lora_r=4)).eval()
    pixels = trainees.rows("depth", 2).pixel_values
    with torch.no_grad():
        wanted = model.get_image_features(pixels)
        for style in ("upstream", "plain", "merged"):
            export(model, tmp_path / style, style)
            loaded = model_dict["depth"].from_pretrained(tmp_path / style)
            torch.testing.assert_close(loaded.get_image_features(pixels), wanted, rtol=1e-4, atol=1e-5)
    assert model_dict["depth"].from_pretrained(tmp_path / "merged", merge_lora=False).config.vision_config.lora_r == 0
    assert any(".lora_A." in name for name in model.state_dict())  # ours was not merged
    with pytest.raises(ValueError, match="style: expected one of upstream"):
        export(model, tmp_path / "x", "other")
    with pytest.raises(ValueError, match="expected a model with adapters for 'peft'"):
        export(trainees.trainee(trainees.plan(lora_r=0)), tmp_path / "x", "peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "plain", "upstream"]


def test_an_export_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model = trainees.trainee(trainees.plan(lora_r=4)).eval()
    export(model, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def full(*arguments, **options):
        raise OSError("no space")

    monkeypatch.setattr("lbfast.model.checkpoint.save_state_dict", full)
    with pytest.raises(OSError, match="no space"):
        export(model, tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_recipes_are_values():
    plan = Recipe("depth", lr=1)
    assert plan.lr == 1.0 and isinstance(plan.lr, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.lr = 2.0
    with pytest.raises(ValueError, match="unknown field 'lrr'"):
        plan.replace(lrr=1)
