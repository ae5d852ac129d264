"""Which implementation of attention is asked first, by its inputs."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from lbfast import dispatch, use_impl


def test_a_gpu_gives_float32_without_gradients_to_sdpa():
    """Which has tensor cores for it; but what is asked for stays."""
    module = importlib.import_module("lbfast.ops.attention")

    def chosen(dtype=torch.float32, causal=False, padded=None, impl=None, **more):
        x = SimpleNamespace(**{"dtype": dtype, "is_cuda": True, "requires_grad": False, **more})
        takes = dict.fromkeys(module.in_order(x, x, x, causal, padded), lambda *inputs: [])
        return dispatch.choose("attention", impl, takes, x, x, x, causal, padded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "triton_interpreted", lambda: False)
        assert chosen() == chosen(requires_grad=False) == "torch"
        assert chosen(impl="triton") == "triton"
        with use_impl("triton"):
            assert chosen() == "triton"
        others = (
            {"dtype": torch.bfloat16},
            {"causal": True},
            {"padded": 1},
            {"requires_grad": True},
            {"is_cuda": False},
        )
        for other in others:
            assert chosen(**other) == "triton", other
        with torch.no_grad():
            assert chosen(requires_grad=True) == "torch"
