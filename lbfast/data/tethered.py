"""Importing this ends the process with its parent, where that is named, and makes it deaf to signals; see `tether`."""

import os

from lbfast.data import tether

tether.stay_deaf()
if tether.PARENT in os.environ:
    tether.die_with_parent(int(os.environ.pop(tether.PARENT)))
