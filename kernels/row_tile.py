"""Tiles of matrices as row kernels read them."""

from __future__ import annotations

import triton
import triton.language as tl


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
