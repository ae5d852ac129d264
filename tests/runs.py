"""Runs in processes of their own, which tests kill, stop or starve."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import sys
import time
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import lbfast.__main__
import lbfast.cli
import lbfast.embedding.pipeline
from lbfast.evaluation import encoder
from lbfast.processing.text import TOKENIZERS, default_tokenizer
from lbfast.training import engine
from lbfast.training.checkpoints import CheckpointWriteError
from lbfast.training.plan import plan
from lbfast.training.report import memory_mib
from lbfast.training.trainer import train
from lbfast.training.watch import Evaluation, Watch
from tests import tiny, trainees

with contextlib.suppress(ImportError):
    import matplotlib.figure  # noqa: F401  (what a run imports late is there before the fork)
with contextlib.suppress(ImportError):
    import torch.utils.tensorboard

gc.freeze()  # a million objects of libraries that no collection of a run's need look at
gc.set_threshold(100_000, 10, 10)

SAVE_EVERY = 3
STEPS = 10_000


def long_run(out: Path, fields: dict) -> None:
    torch.set_num_threads(1)
    plan = trainees.plan(**fields)
    train(plan, trainees.trainee(plan), trainees.Data(), out, save_every=SAVE_EVERY)


def said_to(folder: Path) -> None:
    """What this process says goes to files."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)


def script(folder: Path, code: str, *arguments: object) -> None:
    """As `python -c code arguments`, without what that takes to import."""
    said_to(folder)
    sys.argv = ["-c", *map(str, arguments)]
    exec(compile(code, "script", "exec"), {"__name__": "__main__"})


def called(folder: Path, environment: dict[str, str], function: str, *arguments: object) -> None:
    """As `python -c "from module import function; function(arguments)"`, of "module:function", in that environment."""
    said_to(folder)
    os.environ.update(environment)
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(*arguments)


def ended(context: Any, folder: Path, target: Any, *arguments: object, seconds: float = 300) -> SimpleNamespace:
    """target(folder, *arguments) in a process of that context: its status and what it has said."""
    folder.mkdir(exist_ok=True)
    process = context.Process(target=target, args=(folder, *arguments))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    said = {name: (folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")}
    return SimpleNamespace(returncode=process.exitcode, **said)


def lbfast_command(folder: Path, *arguments: object) -> None:
    """As `lbfast arguments`."""
    torch.set_num_threads(1)
    said_to(folder)
    sys.argv = ["lbfast", *map(str, arguments)]
    lbfast.__main__.main()


def lbfast_of_a_session(folder: Path, *arguments: object) -> None:
    """As `setsid lbfast arguments`: what its workers are forked from is its own."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    forkserver._forkserver.__init__()  # type: ignore[misc]
    resource_tracker._resource_tracker.__init__()  # type: ignore[misc]
    lbfast_command(folder, *arguments)


def _lbfast_of_rank(folder: Path, *arguments: object) -> None:
    mine = folder / os.environ["RANK"]
    mine.mkdir()
    try:
        lbfast_command(mine, *arguments)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"status {end.code}: {(mine / 'stderr').read_text()}") from None


def torchrun(folder: Path, processes: int, *arguments: object) -> None:
    """As `torchrun --nproc-per-node processes -m lbfast arguments`: its agent, whose processes are forked from here.

    What each of them says is in folder/<its rank>.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",  # this process has started no threads, and has imported everything
    )
    elastic_launch(config, _lbfast_of_rank)(folder, *arguments)


def command(folder: Path) -> None:
    """`lbfast train` for far longer than a test."""
    data, model = trainees.manifest(folder), tiny.checkpoint(folder, "image")
    settings = ["--set", "batch_size=20", "--set", f"epochs={STEPS}", "--set", "warmup=1", "--set", "micro_batch=20"]
    where = ["--model", model, "--data", data, "--out", folder / "out", "--device", "cpu"]
    lbfast_command(folder, "train", "--recipe", "depth", *where, *settings)


def on_a_small_disk(folder: Path) -> None:
    """From the third step on no file may have more than 20 KB, less than a checkpoint's have."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write that is too long fails, as on a full disk
    plan, data = trainees.plan(), trainees.Data()

    def fill(step: int) -> None:
        if step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    data.before = fill
    try:
        train(plan, trainees.trainee(plan), data, folder / "out", save_every=2)
    except CheckpointWriteError as error:
        (folder / "error").write_text(str(error))


def wait_for(path: Path, seconds: float = 60) -> None:
    """Until there is something in a file."""
    end = time.monotonic() + seconds
    while not (path.is_file() and path.stat().st_size):
        if time.monotonic() > end:
            raise TimeoutError(f"{path} did not come")
        time.sleep(0.05)


def planned(fields: dict, out: Any) -> None:
    torch.set_num_threads(1)
    made = trainees.plan(**fields)
    out.send(plan(made, trainees.trainee(made)).peak)


def taken(fields: dict, folder: Path, out: Any) -> None:
    """The most memory that a run of two steps has had, in bytes."""
    torch.set_num_threads(1)
    made = trainees.plan(**fields)
    data = trainees.Data(made.modality, 2 * made.batch_size, made.batch_size)
    train(made, trainees.trainee(made), data, folder)
    out.send(memory_mib(torch.device("cpu")) * 2**20)


def watched(out: Path, fields: dict, data: Path, dies: bool) -> None:
    """A run that is evaluated at every third step, and dies in the second evaluation between two of its batches."""
    torch.set_num_threads(1)
    plan, seen, unit = trainees.plan(**fields), [], encoder.Encoder._unit

    def embedded(self: encoder.Encoder, embeds: torch.Tensor) -> torch.Tensor:
        seen.append(len(embeds))
        if dies and sum(seen) > 4 * 40:  # the captions once, the items twice: as they are and averaged
            os.kill(os.getpid(), signal.SIGKILL)
        return unit(self, embeds)

    encoder.Encoder._unit = embedded
    evaluation = Evaluation([str(data)], default_tokenizer(TOKENIZERS["depth"]), 3, "ema/R@5", batch_size=16)
    train(plan, trainees.trainee(plan), trainees.Data(), out, save_every=2, evaluation=evaluation)


def evaluated(rank: int, folder: Path, data: Path) -> None:
    """One of three processes: what they find together, and what is said where the second of them then fails."""
    torch.set_num_threads(1)
    address = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=3)
    plan, wanted = trainees.plan(), Evaluation([str(data)], default_tokenizer(TOKENIZERS["depth"]), batch_size=8)
    watch, model = Watch(wanted, plan, engine.here(torch.device("cpu")), False), trainees.trainee(plan)
    found = watch(model, "eval")

    def fails(self: encoder.Encoder, embeds: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    if rank == 1:
        encoder.Encoder._unit = fails
    try:
        watch(model, "eval")
        said = ""
    except (ValueError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps([found, said]))
    torch.distributed.destroy_process_group()
