"""Checkpoints, configurations and tokenizers that somebody means ill by: refused, naming the file and the field."""

from __future__ import annotations

import json
import pickle
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lbfast
from lbfast import CheckpointError, mini
from lbfast.messages import LONGEST, listing, plain
from tests import tiny
from tests.fuzz import checkpoints, hostile

OPENERS = (lbfast.LanguageBindImageConfig, lbfast.LanguageBindImage, lbfast.LanguageBindImageProcessor)


@pytest.fixture
def folder(tmp_path):
    """A writable copy of lbfast-mini/image."""
    hostile.copy(tmp_path / "image")
    return tmp_path / "image"


def change(folder: Path, place: str | None, name: str, value: object) -> None:
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    (fields if place is None else fields[place])[name] = value
    file.write_text(json.dumps(fields))


def refused(folder: Path, field: str, openers=OPENERS, **options) -> str:
    """That every one of them refuses the folder for that field, at once, in few words; the last message."""
    text = ""
    for opener in openers:
        started = time.process_time()
        with pytest.raises(CheckpointError) as error:
            opener.from_pretrained(folder, **options)
        text = str(error.value)
        assert str(folder) in text and field in text and len(text) <= LONGEST + 100, text
        assert text.replace("\n", "").isprintable() and time.process_time() - started < 5
    return text


SIZES = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "projection_dim"]


@pytest.mark.parametrize("value", [-1, 0, "32", 1.5, None, True, [], {}, 10**400], ids=str)
@pytest.mark.parametrize(
    ("place", "name"),
    [
        *(("vision_config", name) for name in (*SIZES, "image_size", "patch_size", "num_channels", "num_frames")),
        *(("text_config", name) for name in (*SIZES, "vocab_size", "max_position_embeddings")),
        (None, "projection_dim"),
    ],
)
def test_sizes_that_are_none(place, name, value, folder):
    change(folder, place, name, value)
    refused(folder, f"{place}.{name}: expected" if place else f"{name}: expected", OPENERS[:1])


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("vision_config", "layer_norm_eps", 0),
        ("text_config", "hidden_act", "relu"),
        ("text_config", "hidden_act", ["gelu"]),
        ("vision_config", "attention_dropout", 1.0),
        ("text_config", "attention_dropout", 1e-320),
        ("vision_config", "force_patch_dropout", -0.1),
        ("vision_config", "lora_r", -2),
        ("vision_config", "add_time_attn", "yes"),
        ("vision_config", "num_mel_bins", 1.5),
        ("vision_config", "image_size", [64, 0]),
        ("vision_config", "num_attention_heads", 7),
        ("vision_config", "max_depth", "10"),
        (None, "logit_scale_init_value", 1e300),
        (None, "text_config", 5),
        (None, "vision_config", []),
        (None, "vision_config_dict", {"hidden_size": -1}),
        (None, "torch_dtype", "float8_e4m3fn"),
        (None, "architectures", 5),
        (None, "model_type", 5),
        ("text_config", "output_attentions", "yes"),
    ],
)
def test_fields_that_are_not_what_they_may_be(place, name, value, folder):
    change(folder, place, name, value)
    refused(folder, name.removesuffix("_dict"))


def test_more_than_there_are_weights_of(folder):
    """What is no fault of the configuration alone is seen before the model is built."""
    for tower in ("vision_config", "text_config"):
        change(folder, tower, "num_hidden_layers", 400)
        text = refused(folder, f"{tower}.num_hidden_layers", [lbfast.LanguageBindImage])
        assert "weights of, got 400" in text
        change(folder, tower, "num_hidden_layers", 10**9)
        refused(folder, f"{tower}.num_hidden_layers")
        change(folder, tower, "num_hidden_layers", 2)
    change(folder, "vision_config", "patch_size", 1000)
    refused(folder, "vision_config.patch_size: expected at most image_size", [lbfast.LanguageBindImage])
    change(folder, "vision_config", "patch_size", 16)
    change(folder, "vision_config", "hidden_size", 1 << 16)
    refused(folder, "misshapen", [lbfast.LanguageBindImage])


