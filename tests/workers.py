"""What worker processes run in tests. Nothing heavy is imported: each of them imports this module."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from lbfast.data import crew
from lbfast.data.shared import Desk


def poisoned(connection: Connection, work: object) -> None:
    """A file named poison kills it, each time."""
    connection.send(None)
    desk = Desk(connection)
    while True:
        if "poison" in desk.task().path:
            os.kill(os.getpid(), signal.SIGKILL)
        desk.answer(np.zeros(3, np.float32))


def dying(connection: Connection, work: Any) -> None:
    """It is killed after three parts of a recording, each time."""
    connection.send(None)
    desk = Desk(connection)
    left = 3
    while True:
        for part in work.decode(desk.task()):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            desk.answer(part)
            left -= 1
        desk.answer(crew.DONE)


def stillborn(connection: Connection, work: object) -> None:
    """It ends before it is ready."""
    os._exit(7)


class Named:
    """Work whose result is a task's path."""

    def decode(self, task):
        return task.path


def allocates(mib: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.ones(mib * 2**20 // 4).sum()


def dies() -> None:
    os._exit(3)


class Noise:
    """A processor whose pixels are the file's first byte and a draw; the file "deadly" ends the process."""

    modality = "image"
    transform = None
    tokenizer = None
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=2))

    def train(self, mode, generator=None):
        self.training, self.generator = mode, generator

    def pixel_values(self, files, raw):
        assert not raw and len(files) == 1
        if Path(files[0]).name == "deadly":
            os._exit(3)
        first = Path(files[0]).read_bytes()[0]
        draw = torch.rand((), generator=self.generator) if self.training else torch.zeros(())
        return torch.stack([torch.full((3, 2, 2), float(first)) + draw])
