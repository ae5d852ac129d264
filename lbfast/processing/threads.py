"""How many threads work on a file. PyTorch: one. What a file takes is too small for more, which would wait for each
other, at several times the CPU time and more beside other work. FFmpeg: as many as PyTorch has otherwise."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_here = threading.local()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside the block, PyTorch computes with one thread."""
    before = torch.get_num_threads()
    outermost = not hasattr(_here, "outside")
    if outermost:
        _here.outside = before
    if before != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before != 1:
            torch.set_num_threads(before)
        if outermost:
            del _here.outside


def decoding_threads() -> int:
    """PyTorch's threads, as they are outside such a block."""
    return getattr(_here, "outside", None) or torch.get_num_threads()
