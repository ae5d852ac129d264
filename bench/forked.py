"""Commands that run a Python module, each in a process forked from one that has the imports behind it.

Importing torch, its compiler, Triton and transformers takes ten seconds where they are read for the first time,
and a second or two each time after: of a GPU's minutes half would go into imports. The process that is forked from
computes nothing and never asks for the GPU, which a fork could not use then.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

from . import run as plainly

BEHIND = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch._inductor.codegen.triton",
    "triton.compiler",
    "transformers.models.clip.modeling_clip",
    "pytest",
    "lbfast.ops",
    "lbfast.training",
    "bench.bench_languagebind",
    "bench.bench_training",
    "bench.bench_info_nce",
    "bench.profile",
    "bench.tune",
)


def import_all() -> None:
    for name in BEHIND:
        with contextlib.suppress(Exception):  # it is the job that will say what is missing
            importlib.import_module(name)


@functools.cache
def _server() -> ForkServerContext:
    # Counting GPUs by NVML starts no CUDA: a module that asks whether there is one spoils no fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.update(plainly.environment())  # where the server, too, finds the checkout
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__ + "_ready"])
    return context


def run(command: Sequence[str], seconds: float, env: Mapping[str, str], log: Path) -> int | None:
    """As bench.run.run; what is not `python -m module` is left to that."""
    if list(command[:2]) != [sys.executable, "-m"]:
        return plainly.run(command, seconds, env, log)
    process = _server().Process(target=_job, args=(list(command[2:]), dict(env), str(log)))
    process.start()
    try:
        process.join(max(1.0, seconds))
        return process.exitcode
    finally:
        if process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
            process.join()


def _job(arguments: list[str], env: Mapping[str, str], log: str) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.chdir(plainly.ROOT)
    for name in os.environ.keys() - env.keys():
        del os.environ[name]
    os.environ.update(env)
    sys.path[:0] = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder not in sys.path]
    if threads := env.get("OMP_NUM_THREADS"):  # which the imports have read already
        importlib.import_module("torch").set_num_threads(int(threads))
    sys.argv = arguments
    sys.modules.pop(arguments[0], None)
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
