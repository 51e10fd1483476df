"""int8 matrix product, with scales, bias, activation and residual in its epilogue.

Sums are int32 and exact: neither tiles nor a split of the inner dimension change a bit of them. All that follows is
fp32, its products never fused with its sums, and rounded once (int8_epilogue.py): a row has the same bits whatever it
is batched with. Both operands are read along the inner dimension, which is what the matrix instructions of int8 want: a
is rows of activations, b a linear layer's weight as it is. Their rows begin at multiples of 16 bytes and are such
multiples long, so that every load is of 128 bits: zeros at their ends change no sum. Programs are numbered in groups of
rows of tiles, which share the weight's tiles in the L2 cache. No atomics.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pyaccel.kernels.common.device import device_guard, device_info
from pyaccel.kernels.common.tiles import tile_of_program
from pyaccel.kernels.common.tma import launch
from pyaccel.kernels.int8.config import Int8MatmulConfig
from pyaccel.kernels.int8.epilogue import Epilogue, epilogue_tile


@triton.jit
def _store_tile(
    out_ptr, sums, o_m, first_n, n_rows, n_out, terms, strides,
    ACTIVATION: tl.constexpr, EPILOGUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SUBTILE: tl.constexpr,
):  # fmt: skip
    """Finish and store the columns from first_n on, at most SUBTILE at a time: for so many there are registers."""
    if BLOCK_N > SUBTILE:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(sums, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        _store_tile(
            out_ptr, left, o_m, first_n, n_rows, n_out, terms, strides,
            ACTIVATION, EPILOGUE, BLOCK_M, HALF, SUBTILE,
        )  # fmt: skip
        _store_tile(
            out_ptr, right, o_m, first_n + HALF, n_rows, n_out, terms, strides,
            ACTIVATION, EPILOGUE, BLOCK_M, HALF, SUBTILE,
        )  # fmt: skip
    else:
        o_n = first_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        x = sums
        if EPILOGUE:
            x = epilogue_tile(sums, o_m, o_n, n_rows, n_out, terms, strides, ACTIVATION)
        offset = o_m.to(tl.int64)[:, None] * n_out + o_n[None, :]
        mask = (o_m < n_rows)[:, None] & (o_n < n_out)[None, :]
        tl.store(out_ptr + offset, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def matmul_kernel(
    out_ptr,
    a_ptr, b_ptr, a_scale_ptr, a_offset_ptr, b_scale_ptr, b_sum_ptr, bias_ptr, residual_ptr,
    stride_a, stride_b,
    stride_a_scale, stride_b_scale, stride_residual_row, stride_residual_col,
    n_rows, n_out, n_in,
    ACTIVATION: tl.constexpr, EPILOGUE: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SUBTILE: tl.constexpr,
):  # fmt: skip
    """Tiles [BLOCK_M, BLOCK_N] of the output, one a program or, of a grid of fewer programs, several in turn.

    The grid's second axis splits the inner dimension; then, and wherever EPILOGUE is False, out is int32 sums
    [splits, n_rows, n_out]. With TMA, tiles come through Hopper's copy engine, and the next tile's loads begin while
    this one's epilogue runs.
    """
    n_tiles = tl.cdiv(n_rows, BLOCK_M) * tl.cdiv(n_out, BLOCK_N)
    split = tl.program_id(1)
    per_split = tl.cdiv(tl.cdiv(n_in, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    first_k = split * per_split
    last_k = tl.minimum(first_k + per_split, n_in)
    out_ptr += split.to(tl.int64) * n_rows * n_out
    terms = (a_scale_ptr, a_offset_ptr, b_scale_ptr, b_sum_ptr, bias_ptr, residual_ptr)
    strides = (stride_a_scale, stride_b_scale, stride_residual_row, stride_residual_col)
    if TMA:  # what is outside comes as zeros
        a_tensor = tl.make_tensor_descriptor(a_ptr, [n_rows, n_in], [stride_a, 1], [BLOCK_M, BLOCK_K])
        b_tensor = tl.make_tensor_descriptor(b_ptr, [n_out, n_in], [stride_b, 1], [BLOCK_N, BLOCK_K])
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=TMA):
        tile_m, tile_n = tile_of_program(tile, n_rows, n_out, BLOCK_M, BLOCK_N, GROUP_M)
        o_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        if TMA:
            for start in range(first_k, last_k, BLOCK_K):
                a = a_tensor.load([tile_m * BLOCK_M, start])  # [BLOCK_M, BLOCK_K]
                b = b_tensor.load([tile_n * BLOCK_N, start])  # [BLOCK_N, BLOCK_K]
                sums = tl.dot(a, tl.trans(b), sums, out_dtype=tl.int32)
        else:
            o_k = first_k + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            # What is beyond the last row reads the last one again, and isn't stored: no mask in the loop.
            a_row = tl.minimum(o_m, n_rows - 1).to(tl.int64)[:, None]
            b_row = tl.minimum(o_n, n_out - 1).to(tl.int64)[:, None]
            a_ptrs = a_ptr + a_row * stride_a + o_k[None, :]  # [BLOCK_M, BLOCK_K]
            b_ptrs = b_ptr + b_row * stride_b + o_k[None, :]  # [BLOCK_N, BLOCK_K]
            for start in range(first_k, last_k, BLOCK_K):
                if EVEN_K:
                    a = tl.load(a_ptrs)  # [BLOCK_M, BLOCK_K]
                    b = tl.load(b_ptrs)  # [BLOCK_N, BLOCK_K]
                else:
                    m_k = (start + tl.arange(0, BLOCK_K) < n_in)[None, :]
                    a = tl.load(a_ptrs, mask=m_k, other=0)
                    b = tl.load(b_ptrs, mask=m_k, other=0)
                sums = tl.dot(a, tl.trans(b), sums, out_dtype=tl.int32)
                a_ptrs += BLOCK_K
                b_ptrs += BLOCK_K
        _store_tile(
            out_ptr, sums, o_m, tile_n * BLOCK_N, n_rows, n_out, terms, strides,
            ACTIVATION, EPILOGUE, BLOCK_M, BLOCK_N, SUBTILE,
        )  # fmt: skip


def matmul(out: Tensor, a: Tensor, b: Tensor, epilogue: Epilogue | None, config: Int8MatmulConfig) -> None:
    """Launch the kernel; it writes ``out``.

    Shapes: a int8 ``[rows, in]`` and b int8 ``[out, in]``, :func:`aligned`. out, contiguous: with an epilogue
    ``[rows, out]`` in fp32, bf16 or fp16; without one int32 ``[splits, rows, out]``, the sums of each part of the inner
    dimension.
    """
    if out.numel() == 0:
        return
    arguments = matmul_arguments(out, a, b, epilogue, config)
    n_tiles = triton.cdiv(a.shape[0], config.block_m) * triton.cdiv(b.shape[0], config.block_n)
    splits = 1 if epilogue is not None else out.shape[0]
    if arguments["TMA"]:
        n_tiles = min(n_tiles, device_info(a.device).num_sms)
    with device_guard(a):
        run = partial(
            matmul_kernel[(n_tiles, splits)], **arguments, **config.launch_options, enable_fp_fusion=False
        )
        launch(run, allocates=arguments["TMA"])


def aligned(x: Tensor) -> bool:
    """Whether rows are contiguous, multiples of 16 elements and that far apart, and begin at multiples of 16 bytes."""
    rows_apart = x.stride(0) if x.shape[0] > 1 else 0
    return x.stride(1) == 1 and not any(n % 16 for n in (x.shape[1], rows_apart, x.data_ptr()))


# Where there is no epilogue nothing is read of one.
NO_EPILOGUE: dict[str, Any] = {
    "a_scale_ptr": None,
    "a_offset_ptr": None,
    "b_scale_ptr": None,
    "b_sum_ptr": None,
    "bias_ptr": None,
    "residual_ptr": None,
    "stride_a_scale": 0,
    "stride_b_scale": 0,
    "stride_residual_row": 0,
    "stride_residual_col": 0,
    "ACTIVATION": None,
}


def matmul_arguments(
    out: Tensor, a: Tensor, b: Tensor, epilogue: Epilogue | None, config: Int8MatmulConfig
) -> dict[str, Any]:
    """The kernel's arguments by name."""
    n_in = a.shape[1]
    return {
        "out_ptr": out,
        "a_ptr": a,
        "b_ptr": b,
        **(NO_EPILOGUE if epilogue is None else epilogue.arguments()),
        "stride_a": a.stride(0),
        "stride_b": b.stride(0),
        "n_rows": a.shape[0],
        "n_out": b.shape[0],
        "n_in": n_in,
        "EPILOGUE": epilogue is not None,
        "EVEN_K": n_in % config.block_k == 0,
        "TMA": config.tma,
        **config.blocks,
    }
