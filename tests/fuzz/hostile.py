"""Checkpoints, configurations and tokenizers that somebody means ill by: lbfast-mini/image with one thing wrong.

`spoil(folder, number, seed)` is the same for the same numbers, and says in words what it did.
"""

from __future__ import annotations

import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lbfast.model.hub import full_name
from lbfast.model.schema import TEXT, VISION, WHOLE

CANARY = "canary"
"""A file that code in a checkpoint would make."""

SMALL = Path(full_name("lbfast-mini/image"))
Random = random.Random

FOREIGN = {  # what transformers, or a Python object, gives a meaning
    "attn_implementation": ["someone/kernels", "paged|someone/kernels", {"": "x/y"}, 3],
    "_attn_implementation": ["someone/kernels"],
    "_attn_implementation_internal": ["someone/kernels"],
    "experts_implementation": ["someone/kernels"],
    "auto_map": [{"AutoModel": "someone/code--model.Model"}, 3],
    "quantization_config": [{"quant_method": "gptq"}, {}, 7],
    "num_labels": [10**9, -1, "x"],
    "id2label": [{"a": 1}, [1], 5],
    "label2id": [7],
    "per_layer_config": [{"0": {}}, 5],
    "rope_scaling": [{"type": "x"}],
    "rope_parameters": [5],
    "problem_type": ["single_label_classification"],
    "dtype": ["float8_e4m3fn", "nn", "load", 5],
    "torch_dtype": ["os", "int8", ["float32"]],
    "to_dict": [5],
    "__class__": ["x"],
    "__dict__": [{}],
    "sub_configs": [{}],
    "rules": [{}],
    "modality": ["x"],
    "model_type": ["LanguageBindVideo", 5, None, "../x", [], "clip"],
    "architectures": [5, ["x"] * 9, [5]],
    "transformers_version": [5, "9.9"],
    "configuration_files": [["config.99.0.0.json"], 5],
    "base_config_key": ["x"],
    "return_dict": [5, "no"],
    "output_attentions": ["yes", 1],
    "name_or_path": ["http://127.0.0.1:9/x"],
    "text_config": [5, [], None, {}, "x"],
    "vision_config": [5, [], None, {}, "x"],
    "text_config_dict": [5, {"hidden_size": -1}, None],
    "vision_config_dict": [[], {"num_hidden_layers": 10**9}],
}
VALUES: list[Any] = [
    *(-1, 0, 1, 7, 2**31, 2**63, 10**9, 10**400, -(10**400), 1.5, -0.5, 1e308, 1e-320, float("nan"), float("inf")),
    *("32", "", "x" * 300_000, "\x1b[31mred\r", "\ud800", None, True, False, [], [1, 2], {}, {"a": {"b": [1]}}),
]


def deep(levels: int = 5000) -> str:
    return "[" * levels + "]" * levels


