"""With fewer instructions than the machine has, the ops are right or say what they cannot take; never a signal."""

import collections

import pytest

from lbfast import native
from tests.fuzz import ops

LIMITS = ("AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX")


@pytest.mark.skipif(bool(native.why_not()), reason="no native kernels here")
@pytest.mark.parametrize("limit", LIMITS[:4])
def test_onednn_limited(limit):
    """What oneDNN may not use, a probe finds out: not the cores' own list, which would end in its error."""
    counts = collections.Counter()
    assert ops.run_batch(0, 0, 24, limit, {"ONEDNN_MAX_CPU_ISA": limit}, 600.0, counts) == []
    assert sum(counts.values()) == 24
