"""Where checkpoints are looked for: directories, lbfast-mini, the hub and its cache; from_pretrained's keywords."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch

import lbfast
from lbfast.model import hub
from lbfast.processing.text import TOKENIZERS, default_tokenizer, write_clip_vocabulary
from tests import tiny

HUB = "LanguageBind/LanguageBind_Image"


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def unreachable(monkeypatch):
    """The hub is asked for, and nobody answers."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


def openers(modality="image"):
    """Every class that has a from_pretrained, for one modality."""
    name = modality.capitalize()
    return [getattr(lbfast, f"LanguageBind{name}{kind}") for kind in ("", "Config", "Processor", "Tokenizer")]


def cached(cache: Path, *files: Path) -> None:
    """The hub's cache of HUB, as a download of these files would have left it."""
    repository = cache / "models--LanguageBind--LanguageBind_Image"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(file, folder)


@pytest.mark.parametrize("modality", lbfast.model_dict)
def test_the_small_models_are_names_everywhere(modality):
    where = f"lbfast-mini/{modality}"
    model, config, processor, tokenizer = (each.from_pretrained(where) for each in openers(modality))
    assert config.to_dict() == processor.config.to_dict()
    assert config.vision_config.to_diff_dict() == model.config.vision_config.to_diff_dict()
    assert len(tokenizer) == len(processor.tokenizer) == config.text_config.vocab_size
    assert type(processor) is lbfast.transform_dict[modality]
    for each in openers(modality):
        with pytest.raises(ValueError, match="lbfast-mini/smell: expected one of lbfast-mini/audio, "):
            each.from_pretrained("lbfast-mini/smell")
        with pytest.raises(ValueError, match=r"lbfast-mini/\.\./weights"):
            each.from_pretrained("lbfast-mini/../weights")


@pytest.mark.parametrize("name", [HUB, "LanguageBind/LanguageBind_Imgae", "LanguageBind_Image"])
@pytest.mark.parametrize("network", ["offline", "unreachable"])
def test_names_that_are_not_cached(name, network, tmp_path, request):
    request.getfixturevalue(network)
    started = time.monotonic()
    for each in openers():
        with pytest.raises(OSError, match=f"{name}: not a local directory, and .* neither in the cache") as error:
            each.from_pretrained(name, cache_dir=tmp_path)
        assert "\n\n" not in str(error.value)
    with pytest.raises(OSError, match=f"{name}: not a local directory"):
        lbfast.LanguageBind({"image": name.removeprefix("LanguageBind/")}, cache_dir=tmp_path)
    assert time.monotonic() - started < 10  # the hub's client alone would try for half a minute, each time


@pytest.mark.parametrize("name", ["/no/such/place", "no such place", "./nothing", "../a/b", "a/b/c", "~/x"])
def test_paths_of_nothing(name, offline):
    for each in openers():
        with pytest.raises(FileNotFoundError, match="no such file or directory"):
            each.from_pretrained(name)


def test_a_file_is_no_checkpoint(tmp_path, offline):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    for each in openers():
        with pytest.raises(NotADirectoryError, match="expected the directory of a checkpoint"):
            each.from_pretrained(file)


def test_short_names_are_of_the_hub_organisation(tmp_path, offline):
    with pytest.raises(OSError, match="LanguageBind/LanguageBind_Video_FT: not a local directory"):
        lbfast.LanguageBind({"video": "LanguageBind_Video_FT"}, cache_dir=tmp_path)
    with pytest.raises(OSError, match="someone/model: not a local directory"):
        lbfast.LanguageBind({"video": "someone/model"}, cache_dir=tmp_path)
    for modalities in (("thermal", "video"), ["thermal"]):  # as upstream had it first
        with pytest.raises(OSError, match="LanguageBind/LanguageBind_Thermal: not a local directory"):
            lbfast.LanguageBind(modalities, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"expected modalities of .* got smell"):
        lbfast.LanguageBind(("smell",))
    for wrong in ("video", (), [1], None):
        with pytest.raises(ValueError, match="clip_type: expected a mapping"):
            lbfast.LanguageBind(wrong)