def copy(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in SMALL.iterdir():
        shutil.copyfile(file, folder / file.name)


def damaged(text: bytes, dice: Random) -> tuple[bytes, str]:
    """Bytes of a file, damaged."""
    way = dice.choice(["flip", "cut", "insert", "double", "empty", "noise", "utf16", "repeat"])
    data = bytearray(text)
    if way == "flip":
        for _ in range(dice.choice([1, 4, 50])):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    elif way == "cut":
        data = data[: dice.randrange(len(data))]
    elif way == "insert":
        at = dice.randrange(len(data))
        data[at:at] = dice.randbytes(dice.choice([1, 9, 1000]))
    elif way == "double":
        data = data + data
    elif way == "noise":
        data = bytearray(dice.randbytes(2000))
    elif way == "utf16":
        data = bytearray(text[:4000].decode("latin1").encode("utf-16"))
    elif way == "repeat":
        at = dice.randrange(len(data))
        data = data[:at] + data[at : at + 100] * 50 + data[at + 100 :]
    return bytes(data) if way != "empty" else b"", way


def spoil_config(folder: Path, dice: Random) -> str:
    """A field that is not what it may be, or JSON that is none."""
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    if dice.random() < 0.15:
        data, way = damaged(file.read_bytes(), dice)
        file.write_bytes(data)
        return f"config.json: {way}"
    if dice.random() < 0.08:
        text = dice.choice([deep(), deep(200_000), '{"a":' + deep(900) + "}", "5", "null", '"x"', "[]", "{}", "1e999"])
        file.write_text(text)
        return f"config.json: {text[:20]}"
    place = dice.choice(["text_config", "vision_config", None])
    inside = fields if place is None else fields[place]
    if dice.random() < 0.3:
        name = dice.choice(list(FOREIGN))
        inside[name] = value = dice.choice(FOREIGN[name])
    else:
        name = dice.choice(list({None: WHOLE, "text_config": TEXT, "vision_config": VISION}[place]))
        value = dice.choice(VALUES)
        if dice.random() < 0.1:
            inside.pop(name, None)
            value = "(gone)"
        else:
            inside[name] = value
    file.write_text(json.dumps(fields))
    return f"config.json: {place}.{name} = {str(value)[:30]!a}"


class Code:
    def __reduce__(self) -> Any:
        return (exec, (f"open({CANARY!r}, 'w').close()",))


def _laughs() -> Any:
    """2^40 leaves, of forty tuples."""
    value: Any = ("ha",)
    for _ in range(40):
        value = (value, value)
    return value


def odd_tensors() -> dict[str, Callable[[], Any]]:
    """What a pickle can hold in the place of a weight."""
    return {
        "sparse": lambda: torch.eye(48).to_sparse(),
        "csr": lambda: torch.eye(48).to_sparse_csr(),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "meta": lambda: torch.empty(64, 64, device="meta"),
        "expanded": lambda: torch.ones(1, 1).expand(2**20, 2**22),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8),
        "complex": lambda: torch.ones(4, dtype=torch.complex64),
        "list": lambda: [torch.ones(2)],
        "number": lambda: 5,
        "code": Code,
        "laughs": _laughs,
        "parameter": lambda: torch.nn.Parameter(torch.ones(3)),
        "view": lambda: torch.arange(16.0)[3:9:2],
    }


def plain_tensors() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """What any file can hold in the place of a weight."""
    return {
        "nan": lambda x: torch.full_like(x, float("nan")),
        "inf": lambda x: torch.full_like(x, float("inf")),
        "huge": lambda x: torch.full(x.shape, 1e30),
        "int": lambda x: torch.ones(x.shape, dtype=torch.int32),
        "bool": lambda x: torch.ones(x.shape, dtype=torch.bool),
        "float8": lambda x: torch.ones(x.shape).to(torch.float8_e4m3fn),
        "flat": lambda x: x.reshape(-1),
        "scalar": lambda x: torch.tensor(1.0),
        "empty": lambda x: torch.empty(0),
        "wide": lambda x: torch.ones(2, 3, 4, 5),
        "double": lambda x: x.double(),
    }


