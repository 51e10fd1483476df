"""Word + position + token type lookup, LayerNorm and dropout, backward: one pass over the rows.

The sum that was normalized is looked up again, not saved. Gives the gradient at that sum, which
:mod:`pyaccel.kernels.common.segment_sum` adds up for each table, and fp32 partial sums of the weight and bias
gradients, one row a program of a persistent grid. No atomics: two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pyaccel.kernels.common.configs import RowConfig
from pyaccel.kernels.common.device import device_guard
from pyaccel.kernels.common.philox import dropout_tile, keep_scale, threshold_bits
from pyaccel.kernels.embeddings.forward import Lookup, load_ids, load_positions, sum_tile
from pyaccel.kernels.layernorm.backward import _add_partial


@triton.jit
def _gradient_tile(
    dy_ptr, weight_ptr, key_ptr, o_row, o_col, first_col, mask, m_col, stride_dy_row, stride_dy_col,
    threshold, scale, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient before the dropout, and it times the weight, [rows, columns] each, in fp32; 0 where masked."""
    offset = o_row[:, None] * stride_dy_row + o_col.to(tl.int64)[None, :] * stride_dy_col
    dy = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if key_ptr is not None:
        dy = dropout_tile(
            dy, key_ptr, o_row, first_col, tl.full((), 0, tl.int32), threshold, scale, BLOCK_ROWS, BLOCK_N
        )
    wdy = dy
    if weight_ptr is not None:
        wdy = dy * tl.load(weight_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    return dy, wdy


@triton.jit(do_not_specialize=["threshold"])
def backward_kernel(
    dz_ptr, dweight_ptr, dbias_ptr,
    dy_ptr, mean_ptr, rstd_ptr, input_ids_ptr, position_ids_ptr, token_type_ids_ptr,
    word_ptr, position_ptr, type_ptr, weight_ptr, key_ptr,
    stride_dy_row, stride_dy_col,
    stride_word_row, stride_word_col, stride_position_row, stride_position_col, stride_type_row, stride_type_col,
    n_rows, n_cols, period, n_words, n_positions, n_types, scale, threshold,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whole rows in registers. dweight, dbias: fp32 partial sums [programs, n_cols]."""
    pid = tl.program_id(0)
    o_col = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_col = o_col < n_cols
    # Summed over BLOCK_ROWS once, at the end: no cross-thread sum inside the loop.
    b_dweight = tl.zeros((BLOCK_ROWS, BLOCK_N), dtype=tl.float32)
    b_dbias = tl.zeros((BLOCK_ROWS, BLOCK_N), dtype=tl.float32)
    for block in range(pid, tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0)):
        o_row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)  # [BLOCK_ROWS]
        m_row = o_row < n_rows
        mask = m_row[:, None] & m_col[None, :]
        mean = tl.load(mean_ptr + o_row, mask=m_row, other=0.0)
        rstd = tl.load(rstd_ptr + o_row, mask=m_row, other=0.0)
        word, _ = load_ids(input_ids_ptr, o_row, m_row, n_words)
        position, _ = load_positions(position_ids_ptr, o_row, m_row, period, n_positions)
        token_type, _ = load_ids(token_type_ids_ptr, o_row, m_row, n_types)
        z = sum_tile(
            word_ptr, position_ptr, type_ptr, word, position, token_type, o_col, mask,
            stride_word_row, stride_word_col, stride_position_row, stride_position_col,
            stride_type_row, stride_type_col,
        )  # fmt: skip
        x_hat = (z - mean[:, None]) * rstd[:, None]  # [BLOCK_ROWS, BLOCK_N]
        dy, wdy = _gradient_tile(
            dy_ptr, weight_ptr, key_ptr, o_row, o_col, 0, mask, m_col, stride_dy_row, stride_dy_col,
            threshold, scale, BLOCK_ROWS, BLOCK_N,
        )  # fmt: skip
        if dweight_ptr is not None:
            b_dweight += dy * x_hat
        if dbias_ptr is not None:
            b_dbias += dy
        if dz_ptr is not None:
            mean_wdy = tl.sum(wdy, axis=1) / n_cols  # [BLOCK_ROWS]
            mean_wdy_x_hat = tl.sum(wdy * x_hat, axis=1) / n_cols
            dz = (wdy - mean_wdy[:, None] - x_hat * mean_wdy_x_hat[:, None]) * rstd[:, None]
            offset = o_row[:, None] * n_cols + o_col[None, :]
            tl.store(dz_ptr + offset, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    o_partial = pid.to(tl.int64) * n_cols + o_col
    if dweight_ptr is not None:
        tl.store(dweight_ptr + o_partial, tl.sum(b_dweight, axis=0), mask=m_col)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + o_partial, tl.sum(b_dbias, axis=0), mask=m_col)


@triton.jit(do_not_specialize=["threshold"])
def backward_tiled_kernel(
    dz_ptr, dweight_ptr, dbias_ptr,
    dy_ptr, mean_ptr, rstd_ptr, input_ids_ptr, position_ids_ptr, token_type_ids_ptr,
    word_ptr, position_ptr, type_ptr, weight_ptr, key_ptr,
    stride_dy_row, stride_dy_col,
    stride_word_row, stride_word_col, stride_position_row, stride_position_col, stride_type_row, stride_type_col,
    n_rows, n_cols, period, n_words, n_positions, n_types, scale, threshold,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Long rows, walked twice in tiles of BLOCK_N columns: once for the row sums, once for the gradients."""
    pid = tl.program_id(0)
    for block in range(pid, tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0)):
        o_row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)  # [BLOCK_ROWS]
        m_row = o_row < n_rows
        mean = tl.load(mean_ptr + o_row, mask=m_row, other=0.0)
        rstd = tl.load(rstd_ptr + o_row, mask=m_row, other=0.0)
        word, _ = load_ids(input_ids_ptr, o_row, m_row, n_words)
        position, _ = load_positions(position_ids_ptr, o_row, m_row, period, n_positions)
        token_type, _ = load_ids(token_type_ids_ptr, o_row, m_row, n_types)
        b_wdy = tl.zeros((BLOCK_ROWS, BLOCK_N), dtype=tl.float32)
        b_wdy_x_hat = tl.zeros((BLOCK_ROWS, BLOCK_N), dtype=tl.float32)
        mean_wdy = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        mean_wdy_x_hat = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        for walk in tl.static_range(2):
            for first_col in range(0, n_cols, BLOCK_N):
                o_col = first_col + tl.arange(0, BLOCK_N)  # [BLOCK_N]
                m_col = o_col < n_cols
                mask = m_row[:, None] & m_col[None, :]
                z = sum_tile(
                    word_ptr, position_ptr, type_ptr, word, position, token_type, o_col, mask,
                    stride_word_row, stride_word_col, stride_position_row, stride_position_col,
                    stride_type_row, stride_type_col,
                )  # fmt: skip
                x_hat = (z - mean[:, None]) * rstd[:, None]  # [BLOCK_ROWS, BLOCK_N]
                dy, wdy = _gradient_tile(
                    dy_ptr, weight_ptr, key_ptr, o_row, o_col, first_col, mask, m_col,
                    stride_dy_row, stride_dy_col, threshold, scale, BLOCK_ROWS, BLOCK_N,
                )  # fmt: skip
                if walk == 0:
                    b_wdy += wdy
                    b_wdy_x_hat += wdy * x_hat
                else:
                    if dz_ptr is not None:
                        dz = (wdy - mean_wdy[:, None] - x_hat * mean_wdy_x_hat[:, None]) * rstd[:, None]
                        offset = o_row[:, None] * n_cols + o_col[None, :]
                        tl.store(dz_ptr + offset, dz.to(dz_ptr.dtype.element_ty), mask=mask)
                    o_partial = pid.to(tl.int64) * n_cols + o_col
                    m_before = m_col & (block + tl.zeros((BLOCK_N,), tl.int32) > pid)
                    if dweight_ptr is not None:
                        _add_partial(dweight_ptr, o_partial, dy * x_hat, m_col, m_before)
                    if dbias_ptr is not None:
                        _add_partial(dbias_ptr, o_partial, dy, m_col, m_before)
            if walk == 0:
                mean_wdy = tl.sum(b_wdy, axis=1) / n_cols  # [BLOCK_ROWS]
                mean_wdy_x_hat = tl.sum(b_wdy_x_hat, axis=1) / n_cols


