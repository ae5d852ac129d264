"""Stands in for upstream's package: its names are lbfast's."""

import sys

from lbfast import paths
from lbfast.languagebind import names

paths.install()
setattr(sys.modules[__name__], paths.MARK, True)
paths.fill(sys.modules[__name__], names())
