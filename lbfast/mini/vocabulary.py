"""Byte-pair merges learnt from captions, in the form of CLIP's: every word that occurs becomes one token."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable


def learn_merges(captions: Iterable[str]) -> list[str]:
    """Merges ("a b", in order) until every word of the captions, in lower case, is one token.

    Each step merges the pair that occurs most, the first in the alphabet of those that do.
    """
    counts = Counter(word for caption in captions for word in re.findall(r"[a-z]+", caption.lower()))
    pieces = {word: (*word[:-1], word[-1] + "</w>") for word in sorted(counts)}
    merges: list[str] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(" ".join(best))
        pieces = {word: _merged(parts, best) for word, parts in pieces.items()}


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The parts of a word with each such pair joined."""
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)
