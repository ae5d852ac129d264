"""The random calls themselves: some of them are right, a wrong one is found, a signal is told with its case."""

import collections
import random
import subprocess
import sys

import pytest
import torch

from lbfast import native, testing
from tests.fuzz import cases, layouts, ops
from tests.fuzz.__main__ import main, modules


def test_ops_is_one_of_the_modules():
    assert "ops" in modules()


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_layouts_keep_shape_and_dtype(layout):
    for seed in range(20):
        rng = random.Random(seed)
        shape = tuple(rng.randrange(0, 4) for _ in range(rng.randrange(0, 5)))
        x = layouts.LAYOUTS[layout](rng, torch.ones(shape, dtype=torch.bfloat16))
        assert x.shape == shape and x.dtype == torch.bfloat16
        assert (x.abs() == 1).all(), "numbers from beyond the tensor"


@pytest.mark.skipif(bool(native.why_not()), reason="no native kernels here")
def test_random_calls_are_right():
    ends = collections.Counter()
    for index in range(60):
        told = ops.one(random.Random(f"0 {index}"), None)
        assert "failure" not in told, told
        ends[told["end"]] += 1
    assert {"attention", "info_nce", "layer_norm", "mlp", "patch_embed", "temporal_attention"} <= set(ends)


@pytest.mark.parametrize("make", cases.IMPLS)
def test_a_slightly_wrong_result_is_found(make):
    rng = random.Random(3)
    made = make(rng, "torch")
    while made.tensors[0].dtype not in (torch.float32, torch.float64) or not made.tensors[0].any():
        made = make(rng, "torch")
    with testing.poisoned_empty():
        assert not ops.compare(made, random.Random(3))
        right = made.call
        made.call = lambda *x: right(*x) + 0.01 if isinstance(right(*x), torch.Tensor) else right(*x)[0]
        assert ops.compare(made, random.Random(3))


def test_a_signal_is_told_and_the_rest_goes_on(monkeypatch):
    """The process is one that ends by SIGSEGV at its third case."""
    script = (
        "import json, os, signal, sys\n"
        "first, count = (int(a.split('=')[1]) for a in sys.argv[2:4])\n"
        "for i in range(first, first + count):\n"
        "    print(json.dumps({'case': i}), flush=True)\n"
        "    if i == 3: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    print(json.dumps({'case': i, 'end': 'op'}), flush=True)\n"
    )
    popen = subprocess.Popen
    monkeypatch.setattr(ops.subprocess, "Popen", lambda c, **k: popen([sys.executable, "-c", script, *c[3:]], **k))
    counts = collections.Counter()
    failures = ops.run_batch(7, 1, 5, "here", {"X": "1"}, 60.0, counts)
    assert failures == ["X=1 python -m tests.fuzz.ops --seed=7 --first=3 --count=1: SIGSEGV"]
    assert counts == {"here: op": 4}


def test_prints_its_seed_and_counts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz", "--seconds=0.1", "--seed=5", "--only", "ops"])
    status, said = main(), capsys.readouterr().out
    assert status == 0, said
    assert said.startswith("seed 5\n") and said.endswith("nothing failed\n")
    assert sum(int(line.split()[0]) for line in said.splitlines() if line.startswith("  ")) == ops.BATCH
