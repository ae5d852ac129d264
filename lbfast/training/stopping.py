"""An orderly end of a run: signals are noted, and what they ask for is done after the step."""

from __future__ import annotations

import signal
import threading
from typing import Any

from lbfast.signals import Signals


class StopSignals:
    """Notes SIGTERM, SIGHUP and the first SIGINT instead of dying of them; a second SIGINT interrupts at once.

    SIGHUP, where the process was started deaf to it (by nohup), stays without effect.
    """

    def __init__(self) -> None:
        self.seen = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        Signals.check()  # of the command's, which has noted them until now
        if threading.current_thread() is threading.main_thread():
            hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
            for number in (signal.SIGTERM, signal.SIGINT, *hangup):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.seen = number
