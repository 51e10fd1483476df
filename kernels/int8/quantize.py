"""int8 codes of rows, in the bits of pyaccel/reference/int8.py: one read of x, one write of its codes.

A program holds whole rows in registers, because a row's scale is that of its largest value. No product may be fused
with a sum here: where the definition rounds twice, so must the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyaccel.kernels.common.configs import RowConfig
from pyaccel.kernels.common.device import device_guard
from pyaccel.kernels.common.tiles import encode, load_tile, middle_of_rows, quantize_rows


@triton.jit
def _load_scaled(x_ptr, factor_ptr, row, o_col, mask, stride_row, stride_col, n_cols):
    """A tile of x [rows, columns], multiplied by its columns' factors where there are any."""
    x = load_tile(x_ptr, row, o_col, mask, stride_row, stride_col)
    if factor_ptr is not None:
        x *= tl.load(factor_ptr + o_col, mask=o_col < n_cols, other=0.0)[None, :]
    return x


@triton.jit
def rows_kernel(
    codes_ptr, scale_ptr, offset_ptr,
    x_ptr, factor_ptr,
    stride_x_row, stride_x_col,
    n_rows, n_cols,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A scale for each row and, with offset_ptr, the middle of its range, around which it is quantized."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    o_col = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_row = o_row < n_rows
    mask = m_row[:, None] & (o_col < n_cols)[None, :]
    row = o_row[:, None]
    x = _load_scaled(x_ptr, factor_ptr, row, o_col, mask, stride_x_row, stride_x_col, n_cols)
    if offset_ptr is not None:
        offset = middle_of_rows(x, mask)
        tl.store(offset_ptr + o_row, offset, mask=m_row)
        x -= offset[:, None]
    codes, scale = quantize_rows(x, mask)  # [BLOCK_ROWS, BLOCK_N], [BLOCK_ROWS]
    tl.store(codes_ptr + row * n_cols + o_col[None, :], codes, mask=mask)
    tl.store(scale_ptr + o_row, scale, mask=m_row)


@triton.jit
def tensor_kernel(
    codes_ptr,
    x_ptr, factor_ptr, scale_ptr,
    stride_x_row, stride_x_col,
    n_rows, n_cols,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One given scale for all of x; tiles, neighbors along a row first."""
    pid = tl.program_id(0)
    col_blocks = tl.cdiv(n_cols, BLOCK_N)
    o_row = (pid // col_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    o_col = (pid % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = (o_row < n_rows)[:, None] & (o_col < n_cols)[None, :]
    row = o_row[:, None]
    x = _load_scaled(x_ptr, factor_ptr, row, o_col, mask, stride_x_row, stride_x_col, n_cols)
    tl.store(codes_ptr + row * n_cols + o_col[None, :], encode(x, tl.load(scale_ptr)), mask=mask)


@triton.jit
def row_sum_kernel(
    out_ptr, codes_ptr, stride_row, n_rows, n_cols, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """out: int32 sums of the rows of int8 codes, whose columns are contiguous."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    m_row = o_row < n_rows
    total = tl.zeros((BLOCK_ROWS, BLOCK_N), tl.int32)
    for first in range(0, n_cols, BLOCK_N):
        o_col = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask = m_row[:, None] & (o_col < n_cols)[None, :]
        total += tl.load(codes_ptr + o_row[:, None] * stride_row + o_col[None, :], mask=mask, other=0).to(
            tl.int32
        )
    tl.store(out_ptr + o_row, tl.sum(total, axis=1), mask=m_row)


def rows(
    codes: Tensor, scale: Tensor, offset: Tensor | None, x: Tensor, factor: Tensor | None, config: RowConfig
) -> None:
    """Write int8 ``codes``, fp32 ``scale`` and, if it isn't None, fp32 ``offset`` of every row of ``x * factor``.

    Shapes: x ``[rows, cols]`` of any strides, with cols at most ``config.block_n``; codes the same, contiguous; scale
    and offset ``[rows]``; factor fp32 ``[cols]`` contiguous, or None.
    """
    n_rows, n_cols = x.shape
    if n_rows == 0:
        return
    with device_guard(x):
        rows_kernel[(triton.cdiv(n_rows, config.block_rows),)](
            codes, scale, offset, x, factor, x.stride(0), x.stride(1), n_rows, n_cols,
            BLOCK_ROWS=config.block_rows, BLOCK_N=config.block_n,
            num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip


def tensor(codes: Tensor, x: Tensor, factor: Tensor | None, scale: Tensor, config: RowConfig) -> None:
    """Write int8 ``codes`` of ``x * factor`` by the fp32 ``scale``, which is one number.

    Shapes: x ``[rows, cols]`` of any strides; codes the same, contiguous; factor fp32 ``[cols]`` contiguous, or None.
    """
    n_rows, n_cols = x.shape
    if x.numel() == 0:
        return
    grid = (triton.cdiv(n_rows, config.block_rows) * triton.cdiv(n_cols, config.block_n),)
    with device_guard(x):
        tensor_kernel[grid](
            codes, x, factor, scale, x.stride(0), x.stride(1), n_rows, n_cols,
            BLOCK_ROWS=config.block_rows, BLOCK_N=config.block_n,
            num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip


def row_sum(out: Tensor, codes: Tensor, config: RowConfig) -> None:
    """Write the int32 sums ``[rows]`` of int8 ``codes`` ``[rows, cols]``, whose rows are contiguous."""
    n_rows, n_cols = codes.shape
    if n_rows == 0:
        return
    with device_guard(codes):
        row_sum_kernel[(triton.cdiv(n_rows, config.block_rows),)](
            out, codes, codes.stride(0), n_rows, n_cols,
            BLOCK_ROWS=config.block_rows, BLOCK_N=config.block_n, num_warps=config.num_warps,
        )  # fmt: skip
