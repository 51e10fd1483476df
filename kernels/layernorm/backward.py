"""Bias + dropout + residual + LayerNorm (or RMSNorm), backward: all five gradients in one pass over the rows.

A persistent grid; each program sums its rows' share of the weight, bias and x_bias gradients in fp32 and writes
one row of partial sums; a second, small kernel adds these rows up. No atomics: two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyaccel.kernels.common.configs import RowConfig
from pyaccel.kernels.common.launch import Launcher
from pyaccel.kernels.common.philox import dropout_scalars, dropout_tile


@triton.jit
def _load_tile(
    dy_ptr, sum_ptr, weight_ptr, mean, rstd, row, o_col, mask, m_col, stride_dy_row, stride_dy_col, n_cols
):
    """dy, w * dy (0 where masked) and the normalized input of a tile, [rows, columns] each, in fp32."""
    col = o_col[None, :]
    dy = tl.load(dy_ptr + row * stride_dy_row + col.to(tl.int64) * stride_dy_col, mask=mask, other=0.0)
    dy = dy.to(tl.float32)
    z = tl.load(sum_ptr + row * n_cols + col, mask=mask, other=0.0).to(tl.float32)
    x_hat = (z if mean is None else z - mean[:, None]) * rstd[:, None]
    wdy = dy
    if weight_ptr is not None:
        wdy = dy * tl.load(weight_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    return dy, wdy, x_hat


@triton.jit
def _store_tile(
    dx_ptr, dresidual_ptr, dsum_ptr, key_ptr, dz, o_row, row, o_col, first_col, mask,
    stride_dsum_row, stride_dsum_col, n_cols, threshold, scale,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the gradient of the returned sum, write dresidual and dx, and return dx [rows, columns]."""
    col = o_col[None, :]
    if dsum_ptr is not None:
        offset = row * stride_dsum_row + col.to(tl.int64) * stride_dsum_col
        dz += tl.load(dsum_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + row * n_cols + col, dz.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if key_ptr is not None:
        dz = dropout_tile(
            dz, key_ptr, o_row, first_col, tl.full((), 0, tl.int32), threshold, scale, BLOCK_ROWS, BLOCK_N
        )
    if dx_ptr is not None:
        tl.store(dx_ptr + row * n_cols + col, dz.to(dx_ptr.dtype.element_ty), mask=mask)
    return dz


@triton.jit(do_not_specialize=["threshold"])
def backward_kernel(
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr, dx_bias_ptr,
    dy_ptr, dsum_ptr, sum_ptr, mean_ptr, rstd_ptr, weight_ptr, key_ptr,
    stride_dy_row, stride_dy_col, stride_dsum_row, stride_dsum_col,
    n_rows, n_cols, scale, threshold,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whole rows in registers. dweight, dbias, dx_bias: fp32 partial sums [programs, n_cols]."""
    pid = tl.program_id(0)
    o_col = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_col = o_col < n_cols
    # Summed over BLOCK_ROWS once, at the end: no cross-thread sum inside the loop.
    b_dweight = tl.zeros((BLOCK_ROWS, BLOCK_N), dtype=tl.float32)
    b_dbias = tl.zeros((BLOCK_ROWS, BLOCK_N), dtype=tl.float32)
    b_dx_bias = tl.zeros((BLOCK_ROWS, BLOCK_N), dtype=tl.float32)
    for block in range(pid, tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0)):
        o_row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)  # [BLOCK_ROWS]
        m_row = o_row < n_rows
        mask = m_row[:, None] & m_col[None, :]
        row = o_row[:, None]
        mean = None
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + o_row, mask=m_row, other=0.0)
        rstd = tl.load(rstd_ptr + o_row, mask=m_row, other=0.0)
        dy, wdy, x_hat = _load_tile(
            dy_ptr,
            sum_ptr,
            weight_ptr,
            mean,
            rstd,
            row,
            o_col,
            mask,
            m_col,
            stride_dy_row,
            stride_dy_col,
            n_cols,
        )
        if dweight_ptr is not None:
            b_dweight += dy * x_hat
        if dbias_ptr is not None:
            b_dbias += dy
        mean_wdy_x_hat = tl.sum(wdy * x_hat, axis=1) / n_cols  # [BLOCK_ROWS]
        dz = wdy - x_hat * mean_wdy_x_hat[:, None]
        if mean_ptr is not None:
            dz -= (tl.sum(wdy, axis=1) / n_cols)[:, None]
        dz *= rstd[:, None]
        dx = _store_tile(
            dx_ptr, dresidual_ptr, dsum_ptr, key_ptr, dz, o_row, row, o_col, 0, mask,
            stride_dsum_row, stride_dsum_col, n_cols, threshold, scale, BLOCK_ROWS, BLOCK_N,
        )  # fmt: skip
        if dx_bias_ptr is not None:
            b_dx_bias += dx  # rows beyond the last add 0: their dy and rstd are 0
    o_partial = pid.to(tl.int64) * n_cols + o_col
    if dweight_ptr is not None:
        tl.store(dweight_ptr + o_partial, tl.sum(b_dweight, axis=0), mask=m_col)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + o_partial, tl.sum(b_dbias, axis=0), mask=m_col)
    if dx_bias_ptr is not None:
        tl.store(dx_bias_ptr + o_partial, tl.sum(b_dx_bias, axis=0), mask=m_col)


@triton.jit
def _add_partial(partial_ptr, o_partial, tile, m_col, m_before):
    """Add a tile's column sums to this program's row of partial sums, which starts at 0 where not m_before."""
    tl.debug_barrier()  # what other threads of this program stored here for the rows before
    before = tl.load(partial_ptr + o_partial, mask=m_before, other=0.0)
    tl.store(partial_ptr + o_partial, before + tl.sum(tile, axis=0), mask=m_col)


@triton.jit(do_not_specialize=["threshold"])
def backward_tiled_kernel(
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr, dx_bias_ptr,
    dy_ptr, dsum_ptr, sum_ptr, mean_ptr, rstd_ptr, weight_ptr, key_ptr,
    stride_dy_row, stride_dy_col, stride_dsum_row, stride_dsum_col,
    n_rows, n_cols, scale, threshold,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Long rows, walked twice in tiles of BLOCK_N columns: once for the row sums, once for the gradients."""
    pid = tl.program_id(0)
    for block in range(pid, tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0)):
        o_row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)  # [BLOCK_ROWS]
        m_row = o_row < n_rows
        row = o_row[:, None]
        mean = None
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + o_row, mask=m_row, other=0.0)
        rstd = tl.load(rstd_ptr + o_row, mask=m_row, other=0.0)
        b_wdy = tl.zeros((BLOCK_ROWS, BLOCK_N), dtype=tl.float32)
        b_wdy_x_hat = tl.zeros((BLOCK_ROWS, BLOCK_N), dtype=tl.float32)
        for first_col in range(0, n_cols, BLOCK_N):
            o_col = first_col + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            m_col = o_col < n_cols
            mask = m_row[:, None] & m_col[None, :]
            _, wdy, x_hat = _load_tile(
                dy_ptr,
                sum_ptr,
                weight_ptr,
                mean,
                rstd,
                row,
                o_col,
                mask,
                m_col,
                stride_dy_row,
                stride_dy_col,
                n_cols,
            )
            b_wdy += wdy
            b_wdy_x_hat += wdy * x_hat
        mean_wdy_x_hat = tl.sum(b_wdy_x_hat, axis=1) / n_cols  # [BLOCK_ROWS]
        mean_wdy = tl.sum(b_wdy, axis=1) / n_cols
        for first_col in range(0, n_cols, BLOCK_N):
            o_col = first_col + tl.arange(0, BLOCK_N)
            m_col = o_col < n_cols
            mask = m_row[:, None] & m_col[None, :]
            dy, wdy, x_hat = _load_tile(
                dy_ptr,
                sum_ptr,
                weight_ptr,
                mean,
                rstd,
                row,
                o_col,
                mask,
                m_col,
                stride_dy_row,
                stride_dy_col,
                n_cols,
            )
            dz = wdy - x_hat * mean_wdy_x_hat[:, None]
            if mean_ptr is not None:
                dz -= mean_wdy[:, None]
            dz *= rstd[:, None]
            dx = _store_tile(
                dx_ptr, dresidual_ptr, dsum_ptr, key_ptr, dz, o_row, row, o_col, first_col, mask,
                stride_dsum_row, stride_dsum_col, n_cols, threshold, scale, BLOCK_ROWS, BLOCK_N,
            )  # fmt: skip
            o_partial = pid.to(tl.int64) * n_cols + o_col
            # Triton 3.9's interpreter compares two scalars to a Python bool, which is no mask.
            m_before = m_col & (block + tl.zeros((BLOCK_N,), tl.int32) > pid)
            if dweight_ptr is not None:
                _add_partial(dweight_ptr, o_partial, dy * x_hat, m_col, m_before)
            if dbias_ptr is not None:
                _add_partial(dbias_ptr, o_partial, dy, m_col, m_before)
            if dx_bias_ptr is not None:
                _add_partial(dx_bias_ptr, o_partial, dx, m_col, m_before)


