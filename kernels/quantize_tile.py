"""Symmetric int8 codes of rows, in the bits of pyaccel/reference/quantize.py: amax / 127, rounding half to even."""

from __future__ import annotations

import triton
import triton.language as tl

INT8_MAX = tl.constexpr(127.0)
# 1.5 * 2**23: beside it fp32 has no fractions left, so adding it rounds, half to even, and taking it off is exact.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def quantize_rows(x, mask):
    """int8 codes [rows, columns] and fp32 scales [rows] of a tile of whole rows in fp32.

    What mask leaves out counts for nothing. A row with NaN or inf has a NaN or inf scale; zeros have scale 1.
    """
    x = tl.where(mask, x, 0.0)
    amax = tl.max(tl.abs(x), axis=1)  # [rows]
    has_nan = tl.max((x != x).to(tl.int32), axis=1) > 0  # a maximum may pass over NaN
    scale = tl.where(has_nan, float("nan"), tl.math.div_rn(amax, tl.zeros_like(amax) + INT8_MAX))
    scale = tl.where(scale == 0.0, 1.0, scale)
    codes = tl.math.div_rn(x, scale[:, None] + tl.zeros_like(x))
    codes = tl.minimum(tl.maximum(codes, -INT8_MAX), INT8_MAX)
    codes = tl.where(codes == codes, codes, 0.0)
    return ((codes + ROUND) - ROUND).to(tl.int8), scale
