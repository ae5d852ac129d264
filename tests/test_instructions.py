"""With fewer instructions than the machine has, the ops are right or say what they cannot take; never a signal."""

import collections

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
