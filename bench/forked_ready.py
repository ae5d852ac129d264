"""Imported by the process that jobs are forked from: bench/forked.py."""

from .forked import _import_all

_import_all()
