"""The threads that native ops share (csrc/cpu/crew.h): the same bits whoever works, from many callers, after a fork."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lbfast import tokenwise
from lbfast.ops.attention import attention
from lbfast.testing import randn

pytestmark = pytest.mark.skipif(not tokenwise.kernels(torch.float32), reason="no native kernels here")
TOKENS, WIDTH = 400, 64


@pytest.fixture(scope="module")
def work():
    """A call of two ops, each in a few pieces."""
    room = tokenwise.Room(tokenwise.panel_bytes(WIDTH, WIDTH, torch.float32))
    layer = tokenwise.product(randn(WIDTH, WIDTH), torch.zeros(WIDTH), torch.float32, room=room)
    x, qkv = randn(TOKENS, WIDTH, seed=1), randn(2, 40, 3, 4, 16, seed=2)

    def call():
        with torch.inference_mode():
            return tokenwise.linear(x, layer, WIDTH), attention(*qkv.unbind(2), scale=0.25, impl="native")

    return call


def equal(a, b):
    """By no op of PyTorch, whose threads a fork does not have."""
    return all(x.numpy().tobytes() == y.numpy().tobytes() for x, y in zip(a, b))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_any_number_of_threads_gives_the_same_bits(work):
    torch.set_num_threads(1)
    alone = work()
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        assert all(equal(work(), alone) for _ in range(5)), count


def test_many_callers_at_once(work):
    torch.set_num_threads(3)
    expected = work()
    with ThreadPoolExecutor(6) as pool:
        assert all(equal(given, expected) for given in pool.map(lambda _: work(), range(120)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_has_threads_of_its_own(work):
    torch.set_num_threads(3)
    expected = work()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # rather than hang
        os._exit(0 if all(equal(work(), expected) for _ in range(5)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert equal(work(), expected)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc here")
def test_signals_are_left_to_threads_that_python_knows(work):
    torch.set_num_threads(4)
    work()
    blocked = 0
    for name in os.listdir("/proc/self/task"):
        status = Path(f"/proc/self/task/{name}/status").read_text()
        mask = int(status.partition("SigBlk:")[2].split()[0], 16)
        blocked += bool(mask >> (signal.SIGINT - 1) & 1)
        assert int(name) != threading.get_native_id() or not mask >> (signal.SIGINT - 1) & 1
    assert blocked >= 3


REFUSED = """
import resource, torch
from pathlib import Path
from lbfast import tokenwise
tokenwise.kernels(torch.float32)
torch.set_num_threads(1)
layer = tokenwise.product(torch.zeros(16, 16384), torch.zeros(16), torch.float32)
x = torch.zeros(160, 16384)
tokenwise.linear(x[:1], layer, 16)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), -1))
try:
    tokenwise.linear(x, layer, 16)
except RuntimeError as error:
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    print("refused" if "out of memory" in str(error) else error)
tokenwise.linear(x, layer, 16)
print("done")
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc here")
def test_memory_that_was_refused_is_asked_for_again():
    ran = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["refused", "done"], ran.stderr[-2000:]
