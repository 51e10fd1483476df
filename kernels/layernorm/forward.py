"""Bias + dropout + residual + LayerNorm (or RMSNorm), forward: one read of each input, one write of each output.

Method: LayerNorm (arXiv:1607.06450) with two-pass statistics in fp32 over a row held in registers, RMSNorm
(arXiv:1910.07467). int8 codes of the output, for the matrix product that comes next, are made while it is at hand.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyaccel.kernels.common.configs import RowConfig
from pyaccel.kernels.common.launch import Launcher
from pyaccel.kernels.common.philox import dropout_scalars, dropout_tile
from pyaccel.kernels.common.tiles import quantize_rows, row_mean


@triton.jit(do_not_specialize=["threshold"])
def forward_kernel(
    out_ptr, sum_ptr, codes_ptr, codes_scale_ptr, mean_ptr, rstd_ptr,
    x_ptr, residual_ptr, weight_ptr, bias_ptr, x_bias_ptr, key_ptr,
    stride_x_row, stride_x_col, stride_residual_row, stride_residual_col,
    n_rows, n_cols, eps, scale, threshold,
    RMS_NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A pointer that is None stands for an input that isn't there or an output that isn't wanted."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    o_col = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_row = o_row < n_rows
    m_col = o_col < n_cols
    mask = m_row[:, None] & m_col[None, :]
    row, col = o_row[:, None], o_col[None, :]
    x = tl.load(x_ptr + row * stride_x_row + col.to(tl.int64) * stride_x_col, mask=mask, other=0.0).to(
        tl.float32
    )
    if x_bias_ptr is not None:
        x += tl.load(x_bias_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    if key_ptr is not None:
        x = dropout_tile(
            x, key_ptr, o_row, 0, tl.full((), 0, tl.int32), threshold, scale, BLOCK_ROWS, BLOCK_N
        )
    if residual_ptr is not None:
        offset = row * stride_residual_row + col.to(tl.int64) * stride_residual_col
        x += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if residual_ptr.dtype.element_ty == x_ptr.dtype.element_ty:
            x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    else:
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    # Rounded to the sum's dtype before its statistics are taken: they belong to what backward reads.
    if sum_ptr is not None:
        tl.store(sum_ptr + row * n_cols + col, x.to(sum_ptr.dtype.element_ty), mask=mask)

    if RMS_NORM:
        centred = tl.where(mask, x, 0.0)
    else:
        mean = row_mean(x, mask, n_cols)  # [BLOCK_ROWS]
        if mean_ptr is not None:
            tl.store(mean_ptr + o_row, mean, mask=m_row)
        centred = tl.where(mask, x - mean[:, None], 0.0)  # [BLOCK_ROWS, BLOCK_N]
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / n_cols + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + o_row, rstd, mask=m_row)
    out = centred * rstd[:, None]
    if weight_ptr is not None:
        out *= tl.load(weight_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    if out_ptr is not None:
        tl.store(out_ptr + row * n_cols + col, out.to(out_ptr.dtype.element_ty), mask=mask)
    if codes_ptr is not None:
        codes, codes_scale = quantize_rows(out, mask)
        tl.store(codes_ptr + row * n_cols + col, codes, mask=mask)
        tl.store(codes_scale_ptr + o_row, codes_scale, mask=m_row)


_launch = Launcher(forward_kernel)


def forward(
    out: Tensor | None,
    total: Tensor | None,
    codes: Tensor | None,
    codes_scale: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    dropout_key: Tensor | None,
    eps: float,
    dropout_p: float,
    rms_norm: bool,
    config: RowConfig,
) -> None:
    """Launch the forward kernel; it writes what isn't None (RMSNorm has no mean).

    Shapes: x, residual ``[rows, cols]`` of any strides; out, total (the sum), codes (int8, of the fp32 output) the
    same, contiguous; weight, bias, x_bias ``[cols]`` contiguous; codes_scale, mean, rstd ``[rows]`` fp32. Statistics
    are those of the sum rounded to its dtype, the promoted one of x and residual.
    """
    n_rows, n_cols = x.shape
    if n_rows == 0:
        return
    args = (
        out, total, codes, codes_scale, mean, rstd,
        x, residual, weight, bias, x_bias, dropout_key,
        *x.stride(), *((0, 0) if residual is None else residual.stride()),
        n_rows, n_cols, eps, *dropout_scalars(dropout_p),
    )  # fmt: skip
    constants = (rms_norm, config.block_rows, config.block_n)
    _launch(x, -(-n_rows // config.block_rows), args, constants, config.num_warps)