def spoil_weights(folder: Path, dice: Random) -> str:
    """Tensors that are none, files that are broken, an index that lies."""
    file = folder / "model.safetensors"
    way = dice.choice(["damage", "header", "tensor", "tensor", "key", "pickle", "pickle", "pickle", "zip", "index"])
    if way == "damage":
        data, how = damaged(file.read_bytes(), dice)
        file.write_bytes(data)
        return f"weights: {how}"
    if way == "header":
        data = bytearray(file.read_bytes())
        length = int.from_bytes(data[:8], "little")
        if dice.random() < 0.5:
            lie = dice.choice([0, 1, 2**63, 2**64 - 1, length - 1, length + 1, len(data)])
            data[:8] = lie.to_bytes(8, "little")
        else:
            head = data[8 : 8 + length]
            new = dice.choice([deep().encode(), b"{}", head.replace(b"F16", b"F64"), head.replace(b"[0,", b"[-1,")])
            data[8 : 8 + length] = new.ljust(length)[:length]
        file.write_bytes(bytes(data))
        return "weights: header"
    state = load_file(file)
    key = dice.choice(sorted(state))
    if way == "tensor":
        kind = dice.choice(sorted(plain_tensors()))
        state[key] = plain_tensors()[kind](state[key])
        save_file(state, file)
        return f"weights: {key} {kind}"
    if way == "key":
        name = dice.choice(
            ["\x1b[2J\r\n", "a" * 3_000_000, "", "vision_model", "base_model.model.x", "é" * 500, f"{key}."]
        )
        if dice.random() < 0.5:
            state[name] = state.pop(key)
        else:
            count = dice.choice([1, 3000]) if len(name) < 1000 else 1
            state |= {f"{name}{i}": torch.ones(1) for i in range(count)}
        save_file(state, file)
        return f"weights: key {name[:20]!a}"
    file.unlink()
    pickled = folder / "pytorch_model.bin"
    if way == "index":
        return spoil_index(folder, state, dice)
    if way == "zip":
        torch.save(state, pickled)
        packed = folder / "packed"
        with zipfile.ZipFile(pickled) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.namelist():
                bomb = entry.endswith("data.pkl") and dice.random() < 0.5
                new.writestr(entry, b"\0" * 300_000_000 if bomb else old.read(entry))
        packed.rename(pickled)
        return "pickle: compressed"
    kind = dice.choice([*sorted(odd_tensors()), "top", "damage", "legacy", "plain", "deep", "tuple key"])
    legacy = dice.random() < 0.3 or kind == "legacy"
    content: Any = dict(state)
    if kind in odd_tensors():
        content[key] = odd_tensors()[kind]()
    elif kind == "top":
        content = dice.choice([[1], 5, None, "x", {}, {5: torch.ones(1)}, {("a",): torch.ones(1)}, torch.ones(3)])
    elif kind == "deep":
        value: Any = []
        for _ in range(400):
            value = [value]
        content[key] = value
    elif kind == "tuple key":
        content = {(1, 2): torch.ones(1)}
    if kind == "plain":
        plain = dice.choice([{"a": Code()}, Code(), [1], {"a": 1}])
        pickled.write_bytes(pickle.dumps(plain, protocol=dice.choice([0, 2, 4])))
        return "pickle: plain"
    if kind == "tuple key" and dice.random() < 0.5:
        pickled.write_bytes(laughing_key())
    else:
        torch.save(content, pickled, _use_new_zipfile_serialization=not legacy)
    if kind == "damage":
        data, how = damaged(pickled.read_bytes(), dice)
        pickled.write_bytes(data)
        return f"pickle: {how}"
    return f"pickle: {key} {kind}{' legacy' * legacy}"


def laughing_key() -> bytes:
    """The pickle of {laughs: 1}, written by hand: Python would hash the key for ever."""
    body = b"\x80\x02}X\x02\x00\x00\x00haq\x00"
    for number in range(40):
        body += b"\x86" if number else b"h\x00\x86"
        name = (number + 1).to_bytes(4, "little")
        body += b"r" + name + (b"j" + name if number < 39 else b"")
    return body + b"K\x01s."


