"""Being told to end: SIGINT, SIGTERM and SIGHUP become an exception, so that whoever holds something lets go of it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked this process to end. No error: nothing but the command itself takes notice of it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Signals:
    """Within it SIGINT, SIGTERM and SIGHUP raise Stopped, once; a second one ends the process on the spot.

    A signal that the process was started deaf to (by nohup, in the background of a script) stays without effect.
    """

    _seen = 0  # of the process, as signals are

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._unraisable: Any = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._stop)
            self._unraisable, sys.unraisablehook = sys.unraisablehook, self._lost
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._unraisable is not None:
            sys.unraisablehook = self._unraisable
        seen, Signals._seen = Signals._seen, 0
        if seen and isinstance(error, Exception):
            raise Stopped(seen) from None

    @staticmethod
    def check() -> None:
        """Raises Stopped again, where a library has made an error of its own of the first or dropped it."""
        if Signals._seen:
            raise Stopped(Signals._seen) from None

    @staticmethod
    def _stop(number: int, frame: object) -> None:
        if Signals._seen:
            os.write(2, b"interrupted\n")
            os._exit(128 + number)
        Signals._seen = number
        raise Stopped(number)

    def _lost(self, unraisable: Any) -> None:
        """Stopped was raised where no exception leaves, in a destructor say: once more, a moment later."""
        if not isinstance(unraisable.exc_value, Stopped):
            self._unraisable(unraisable)
            return
        number, Signals._seen = Signals._seen, 0
        later = threading.Timer(0.05, os.kill, (os.getpid(), number))
        later.daemon = True
        later.start()
