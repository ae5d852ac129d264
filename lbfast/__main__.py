"""The script `lbfast`, and `python -m lbfast`."""

from __future__ import annotations

import gc
import os
import sys

from lbfast.importing import importing
from lbfast.signals import Signals, Stopped


def main() -> None:
    """Runs the command line. Told to end by SIGINT, SIGTERM or SIGHUP: one line, and the status that shells expect."""
    _open_standard_streams()
    try:
        with Signals():
            with importing():
                from lbfast.cli import app

            app()
    except Stopped as stopped:
        number = stopped.number
    except OSError as error:  # of stdout: a full disk
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (what waits in it is given up)
        print(f"error: cannot write to stdout: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # a second Ctrl-C, while training was saving
        number = 2
    else:
        return
    finally:
        gc.freeze()  # else the interpreter looks all that PyTorch has made through once more, a third of a second
    print("interrupted", file=sys.stderr)
    sys.exit(128 + number)


def _open_standard_streams() -> None:
    """Where the caller has closed one, what is opened next, a file of results say, would take what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


if __name__ == "__main__":
    main()