_launch, _launch_tiled = Launcher(backward_kernel), Launcher(backward_tiled_kernel)


def backward(
    dx: Tensor | None,
    dresidual: Tensor | None,
    dweight_partial: Tensor | None,
    dbias_partial: Tensor | None,
    dx_bias_partial: Tensor | None,
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dropout_key: Tensor | None,
    dropout_p: float,
    n_programs: int,
    config: RowConfig,
) -> None:
    """Launch the backward kernel; it writes dx, dresidual and the partial sums, whichever are not None.

    Shapes: dy, dsum ``[rows, cols]`` of any strides; dx, dresidual, total the same, contiguous; partial sums
    ``[n_programs, cols]`` fp32; mean (None for RMSNorm), rstd ``[rows]`` fp32. ``n_programs`` is at most the number
    of row blocks.
    """
    n_rows, n_cols = total.shape
    if n_rows == 0:
        return
    launch = _launch_tiled if config.tiled else _launch
    args = (
        dx, dresidual, dweight_partial, dbias_partial, dx_bias_partial,
        dy, dsum, total, mean, rstd, weight, dropout_key,
        *dy.stride(), *((0, 0) if dsum is None else dsum.stride()),
        n_rows, n_cols, *dropout_scalars(dropout_p),
    )  # fmt: skip
    launch(total, n_programs, args, (config.block_rows, config.block_n), config.num_warps)
