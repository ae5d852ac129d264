import importlib.util
import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is decorated
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from lbfast import testing

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from tests import interpreter

    interpreter.install()

_CUDA = torch.cuda.is_available, os.environ.get("CUDA_VISIBLE_DEVICES")


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


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
