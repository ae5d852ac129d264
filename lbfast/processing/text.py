"""CLIP's byte-pair tokeniser under LanguageBind's five names. Importing this module imports transformers.

CLIP's vocabulary follows from its merges: 256 byte symbols, the same ending a word, one token a merge, two specials.
The package carries the merges, so that `default_tokenizer` works offline; `from_pretrained` reads a checkpoint's files.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import unicodedata
from pathlib import Path
from typing import Any, TypeVar

from transformers import CLIPTokenizer

CONTEXT_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
_MERGES = Path(__file__).parent / "clip_vocabulary" / "merges.txt.gz"


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

T = TypeVar("T", bound=CLIPTokenizer)


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
    config = {
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "model_max_length": CONTEXT_LENGTH,
    }
    folder = Path(folder)
    folder.joinpath("vocab.json").write_text(json.dumps(vocabulary(merges), ensure_ascii=False), encoding="utf-8")
    folder.joinpath("merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    folder.joinpath("tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def default_tokenizer(cls: type[T] = LanguageBindImageTokenizer) -> T:  # type: ignore[assignment]
    """CLIP's tokeniser from the merges in the package: that of every published LanguageBind checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        write_clip_vocabulary(folder)
        return cls.from_pretrained(folder)
