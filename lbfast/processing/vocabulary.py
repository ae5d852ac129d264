"""A tokenizer's files -> the vocabulary in them, checked. Of files that anyone may have written, only data is used.

What counts are tokens with their ids, merges in order, four special tokens, tokens added since, and a few settings; how
text is cut is CLIP's way (see `text`), whatever tokenizer.json says. Everything else in the files is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbfast.messages import shown
from lbfast.model.hub import CheckpointError, read_json

FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""What is looked for; vocab.json and merges.txt, or tokenizer.json, must be there."""

START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
_MERGES = 49152 - 256 - 2  # as many as CLIP's tokenizers read
_MOST_TEXT = 64 << 20
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
_SIDES = ("left", "right")
_SETTINGS = {  # what each may be, in words and as a test
    "clean_up_tokenization_spaces": ("true or false", lambda value: isinstance(value, bool)),
    "errors": ("strict, replace or ignore", lambda value: value in ("strict", "replace", "ignore")),
    "model_max_length": ("a number of tokens from 1 to 1e31", lambda value: _is_number(value) and 1 <= value <= 1e31),
    "padding_side": ("left or right", lambda value: value in _SIDES),
    "split_special_tokens": ("true or false", lambda value: isinstance(value, bool)),
    "truncation_side": ("left or right", lambda value: value in _SIDES),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Vocabulary:
    """What the files of a tokenizer say.

    Attributes:
        tokens: with their ids, 0, 1, 2...
        merges: pairs "a b", in order.
        settings: fields of tokenizer_config.json: special tokens, lengths, sides.
        added: fields of an AddedToken each, in the order of their ids, which follow those of `tokens`.
    """

    tokens: dict[str, int]
    merges: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    added: list[dict[str, Any]] = field(default_factory=list)


def is_whole(files: Mapping[str, Path]) -> bool:
    """Whether there is a vocabulary among them."""
    return {"vocab.json", "merges.txt"} <= files.keys() or "tokenizer.json" in files


def read_vocabulary(files: Mapping[str, Path]) -> Vocabulary:
    """The vocabulary in files, by their names; see FILES.

    Raises CheckpointError naming the file, and the field, that is not what it should be.
    """
    whole = _object(files["tokenizer.json"]) if "tokenizer.json" in files else {}
    if {"vocab.json", "merges.txt"} <= files.keys():
        tokens = _tokens(read_json(files["vocab.json"]), str(files["vocab.json"]))
        merges = _merges(_lines(files["merges.txt"]), tokens, str(files["merges.txt"]))
    else:
        where, model = files["tokenizer.json"], whole.get("model")
        if not isinstance(model, dict) or model.get("type") not in (None, "BPE"):
            raise CheckpointError(f"{where}: model: expected byte-pair encoding (BPE), got {_kind(model)}")
        tokens = _tokens(model.get("vocab"), f"{where}: model.vocab")
        merges = _merges(_pairs(model.get("merges"), f"{where}: model.merges"), tokens, f"{where}: model.merges")
    config = _object(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    settings = _settings(config, str(files.get("tokenizer_config.json")))
    added = _added(files, whole, config, tokens)
    known = {**tokens, **{token["content"]: None for token in added}}
    for name, value in _special(files, config).items():
        settings[name] = value
        content = value["content"] if isinstance(value, dict) else value
        if content not in known:
            where = _named(files, "tokenizer_config.json")
            raise CheckpointError(f"{where}: {name}: expected a token of the vocabulary, got {shown(content)}")
    return Vocabulary(tokens, merges, settings, added)


def _named(files: Mapping[str, Path], name: str) -> Path:
    return files.get(name) or next(iter(files.values()))


def _object(file: Path) -> dict[str, Any]:
    found = read_json(file)
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: expected an object of JSON, got {shown(found)}")
    return found


def _kind(model: Any) -> str:
    return shown(model.get("type")) if isinstance(model, dict) else shown(model)


def _tokens(given: Any, where: str) -> dict[str, int]:
    if not isinstance(given, dict) or not given:
        raise CheckpointError(f"{where}: expected tokens with their ids, got {shown(given)}")
    for token, number in given.items():
        if type(number) is not int or not 0 <= number < len(given):
            raise CheckpointError(
                f"{where}: expected the ids 0 to {len(given) - 1}, got {shown(number)} for {shown(token)}"
            )
    if len(set(given.values())) < len(given):
        raise CheckpointError(f"{where}: expected an id for each token, got one twice")
    try:
        "".join(given).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{where}: expected tokens of Unicode, got half of a surrogate pair") from None
    return given


def _lines(file: Path) -> list[str]:
    size = file.stat().st_size
    if size > _MOST_TEXT:
        raise CheckpointError(f"{file}: expected at most {_MOST_TEXT >> 20} MiB, got {size >> 20} MiB")
    try:
        lines = file.read_bytes().decode().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: expected merges in UTF-8, cannot read it: {error}") from None
    return [line for line in lines[lines[0].startswith("#version") :] if line]


def _pairs(given: Any, where: str) -> list[str]:
    if not isinstance(given, list):
        raise CheckpointError(f"{where}: expected a list of merges, got {shown(given)}")
    pairs = [" ".join(map(str, merge)) if isinstance(merge, list) else merge for merge in given]
    if not all(isinstance(pair, str) for pair in pairs):
        raise CheckpointError(f"{where}: expected pairs of tokens, got something else")
    return pairs


def _merges(lines: list[str], tokens: Mapping[str, int], where: str) -> list[str]:
    for number, line in enumerate(lines[:_MERGES], start=1):
        first, _, second = line.partition(" ")
        if not (first in tokens and second in tokens and first + second in tokens):
            raise CheckpointError(
                f"{where}: merge {number}: expected two tokens that make a third of the vocabulary, got {shown(line)}"
            )
    return lines[:_MERGES]


def _settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = {}
    for name, (expected, fits) in _SETTINGS.items():
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, (dict, list)) or not fits(value):
            raise CheckpointError(f"{where}: {name}: expected {expected}, got {shown(value)}")
        found[name] = value
    return found


def _special(files: Mapping[str, Path], config: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens, as text or as fields of an AddedToken."""
    found: dict[str, Any] = {}
    others = _object(files["special_tokens_map.json"]) if "special_tokens_map.json" in files else {}
    for name, default in SPECIAL.items():
        source = "tokenizer_config.json" if config.get(name) is not None else "special_tokens_map.json"
        value = next((given[name] for given in (config, others) if given.get(name) is not None), default)
        found[name] = value if isinstance(value, str) else _token(value, f"{_named(files, source)}: {name}")
    return found


def _token(given: Any, where: str) -> dict[str, Any]:
    """The fields of a token with flags."""
    if not isinstance(given, dict) or not isinstance(given.get("content"), str) or not given["content"]:
        raise CheckpointError(f"{where}: expected a token, or an object with its content, got {shown(given)}")
    try:
        given["content"].encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{where}: expected a token of Unicode, got half of a surrogate pair") from None
    odd = next((flag for flag in _FLAGS if not isinstance(given.get(flag, False), bool)), None)
    if odd:
        raise CheckpointError(f"{where}: {odd}: expected true or false, got {shown(given[odd])}")
    return {"content": given["content"], **{flag: given[flag] for flag in _FLAGS if flag in given}}


def _added(
    files: Mapping[str, Path], whole: Mapping[str, Any], config: Mapping[str, Any], tokens: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The tokens that were added to the vocabulary, from whichever file names them."""
    found: dict[Any, dict[str, Any]] = {}

    def add(number: Any, token: Any, where: str) -> None:
        made = _token(token, where)
        own = tokens.get(made["content"])
        if own is not None and own != number:
            raise CheckpointError(f"{where}: expected the id {own} of the vocabulary, got {shown(number)}")
        if own is None and found.setdefault(number, made)["content"] != made["content"]:
            raise CheckpointError(f"{where}: expected one token of the id {shown(number)}, got two")

    where = f"{files.get('tokenizer.json')}: added_tokens"
    for token in _list(whole.get("added_tokens"), where):
        add(token.get("id") if isinstance(token, dict) else None, token, where)
    where = f"{files.get('tokenizer_config.json')}: added_tokens_decoder"
    for number, token in _entries(config.get("added_tokens_decoder"), where):
        add(int(number) if number.isdecimal() and len(number) < 12 else number, token, where)
    if "added_tokens.json" in files:
        where = str(files["added_tokens.json"])
        for content, number in _object(files["added_tokens.json"]).items():
            if not any(token["content"] == content for token in found.values()):
                add(number, {"content": content}, where)
    wanted = list(range(len(tokens), len(tokens) + len(found)))
    if len(found) > 10_000 or {*found} != {*wanted}:
        raise CheckpointError(
            f"{where}: expected the ids of added tokens to follow those of the vocabulary, from {len(tokens)} on, "
            f"got {shown(min(found, key=str, default=None))}"
        )
    return [found[number] for number in wanted]


def _list(given: Any, where: str) -> list[Any]:
    if not isinstance(given, (list, type(None))):
        raise CheckpointError(f"{where}: expected a list, got {shown(given)}")
    return given or []


def _entries(given: Any, where: str) -> list[tuple[str, Any]]:
    if not isinstance(given, (dict, type(None))):
        raise CheckpointError(f"{where}: expected an object of JSON, got {shown(given)}")
    return list((given or {}).items())
