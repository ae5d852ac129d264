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
    """Tile sizes by their names in the kernel, warps, and software pipeline stages.

    spilt: bytes that a thread may spill; more than 0 where that was measured to be faster than what spills none.
    """

    tile: Mapping[str, int]
    num_warps: int
    num_stages: int = 1
    spilt: int = 0


# layer_norm: NUMBERS of a tile in each thread; PER_SM programs a multiprocessor, each with partial sums of its own, in
# the backward. "wide": rows over 4 KiB.
LAYER_NORM_FWD: Mapping[str, Launch] = {
    "default": Launch({"NUMBERS": 64}, num_warps=4),
    "wide": Launch({"NUMBERS": 32}, num_warps=8),
}
LAYER_NORM_BWD: Mapping[str, Launch] = {
    "default": Launch({"NUMBERS": 40, "PER_SM": 2}, num_warps=4),
    "wide": Launch({"NUMBERS": 16, "PER_SM": 2}, num_warps=8),
}

# mlp: BLOCK numbers a program in the forward; in the backward [BLOCK_M, BLOCK_F] tiles down ROWS_EACH rows; about
# NUMBERS of a row in each thread, and at most so many warps, where it is rounded to float8.
MLP_FWD: Mapping[str, Launch] = {"default": Launch({"BLOCK": 4096}, num_warps=4)}
MLP_BWD: Mapping[str, Launch] = {"default": Launch({"BLOCK_M": 4, "BLOCK_F": 512, "ROWS_EACH": 256}, num_warps=4)}
MLP_FLOAT8: Mapping[str, Launch] = {"default": Launch({"NUMBERS": 32}, num_warps=8)}

# patch_embed: tiles [BLOCK_M, BLOCK_K] of the GEMM's rows; BLOCK_D channels of BLOCK_B tokens.
PATCH_EMBED_ROWS: Mapping[str, Launch] = {"default": Launch({"BLOCK_M": 64, "BLOCK_K": 64}, num_warps=4)}
PATCH_EMBED_MATRIX: Mapping[str, Launch] = {"default": Launch({}, num_warps=4)}
PATCH_EMBED_BWD_POSITION: Mapping[str, Launch] = {"default": Launch({"BLOCK_B": 8, "BLOCK_D": 256}, num_warps=4)}

# temporal_attention: ROWS of a tile, frames times positions. "wide": float32.
TEMPORAL_ATTENTION_FWD: Mapping[str, Launch] = {
    "default": Launch({"ROWS": 64}, num_warps=4),
    "wide": Launch({"ROWS": 32}, num_warps=4),
}
TEMPORAL_ATTENTION_BWD: Mapping[str, Launch] = {
    "default": Launch({"ROWS": 64}, num_warps=4),
    "wide": Launch({"ROWS": 32}, num_warps=4),
}

# attention: ROWS queries (in the backward: queries, or keys) a program, COLS keys (queries) a step of its loop. "wide":
# float32. "large": heads of more than 80. "short": up to TOKENS tokens, as captions have. HEAD: a head at once, ROWS
# queries a step, where it has at most KEYS tokens of 80 numbers (fewer of more); "sm_90 large": heads above 64.
ATTENTION_FWD_HEAD: Mapping[str, Launch] = {
    "default": Launch({"ROWS": 64, "KEYS": 80}, num_warps=4, num_stages=2),
    "sm_90": Launch({"ROWS": 64, "KEYS": 272}, num_warps=4, num_stages=3),
    "sm_90 large": Launch({"ROWS": 64, "KEYS": 272}, num_warps=4, num_stages=2),
    "interpreter": Launch({"ROWS": 64, "KEYS": 272}, num_warps=4),
}
ATTENTION_FWD: Mapping[str, Launch] = {
    "default": Launch({"ROWS": 64, "COLS": 64}, num_warps=4, num_stages=2),
    "sm_90": Launch({"ROWS": 128, "COLS": 64}, num_warps=4, num_stages=3),
    "large": Launch({"ROWS": 64, "COLS": 64}, num_warps=4, num_stages=2),
    "wide": Launch({"ROWS": 32, "COLS": 32}, num_warps=4, num_stages=1),
}
ATTENTION_BWD: Mapping[str, Launch] = {
    "default": Launch({"ROWS": 128, "COLS": 32}, num_warps=8, num_stages=2),
    "sm_90": Launch({"ROWS": 128, "COLS": 32}, num_warps=8, num_stages=3),
    "sm_90 large": Launch({"ROWS": 64, "COLS": 64}, num_warps=4, num_stages=3, spilt=56),
    "sm_100": Launch({"ROWS": 128, "COLS": 64}, num_warps=8, num_stages=2),
    "large": Launch({"ROWS": 128, "COLS": 32}, num_warps=8, num_stages=2),
    "gfx942 large": Launch({"ROWS": 64, "COLS": 32}, num_warps=4, num_stages=1),
    "wide": Launch({"ROWS": 32, "COLS": 32}, num_warps=4, num_stages=1),
    "short": Launch({"ROWS": 32, "COLS": 32, "TOKENS": 128}, num_warps=4, num_stages=1),
}

