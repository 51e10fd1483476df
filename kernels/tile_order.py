"""The order in which programs make the tiles of a matrix product: in groups of rows of tiles, which share the weight's
tiles in the L2 cache."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of_program(pid, n_rows, n_out, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile (row, column) of program ``pid``: down the GROUP_M tiles of a group first, then along the columns."""
    blocks_m, blocks_n = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_out, BLOCK_N)
    per_group = GROUP_M * blocks_n
    first_m = pid // per_group * GROUP_M
    group_m = tl.minimum(blocks_m - first_m, GROUP_M)  # the last group may have fewer
    in_group = pid % per_group
    return first_m + in_group % group_m, in_group // group_m
