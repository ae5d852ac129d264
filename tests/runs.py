"""Runs in processes of their own, which tests kill, stop or starve."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

import lbfast.cli
from lbfast.training.checkpoints import CheckpointWriteError
from lbfast.training.trainer import train
from tests import tiny, trainees

with contextlib.suppress(ImportError):
    import matplotlib.figure  # noqa: F401  (what a run imports late is there before the fork)
with contextlib.suppress(ImportError):
    import torch.utils.tensorboard

SAVE_EVERY = 3
STEPS = 10_000


def long_run(out: Path, fields: dict) -> None:
    torch.set_num_threads(1)
    plan = trainees.plan(**fields)
    train(plan, trainees.trainee(plan), trainees.Data(), out, save_every=SAVE_EVERY)


def command(folder: Path) -> None:
    """`lbfast train` for far longer than a test; what it says goes to files."""
    torch.set_num_threads(1)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    data, model = trainees.manifest(folder), tiny.checkpoint(folder, "image")
    settings = ["--set", "batch_size=20", "--set", f"epochs={STEPS}", "--set", "warmup=1", "--set", "micro_batch=20"]
    sys.argv = ["lbfast", "train", "--recipe", "depth", "--model", str(model), "--data", str(data), *settings]
    sys.argv += ["--out", str(folder / "out"), "--device", "cpu"]
    lbfast.cli.main()


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
