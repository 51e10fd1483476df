"""Small kernels with known machine code, for the tests of the harness itself."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_kernel(out_ptr, x_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=mask), mask=mask)


@triton.jit
def dot_kernel(out_ptr, a_ptr, b_ptr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    o_m = tl.arange(0, BLOCK)[:, None]
    o_n = tl.arange(0, BLOCK)[None, :]
    a = tl.load(a_ptr + o_m * BLOCK + o_n)  # [BLOCK, BLOCK]
    b = tl.load(b_ptr + o_m + o_n * BLOCK)  # [BLOCK, BLOCK], column-major, as int8 matrix units want it
    tl.store(out_ptr + o_m * BLOCK + o_n, tl.dot(a, b, out_dtype=ACC))


@triton.jit
def refused_kernel(out_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK > 1000, "this kernel never compiles")
    tl.store(out_ptr, 1.0)