@pytest.mark.parametrize("name", sorted(set(hostile.FOREIGN) - {"model_type", "text_config", "vision_config"}))
def test_what_transformers_would_act_on_is_dropped_or_refused(name, folder):
    """config.json's attn_implementation fetches kernels, auto_map code, num_labels a list of 10^9."""
    usual = lbfast.LanguageBindImageConfig.from_pretrained(folder)
    for place in (None, "vision_config", "text_config"):
        for value in hostile.FOREIGN[name]:
            hostile.copy(folder)
            change(folder, place, name, value)
            try:
                config = lbfast.LanguageBindImageConfig.from_pretrained(folder)
            except CheckpointError as error:
                assert name.removesuffix("_dict") in str(error)
                continue
            towers = (config, config.text_config, config.vision_config)
            assert [part._attn_implementation for part in towers] == [usual._attn_implementation] * 3
            assert config.num_labels == usual.num_labels and not hasattr(config, "auto_map")
            assert not hasattr(config, "quantization_config") and callable(config.to_dict)


def test_strange_fields_are_kept_as_data(folder):
    change(folder, "vision_config", "our_own", {"a": [1, 2]})
    assert lbfast.LanguageBindImageConfig.from_pretrained(folder).vision_config.our_own == {"a": [1, 2]}


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "tokenizer_config.json", "vocab.json"])
@pytest.mark.parametrize(
    "text", [hostile.deep(), hostile.deep(200_000), '{"a":' + hostile.deep(900) + "}", "{", "\xff", "[1e999]"]
)
def test_json_that_is_deep_or_none(file, text, folder):
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(text.encode("latin1"))
    opener = {"c": lbfast.LanguageBindImageConfig, "m": lbfast.LanguageBindImage}.get(
        file[0], lbfast.LanguageBindImageTokenizer
    )
    refused(folder, file, [opener])


def edited(folder: Path, name: str, value: object) -> None:
    file = folder / name
    fields = json.loads(file.read_text()) if name != "merges.txt" else None
    if fields is None:
        file.write_text(str(value))
    else:
        file.write_text(json.dumps({**fields, **value}))  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("file", "change", "names"),
    [
        ("vocab.json", {"!": -1}, "vocab.json: expected the ids"),
        ("vocab.json", {"!": 10**9}, "vocab.json: expected the ids"),
        ("vocab.json", {"!": "0"}, "vocab.json: expected the ids"),
        ("vocab.json", {"!": 1}, "an id for each token"),
        ("vocab.json", {"\ud800": 655}, "half of a surrogate"),
        ("merges.txt", "#version: 0.2\na", "merges.txt: merge 1"),
        ("merges.txt", "#version: 0.2\nno such", "merges.txt: merge 1"),
        ("merges.txt", "#version: 0.2\na b c", "merges.txt: merge 1"),
        ("tokenizer_config.json", {"eos_token": "nothing"}, "tokenizer_config.json: eos_token"),
        ("tokenizer_config.json", {"bos_token": 5}, "tokenizer_config.json: bos_token"),
        ("tokenizer_config.json", {"pad_token": {"content": "!", "lstrip": "x"}}, "pad_token: lstrip"),
        ("tokenizer_config.json", {"model_max_length": -5}, "tokenizer_config.json: model_max_length"),
        ("tokenizer_config.json", {"model_max_length": "x"}, "tokenizer_config.json: model_max_length"),
        ("tokenizer_config.json", {"padding_side": "up"}, "tokenizer_config.json: padding_side"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": {"content": "new"}}}, "ids of added tokens to follow"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"99999999999999999": {"content": "new"}}}, "added tokens"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "<|endoftext|>"}}}, "expected the id"),
        ("tokenizer_config.json", {"added_tokens_decoder": 5}, "added_tokens_decoder"),
    ],
)
def test_tokenizers_that_are_none(file, change, names, folder):
    edited(folder, file, change)
    refused(folder, names, [lbfast.LanguageBindImageTokenizer, lbfast.LanguageBindImageProcessor])
    assert not (folder / hostile.CANARY).exists()


