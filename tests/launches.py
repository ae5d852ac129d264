"""Launches every Triton kernel as its op does on a GPU, without one: compiled for what the launch specialises on,
and not run. A process of its own, with TRITON_INTERPRET=0:

    python -m tests.launches sm_90 bfloat16    an architecture of bench.resources; prints the kernels' names
    python -m tests.launches                   each line of input in a process forked from this one: "sm_90 bfloat16
                                               folder" leaves stdout and stderr there, and its status is answered

`bench.resources` compiles what kernels/X.py describes; this compiles what launches ask for, where Triton makes a
constant of a number that is 1 and drops what is None.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import os
import signal
import sys
import traceback
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench import memcheck, resources, sass
from bench.resources import ARCHS, KERNELS
from lbfast import ops
from lbfast.kernels import primitives
from lbfast.ops.layer_norm import layer_norm_float8
from lbfast.ops.mlp import ACTIVATIONS, activate_, activate_float8

OPS = ("attention", "temporal_attention", "layer_norm", "mlp", "patch_embed", "info_nce", "sigmoid_loss")
LAUNCHED: collections.Counter[str] = collections.Counter()
SMALLEST = 16 * 64 * 2
"""Bytes of the least factor in shared memory."""


class Driver:
    """Of a GPU that takes every launch and does nothing."""

    def __init__(self, arch: str, searched: bool) -> None:
        self.searched = searched
        about = {"max_shared_mem": ARCHS[arch].shared, "multiprocessor_count": primitives.MULTIPROCESSORS[arch]}
        self.target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: about,
            load_binary=self.load,
        )

    def load(self, name, kernel, shared, device):
        if self.searched and shared >= SMALLEST:
            lost = sass.lost_bases(resources.disassembled(kernel))
            assert not lost, f"{name}: ptxas reads registers that hold something else: {lost[0]}"
        return 1, 1, 0, 0, 1024

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def launcher_cls(self, source, metadata):
        kinds = dict(source.signature)

        def launch(x, y, z, stream, function, packed, about, enter, leave, *given):
            LAUNCHED[metadata.name] += 1
            assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, f"{metadata.name}: grid {x}, {y}, {z}"
            for (name, kind), value in zip(kinds.items(), given):
                fits = hasattr(value, "data_ptr") if kind[0] == "*" else kind[0] != "i" or isinstance(value, int)
                assert fits, f"{metadata.name}: {name}: expected {kind}, got {value!r}"

        return launch


def pretend(arch: str, searched: bool = False) -> None:
    """From here on the CPU's tensors are a GPU's to the kernels' launchers. searched: binaries are, for lost bases."""
    driver.set_active(Driver(arch, searched))
    for name in OPS:
        importlib.import_module(f"lbfast.ops.{name}").IMPLEMENTATIONS["triton"] = lambda *inputs: []
    answers = {
        "arch": lambda device: arch,
        "programs": lambda device, per_sm: primitives.MULTIPROCESSORS[arch] * per_sm,
        "on_device": lambda tensor: contextlib.nullcontext(),
    }
    for path in sorted(KERNELS.glob("*.py")):
        module = primitives if path.stem == "primitives" else importlib.import_module(f"lbfast.kernels.{path.stem}")
        for name, answer in answers.items():
            if hasattr(module, name):
                setattr(module, name, answer)


