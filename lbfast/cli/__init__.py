"""The command `lbfast`, a file for each group of commands. They import torch; `lbfast --help` does not."""

from __future__ import annotations

from lbfast.cli import about, bench, embed, evaluate, mini, profile, search, serve, train
from lbfast.cli.app import app

__all__ = ["about", "app", "bench", "embed", "evaluate", "mini", "profile", "search", "serve", "train"]
