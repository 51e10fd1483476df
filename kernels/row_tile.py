"""Tiles of matrices as row kernels read them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(ptr, row, o_col, mask, stride_row, stride_col):
    """A tile [rows, columns] of a matrix of any strides, in fp32; 0 where it is masked."""
    offset = row * stride_row + o_col.to(tl.int64)[None, :] * stride_col
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)
