"""Worker processes that decode ahead: results in order, the dead replaced, none left behind."""

from __future__ import annotations

import time

import numpy as np
import pytest

from lbfast.data import crew
from lbfast.data.decode import Decoder, Processors, Task, Undecodable
from tests import tiny, workers

VISION = {"image": {"image_size": 64}}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny.pictures(tmp_path_factory.mktemp("pictures"), 10)


def test_workers_decode_in_order_and_are_replaced(pictures):
    tasks = [Task("image", str(path)) for path in sorted(pictures.iterdir())] + [Task("image", "nowhere.jpg")]
    plain = list(Decoder(Processors(VISION), tasks, workers=0, ahead=1))
    with Decoder(Processors(VISION), tasks, workers=2, ahead=3) as decoder:
        results = iter(decoder)
        got = [next(results)]
        for process in tuple(decoder._crew.running):
            process.kill()
        got += results
    assert not decoder._crew.running
    for ours, theirs in zip(got[:-1], plain[:-1], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert got[-1] == plain[-1] and isinstance(got[-1], Undecodable) and "nowhere.jpg" in got[-1].reason


def test_a_file_that_kills_workers_is_reported(monkeypatch):
    monkeypatch.setattr(crew, "_work", workers.poisoned)
    with Decoder(
        Processors(VISION), [Task("image", name) for name in ("a", "poison", "b")], workers=1, ahead=2
    ) as decoder:
        a, poison, b = decoder
    assert isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
    assert poison == Undecodable("poison: the worker process was ended by SIGKILL while decoding it")


def test_workers_that_cannot_start_stop_the_run(monkeypatch):
    monkeypatch.setattr(crew, "_work", workers.stillborn)
    with (
        Decoder(Processors(VISION), [Task("image", "a")], workers=1, ahead=1) as decoder,
        pytest.raises(RuntimeError, match="ended with status 7 before it was ready"),
    ):
        list(decoder)


def test_leaving_early_ends_the_workers(pictures):
    tasks = [Task("image", str(path)) for path in sorted(pictures.iterdir())]
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Decoder(Processors(VISION), tasks, workers=1, ahead=2) as decoder:
        for _ in decoder:
            raise KeyboardInterrupt
    assert not decoder._crew.running and time.monotonic() - begin < 20
