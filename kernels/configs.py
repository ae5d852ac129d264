"""Launch tables by architecture ("sm_90", "gfx942", ...), one section an op; "default" serves hardware not named.

Nothing is tuned at run time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

Row = TypeVar("Row")


def lookup(table: Mapping[str, Row], arch: str) -> Row:
    """The row of `arch`, or the default one."""
    return table.get(arch, table["default"])


@dataclasses.dataclass(frozen=True)
class Launch:
    """Tile sizes by their names in the kernel, warps, and software pipeline stages."""

    tile: Mapping[str, int]
    num_warps: int
    num_stages: int = 1


# layer_norm: ELEMENTS numbers a tile (whole rows of D rounded up to a power of two); PER_SM programs a multiprocessor,
# each with partial sums of its own in the backward.
LAYER_NORM_FWD: Mapping[str, Launch] = {"default": Launch({"ELEMENTS": 4096}, num_warps=4)}
LAYER_NORM_BWD: Mapping[str, Launch] = {"default": Launch({"ELEMENTS": 2048, "PER_SM": 4}, num_warps=4)}

# mlp: BLOCK numbers a program in the forward; in the backward [BLOCK_M, BLOCK_F] tiles down ROWS_EACH rows.
MLP_FWD: Mapping[str, Launch] = {"default": Launch({"BLOCK": 4096}, num_warps=4)}
MLP_BWD: Mapping[str, Launch] = {"default": Launch({"BLOCK_M": 4, "BLOCK_F": 512, "ROWS_EACH": 256}, num_warps=4)}
