"""Imported by the process that jobs are forked from: bench/forked.py."""

from .forked import import_all

import_all()
