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

# patch_embed: tiles of tokens (BLOCK_M), channels (BLOCK_N) and padded patch pixels (BLOCK_K, at most 64 where they are
# summed over); SPLITS parts of the tokens in the weight's gradient. "wide": float32, whose tiles take twice the space.
PATCH_EMBED_FWD: Mapping[str, Launch] = {
    "default": Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, num_warps=8, num_stages=3),
    "wide": Launch({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=2),
    "sm_90": Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    "sm_100": Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
}
PATCH_EMBED_BWD_WEIGHT: Mapping[str, Launch] = {
    "default": Launch({"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 128, "SPLITS": 8}, num_warps=8, num_stages=3),
    "wide": Launch({"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "SPLITS": 8}, num_warps=4, num_stages=2),
}
PATCH_EMBED_BWD_PIXELS: Mapping[str, Launch] = {
    "default": Launch({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 128}, num_warps=8, num_stages=3),
    "wide": Launch({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64}, num_warps=4, num_stages=2),
}
PATCH_EMBED_BWD_POSITION: Mapping[str, Launch] = {"default": Launch({"BLOCK_B": 8, "BLOCK_D": 256}, num_warps=4)}
PATCH_EMBED_PACK: Mapping[str, Launch] = {"default": Launch({}, num_warps=4)}

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
# float32. "short": up to TOKENS tokens, as captions have.
ATTENTION_FWD: Mapping[str, Launch] = {
    "default": Launch({"ROWS": 128, "COLS": 32}, num_warps=8, num_stages=2),
    "sm_90": Launch({"ROWS": 128, "COLS": 32}, num_warps=8, num_stages=3),
    "wide": Launch({"ROWS": 32, "COLS": 32}, num_warps=4, num_stages=1),
    "short": Launch({"ROWS": 32, "COLS": 32, "TOKENS": 128}, num_warps=4, num_stages=2),
}
ATTENTION_BWD: Mapping[str, Launch] = {
    "default": Launch({"ROWS": 128, "COLS": 32}, num_warps=8, num_stages=2),
    "sm_90": Launch({"ROWS": 128, "COLS": 64, "DQ_ROWS": 256}, num_warps=8, num_stages=1),
    "sm_100": Launch({"ROWS": 128, "COLS": 64}, num_warps=8, num_stages=2),
    "large": Launch({"ROWS": 128, "COLS": 32}, num_warps=8, num_stages=2),
    "gfx942 large": Launch({"ROWS": 64, "COLS": 32}, num_warps=4, num_stages=1),
    "wide": Launch({"ROWS": 32, "COLS": 32}, num_warps=4, num_stages=1),
    "short": Launch({"ROWS": 32, "COLS": 32, "TOKENS": 128}, num_warps=4, num_stages=1),
}

# Of the backward, which sizes one program a head takes: up to KEYS keys and one, heads up to DIM, with MASKS causal and
# padded ones too; COLS queries a step, RAGGED_COLS where there are fewer keys. What no row takes, ATTENTION_BWD splits,
# DQ_ROWS queries a program where that is not ROWS; "large": heads above 64. "default" is the interpreter alone here.
ATTENTION_BWD_WHOLE: Mapping[str, tuple[Launch, ...]] = {
    "sm_90": (
        Launch({"KEYS": 64, "DIM": 64, "MASKS": 1, "COLS": 64, "RAGGED_COLS": 64}, num_warps=4),
        Launch({"KEYS": 128, "DIM": 64, "MASKS": 1, "COLS": 64, "RAGGED_COLS": 64}, num_warps=8),
        Launch({"KEYS": 256, "DIM": 64, "MASKS": 0, "COLS": 64, "RAGGED_COLS": 32}, num_warps=8),
    ),
    "default": (
        Launch({"KEYS": 16, "DIM": 128, "MASKS": 1, "COLS": 32, "RAGGED_COLS": 32}, num_warps=4),
        Launch({"KEYS": 64, "DIM": 64, "MASKS": 1, "COLS": 64, "RAGGED_COLS": 64}, num_warps=4),
        Launch({"KEYS": 128, "DIM": 64, "MASKS": 1, "COLS": 64, "RAGGED_COLS": 32}, num_warps=8),
        Launch({"KEYS": 256, "DIM": 64, "MASKS": 0, "COLS": 64, "RAGGED_COLS": 32}, num_warps=8),
    ),
}

# info_nce: tiles of logits, GROUP rows of tiles swept together. "wide": float32. "busy": labels, or logits kept.
INFO_NCE: Mapping[str, Launch] = {
    "default": Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "GROUP": 8}, num_warps=8, num_stages=3),
    "busy": Launch({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8}, num_warps=4, num_stages=3),
    "wide": Launch({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8}, num_warps=4, num_stages=2),
    "sm_80": Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "GROUP": 8}, num_warps=8, num_stages=4),
    "sm_90": Launch({"BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8}, num_warps=8, num_stages=3),
    "sm_90 bwd": Launch({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 8}, num_warps=8, num_stages=3),
    "sm_90 busy": Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8}, num_warps=8, num_stages=3),
    "sm_100": Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8}, num_warps=8, num_stages=3),
    "sm_100 bwd": Launch({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 8}, num_warps=8, num_stages=3),
    "sm_100 busy": Launch({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 8}, num_warps=8, num_stages=3),
    "sm_120": Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8}, num_warps=8, num_stages=2),
    "interpreter": Launch({"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 256, "GROUP": 2}, num_warps=4),
}
