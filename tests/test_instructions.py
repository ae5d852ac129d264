"""With fewer instructions than the machine has, the ops are right or say what they cannot take; never a signal."""

import collections
import os
import subprocess
import sys

import pytest

from lbfast import native
from tests.fuzz import ops

CALLS = 16


@pytest.mark.skipif(bool(native.why_not()), reason="no native kernels here")
@pytest.mark.parametrize("limit", ("AVX2", "AVX512_CORE"))
def test_onednn_limited(limit):
    """What oneDNN may not use, a probe finds out: not the cores' own list, which would end in its error."""
    counts = collections.Counter()
    assert ops.run_batch(0, 0, CALLS, limit, {"ONEDNN_MAX_CPU_ISA": limit}, 600.0, counts) == []
    assert sum(counts.values()) == CALLS


@pytest.mark.parametrize("limit", ("avx2", "default"))
def test_attention_in_pytorch_told_to_keep_to_fewer(limit):
    """SDPA packs for AMX where the machine has it, and raises: a few threads for many rows make it do so."""
    program = """
import torch
from lbfast import ops
torch.set_num_threads(1)
for dtype in (torch.bfloat16, torch.float16):
    q, k, v = torch.randn(3, 1, 300, 2, 64, dtype=dtype)
    for causal in (False, True):
        wanted = ops.attention(q.float(), k.float(), v.float(), causal=causal, impl="torch")
        got = ops.attention(q, k, v, causal=causal, impl="torch")
        print(bool((got.float() - wanted).norm() < 0.02 * wanted.norm()))
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": limit}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 4, done.stderr[-500:]
