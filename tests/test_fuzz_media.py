"""The campaign of damaged media, in brief; `python -m tests.fuzz.media` runs it for as long as asked."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("av")

from tests.fuzz import media


def test_mutations_are_drawn_by_the_seed():
    data, others = bytes(range(256)) * 9, [b"another file" * 40]
    first = [media.mutated(data, others, random.Random(f"1 {i}")) for i in range(60)]
    assert first == [media.mutated(data, others, random.Random(f"1 {i}")) for i in range(60)]
    assert sum(damaged != data for damaged in first) > 50


def test_damaged_media_are_read_or_refused():
    outcomes, failures = media.campaign(600, seed=7, count=60)
    assert not failures and outcomes["files"] == 60
    assert any(name.endswith("result") for name in outcomes) and any(name.endswith("refused") for name in outcomes)
