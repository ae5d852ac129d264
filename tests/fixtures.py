"""What all tests have: fixtures, and the order they run in. Kernels are interpreted where there is no GPU."""

import functools
import gc
import importlib.util
import multiprocessing
import os
import pkgutil
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: its threads spin, twenty times as long as they add
if _capability := os.environ.get("ATEN_CPU_CAPABILITY"):  # what torch.compile keeps is not told apart by it
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor-{_capability}")

import torch
import typer.testing

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is decorated
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from lbfast import testing
from lbfast.processing import text

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from lbfast import kernels
    from tests import interpreter

    interpreter.install()
    for module in pkgutil.iter_modules(kernels.__path__, "lbfast.kernels."):
        importlib.import_module(module.name)  # interpreted, whatever the first test that needs one sets

_CUDA = torch.cuda.is_available, os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.fixture(autouse=True, scope="session")
def _nobody_pulls_the_plug():
    """What is flushed to the disk need not be there when a test ends: thousands of writes would wait for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which fails, too, where there is no such file
        yield


@pytest.fixture(autouse=True, scope="session")
def _made_once():
    """What every run of a command makes anew, always the same: its parser, and CLIP's vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", functools.cache(typer.main.get_command))
        patch.setattr(text, "clip_vocabulary", functools.cache(text.clip_vocabulary))
        yield


@pytest.fixture(autouse=True, scope="module")
def _on_the_cpu(request):
    """Where there is a GPU, only tests that are marked "gpu" or "any_device" use it."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("any_device"):
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for their processes
        yield


@pytest.fixture(autouse=True)
def _on_the_gpu(_on_the_cpu, request, monkeypatch):
    if {"gpu", "any_device"} & set(request.keywords):
        monkeypatch.setattr(torch.cuda, "is_available", _CUDA[0])
        if _CUDA[1] is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", _CUDA[1])


@pytest.fixture(autouse=True)
def _poisoned_empty():
    with testing.poisoned_empty():
        yield


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """torch.compile recompiles a function eight times at most: cases of one test must not add up."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def pretended_gpu():
    from tests.pretend import pretended_gpu

    with pretended_gpu():
        yield


@pytest.fixture(scope="session")
def processes():
    """Processes that begin with the imports of tests/runs.py done: forked from one that has never computed anything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs"])
    return context


@pytest.fixture(autouse=True, scope="session")
def _forked_from_one():
    """A process of pytest has one process to fork from: in a run of all tests, whatever asks first, it is that one."""
    with pytest.MonkeyPatch.context() as patch:
        if "PYTEST_XDIST_WORKER" in os.environ:
            preload = forkserver.set_forkserver_preload
            patch.setattr(forkserver, "set_forkserver_preload", lambda names: preload([*names, "tests.runs"]))
        yield


def pytest_collection_finish():
    gc.freeze()  # a million objects of libraries that no collection need look at
    gc.set_threshold(100_000, 10, 10)  # a tenth of all tests' time were collections, which free little here


def pytest_collection_modifyitems(items):
    """tests/slow.txt names what takes more than a second, cases together: `make test-fast` does without.

    They come first, and before the others those above its empty line, a case of which may take five: no process waits
    for a long one at the end.
    """
    longest, slow = Path(__file__).with_name("slow.txt").read_text(encoding="utf-8").split("\n\n")
    turns = dict.fromkeys(slow.split(), 1) | dict.fromkeys(longest.split(), 0)
    for item in items:
        if item.nodeid.partition("[")[0] in turns:
            item.add_marker(pytest.mark.slow)

    def turn(item):
        return turns.get(item.nodeid.partition("[")[0], 2 - bool(item.get_closest_marker("slow")))

    items.sort(key=turn)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
