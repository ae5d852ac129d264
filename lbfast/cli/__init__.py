"""The command `lbfast`, a file for each group of commands. They import torch; `lbfast --help` does not."""

from __future__ import annotations

import sys

from lbfast.cli import about, bench, embed, evaluate, mini, profile, train
from lbfast.cli.app import INTERRUPTED, app, errors

__all__ = ["about", "app", "bench", "embed", "evaluate", "main", "mini", "profile", "train"]


def main() -> None:
    """Entry point of the script `lbfast`."""
    try:
        app()
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(INTERRUPTED)
