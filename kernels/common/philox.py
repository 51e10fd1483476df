"""The dropout mask: Philox4x32-10 of a key and of logical positions (see pyaccel/reference/philox.py)."""

from __future__ import annotations

import functools

import triton
import triton.language as tl


def threshold_bits(dropout_p: float) -> int:
    """``round(p * 2**32)`` as the int32 with the same bits, so that every p is passed as one type."""
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    return threshold - 2**32 if threshold >= 2**31 else threshold


def keep_scale(dropout_p: float) -> float:
    """The factor of what is kept: 1 / (1 - p); 0 for p = 1, where nothing is to remain."""
    return 0.0 if dropout_p >= 1.0 else 1.0 / (1.0 - dropout_p)


@functools.cache
def dropout_scalars(dropout_p: float) -> tuple[float, int]:
    """:func:`keep_scale` and :func:`threshold_bits`."""
    return keep_scale(dropout_p), threshold_bits(dropout_p)


@triton.jit
def keep_tile(key_ptr, o_row, first_col, stream, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which elements of a tile [ROWS, COLS] dropout keeps, whose rows are ``o_row`` [ROWS] and whose columns
    begin at ``first_col``. ``stream`` is a scalar or [ROWS].

    ``first_col`` is a multiple of 4: one Philox call gives the words of 4 neighboring columns.
    """
    seed = tl.load(key_ptr)
    c3 = tl.load(key_ptr + 1).to(tl.uint32)
    o_quad = (first_col // 4 + tl.arange(0, COLS // 4)).to(tl.uint32)
    zero = tl.zeros((ROWS, COLS // 4), dtype=tl.uint32)
    c0 = zero + o_quad[None, :]
    c1 = zero + o_row.to(tl.uint32)[:, None]
    c2 = zero + (stream + tl.zeros((ROWS,), tl.int32)).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, zero + c3)
    # [ROWS, COLS / 4] x 4 words -> [ROWS, COLS], word i of quad j at column 4 j + i
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, COLS))
    return words >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def dropout_tile(
    x, key_ptr, o_row, first_col, stream, threshold, scale, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Dropout of ``x`` [ROWS, COLS] by :func:`keep_tile`."""
    return tl.where(keep_tile(key_ptr, o_row, first_col, stream, threshold, ROWS, COLS), x * scale, 0.0)