def ones(dtype: torch.dtype):
    """Every count at 1, but for the heads and tokens that one kernel asks for: name -> an op and its inputs."""

    def new(*shape):
        return torch.randn(shape).to(dtype).requires_grad_()

    def patches(pixels, weight, classes, position):
        return ops.patch_embed(pixels, weight, class_embedding=classes, position_embedding=position, impl="triton")

    scale = torch.tensor(14.3, requires_grad=True)
    return {
        "attention": (lambda *x: ops.attention(*x, impl="triton"), [new(1, 1, 1, 64) for _ in range(3)]),
        "attention, as many heads as multiprocessors": (
            lambda *x: ops.attention(*x, impl="triton"),
            [new(1, 330, primitives.MULTIPROCESSORS["sm_90"], 64) for _ in range(3)],
        ),
        "temporal": (lambda *x: ops.temporal_attention(*x, impl="triton"), [new(1, 1, 1, 1, 64) for _ in range(3)]),
        "layer_norm": (lambda *x: ops.layer_norm(*x, impl="triton"), [new(1, 64), new(64), new(64)]),
        "mlp": (
            lambda *x: ops.mlp(*x, activation="quick_gelu", impl="triton"),
            [new(1, 16), new(16, 16), new(16), new(16, 16), new(16)],
        ),
        "patch_embed": (patches, [new(1, 1, 14, 14), new(64, 1, 14, 14), new(64), new(2, 64)]),
        "info_nce": (lambda *x: ops.info_nce(*x, impl="triton"), [new(1, 64), new(1, 64), scale]),
        "sigmoid_loss": (lambda *x: ops.sigmoid_loss(*x, -5.0, impl="triton"), [new(1, 64), new(1, 64), scale]),
        "info_nce, repeats": (
            lambda *x: ops.info_nce(*x, ids=torch.zeros(300, dtype=torch.int64), impl="triton"),
            [new(300, 64), new(300, 64), scale],
        ),
    }


def unkept(dtype: torch.dtype):
    """The losses with more logits than they may keep, or than one launch takes; pairs left out."""
    rows = [torch.randn(1024, 64).to(dtype).requires_grad_() for _ in range(2)]
    scale = torch.tensor(14.3, requires_grad=True)
    ids = torch.arange(1024) // 2
    return {
        "info_nce, unkept": (lambda *x: ops.info_nce(*x, workspace_mib=1, impl="triton"), [*rows, scale]),
        "sigmoid_loss": (
            lambda *x: ops.sigmoid_loss(*x, -5.0, ids=ids, workspace_mib=1, impl="triton"),
            [*rows, scale],
        ),
    }


def inference(dtype: torch.dtype, float8: bool) -> None:
    """What no gradient is taken of: the activation in place, norms that keep no sum, float8 where there is."""
    x, weight = torch.randn(2, 3, 5, 64).to(dtype), torch.randn(64).to(dtype)
    for residual in (None, weight, torch.randn(3, 1, 64), x):
        ops.layer_norm(x, weight, weight, residual=residual, keep_total=False, impl="triton")
        for keep_total in (False, True) if float8 else ():
            layer_norm_float8(x, weight, weight, residual=residual, keep_total=keep_total, impl="triton")
    for activation in ACTIVATIONS:
        activate_(x, activation, "triton")
    for activation in (*ACTIVATIONS, "none") if float8 else ():
        activate_float8(x, activation, "triton")
        activate_float8(x[0, 0, :1, :1], activation, "triton")


def main(arch: str, kind: str) -> None:
    dtype = getattr(torch, kind)
    pretend(arch, searched=arch == "sm_90" and dtype.itemsize == 2)  # whose products have factors in shared memory
    more = {**(ones(dtype) if arch == "sm_90" else {}), **unkept(dtype)}
    inference(dtype, arch in primitives.FLOAT8_ARCHS)
    for op, inputs in (*memcheck.cases("cpu", dtype).values(), *more.values()):
        out = op(*inputs)
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        torch.autograd.grad(outs, inputs, [torch.ones_like(o) for o in outs])
    print(*sorted(LAUNCHED), sep="\n", flush=True)


def serve() -> None:
    for line in sys.stdin:
        arch, kind, folder = line.rstrip("\n").split(" ", 2)
        child = os.fork()
        if not child:
            status = 1
            signal.alarm(500)
            try:
                for number, name in ((1, "stdout"), (2, "stderr")):
                    os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                main(arch, kind)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:]) if sys.argv[1:] else serve()
