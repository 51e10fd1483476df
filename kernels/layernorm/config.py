"""Launch configurations of residual_layernorm."""

from __future__ import annotations

import functools

from pyaccel.kernels.common.configs import RowConfig, check_row, next_power_of_2


@functools.lru_cache(maxsize=1024)
def residual_layernorm_forward(n_cols: int) -> RowConfig:
    """Rows stay in registers, several short rows a program.

    The number of rows plays no part: a row's bits don't depend on what it is batched with.
    """
    check_row(n_cols)
    block_n = max(next_power_of_2(n_cols), 64)
    # 16 elements a thread. Of 4096 columns 8: ptxas aims at 48 registers on sm_100 and misses it with int8 codes.
    return RowConfig(max(2048 // block_n, 1), block_n, num_warps=4 if block_n <= 2048 else 16)


@functools.lru_cache(maxsize=1024)
def residual_layernorm_backward(n_cols: int) -> RowConfig:
    """A persistent grid whose programs keep the column sums of their rows in registers.

    Above 4096 columns these sums no longer fit beside the row; the tiled kernel keeps them in memory.
    """
    check_row(n_cols)
    block_n = max(next_power_of_2(n_cols), 64)
    # 8 elements a thread and 16 warps an SM: row, gradients and sums then fit in registers on every GPU.
    if block_n > 4096:
        return RowConfig(4, 1024, num_warps=16, programs_per_sm=1, tiled=True)
    num_warps = max(block_n // 256, 8)
    return RowConfig(max(2048 // block_n, 1), block_n, num_warps, programs_per_sm=16 // num_warps)
