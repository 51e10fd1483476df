"""Tiles of matrices: loaded, summed, made in an order that the L2 cache likes, and quantized by row.

int8 codes have the bits of pyaccel/reference/int8.py: amax / 127, rounding half to even.
"""

from __future__ import annotations

import triton
import triton.language as tl

INT8_MAX = tl.constexpr(127.0)
# 1.5 * 2**23: beside it fp32 has no fractions left, so adding it rounds, half to even, and taking it off is exact.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def load_tile(ptr, row, o_col, mask, stride_row, stride_col):
    """A tile [rows, columns] of a matrix of any strides, in fp32; 0 where it is masked."""
    offset = row * stride_row + o_col.to(tl.int64)[None, :] * stride_col
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def row_mean(x, mask, n_cols):
    """Means [rows] of the rows of a tile that is 0 where masked.

    Corrected once by the mean of what is left: of equal elements the mean is that element to the last bit, which
    LayerNorm may divide by the root of an eps of 1e-12.
    """
    mean = tl.sum(x, axis=1) / n_cols
    return mean + tl.sum(tl.where(mask, x - mean[:, None], 0.0), axis=1) / n_cols


@triton.jit
def tile_of_program(pid, n_rows, n_out, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile (row, column) of program ``pid``: down the GROUP_M tiles of a group first, then along the columns."""
    blocks_m, blocks_n = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_out, BLOCK_N)
    per_group = GROUP_M * blocks_n
    first_m = pid // per_group * GROUP_M
    group_m = tl.minimum(blocks_m - first_m, GROUP_M)  # the last group may have fewer
    in_group = pid % per_group
    return first_m + in_group % group_m, in_group // group_m


@triton.jit
def quantize_rows(x, mask):
    """int8 codes [rows, columns] and fp32 scales [rows] of a tile of whole rows in fp32.

    What mask leaves out counts for nothing. A row with NaN or inf has a NaN or inf scale; zeros have scale 1.
    """
    x = tl.where(mask, x, 0.0)
    amax = tl.max(tl.abs(x), axis=1)  # [rows]
    has_nan = _has_nan(x)
    scale = tl.where(has_nan, float("nan"), tl.math.div_rn(amax, tl.zeros_like(amax) + INT8_MAX))
    scale = tl.where(scale == 0.0, 1.0, scale)
    return encode(x, scale[:, None]), scale


@triton.jit
def encode(x, scale):
    """int8 codes of fp32 values for a scale that is broadcast to them; NaN's is 0."""
    codes = tl.math.div_rn(x, scale + tl.zeros_like(x))
    codes = tl.minimum(tl.maximum(codes, -INT8_MAX), INT8_MAX)
    codes = tl.where(codes == codes, codes, 0.0)
    return ((codes + ROUND) - ROUND).to(tl.int8)


@triton.jit
def middle_of_rows(x, mask):
    """``max / 2 + min / 2`` [rows] of a tile of whole rows in fp32; NaN where a row has NaN."""
    high = tl.max(tl.where(mask, x, float("-inf")), axis=1)  # [rows]
    low = tl.min(tl.where(mask, x, float("inf")), axis=1)
    # Halved by themselves, as the definition does: the sum of the two may be too large for fp32.
    has_nan = _has_nan(tl.where(mask, x, 0.0))
    return tl.where(has_nan, float("nan"), high * 0.5 + low * 0.5 + 0.0)  # never -0


@triton.jit
def _has_nan(x):
    """Whether a row [rows, columns] has NaN, which a maximum may pass over."""
    return tl.max((x != x).to(tl.int32), axis=1) > 0