def test_what_else_a_tokenizers_files_say_is_passed_over(folder):
    """Classes, code, templates and pipelines of others do not count: text is cut as CLIP cuts it."""
    usual = lbfast.LanguageBindImageTokenizer.from_pretrained(folder)
    edited(
        folder, "tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["x--y.Z", None]}}
    )
    edited(folder, "tokenizer_config.json", {"chat_template": "{{ 1/0 }}", "backend": "x", "processor_class": "Evil"})
    hostile._as_tokenizer_json(folder)
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole |= {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}, "pre_tokenizer": 5}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    made = lbfast.LanguageBindImageTokenizer.from_pretrained(folder)
    text = "A large  RED circle aaaa"
    assert type(made) is type(usual) and made(text)["input_ids"] == usual(text)["input_ids"]
    (folder / "tokenizer.json").write_text(json.dumps({**whole, "model": {"type": "WordLevel", "vocab": {}}}))
    refused(folder, "tokenizer.json: model: expected byte-pair", [lbfast.LanguageBindImageTokenizer])


def pickled(folder: Path, content: object, legacy: bool = False) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "kind", ["sparse", "csr", "nested", "meta", "expanded", "quantized", "complex", "list", "number", "code"]
)
@pytest.mark.filterwarnings("ignore:.*(Sparse|nested).*")
def test_tensors_that_are_none(kind, legacy, folder):
    state = dict(load_file(folder / "model.safetensors"))
    state["logit_scale"] = hostile.odd_tensors()[kind]()
    pickled(folder, state, legacy)
    text = refused(folder, "pytorch_model.bin" if kind != "complex" else "logit_scale", [lbfast.LanguageBindImage])
    named = kind in ("sparse", "csr", "meta", "expanded") or (
        kind == "nested" and not legacy
    )  # the reader refuses some
    assert not named or "logit_scale (" in text, text


