"""What follows an int8 product: scales, bias, activation, residual, in fp32; and the kernel that finishes whole rows.

``act((sums * a_scale + a_offset * b_sum) * b_scale + bias) + residual``, the steps and their order of
pyaccel/reference/int8.py. A tile's epilogue runs where its sums are. The kernel here takes sums from memory:
those of a split inner dimension, which it adds up first, and those of rows whose result is quantized again, for which
a program must see a whole row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pyaccel.kernels.common.activations import activation_tile
from pyaccel.kernels.common.configs import RowConfig
from pyaccel.kernels.common.device import device_guard
from pyaccel.kernels.common.tiles import quantize_rows


@triton.jit
def epilogue_tile(sums, o_m, o_n, n_rows, n_out, terms, strides, ACTIVATION: tl.constexpr):
    """The fp32 result of int32 sums [rows, columns] that stand at ``o_m`` and ``o_n``.

    terms: pointers (a_scale, a_offset, b_scale, b_sum, bias, residual), all but the scales may be None; strides: those
    of a_scale and b_scale (0 for a scalar), the row's and the column's of residual.
    """
    a_scale_ptr, a_offset_ptr, b_scale_ptr, b_sum_ptr, bias_ptr, residual_ptr = terms
    m_m, m_n = o_m < n_rows, o_n < n_out
    x = sums.to(tl.float32) * tl.load(a_scale_ptr + o_m * strides[0], mask=m_m, other=0.0)[:, None]
    if a_offset_ptr is not None:
        offset = tl.load(a_offset_ptr + o_m, mask=m_m, other=0.0)[:, None]
        x += offset * tl.load(b_sum_ptr + o_n, mask=m_n, other=0).to(tl.float32)[None, :]
    x *= tl.load(b_scale_ptr + o_n * strides[1], mask=m_n, other=0.0)[None, :]
    if bias_ptr is not None:
        x += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION is not None:
        x = activation_tile(x, ACTIVATION)
    if residual_ptr is not None:
        offset_residual = o_m.to(tl.int64)[:, None] * strides[2] + o_n.to(tl.int64)[None, :] * strides[3]
        x += tl.load(residual_ptr + offset_residual, mask=m_m[:, None] & m_n[None, :], other=0.0).to(
            tl.float32
        )
    return x


@triton.jit
def finish_kernel(
    out_ptr, out_scale_ptr,
    sums_ptr, a_scale_ptr, a_offset_ptr, b_scale_ptr, b_sum_ptr, bias_ptr, residual_ptr,
    stride_a_scale, stride_b_scale, stride_residual_row, stride_residual_col,
    n_rows, n_out, n_splits,
    ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sums: int32 [n_splits, n_rows, n_out]. With out_scale_ptr a block holds whole rows, and out is int8 codes."""
    blocks_n = tl.cdiv(n_out, BLOCK_N)
    pid = tl.program_id(0)
    o_m = pid // blocks_n * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    o_n = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_m = o_m < n_rows
    mask = m_m[:, None] & (o_n < n_out)[None, :]
    offset = o_m.to(tl.int64)[:, None] * n_out + o_n[None, :]  # [BLOCK_ROWS, BLOCK_N]
    sums = tl.load(sums_ptr + offset, mask=mask, other=0)
    for _ in range(1, n_splits):
        sums_ptr += n_rows.to(tl.int64) * n_out
        sums += tl.load(sums_ptr + offset, mask=mask, other=0)
    terms = (a_scale_ptr, a_offset_ptr, b_scale_ptr, b_sum_ptr, bias_ptr, residual_ptr)
    strides = (stride_a_scale, stride_b_scale, stride_residual_row, stride_residual_col)
    x = epilogue_tile(sums, o_m, o_n, n_rows, n_out, terms, strides, ACTIVATION)
    if out_scale_ptr is not None:
        x, scale = quantize_rows(x, mask)
        tl.store(out_scale_ptr + o_m, scale, mask=m_m)
    tl.store(out_ptr + offset, x.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Epilogue:
    """The terms of one call's epilogue.

    Attributes:
        a_scale: fp32 ``[rows]`` or one number; b_scale: fp32 ``[out]`` or one number; both contiguous.
        a_offset: fp32 ``[rows]``, beside which b_sum is int32 ``[out]``, the sums of b's rows; or both None.
        bias: ``[out]`` contiguous, residual: ``[rows, out]`` of any strides, any floating dtype; or None.
        activation: a name of :mod:`pyaccel.kernels.common.activations`, or None.
    """

    a_scale: Tensor
    b_scale: Tensor
    a_offset: Tensor | None = None
    b_sum: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    activation: str | None = None

    def arguments(self) -> dict[str, Any]:
        """The kernels' arguments by name."""
        residual_row, residual_col = (0, 0) if self.residual is None else self.residual.stride()
        return {
            "a_scale_ptr": self.a_scale,
            "a_offset_ptr": self.a_offset,
            "b_scale_ptr": self.b_scale,
            "b_sum_ptr": self.b_sum,
            "bias_ptr": self.bias,
            "residual_ptr": self.residual,
            "stride_a_scale": self.a_scale.dim(),
            "stride_b_scale": self.b_scale.dim(),
            "stride_residual_row": residual_row,
            "stride_residual_col": residual_col,
            "ACTIVATION": self.activation,
        }


def finish(
    out: Tensor, out_scale: Tensor | None, sums: Tensor, epilogue: Epilogue, config: RowConfig
) -> None:
    """Launch the kernel; it writes ``out`` or, with ``out_scale``, int8 codes and their scales.

    Shapes: sums int32 ``[splits, rows, out]`` and out ``[rows, out]`` contiguous, out_scale fp32 ``[rows]``, with rows
    of at most ``config.block_n`` elements.
    """
    n_splits, n_rows, n_out = sums.shape
    if out.numel() == 0:
        return
    grid = (triton.cdiv(n_rows, config.block_rows) * triton.cdiv(n_out, config.block_n),)
    with device_guard(out):
        finish_kernel[grid](
            out_ptr=out, out_scale_ptr=out_scale, sums_ptr=sums, **epilogue.arguments(),
            n_rows=n_rows, n_out=n_out, n_splits=n_splits,
            BLOCK_ROWS=config.block_rows, BLOCK_N=config.block_n, num_warps=config.num_warps,
            enable_fp_fusion=False,
        )  # fmt: skip