def backward(
    dz: Tensor | None,
    dweight_partial: Tensor | None,
    dbias_partial: Tensor | None,
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    lookup: Lookup,
    weight: Tensor | None,
    dropout_key: Tensor | None,
    dropout_p: float,
    n_programs: int,
    config: RowConfig,
) -> None:
    """Launch the backward kernel; it writes dz and the partial sums, whichever are not None.

    Shapes: dy ``[tokens, hidden]`` of any strides; dz the same, contiguous; partial sums ``[n_programs, hidden]`` fp32;
    mean, rstd ``[tokens]`` fp32. ``n_programs`` is at most the number of row blocks.
    """
    if dy.shape[0] == 0:
        return
    kernel = backward_tiled_kernel if config.tiled else backward_kernel
    arguments = backward_arguments(
        dz, dweight_partial, dbias_partial, dy, mean, rstd, lookup, weight, dropout_key, dropout_p, config
    )
    with device_guard(dy):
        kernel[(n_programs,)](**arguments, num_warps=config.num_warps)


def backward_arguments(
    dz: Tensor | None,
    dweight_partial: Tensor | None,
    dbias_partial: Tensor | None,
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    lookup: Lookup,
    weight: Tensor | None,
    dropout_key: Tensor | None,
    dropout_p: float,
    config: RowConfig,
) -> dict[str, Any]:
    """The kernels' arguments by name."""
    return {
        "dz_ptr": dz,
        "dweight_ptr": dweight_partial,
        "dbias_ptr": dbias_partial,
        "dy_ptr": dy,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        **lookup.arguments(),
        "weight_ptr": weight,
        "key_ptr": dropout_key,
        "stride_dy_row": dy.stride(0),
        "stride_dy_col": dy.stride(1),
        "scale": keep_scale(dropout_p),
        "threshold": threshold_bits(dropout_p),
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_N": config.block_n,
    }