def test_a_key_that_takes_for_ever_to_hash(folder):
    """A tuple of a tuple of..., forty deep and shared: a line of pickle, 2^40 leaves."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(hostile.laughing_key())
    refused(folder, "pytorch_model.bin", [lbfast.LanguageBindImage])


def test_float8_and_what_else_files_hold(folder):
    usual = load_file(folder / "model.safetensors")
    for kind, names in (
        ("float8", "16 to 64 bits"),
        ("int", "16 to 64 bits"),
        ("nan", "not finite"),
        ("flat", "misshapen"),
    ):
        state = {**usual, "text_projection.weight": hostile.plain_tensors()[kind](usual["text_projection.weight"])}
        save_file(state, folder / "model.safetensors")
        refused(folder, f"{names}: text_projection.weight", [lbfast.LanguageBindImage])


def test_archives_that_grow(folder):
    pickled(folder, dict(load_file(folder / "model.safetensors")))
    file = folder / "pytorch_model.bin"
    assert isinstance(lbfast.LanguageBindImage.from_pretrained(folder), lbfast.LanguageBindImage)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(folder / "new", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, b"\0" * 50_000_000 if name.endswith("data.pkl") else old.read(name))
    (folder / "new").rename(file)
    refused(folder, "a compressed archive", [lbfast.LanguageBindImage])


@pytest.mark.parametrize(
    "names",
    [{}, [], {"a": 5}, {"a": "../x.safetensors"}, {"a": "config.json"}, {"a": "x.bin"}, {"a": "gone.safetensors"}],
    ids=str,
)
def test_indices_that_lie(names, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    refused(folder, "index.json", [lbfast.LanguageBindImage])


def test_errors_are_short_and_plain(folder):
    state = load_file(folder / "model.safetensors")
    odd = {"\x1b[2J\x1b[31mgood\r\n": torch.ones(1), "k" * 5_000_000: torch.ones(1), "A\u202eevil": torch.ones(1)}
    save_file({**state, **odd, **{f"x{i}": torch.ones(1) for i in range(5000)}}, folder / "model.safetensors")
    text = refused(folder, "unexpected", [lbfast.LanguageBindImage])
    assert "\\x1b[2J" in text and "\\r\\n" in text and "\\u202e" in text and "4995 more" in text
    change(folder, None, "\x1b[31m" + "y" * 10**6, 5)
    change(folder, "text_config", "hidden_act", "\x1b]0;" + "z" * 10**7)
    assert "\\x1b" in refused(folder, "hidden_act")
    error = pickle.loads(pickle.dumps(CheckpointError("a\x07b")))
    assert str(error) == "a\\x07b" and plain("é\n日本") == "é\n日本" and plain("\ud800\u2028") == "\\ud800\\u2028"
    assert len(plain("a" * 10**6)) < LONGEST + 100 and listing([str(i) for i in range(10)]).endswith("7 and 2 more")


def test_weights_that_float16_cannot_hold(folder):
    """Finite as they are, infinite as they were asked for."""
    state = load_file(folder / "model.safetensors")
    state = {key: value.float() for key, value in state.items()}
    state["text_projection.weight"][0, 0] = 7e4
    save_file(state, folder / "model.safetensors")
    load = lbfast.LanguageBindImage.from_pretrained
    refused(
        folder,
        "not fit into float16, not finite: text_projection.weight",
        [lbfast.LanguageBindImage],
        torch_dtype="float16",
    )
    model = load(folder)
    assert load(folder, torch_dtype="bfloat16").dtype == torch.bfloat16 and model.dtype == torch.float32
    with pytest.raises(CheckpointError, match="not fit into float16, not finite: text_projection"):
        lbfast.optimize_for_inference(model, dtype="float16")


def test_adapters_whose_sum_float16_cannot_hold(tmp_path):
    """Each fits; merged they do not."""
    torch.manual_seed(0)
    model = lbfast.LanguageBindImage(tiny.config("image", lora_r=1, lora_alpha=1))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.constant_(parameter, 300.0)
    model.save_pretrained(tmp_path)
    load = lbfast.LanguageBindImage.from_pretrained
    assert torch.isfinite(load(tmp_path).vision_model.encoder.layers[0].self_attn.q_proj.weight).all()
    refused(tmp_path, "do not fit into float16", [lbfast.LanguageBindImage], torch_dtype="float16")
    assert load(tmp_path, torch_dtype="float16", merge_lora=False).dtype == torch.float16


def test_random_ones():
    """Sixty of those that `python -m tests.fuzz` makes for as long as it is asked to."""
    assert checkpoints.run(300.0, seed=11, count=60) == []


def test_the_search_finds_something(monkeypatch, tmp_path):
    """An error that is not ours, or names no file, is a failure."""
    shutil.copytree(mini.checkpoint("image"), tmp_path / "a")
    assert checkpoints._open(tmp_path / "a", "config") == ""

    def broken(*_: object, **__: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(lbfast.LanguageBindImageConfig, "from_pretrained", broken)
    assert "KeyError" in checkpoints._open(tmp_path / "a", "config")


def test_fields_do_not_replace_what_a_configuration_is():
    """Names of its class's attributes and methods that are no fields."""
    for kind in (lbfast.LanguageBindImageConfig, type(lbfast.LanguageBindImageConfig().vision_config)):
        taken = [name for name in dir(kind) if not name.startswith("_") and name not in kind.rules]
        assert {"rules", "to_dict"} <= set(taken)
        for name in taken:
            made = kind.from_dict({name: "x"})
            assert getattr(made, name, None) != "x", name
