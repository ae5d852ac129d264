"""Starting quickly: Python looks for garbage while modules are imported, which make next to none."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Inside the block nothing is looked through for garbage, nor what was made by then ever again.

    A tenth of what PyTorch and transformers take. For the command line: other processes' garbage is not ours to keep.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if before:
            gc.enable()
