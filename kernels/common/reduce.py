"""Sum the rows of fp32 partial sums: the second, deterministic half of every weight and bias gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyaccel.kernels.common.configs import ColumnSumConfig
from pyaccel.kernels.common.launch import Launcher


@triton.jit
def _sum_columns(out_ptr, partial_ptr, n_partials, n_cols, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    o_col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_col = o_col < n_cols
    total = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    for first in range(0, n_partials, BLOCK_P):
        o_partial = first + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        mask = (o_partial < n_partials)[:, None] & m_col[None, :]
        offset = o_partial.to(tl.int64)[:, None] * n_cols + o_col[None, :]
        total += tl.load(partial_ptr + offset, mask=mask, other=0.0)
    tl.store(out_ptr + o_col, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=m_col)


@triton.jit
def column_sum_kernel(
    out0_ptr, out1_ptr, out2_ptr,
    partial0_ptr, partial1_ptr, partial2_ptr,
    n_partials, n_cols,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Up to three sums in one launch; an output that is None isn't wanted."""
    if out0_ptr is not None:
        _sum_columns(out0_ptr, partial0_ptr, n_partials, n_cols, BLOCK_P, BLOCK_N)
    if out1_ptr is not None:
        _sum_columns(out1_ptr, partial1_ptr, n_partials, n_cols, BLOCK_P, BLOCK_N)
    if out2_ptr is not None:
        _sum_columns(out2_ptr, partial2_ptr, n_partials, n_cols, BLOCK_P, BLOCK_N)


_launch = Launcher(column_sum_kernel)


def column_sum(
    outs: tuple[Tensor | None, ...],
    partials: tuple[Tensor | None, ...],
    config: ColumnSumConfig,
) -> None:
    """Write the column sums of each of three ``partials`` (fp32 ``[n_partials, cols]``) to ``outs`` (``[cols]``, any
    floating dtype). All partials have one shape; with ``n_partials`` 0 the sums are 0."""
    given = [p for p in partials if p is not None]
    if not given:
        return
    n_partials, n_cols = given[0].shape
    args = (*outs, *partials, n_partials, n_cols)
    _launch(given[0], -(-n_cols // config.block_n), args, (config.block_p, config.block_n), config.num_warps)
