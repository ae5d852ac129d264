"""CLIP's byte-pair tokeniser under LanguageBind's five names. Importing this module imports transformers.

CLIP's vocabulary follows from its merges: 256 byte symbols, the same ending a word, one token a merge, two specials.
The package carries the merges, so that `default_tokenizer` works offline; `from_pretrained` reads a checkpoint's files,
checks them, and makes the tokeniser of what they say: transformers would make one of two tokens where they are missing.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

from transformers import AddedToken, CLIPTokenizer

from lbfast.model import hub
from lbfast.processing.vocabulary import END, FILES, SPECIAL, START, Vocabulary, is_whole, read_vocabulary

CONTEXT_LENGTH = 77
VOCABULARY = 49408
"""Tokens of CLIP."""

_MERGES = Path(__file__).parent / "clip_vocabulary" / "merges.txt.gz"


T = TypeVar("T", bound="LanguageBindTokenizer")


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


class LanguageBindTokenizer(CLIPTokenizer):
    """CLIPTokenizer with one behaviour on every version of transformers: NFC, one space for white space, lower case.

    transformers 4 cleans text with ftfy where that is installed, and with BERT's splitter (which parts Chinese
    characters) where it is not. transformers 5, and the fast tokeniser that the checkpoints carry, do neither.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if hasattr(self, "fix_text"):
            self.fix_text = _composed

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[T], pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> T:
        """The tokeniser beside a checkpoint.

        Where there is a model and no tokeniser, CLIP's own serves if the model's text configuration is CLIP's, as that
        of every published one; a warning says so.

        Args:
            pretrained_model_name_or_path: directory, name on the hub, or "lbfast-mini/...", with vocab.json and
                merges.txt, or tokenizer.json.
            kwargs: cache_dir, revision, token, local_files_only, force_download, subfolder; settings of the tokeniser
                that differ (model_max_length, padding_side, pad_token...).

        Raises:
            FileNotFoundError: there is no tokeniser. OSError: a hub name that is neither cached nor reachable.
            CheckpointError: a file is broken; the message names it and the field.
        """
        options = hub.hub_options(kwargs)
        where = hub.full_name(pretrained_model_name_or_path)
        absent: OSError | None = None
        files: dict[str, Path] = {}
        try:
            files = hub.find_some(where, FILES, **options)
        except hub.NotCachedError as error:
            absent = error
        if is_whole(files):
            return _built(cls, read_vocabulary(files), where, kwargs)
        if _has_clips_vocabulary(where, options):
            hub.said(
                f"{where}: no tokenizer there ({', '.join(FILES[:3])}); its text configuration is CLIP's, so CLIP's "
                "vocabulary, which comes with lbfast, is used"
            )
            return default_tokenizer(cls, **kwargs)
        raise absent or FileNotFoundError(
            f"{where}: expected a tokenizer, vocab.json and merges.txt or tokenizer.json, found none; CLIP's own, "
            "lbfast.processing.default_tokenizer(), is for models with CLIP's vocabulary"
        )


def _has_clips_vocabulary(where: str, options: Mapping[str, Any]) -> bool:
    """Whether there is a model there whose text tower has CLIP's vocabulary."""
    try:
        return has_clips_vocabulary(hub.find_file(where, "config.json", **options))
    except OSError:
        return False


def has_clips_vocabulary(config: Path) -> bool:
    """Whether a config.json is of a model whose text tower has CLIP's vocabulary, or does not say another."""
    fields = hub.read_json(config)
    text = fields.get("text_config") if isinstance(fields, dict) else None
    return isinstance(text, dict) and text.get("vocab_size", VOCABULARY) == VOCABULARY


def _built(cls: type[T], vocabulary: Vocabulary, where: str, settings: Mapping[str, Any]) -> T:
    """A tokeniser of a checked vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), vocabulary.tokens, vocabulary.merges, vocabulary.settings)
        made = super(LanguageBindTokenizer, cls).from_pretrained(folder, local_files_only=True, **settings)
    for number, token in enumerate(vocabulary.added, start=len(vocabulary.tokens)):
        made.add_tokens([AddedToken(**token)], special_tokens=bool(token.get("special", False)))
        if made.convert_tokens_to_ids(token["content"]) != number:
            raise hub.CheckpointError(f"{where}: cannot add the token {token['content']!r} under its id {number}")
    if len(made) != len(vocabulary.tokens) + len(vocabulary.added):
        raise hub.CheckpointError(f"{where}: expected {len(vocabulary.tokens)} tokens, got a tokenizer of {len(made)}")
    made.name_or_path = where
    return made


class LanguageBindImageTokenizer(LanguageBindTokenizer):
    """The tokeniser beside the image model."""


class LanguageBindVideoTokenizer(LanguageBindTokenizer):
    """The tokeniser beside the video model."""


class LanguageBindAudioTokenizer(LanguageBindTokenizer):
    """The tokeniser beside the audio model."""


class LanguageBindDepthTokenizer(LanguageBindTokenizer):
    """The tokeniser beside the depth model."""


class LanguageBindThermalTokenizer(LanguageBindTokenizer):
    """The tokeniser beside the thermal model."""


TOKENIZERS: dict[str, type[LanguageBindTokenizer]] = {
    "image": LanguageBindImageTokenizer,
    "video": LanguageBindVideoTokenizer,
    "audio": LanguageBindAudioTokenizer,
    "depth": LanguageBindDepthTokenizer,
    "thermal": LanguageBindThermalTokenizer,
}


def clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's tokens with their ids (49408), and its merges (48894) in order."""
    merges = gzip.decompress(_MERGES.read_bytes()).decode("utf-8").splitlines()
    return vocabulary(merges), merges


def vocabulary(merges: list[str]) -> dict[str, int]:
    """Tokens with their ids for merges ("a b") in order; the end of text, where captions are pooled, is the largest."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [symbol + "</w>" for symbol in symbols]
    tokens = [*symbols, *words, *(merge.replace(" ", "") for merge in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}


def write_clip_vocabulary(folder: str | Path) -> None:
    """Writes CLIP's vocab.json, merges.txt and tokenizer_config.json: what `from_pretrained(folder)` reads."""
    write_vocabulary(folder, clip_vocabulary()[1])


def write_vocabulary(folder: str | Path, merges: list[str]) -> None:
    """The same files for other merges."""
    _write(Path(folder), vocabulary(merges), merges, {**SPECIAL, "model_max_length": CONTEXT_LENGTH})


def _write(folder: Path, tokens: Mapping[str, int], merges: list[str], settings: Mapping[str, Any]) -> None:
    kinds = {name: {"__type": "AddedToken", **v} if isinstance(v, dict) else v for name, v in settings.items()}
    folder.joinpath("vocab.json").write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")
    folder.joinpath("merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    folder.joinpath("tokenizer_config.json").write_text(json.dumps(kinds), encoding="utf-8")


@overload
def default_tokenizer(**settings: Any) -> LanguageBindImageTokenizer: ...
@overload
def default_tokenizer(cls: type[T], **settings: Any) -> T: ...
def default_tokenizer(cls: Any = LanguageBindImageTokenizer, **settings: Any) -> Any:
    """CLIP's tokeniser from the merges in the package: that of every published LanguageBind checkpoint.

    `settings` are those of the tokeniser that differ: model_max_length, padding_side...
    """
    tokens, merges = clip_vocabulary()
    own = {**SPECIAL, "model_max_length": CONTEXT_LENGTH}
    return _built(cls, Vocabulary(tokens, merges, own), "CLIP's vocabulary", settings)
