"""A linear layer with its activation in the product's epilogue, on request writing the pre-activation too.

The sum of products, the bias and the activation are fp32, and the output is rounded once: its activation is that of
the fp32 pre-activation. What a backward pass has to go by is the pre-activation rounded to x's dtype, so that
derivatives are taken there, as they are behind a separate activation. Programs are numbered in groups of rows of
tiles, which share the weight's tiles in the L2 cache. No atomics and no split sums: two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pyaccel.kernels.common.activations import activation_tile
from pyaccel.kernels.common.configs import MatmulConfig
from pyaccel.kernels.common.device import device_guard
from pyaccel.kernels.common.tiles import tile_of_program

# Columns of a tile that an epilogue holds at a time.
WHOLE = tl.constexpr(128)


@triton.jit
def _store_tile(
    out_ptr, pre_ptr, bias_ptr, acc, o_m, first_n, n_rows, n_out,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of the columns from first_n on: add the bias, store that if it is wanted, and its activation."""
    o_n = first_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_n = o_n < n_out
    mask = (o_m < n_rows)[:, None] & m_n[None, :]
    offset = o_m.to(tl.int64)[:, None] * n_out + o_n[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if pre_ptr is not None:
        tl.store(pre_ptr + offset, acc.to(pre_ptr.dtype.element_ty), mask=mask)
    if ACTIVATION is not None:
        acc = activation_tile(acc, ACTIVATION)
    tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def forward_kernel(
    out_ptr, pre_ptr,
    x_ptr, weight_ptr, bias_ptr,
    stride_x_row, stride_x_col, stride_weight_row, stride_weight_col,
    n_rows, n_out, n_in,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of the output a program. pre_ptr, bias_ptr and ACTIVATION may be None."""
    tile_m, tile_n = tile_of_program(tl.program_id(0), n_rows, n_out, BLOCK_M, BLOCK_N, GROUP_M)
    o_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    o_k = tl.arange(0, BLOCK_K).to(tl.int64)  # [BLOCK_K]
    # What is beyond the last row reads the last one again, and isn't stored: no mask in the loop.
    x_row = tl.minimum(o_m, n_rows - 1).to(tl.int64)[:, None]
    weight_row = tl.minimum(o_n, n_out - 1).to(tl.int64)[:, None]
    x_ptrs = x_ptr + x_row * stride_x_row + o_k[None, :] * stride_x_col  # [BLOCK_M, BLOCK_K]
    weight_ptrs = weight_ptr + weight_row * stride_weight_row + o_k[None, :] * stride_weight_col
    block_k = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n_in, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            m_k = (o_k < n_in - start)[None, :]
            x = tl.load(x_ptrs, mask=m_k, other=0.0)
            weight = tl.load(weight_ptrs, mask=m_k, other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision=PRECISION)
        x_ptrs += block_k * stride_x_col
        weight_ptrs += block_k * stride_weight_col

    if BLOCK_N <= WHOLE:
        _store_tile(
            out_ptr, pre_ptr, bias_ptr, acc, o_m, tile_n * BLOCK_N, n_rows, n_out, ACTIVATION, BLOCK_N
        )
    else:  # by halves, for which there are registers
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        first_n = tile_n * BLOCK_N
        _store_tile(out_ptr, pre_ptr, bias_ptr, left, o_m, first_n, n_rows, n_out, ACTIVATION, HALF)
        _store_tile(out_ptr, pre_ptr, bias_ptr, right, o_m, first_n + HALF, n_rows, n_out, ACTIVATION, HALF)


def forward(
    out: Tensor,
    pre: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    config: MatmulConfig,
    *,
    allow_tf32: bool = False,
) -> None:
    """Launch the kernel; it writes ``out`` and, if it isn't None, the pre-activation ``pre``.

    Shapes: x ``[rows, in]`` and weight ``[out, in]`` of one dtype and any strides; out and pre ``[rows, out]``
    contiguous; bias ``[out]`` contiguous. ``allow_tf32``: products of fp32 may be rounded to TF32.
    """
    if out.numel() == 0:
        return
    n_rows, n_out = out.shape
    grid = (triton.cdiv(n_rows, config.block_m) * triton.cdiv(n_out, config.block_n),)
    arguments = forward_arguments(out, pre, x, weight, bias, activation, config, allow_tf32=allow_tf32)
    with device_guard(x):
        forward_kernel[grid](**arguments, **config.launch_options)


def forward_arguments(
    out: Tensor,
    pre: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    config: MatmulConfig,
    *,
    allow_tf32: bool,
) -> dict[str, Any]:
    """The kernel's arguments by name."""
    (n_rows, n_in), n_out = x.shape, weight.shape[0]
    return {
        "out_ptr": out,
        "pre_ptr": pre,
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "stride_x_row": x.stride(0),
        "stride_x_col": x.stride(1),
        "stride_weight_row": weight.stride(0),
        "stride_weight_col": weight.stride(1),
        "n_rows": n_rows,
        "n_out": n_out,
        "n_in": n_in,
        "ACTIVATION": activation,
        "PRECISION": "tf32" if allow_tf32 else "ieee",
        "EVEN_K": n_in % config.block_k == 0,
        **config.blocks,
    }
