"""Importing this ends the process with its parent; see `tether`."""

import os

from lbfast.data import tether

tether.ignore_signals()
tether.die_with_parent(int(os.environ.pop(tether.PARENT, os.getppid())))
