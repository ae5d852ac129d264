"""Loading and saving: strictness, key styles, shards, and files that are not what they should be."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lbfast
from lbfast import testing
from lbfast.model.checkpoint import CheckpointError
from lbfast.model.lora import LoraLinear
from tests.test_model import GOLDEN, expected, inputs, load


def embeds(model, case):
    with torch.no_grad():
        return model(**inputs(case)).image_embeds


@pytest.fixture
def broken(tmp_path):
    """A writable copy of a golden checkpoint: broken("image", edit) where edit changes its state dict in place."""

    def make(case="depth", edit=None):
        folder = tmp_path / case
        shutil.copytree(GOLDEN / case, folder)
        if edit is not None:
            state = load_file(folder / "model.safetensors")
            edit(state)
            save_file(state, folder / "model.safetensors")
        return folder

    return make


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["5GB", "200KB"])
@pytest.mark.parametrize("case", ["image", "video_lora"])
def test_save_and_load_round_trip(case, size, safe, tmp_path):
    model = load(case)
    model.save_pretrained(tmp_path, safe_serialization=safe, max_shard_size=size)
    suffix = "safetensors" if safe else "bin"
    assert (len(list(tmp_path.glob(f"*.{suffix}"))) > 1) == (size == "200KB")
    again = type(model).from_pretrained(tmp_path)
    assert again.config.to_dict() == model.config.to_dict() or again.config.architectures == [type(model).__name__]
    torch.testing.assert_close(embeds(again, case), embeds(model, case), rtol=0, atol=0)
    assert not again.training


@pytest.mark.parametrize("style", ["plain", "upstream"])
@pytest.mark.parametrize("case", ["thermal_lora", "video_lora"])
def test_adapters_kept_apart_round_trip(case, style, tmp_path):
    model = load(case, merge_lora=False)
    adapted = [m for m in model.modules() if isinstance(m, LoraLinear)]
    assert len(adapted) == 8 and {m.lora_A.out_features for m in adapted} == {2 if case == "thermal_lora" else 4}
    model.save_pretrained(tmp_path, key_style=style)
    keys = load_file(tmp_path / "model.safetensors").keys()
    parent = "temporal_attn" if case == "video_lora" else "self_attn"
    prefix = (
        "vision_model.encoder.base_model.model.layers.0." if style == "upstream" else "vision_model.encoder.layers.0."
    )
    suffix = "lora_A.default.weight" if style == "upstream" else "lora_A.weight"
    assert f"{prefix}{parent}.q_proj.{suffix}" in keys
    assert (f"{prefix}{parent}.q_proj.base_layer.weight" in keys) == (style == "upstream")
    for merge in (True, False):
        again = type(model).from_pretrained(tmp_path, merge_lora=merge)
        assert testing.relative_error(embeds(again, case), expected(case)["image_embeds"]) < 2e-6


def test_merging_and_training_adapters():
    model = load("thermal_lora", merge_lora=False)
    trained = {name for name, p in model.vision_model.encoder.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    model(**inputs("thermal_lora"), return_loss=True).loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora_" in name)
    before = embeds(model, "thermal_lora")
    assert model.merge_lora() is model
    assert not any(isinstance(m, LoraLinear) for m in model.modules())
    assert model.config.vision_config.lora_r == 0
    assert all(p.requires_grad for p in model.parameters())
    assert testing.relative_error(embeds(model, "thermal_lora"), before) < 1e-6
    fresh = lbfast.LanguageBindVideo(load("video_lora", merge_lora=False).config)
    assert sum(isinstance(m, LoraLinear) for m in fresh.modules()) == 8


def test_dtypes(tmp_path):
    assert load("image").dtype == torch.float32
    half = load("image", torch_dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(tmp_path)
    assert lbfast.LanguageBindImage.from_pretrained(tmp_path, torch_dtype="auto").dtype == torch.bfloat16
    assert lbfast.LanguageBindImage.from_pretrained(tmp_path, dtype=torch.float16).dtype == torch.float16
    for bad in ("int8", "nonsense", torch.int64):
        with pytest.raises(ValueError, match="torch_dtype: expected a floating"):
            load("image", torch_dtype=bad)
    assert load("image", device_map={"": "cpu"}).device == torch.device("cpu")
    for bad in ("auto", "meta", {"a": "cpu", "b": "meta"}, {}):
        with pytest.raises(ValueError, match="device_map: expected "):
            load("image", device_map=bad)


def test_return_dict_and_given_config():
    model = load("image", return_dict=False)
    assert isinstance(model(**inputs("image")), tuple)
    config = load("thermal_lora").config
    config.vision_config.lora_r = 2
    given = lbfast.LanguageBindThermal.from_pretrained(GOLDEN / "thermal_lora", config=config)
    assert given.config.vision_config.lora_r == 0 and config.vision_config.lora_r == 2  # the caller's is left alone


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("visual_projection.weight"), "missing: visual_projection.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected: extra"),
        (
            lambda s: s.update({"text_projection.weight": torch.zeros(48, 31)}),
            r"misshapen: text_projection.weight \(48, 31\), expected \(48, 32\)",
        ),
        (lambda s: s["logit_scale"].fill_(float("nan")), "not finite: logit_scale"),
        (lambda s: s["text_projection.weight"][0].fill_(float("inf")), "not finite: text_projection.weight"),
        (lambda s: s.update({"logit_scale": torch.tensor(1)}), "not floating point of 16 to 64 bits: logit_scale"),
    ],
)
def test_weights_that_do_not_fit(edit, message, broken):
    folder = broken(edit=edit)
    with pytest.raises(CheckpointError, match=message) as error:
        lbfast.LanguageBindDepth.from_pretrained(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s, k: s.pop(f"{k}.lora_B.default.weight"), "missing: .*k_proj.lora_B.weight"),
        (lambda s, k: s.update({f"{k}.lora_A.default.weight": torch.zeros(3, 64)}), "adapters of one rank"),
        (lambda s, k: s.update({f"{k}.lora_A.other.weight": torch.zeros(4, 64)}), "expected one adapter"),
    ],
)
def test_adapters_that_do_not_fit(edit, message, broken):
    key = "vision_model.encoder.base_model.model.layers.1.temporal_attn.k_proj"
    with pytest.raises(CheckpointError, match=message):
        lbfast.LanguageBindVideo.from_pretrained(broken("video_lora", lambda s: edit(s, key)))


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize(
    "content",
    [
        lambda f: torch.save([torch.zeros(2)], f),
        lambda f: torch.save({"a": 1}, f),
        lambda f: torch.save({}, f),
        lambda f: torch.save({"a": Evil()}, f),
        lambda f: f.write_bytes(pickle.dumps({"a": 1})),
        lambda f: f.write_bytes(b""),
        lambda f: f.write_bytes(b"garbage" * 100),
        lambda f: f.write_bytes((GOLDEN / "image" / "pytorch_model.bin").read_bytes()[:100_000]),
    ],
    ids=["list", "numbers", "empty", "code", "plain pickle", "zero bytes", "garbage", "truncated"],
)
def test_pickles_that_are_no_state_dict(content, tmp_path, capsys):
    shutil.copy(GOLDEN / "image" / "config.json", tmp_path)
    content(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: expected a state dict"):
        lbfast.LanguageBindImage.from_pretrained(tmp_path)
    assert "must never run" not in capsys.readouterr().out


def test_truncated_safetensors(broken):
    folder = broken()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a state dict"):
        lbfast.LanguageBindDepth.from_pretrained(folder)


def test_directories_without_what_they_need(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a config\.json in this directory"):
        lbfast.LanguageBindImage.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((GOLDEN / "image" / "config.json").read_text())
    with pytest.raises(
        FileNotFoundError, match=r"expected one of model\.safetensors, .* in this directory, found none"
    ):
        lbfast.LanguageBindImage.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected model_type LanguageBindVideo, got LanguageBindImage"):
        lbfast.LanguageBindVideo.from_pretrained(tmp_path)
    for text, why in (
        ("{", "expected JSON"),
        ("[]", "expected an object of JSON"),
        ('"x"', "expected an object of JSON"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"config\.json: .*{why}"):
            lbfast.LanguageBindImage.from_pretrained(tmp_path)


def test_broken_shards(tmp_path):
    model = load("image")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    save_file({**load_file(shards[0]), **load_file(shards[1])}, shards[0])
    with pytest.raises(CheckpointError, match="repeats keys of another shard"):
        type(model).from_pretrained(tmp_path)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"names files that are not there: {shards[1].name}"):
        type(model).from_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="expected plain file names"):
        type(model).from_pretrained(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="expected an index of shards"):
        type(model).from_pretrained(tmp_path)


def test_saving_replaces_what_was_there(tmp_path):
    model = load("image")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin"]
    with pytest.raises(ValueError, match="key_style: expected 'plain' or 'upstream', got 'other'"):
        model.save_pretrained(tmp_path, key_style="other")
    with pytest.raises(ValueError, match="save_directory: expected a directory"):
        model.save_pretrained(tmp_path / "config.json")


def test_a_cached_repository_needs_no_network(tmp_path):
    """The hub's cache layout, as a download would have left it."""
    commit = "0" * 40
    repo = tmp_path / "models--LanguageBind--LanguageBind_Image"
    shutil.copytree(GOLDEN / "image", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    model = lbfast.LanguageBind({"image": "LanguageBind_Image"}, cache_dir=tmp_path, local_files_only=True, token="t")
    with torch.no_grad():
        out = model({"image": {"pixel_values": inputs("image")["pixel_values"]}})
    assert out["image"].shape == (3, 48)


def test_configurations_round_trip(tmp_path):
    for name, config_class in lbfast.config_dict.items():
        config = config_class(vision_config={"lora_r": 3, "num_mel_bins": 112, "target_length": 1036, "extra": 5})
        config.save_pretrained(tmp_path / name)
        again = config_class.from_pretrained(tmp_path / name)
        assert again.to_dict() == config.to_dict(), name
        assert again.vision_config.extra == 5 and again.vision_config.image_size == 224
    audio = lbfast.LanguageBindAudioConfig(vision_config={"image_size": [112, 1036]})
    assert audio.vision_config.image_size == 112  # upstream's audio models overwrite it with a list
    both = lbfast.LanguageBindImageConfig.from_text_vision_configs(audio.text_config, audio.vision_config)
    assert both.vision_config.image_size == 112
