"""The script `lbfast`, and `python -m lbfast`."""

from __future__ import annotations

import sys

from lbfast.signals import Signals, Stopped


def main() -> None:
    """Runs the command line. Told to end by SIGINT, SIGTERM or SIGHUP: one line, and the status that shells expect."""
    try:
        with Signals():
            from lbfast.cli import app  # a quarter of a second of imports

            app()
    except Stopped as stopped:
        number = stopped.number
    except KeyboardInterrupt:  # a second Ctrl-C, while training was saving
        number = 2
    else:
        return
    print("interrupted", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
