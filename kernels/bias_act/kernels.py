"""Bias + activation: forward, forward into int8 codes, and backward, each one read of its inputs.

Erf GELU is that of arXiv:1606.08415. All arithmetic is in fp32. The backward has nothing but x and bias to go by; its
persistent grid sums each column of the bias gradient over a program's rows in fp32, and reduce.py adds up what the
programs found. No atomics: two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyaccel.kernels.common.activations import activation_grad_tile, activation_tile
from pyaccel.kernels.common.configs import RowConfig
from pyaccel.kernels.common.launch import Launcher
from pyaccel.kernels.common.tiles import load_tile, quantize_rows


@triton.jit
def forward_kernel(
    out_ptr,
    x_ptr, bias_ptr,
    stride_x_row, stride_x_col,
    n_rows, n_cols,
    ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile a program, neighbors along a row first. bias_ptr may be None."""
    pid = tl.program_id(0)
    col_blocks = tl.cdiv(n_cols, BLOCK_N)
    o_row = (pid // col_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    o_col = (pid % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_col = o_col < n_cols
    mask = (o_row < n_rows)[:, None] & m_col[None, :]
    row = o_row[:, None]
    x = load_tile(x_ptr, row, o_col, mask, stride_x_row, stride_x_col)  # [BLOCK_ROWS, BLOCK_N]
    if bias_ptr is not None:
        x += tl.load(bias_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    out = activation_tile(x, ACTIVATION)
    tl.store(out_ptr + row * n_cols + o_col[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def quantize_kernel(
    codes_ptr, scale_ptr,
    x_ptr, bias_ptr,
    stride_x_row, stride_x_col,
    n_rows, n_cols,
    ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whole rows in registers, because a row's scale is that of its largest value. bias_ptr may be None."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    o_col = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_row = o_row < n_rows
    m_col = o_col < n_cols
    mask = m_row[:, None] & m_col[None, :]
    row = o_row[:, None]
    x = load_tile(x_ptr, row, o_col, mask, stride_x_row, stride_x_col)  # [BLOCK_ROWS, BLOCK_N]
    if bias_ptr is not None:
        x += tl.load(bias_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    codes, scale = quantize_rows(activation_tile(x, ACTIVATION), mask)
    tl.store(codes_ptr + row * n_cols + o_col[None, :], codes, mask=mask)
    tl.store(scale_ptr + o_row, scale, mask=m_row)


@triton.jit
def backward_kernel(
    dx_ptr, dbias_ptr,
    dy_ptr, x_ptr, bias_ptr,
    stride_dy_row, stride_dy_col, stride_x_row, stride_x_col,
    n_rows, n_cols,
    ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program keeps its columns and walks down the rows. dbias: fp32 partial sums [programs of a column, n_cols].

    dx_ptr, dbias_ptr and bias_ptr may be None.
    """
    pid = tl.program_id(0)
    col_blocks = tl.cdiv(n_cols, BLOCK_N)
    first_block = pid // col_blocks
    n_programs = tl.num_programs(0) // col_blocks
    o_col = (pid % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_col = o_col < n_cols
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    # Summed over BLOCK_ROWS once, at the end: no cross-thread sum inside the loop.
    b_dbias = tl.zeros((BLOCK_ROWS, BLOCK_N), dtype=tl.float32)
    for block in range(first_block, tl.cdiv(n_rows, BLOCK_ROWS), n_programs):
        o_row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)  # [BLOCK_ROWS]
        mask = (o_row < n_rows)[:, None] & m_col[None, :]
        row = o_row[:, None]
        dy = load_tile(dy_ptr, row, o_col, mask, stride_dy_row, stride_dy_col)  # [BLOCK_ROWS, BLOCK_N]
        x = load_tile(x_ptr, row, o_col, mask, stride_x_row, stride_x_col)
        if bias_ptr is not None:
            x += bias
        dx = dy * activation_grad_tile(x, ACTIVATION)
        if dx_ptr is not None:
            tl.store(dx_ptr + row * n_cols + o_col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            b_dbias += dx  # rows beyond the last add 0: their dy is 0
    if dbias_ptr is not None:
        o_partial = first_block.to(tl.int64) * n_cols + o_col
        tl.store(dbias_ptr + o_partial, tl.sum(b_dbias, axis=0), mask=m_col)


_launch_forward, _launch_quantize = Launcher(forward_kernel), Launcher(quantize_kernel)
_launch_backward = Launcher(backward_kernel)


def forward(out: Tensor, x: Tensor, bias: Tensor | None, activation: str, config: RowConfig) -> None:
    """Launch the forward kernel; it writes ``out``.

    Shapes: x ``[rows, cols]`` of any strides; out the same, contiguous; bias ``[cols]`` contiguous.
    """
    n_rows, n_cols = x.shape
    if n_rows == 0:
        return
    programs = -(-n_rows // config.block_rows) * -(-n_cols // config.block_n)
    args = (out, x, bias, *x.stride(), n_rows, n_cols)
    _launch_forward(x, programs, args, (activation, config.block_rows, config.block_n), config.num_warps)


def quantize(
    codes: Tensor, scale: Tensor, x: Tensor, bias: Tensor | None, activation: str, config: RowConfig
) -> None:
    """Launch the forward kernel that writes int8 ``codes`` and fp32 ``scale`` of the fp32 result.

    Shapes: x ``[rows, cols]`` of any strides, with cols at most ``config.block_n``; codes the same, contiguous; scale
    ``[rows]``; bias ``[cols]`` contiguous.
    """
    n_rows, n_cols = x.shape
    if n_rows == 0:
        return
    args = (codes, scale, x, bias, *x.stride(), n_rows, n_cols)
    constants = (activation, config.block_rows, config.block_n)
    _launch_quantize(x, -(-n_rows // config.block_rows), args, constants, config.num_warps)


def backward(
    dx: Tensor | None,
    dbias_partial: Tensor | None,
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    n_programs: int,
    config: RowConfig,
) -> None:
    """Launch the backward kernel; it writes dx and the partial sums of dbias, whichever are not None.

    Shapes: dy, x ``[rows, cols]`` of any strides; dx the same, contiguous; bias ``[cols]`` contiguous; partial sums
    ``[n_programs, cols]`` fp32. ``n_programs``, for each block of columns, is at most the number of row blocks.
    """
    n_rows, n_cols = x.shape
    if n_rows == 0:
        return
    programs = n_programs * -(-n_cols // config.block_n)
    args = (dx, dbias_partial, dy, x, bias, *dy.stride(), *x.stride(), n_rows, n_cols)
    _launch_backward(x, programs, args, (activation, config.block_rows, config.block_n), config.num_warps)