# Of the backward, which sizes one program a head takes: up to KEYS keys and one, heads up to DIM, with MASKS causal and
# padded ones too; COLS queries a step, RAGGED_COLS where there are fewer keys. What no row takes, ATTENTION_BWD splits;
# "large": heads above 64.
ATTENTION_BWD_WHOLE: Mapping[str, tuple[Launch, ...]] = {
    "sm_90": (
        Launch({"KEYS": 64, "DIM": 64, "MASKS": 1, "COLS": 64, "RAGGED_COLS": 64}, num_warps=4),
        Launch({"KEYS": 128, "DIM": 64, "MASKS": 1, "COLS": 64, "RAGGED_COLS": 64}, num_warps=8),
        Launch(
            {"KEYS": 256, "DIM": 64, "MASKS": 0, "COLS": 64, "RAGGED_COLS": 32}, num_warps=8, num_stages=3, spilt=120
        ),
    ),
    "interpreter": (
        Launch({"KEYS": 16, "DIM": 128, "MASKS": 1, "COLS": 32, "RAGGED_COLS": 32}, num_warps=4),
        Launch({"KEYS": 64, "DIM": 64, "MASKS": 1, "COLS": 64, "RAGGED_COLS": 64}, num_warps=4),
        Launch({"KEYS": 128, "DIM": 64, "MASKS": 1, "COLS": 64, "RAGGED_COLS": 32}, num_warps=8),
        Launch({"KEYS": 256, "DIM": 64, "MASKS": 0, "COLS": 64, "RAGGED_COLS": 32}, num_warps=8),
    ),
}

# info_nce and sigmoid_loss: tiles of logits, GROUP rows of tiles swept together. "wide": float32. "labels": where pairs
# are left out; "kept": whose exponentials are kept, forward and backward; "sigmoid": of the latter.
INFO_NCE: Mapping[str, Launch] = {
    "default": Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "GROUP": 8}, num_warps=8, num_stages=3),
    "labels": Launch({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8}, num_warps=4, num_stages=3),
    "sigmoid": Launch({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8}, num_warps=8, num_stages=3),
    "sigmoid labels": Launch({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8}, num_warps=8, num_stages=3),
    "wide": Launch({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8}, num_warps=4, num_stages=2),
    "sm_80": Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "GROUP": 8}, num_warps=8, num_stages=4),
    "sm_90": Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8}, num_warps=4, num_stages=3),
    "sm_90 labels": Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8}, num_warps=4, num_stages=3),
    "sm_90 sigmoid labels": Launch(
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 8}, num_warps=8, num_stages=3
    ),
    "sm_90 sigmoid": Launch({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 8}, num_warps=8, num_stages=3),
    "sm_100": Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8}, num_warps=8, num_stages=3),
    "sm_100 bwd": Launch({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 8}, num_warps=8, num_stages=3),
    "sm_100 kept": Launch({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8}, num_warps=8, num_stages=3),
    "sm_100 labels": Launch({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 8}, num_warps=8, num_stages=3),
    "sm_120": Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8}, num_warps=8, num_stages=2),
    "interpreter": Launch({"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 256, "GROUP": 2}, num_warps=4),
}
