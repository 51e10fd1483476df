"""Matrix product of floating activations and an int8 weight: half the bytes of a 16-bit weight, for few rows.

Few rows are bound by the weight's bytes. The weight is the left operand here, converted in registers, where matrix
instructions take it from; activations, few, are the right one. Codes are exact in fp16 and bf16, their scales come in
the fp32 epilogue: ``act((x @ codes^T) * scale + bias)``. Activations have 16 bits: of fp32 ones, Triton multiplies such
tiles in TF32 on sm_100 even where it is told not to, and a weight of half the bytes gains little beside them.
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


@triton.jit
def weight_only_kernel(
    out_ptr,
    x_ptr, weight_ptr, weight_scale_ptr, bias_ptr,
    stride_x, stride_weight,
    n_rows, n_out, n_in,
    ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of the output a program. bias_ptr and ACTIVATION may be None."""
    tile_m, tile_n = tile_of_program(tl.program_id(0), n_rows, n_out, BLOCK_M, BLOCK_N, GROUP_M)
    o_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    o_k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    # What is beyond the last row reads the last one again, and isn't stored: no mask in the loop.
    x_row = tl.minimum(o_m, n_rows - 1).to(tl.int64)[:, None]
    weight_row = tl.minimum(o_n, n_out - 1).to(tl.int64)[:, None]
    x_ptrs = x_ptr + x_row * stride_x + o_k[None, :]  # [BLOCK_M, BLOCK_K]
    weight_ptrs = weight_ptr + weight_row * stride_weight + o_k[None, :]  # [BLOCK_N, BLOCK_K]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, n_in, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            m_k = (start + o_k < n_in)[None, :]
            x = tl.load(x_ptrs, mask=m_k, other=0.0)
            weight = tl.load(weight_ptrs, mask=m_k, other=0)
        acc = tl.dot(weight.to(x.dtype), tl.trans(x), acc)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    m_n = o_n < n_out
    out = tl.trans(acc) * tl.load(weight_scale_ptr + o_n, mask=m_n, other=0.0)[None, :]  # [BLOCK_M, BLOCK_N]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION is not None:
        out = activation_tile(out, ACTIVATION)
    offset = o_m.to(tl.int64)[:, None] * n_out + o_n[None, :]
    mask = (o_m < n_rows)[:, None] & m_n[None, :]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


def weight_only(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    config: MatmulConfig,
) -> None:
    """Launch the kernel; it writes ``out``.

    Shapes: x ``[rows, in]`` in bf16 or fp16 and weight int8 ``[out, in]``, both ``int8_matmul.aligned``; weight_scale
    fp32 and bias ``[out]`` contiguous; out ``[rows, out]`` contiguous.
    """
    if out.numel() == 0:
        return
    arguments = weight_only_arguments(out, x, weight, weight_scale, bias, activation, config)
    grid = (triton.cdiv(x.shape[0], config.block_m) * triton.cdiv(weight.shape[0], config.block_n),)
    with device_guard(x):
        weight_only_kernel[grid](**arguments, **config.launch_options)


def weight_only_arguments(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    config: MatmulConfig,
) -> dict[str, Any]:
    """The kernel's arguments by name."""
    return {
        "out_ptr": out,
        "x_ptr": x,
        "weight_ptr": weight,
        "weight_scale_ptr": weight_scale,
        "bias_ptr": bias,
        "stride_x": x.stride(0),
        "stride_weight": weight.stride(0),
        "n_rows": x.shape[0],
        "n_out": weight.shape[0],
        "n_in": x.shape[1],
        "ACTIVATION": activation,
        "EVEN_K": x.shape[1] % config.block_k == 0,
        **config.blocks,
    }