def spoil_index(folder: Path, state: dict[str, torch.Tensor], dice: Random) -> str:
    """Two shards, and an index that says something else of them."""
    keys = sorted(state)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({key: state[key] for key in keys[:9]}, folder / names[0])
    save_file({key: state[key] for key in keys[9:]}, folder / names[1])
    good = {key: names[i >= 9] for i, key in enumerate(keys)}
    lies: list[Any] = [
        {},
        [],
        None,
        5,
        {"weight_map": 5},
        {"weight_map": {}},
        {"weight_map": []},
        {"weight_map": {"a": 5}},
        {"weight_map": {"a": None}},
        {"weight_map": {"a": ["x"]}},
        {"weight_map": {"a": "../../etc/passwd"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": "config.json"}},
        {"weight_map": {"a": "model.safetensors.index.json"}},
        {"weight_map": {"a": "gone.safetensors"}},
        {"weight_map": {"a": "\x1b[2J.safetensors", "b": names[0]}},
        {"weight_map": {f"k{i}": f"{i}.safetensors" for i in range(5000)}},
        {"weight_map": dict.fromkeys(keys, names[0])},
        {"weight_map": {**good, "extra": names[1]}},
    ]
    number = dice.randrange(len(lies) + 3)
    file = folder / "model.safetensors.index.json"
    if number < len(lies):
        file.write_text(json.dumps(lies[number]))
    elif number == len(lies):
        file.write_text(deep())
    else:
        file.write_bytes(damaged(json.dumps({"weight_map": good}).encode(), dice)[0])
    return f"index: {number}"


def spoil_tokenizer(folder: Path, dice: Random) -> str:
    """A vocabulary, merges, special or added tokens that are none."""
    if dice.random() < 0.4:
        _as_tokenizer_json(folder)
    file = folder / dice.choice(
        sorted(
            path.name for path in folder.iterdir() if "token" in path.name or path.name in ("vocab.json", "merges.txt")
        )
    )
    if dice.random() < 0.3 or file.suffix == ".txt":
        data, way = damaged(file.read_bytes(), dice)
        file.write_bytes(data)
        return f"{file.name}: {way}"
    if dice.random() < 0.1:
        file.write_text(dice.choice([deep(), "5", "null", "[]", '"x"', "{}", "{" * 9]))
        return f"{file.name}: other JSON"
    fields = json.loads(file.read_text())
    hostile = dice.choice(
        [*VALUES, "no such token", {"content": 5}, {"content": "x", "lstrip": "y"}, {"content": "\ud800"}]
    )
    if file.name == "vocab.json":
        token = dice.choice(list(fields))
        fields[dice.choice([token, "new", "\x00", ""])] = hostile
    elif file.name == "tokenizer.json":
        name = dice.choice(
            ["model", "added_tokens", "vocab", "merges", "type", "normalizer", "pre_tokenizer", "decoder"]
        )
        if name in ("vocab", "merges", "type"):
            fields["model"][name] = hostile
        else:
            wholes = [hostile, [hostile], [{"id": hostile, "content": "x"}], {"type": "BPE", "vocab": {}}]
            fields[name] = dice.choice(wholes)
    else:
        names = ["bos_token", "eos_token", "unk_token", "pad_token", "model_max_length", "padding_side", "errors"]
        names += ["added_tokens_decoder", "tokenizer_class", "auto_map", "chat_template", "extra_special_tokens"]
        name = dice.choice(names)
        values = [hostile, {str(dice.choice([0, 700, 10**6, -1, "x"])): {"content": "new"}}, {"5": hostile}]
        fields[name] = dice.choice(values) if name == "added_tokens_decoder" else hostile
    file.write_text(json.dumps(fields))
    return f"{file.name}: {str(hostile)[:30]!a}"


def _as_tokenizer_json(folder: Path) -> None:
    """The same vocabulary in one file, as transformers 5 writes it."""
    tokens = json.loads((folder / "vocab.json").read_text())
    merges = (folder / "merges.txt").read_text().split("\n")[1:]
    model = {"type": "BPE", "vocab": tokens, "merges": [line.split(" ") for line in merges if line]}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


def spoil(folder: Path, number: int, seed: int) -> tuple[str, str]:
    """Writes case `number` into a folder; returns its kind (config, weights or tokenizer) and what is wrong."""
    dice = random.Random(f"{seed}:{number}")
    copy(folder)
    kind, spoiler = [("config", spoil_config), ("weights", spoil_weights), ("tokenizer", spoil_tokenizer)][number % 3]
    return kind, spoiler(folder, dice)
