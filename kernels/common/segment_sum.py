"""Sum the rows that share an id: the gradient of a lookup table, in a fixed order and without atomics.

The ids come sorted, with the order that sorted them, so that equal ids are runs. Chunks of sorted rows are summed by
one program each: runs that lie inside a chunk go straight to the output, and of runs that cross its borders the
partial sums go to a small buffer, which a second kernel adds up. No program walks a long run, and two launches give
the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyaccel.kernels.common.configs import SegmentSumConfig
from pyaccel.kernels.common.device import device_guard


@triton.jit
def chunk_kernel(
    out_ptr, partial_ptr, rows_ptr, ids_ptr, order_ptr,
    stride_row, stride_col, n_rows, n_cols, n_segments, skip, chunk,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Partial sums: [chunks, 2, n_cols], of the run that began in an earlier chunk, and of the one that goes on in
    the next; what isn't there is not written."""
    pid = tl.program_id(0).to(tl.int64)
    first = pid * chunk
    last = tl.minimum(first + chunk, n_rows) - 1
    o_col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_col = o_col < n_cols
    col = o_col.to(tl.int64)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    id = tl.load(ids_ptr + first)
    before = tl.load(ids_ptr + first - 1, mask=first > 0, other=0)
    begun = (first > 0) & (before == id)  # whether the run that acc sums began in an earlier chunk
    for i in range(first, last + 1):
        row = i
        if order_ptr is not None:
            row = tl.load(order_ptr + i).to(tl.int64)
        # `skip` is masked, not multiplied by 0: a NaN there stays there.
        mask = m_col & (id != skip)
        acc += tl.load(rows_ptr + row * stride_row + col * stride_col, mask=mask, other=0.0).to(tl.float32)
        following = tl.load(ids_ptr + i + 1, mask=i + 1 < n_rows, other=0)
        goes_on = (i + 1 < n_rows) & (following == id)
        here = (~goes_on) & (~begun) & (id >= 0) & (id < n_segments)
        o_out = id.to(tl.int64) * n_cols + o_col
        tl.store(out_ptr + o_out, acc.to(out_ptr.dtype.element_ty), mask=m_col & here)
        crosses = ((~goes_on) & begun) | (goes_on & (i == last))
        o_partial = (pid * 2 + tl.where(begun, 0, 1)) * n_cols + o_col
        tl.store(partial_ptr + o_partial, acc, mask=m_col & crosses)
        acc = tl.where(goes_on, acc, 0.0)
        begun = begun & goes_on
        id = following


@triton.jit
def border_kernel(
    out_ptr, partial_ptr, ids_ptr, n_rows, n_cols, n_segments, n_chunks, chunk,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The program of the chunk in which a run begins that crosses borders adds up its partial sums."""
    pid = tl.program_id(0).to(tl.int64)
    first = pid * chunk
    end = first + chunk
    if end < n_rows:
        id = tl.load(ids_ptr + end - 1)
        before = tl.load(ids_ptr + first - 1, mask=first > 0, other=0)
        begins = (first == 0) | (before != id)
        in_range = (id >= 0) & (id < n_segments)
        if begins & in_range & (tl.load(ids_ptr + end) == id):
            o_col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            m_col = o_col < n_cols
            total = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
            block = pid + 1
            going = True
            while going:
                o_chunk = block + tl.arange(0, BLOCK_P)  # [BLOCK_P]
                chunk_id = tl.load(ids_ptr + o_chunk * chunk, mask=o_chunk < n_chunks, other=0)
                m_chunk = (o_chunk < n_chunks) & (chunk_id == id)
                offset = (o_chunk * 2)[:, None] * n_cols + o_col[None, :]
                mask = m_chunk[:, None] & m_col[None, :]
                total += tl.load(partial_ptr + offset, mask=mask, other=0.0)
                block += BLOCK_P
                going = tl.sum(m_chunk.to(tl.int32)) == BLOCK_P
            head = tl.load(partial_ptr + (pid * 2 + 1) * n_cols + o_col, mask=m_col, other=0.0)
            out = head + tl.sum(total, axis=0)
            tl.store(out_ptr + id.to(tl.int64) * n_cols + o_col, out.to(out_ptr.dtype.element_ty), mask=m_col)


def segment_sum(
    out: Tensor, rows: Tensor, ids: Tensor, order: Tensor | None, skip: int, config: SegmentSumConfig
) -> None:
    """Launch: ``out[id]`` becomes the sum of the rows with this id; segments without rows are left as they are.

    Args:
        out: ``[segments, cols]``, any floating dtype, contiguous. Zero it first.
        rows: ``[n, cols]``, any floating dtype and strides; summed in fp32.
        ids: int32 or int64 ``[n]``, sorted, contiguous. Those outside ``[0, segments)`` are left out.
        order: int ``[n]``, the row of each of ``ids``; None where the rows lie in their order.
        skip: an id whose rows are not read and whose sum is 0; -1 for none.
    """
    n_rows, n_cols = rows.shape
    if n_rows == 0:
        return
    n_chunks = triton.cdiv(n_rows, config.chunk)
    partial = rows.new_empty(n_chunks, 2, n_cols, dtype=torch.float32)
    with device_guard(rows):
        chunk_kernel[(n_chunks, triton.cdiv(n_cols, config.block_n))](
            **chunk_arguments(out, partial, rows, ids, order, skip, config), num_warps=config.num_warps
        )
        if n_chunks > 1:
            border_kernel[(n_chunks - 1, triton.cdiv(n_cols, config.border_n))](
                **border_arguments(out, partial, rows, ids, config), num_warps=config.border_warps
            )


def chunk_arguments(
    out: Tensor,
    partial: Tensor,
    rows: Tensor,
    ids: Tensor,
    order: Tensor | None,
    skip: int,
    config: SegmentSumConfig,
) -> dict[str, Any]:
    """The first kernel's arguments by name."""
    return {
        "out_ptr": out,
        "partial_ptr": partial,
        "rows_ptr": rows,
        "ids_ptr": ids,
        "order_ptr": order,
        "stride_row": rows.stride(0),
        "stride_col": rows.stride(1),
        "n_rows": rows.shape[0],
        "n_cols": rows.shape[1],
        "n_segments": out.shape[0],
        "skip": skip,
        "chunk": config.chunk,
        "BLOCK_N": config.block_n,
    }


def border_arguments(
    out: Tensor, partial: Tensor, rows: Tensor, ids: Tensor, config: SegmentSumConfig
) -> dict[str, Any]:
    """The second kernel's arguments by name."""
    return {
        "out_ptr": out,
        "partial_ptr": partial,
        "ids_ptr": ids,
        "n_rows": rows.shape[0],
        "n_cols": rows.shape[1],
        "n_segments": out.shape[0],
        "n_chunks": partial.shape[0],
        "chunk": config.chunk,
        "BLOCK_P": config.border_p,
        "BLOCK_N": config.border_n,
    }
