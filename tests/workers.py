"""Workers that die, for the decoder's tests. Nothing heavy is imported: each worker process imports this module."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection

import numpy as np


def poisoned(connection: Connection, work: object) -> None:
    """A file named poison kills it, each time."""
    connection.send(None)
    while True:
        if "poison" in connection.recv().path:
            os.kill(os.getpid(), signal.SIGKILL)
        connection.send(np.zeros(3, np.float32))


def stillborn(connection: Connection, work: object) -> None:
    """It ends before it is ready."""
    os._exit(7)