def test_a_model_without_a_tokenizer(tmp_path, offline):
    """Never a tokenizer of two tokens: an error, or CLIP's own, said, where the model has CLIP's vocabulary."""
    small = Path(hub.full_name("lbfast-mini/image"))
    cached(tmp_path / "small", small / "config.json", small / "model.safetensors")
    ours = tiny.checkpoint(tmp_path, "image")
    cached(tmp_path / "clip", ours / "config.json", ours / "model.safetensors")
    hub.said.cache_clear()
    for tokenizer in (lbfast.LanguageBindImageTokenizer, lbfast.LanguageBindImageProcessor):
        with pytest.raises(OSError, match=f"{HUB}: not a local directory, and vocab.json .* nor can it be fetched"):
            tokenizer.from_pretrained(HUB, cache_dir=tmp_path / "small")
    with pytest.warns(UserWarning, match="no tokenizer there .*CLIP's vocabulary, which comes with lbfast, is used"):
        found = lbfast.LanguageBindImageTokenizer.from_pretrained(HUB, cache_dir=tmp_path / "clip")
    assert type(found) is lbfast.LanguageBindImageTokenizer and len(found) == 49408
    with pytest.warns(UserWarning, match="no tokenizer there"):
        found = lbfast.LanguageBindImageTokenizer.from_pretrained(ours, model_max_length=9)
    assert found(["a cat"])["input_ids"] == [[49406, 320, 2368, 49407]] and found.model_max_length == 9
    for name in ("config.json", "model.safetensors"):
        shutil.copy(small / name, tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"expected a tokenizer, vocab\.json and merges\.txt or tokenizer\.json"
    ):
        lbfast.LanguageBindImageTokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_from_the_cache(tmp_path, unreachable):
    write_clip_vocabulary(tmp_path)
    cached(tmp_path / "cache", tmp_path / "vocab.json", tmp_path / "merges.txt")
    found = lbfast.LanguageBindImageTokenizer.from_pretrained(HUB, cache_dir=tmp_path / "cache", local_files_only=True)
    assert found(["a cat"])["input_ids"] == [[49406, 320, 2368, 49407]]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_that_were_added_are_kept(name, tmp_path):
    tokenizer = default_tokenizer(TOKENIZERS[name], padding_side="left")
    tokenizer.add_tokens(["<frame>", "cat-like"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<sep>"]})
    tokenizer.save_pretrained(tmp_path)
    again = TOKENIZERS[name].from_pretrained(tmp_path)
    text = "a <frame> of cat-like <sep> things"
    assert len(again) == 49411 and again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert again.padding_side == "left" and again.model_max_length == 77


NOTHING = {
    "attn_implementation": "sdpa",
    "low_cpu_mem_usage": True,
    "device_map": "cpu",
    "use_safetensors": True,
    "trust_remote_code": True,
    "subfolder": "",
    "ignore_mismatched_sizes": False,
    "output_loading_info": False,
    "variant": None,
    "weights_only": True,
    "use_auth_token": None,
    "resume_download": None,
    "local_files_only": True,
    "revision": "main",
    "token": "secret",
    "force_download": False,
    "proxies": None,
    "adapter_kwargs": {},
    "quantization_config": None,
    "_from_auto": True,
    "_commit_hash": None,
}


@pytest.mark.parametrize("keyword", NOTHING)
def test_keywords_that_change_nothing(keyword):
    model = lbfast.LanguageBindDepth
    plain = model.from_pretrained("lbfast-mini/depth").state_dict()
    same = model.from_pretrained("lbfast-mini/depth", **{keyword: NOTHING[keyword]}).state_dict()
    assert all(torch.equal(value, same[key]) for key, value in plain.items()) and len(plain) == len(same)
    if keyword in ("trust_remote_code", "subfolder", "use_auth_token", "local_files_only", "revision", "_from_auto"):
        for each in openers("depth")[1:]:
            each.from_pretrained("lbfast-mini/depth", **{keyword: NOTHING[keyword]})


@pytest.mark.parametrize(
    ("keyword", "value", "why"),
    [
        ("attn_implementation", "someone/kernels", "lbfast.use_impl chooses"),
        ("ignore_mismatched_sizes", True, "weights load strictly"),
        ("weights_only", False, "pickles are read as plain tensors"),
        ("quantization_config", {"load_in_4bit": True}, "optimize_for_inference"),
        ("from_tf", True, "only PyTorch's weights"),
        ("gguf_file", "a.gguf", "only safetensors"),
        ("tp_plan", "auto", "one device"),
        ("proxies", {"https": "x"}, "HTTPS_PROXY"),
    ],
)
def test_keywords_that_ask_for_what_there_is_not(keyword, value, why):
    with pytest.raises(ValueError, match=rf"{keyword}: expected .*{why}"):
        lbfast.LanguageBindImage.from_pretrained("lbfast-mini/image", **{keyword: value})


def test_keywords_that_are_none():
    for each in (lbfast.LanguageBindImage, lbfast.LanguageBindImageProcessor):
        with pytest.raises(TypeError, match="unexpected keyword argument 'bogus'"):
            each.from_pretrained("lbfast-mini/image", bogus=1)


def test_keywords_that_do_something(tmp_path):
    model = tiny.model("image")
    model.save_pretrained(tmp_path / "inside")
    write_clip_vocabulary(tmp_path / "inside")
    for each in openers():
        each.from_pretrained(tmp_path, subfolder="inside")
    load = lbfast.LanguageBindImage.from_pretrained
    again, info = load(tmp_path / "inside", output_loading_info=True, output_hidden_states=True)
    assert info["missing_keys"] in ([], set()) and again.config.output_hidden_states is True
    with pytest.raises(FileNotFoundError, match=r"expected one of pytorch_model\.bin, pytorch_model\.bin\.index\.json"):
        load(tmp_path / "inside", use_safetensors=False)
    with pytest.raises(FileNotFoundError, match=r"expected one of model\.fp16\.safetensors"):
        load(tmp_path / "inside", variant="fp16")
    (tmp_path / "inside" / "model.safetensors").rename(tmp_path / "inside" / "model.fp16.safetensors")
    assert load(tmp_path / "inside", variant="fp16").dtype == torch.float32
    config, unused = lbfast.LanguageBindImageConfig.from_pretrained(
        tmp_path / "inside", projection_dim=7, other=1, return_unused_kwargs=True
    )
    assert config.projection_dim == 7 and unused == {"other": 1}


def test_weights_that_are_given(tmp_path):
    """In the place of the checkpoint's, or with a configuration of a whole checkpoint; and its name is the model's."""
    model = tiny.model("image")
    model.save_pretrained(tmp_path)
    load = lbfast.LanguageBindImage.from_pretrained
    given = {key: value + 1 for key, value in model.state_dict().items()}
    old_style = {**given, "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    for found in (load(tmp_path, state_dict=old_style), load(None, config=model.config, state_dict=given)):
        for key, value in found.state_dict().items():
            assert torch.equal(value, given[key]) and value.data_ptr() != given[key].data_ptr(), key
    assert load(tmp_path).name_or_path == load(tmp_path).config.name_or_path == str(tmp_path)
    assert load("lbfast-mini/image").name_or_path == "lbfast-mini/image"
    with pytest.raises(ValueError, match="pretrained_model_name_or_path: expected one, or config and state_dict"):
        load(None, config=model.config)
    with pytest.raises(hub.CheckpointError, match=r"state_dict: expected a state dict, got an empty one"):
        load(tmp_path, state_dict={})
    with pytest.raises(hub.CheckpointError, match=r"the weights do not fit the model; missing: logit_scale"):
        load(tmp_path, state_dict={key: value for key, value in given.items() if key != "logit_scale"})


def test_one_tower_of_a_configuration():
    from lbfast.model.config import LanguageBindTextConfig, LanguageBindVisionConfig

    whole = lbfast.LanguageBindVideoConfig.from_pretrained("lbfast-mini/video")
    assert LanguageBindTextConfig.from_pretrained("lbfast-mini/video").to_dict() == whole.text_config.to_dict()
    vision = LanguageBindVisionConfig.from_pretrained("lbfast-mini/video")
    assert vision.hidden_size == whole.vision_config.hidden_size and vision.num_frames == whole.vision_config.num_frames
