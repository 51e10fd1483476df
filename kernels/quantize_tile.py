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
