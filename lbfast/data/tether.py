"""Processes that end with the process they work for, at once, however it ends."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker, util

TETHERED = "lbfast.data.tethered"
"""A module that does this to the process that imports it: what workers are forked from does so first of all."""

WORKER = "lbfast-decode"

PARENT = "LBFAST_PARENT"
_SET_DEATH_SIGNAL = 1  # linux/prctl.h: PR_SET_PDEATHSIG


def die_with_parent(parent: int | None = None) -> None:
    """The kernel kills this process when the thread that started it is gone. Linux only: elsewhere pipes tell.

    Args:
        parent: its process; where that is gone already, this one ends.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


@contextlib.contextmanager
def named() -> Iterator[None]:
    """What is started within it finds this process under PARENT in its environment."""
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(PARENT, None)


_DECIDED_BY_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ignore_signals() -> None:
    """Ctrl-C, a closed terminal and `kill` of a group reach every process of it; the parent alone decides."""
    for number in _DECIDED_BY_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """What is started within it is deaf to these signals from its first moment on; this process hears them later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _DECIDED_BY_THE_PARENT)
    try:
        resource_tracker.ensure_running()  # which lets two of the signals through again
        signal.pthread_sigmask(signal.SIG_BLOCK, _DECIDED_BY_THE_PARENT)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stay_deaf() -> None:
    """This process hears them no more, nor do workers, named WORKER, that are forked from it. Others that are do:
    a program has one fork server, and processes that are not lbfast's come from it too.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _DECIDED_BY_THE_PARENT)
    util.register_after_fork(stay_deaf, _hear_again)


def _hear_again(_: object) -> None:
    if multiprocessing.current_process().name != WORKER:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _DECIDED_BY_THE_PARENT)
