"""The tokenisers: upstream's token ids exactly, from the merges in the package and from files."""

import hashlib
import json
import pickle
import unicodedata
from pathlib import Path

import pytest

from lbfast.processing import text
from lbfast.processing.text import TOKENIZERS, clip_vocabulary, default_tokenizer, write_clip_vocabulary

EXPECTED = json.loads((Path(__file__).parent / "data" / "tokens.json").read_text(encoding="utf-8"))
VOCABULARY = "7cccc44d334555d1ff3c0ac5f0246b428fab2918383e77ee745cf30d41010b78"  # of CLIP's tokens in the order of ids
SHARED = Path(__file__).resolve().parents[2] / "shared" / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return default_tokenizer()


def padded(ids):
    return [row + [49407] * (77 - len(row)) for row in ids]


def encode(tokenizer, texts):
    return tokenizer(texts, max_length=77, padding="max_length", truncation=True)


def test_vocabulary_is_clips():
    vocabulary, merges = clip_vocabulary()
    assert list(vocabulary.values()) == list(range(49408)) and len(merges) == 48894
    assert hashlib.sha256("\n".join(vocabulary).encode()).hexdigest() == VOCABULARY


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_upstreams(name):
    tokenizer = default_tokenizer(TOKENIZERS[name])
    assert type(tokenizer) is getattr(text, f"LanguageBind{name.capitalize()}Tokenizer")
    encoded = encode(tokenizer, EXPECTED["texts"])
    assert encoded["input_ids"] == padded(EXPECTED["input_ids"])
    assert encoded["attention_mask"] == [[1] * len(row) + [0] * (77 - len(row)) for row in EXPECTED["input_ids"]]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 49407)
    assert tokenizer.model_max_length == 77


@pytest.mark.parametrize("files", [("vocab.json", "merges.txt"), ("vocab.json", "merges.txt", "tokenizer_config.json")])
def test_tokens_from_files(tmp_path, files):
    write_clip_vocabulary(tmp_path)
    for path in tmp_path.iterdir():
        if path.name not in files:
            path.unlink()
    tokenizer = TOKENIZERS["video"].from_pretrained(tmp_path)
    assert encode(tokenizer, EXPECTED["texts"])["input_ids"] == padded(EXPECTED["input_ids"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared tokenizer files are not here")
def test_files_are_those_of_the_checkpoints(tmp_path):
    write_clip_vocabulary(tmp_path)
    ours, theirs = (json.loads((p / "vocab.json").read_text(encoding="utf-8")) for p in (tmp_path, SHARED))
    assert ours == theirs
    ours, theirs = ((p / "merges.txt").read_text(encoding="utf-8").split("\n")[1:] for p in (tmp_path, SHARED))
    assert [line for line in ours if line] == [line for line in theirs if line]
    expected = json.loads((SHARED / "expected.json").read_text(encoding="utf-8"))
    encoded = encode(TOKENIZERS["image"].from_pretrained(SHARED), expected["texts"])
    assert encoded["input_ids"] == expected["input_ids"] and encoded["attention_mask"] == expected["attention_mask"]


def test_pickled_and_saved_tokenizers_are_the_same(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    for again in (pickle.loads(pickle.dumps(tokenizer)), type(tokenizer).from_pretrained(tmp_path)):
        assert type(again) is type(tokenizer)
        assert encode(again, EXPECTED["texts"])["input_ids"] == padded(EXPECTED["input_ids"])


@pytest.mark.parametrize(
    "same,as_this",
    [
        ("A  Dog\t\nruns", "a dog runs"),
        ("  a dog ", "a dog"),
        (unicodedata.normalize("NFD", "Éclair naïve"), "éclair naïve"),
        ("日本語 DOG", "日本語 dog"),
    ],
)
def test_cleaning(tokenizer, same, as_this):
    assert tokenizer(same)["input_ids"] == tokenizer(as_this)["input_ids"]


def test_every_byte_has_a_token(tokenizer):
    unknown = "".join(chr(c) for c in (0x80, 0x3B1, 0x4E00, 0x1F600, 0x10FFFF)) + "\x07"
    ids = tokenizer(unknown)["input_ids"]
    assert ids[0] == 49406 and ids[-1] == 49407 and all(0 <= i < 49406 for i in ids[1:-1]) and len(ids) > 7


def test_decoding(tokenizer):
    ids = tokenizer("A cat, and a dog!")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a cat , and a dog !"
