"""Batches of what requests wait for: of one kind, the oldest first, and one that fails hurts no other."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from lbfast.serving.batching import Batcher, Full, Unusable


def batched(steps, **options):
    """Runs `steps(batcher)` with a model that returns its values and fails at "bad"; returns its batches too."""
    seen = []

    def run(kind, values):
        seen.append((kind, list(values)))
        if "bad" in values:
            raise RuntimeError("no memory")
        return [f"not finite: {value}" if value == "zero" else np.array([value]) for value in values]

    async def main():
        batcher = Batcher(run, **{"size": 3, "wait": 0.05, "room": 10, **options})
        batcher.start()
        try:
            return await steps(batcher)
        finally:
            await batcher.stop()

    return asyncio.run(main()), seen


def test_batches_are_of_one_kind_the_oldest_first():
    async def steps(batcher):
        kinds = ["text", "image", "text", "text", "image", "text"]
        return await asyncio.gather(*(batcher.embed(kind, i) for i, kind in enumerate(kinds)))

    rows, seen = batched(steps)
    assert [int(row[0]) for row in rows] == [0, 1, 2, 3, 4, 5]
    assert seen == [("text", [0, 2, 3]), ("image", [1, 4]), ("text", [5])]


def test_one_that_fails_hurts_no_other():
    async def steps(batcher):
        return await asyncio.gather(*(batcher.embed("text", v) for v in ("a", "bad", "zero")), return_exceptions=True)

    (good, bad, zero), seen = batched(steps)
    assert good[0] == "a" and isinstance(bad, RuntimeError) and isinstance(zero, Unusable)
    assert [values for _, values in seen] == [["a", "bad", "zero"], ["a"], ["bad"], ["zero"]]


def test_an_item_waits_no_longer_than_it_may_and_those_that_left_not_at_all():
    async def steps(batcher):
        gone = asyncio.ensure_future(batcher.embed("text", "gone"))
        await asyncio.sleep(0)
        gone.cancel()
        start = time.monotonic()
        await batcher.embed("text", "alone")
        with pytest.raises(Full):
            batcher.take(11)
        batcher.take(10)
        with pytest.raises(Full):
            batcher.take(1)
        batcher.done(10)
        return time.monotonic() - start

    spent, seen = batched(steps, wait=0.2)
    assert seen == [("text", ["alone"])] and spent >= 0.19
