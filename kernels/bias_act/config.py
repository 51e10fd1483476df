"""Launch configurations of bias_gelu."""

from __future__ import annotations

import functools

from pyaccel.kernels.common.configs import RowConfig, check_row, check_width, next_power_of_2


@functools.lru_cache(maxsize=1024)
def bias_gelu_forward(n_cols: int) -> RowConfig:
    """Tiles of 16 elements a thread. The widths of feed-forward layers are multiples of 512."""
    check_width(n_cols)
    block_n = 512 if n_cols >= 512 else 128
    return RowConfig(2048 // block_n, block_n, num_warps=4)


@functools.lru_cache(maxsize=1024)
def bias_gelu_backward(n_cols: int) -> RowConfig:
    """A persistent grid of tiles: 8 elements a thread of each gradient and of the column sums, 32 warps an SM."""
    check_width(n_cols)
    block_n = 512 if n_cols >= 512 else 128
    return RowConfig(2048 // block_n, block_n, num_warps=8, programs_per_sm=4)


def bias_gelu_quantize(n_cols: int) -> RowConfig:
    """Rows stay in registers, 16 elements a thread or 32: a row needs its largest value before its first code."""
    check_row(n_cols)
    block_n = max(next_power_of_2(n_cols), 512)
    return RowConfig(max(2048 // block_n, 1), block_n, num_warps=min(max(block_n // 512, 4), 16))
