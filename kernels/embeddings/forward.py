"""Word + position + token type lookup, LayerNorm and dropout, forward: each token's rows are read once.

Method: LayerNorm (arXiv:1607.06450) with two-pass statistics in fp32 over the sum of three table rows, held in
registers. Ids are clamped into their table before anything is read by them; what had to be clamped is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pyaccel.kernels.common.configs import RowConfig
from pyaccel.kernels.common.device import device_guard
from pyaccel.kernels.common.philox import dropout_tile, keep_scale, threshold_bits
from pyaccel.kernels.common.tiles import row_mean


@triton.jit
def clamp_ids(given, size):
    """Ids (int64) as indices of a table of ``size`` rows, and which of them were that already."""
    ids = tl.minimum(tl.maximum(given, 0), size - 1)
    return ids, ids == given


@triton.jit
def load_ids(ids_ptr, o_id, mask, size):
    """:func:`clamp_ids` of what lies at the offsets ``o_id``; 0 where there are no ids."""
    given = o_id * 0
    if ids_ptr is not None:
        given = tl.load(ids_ptr + o_id, mask=mask, other=0).to(tl.int64)
    return clamp_ids(given, size)


@triton.jit
def load_positions(position_ids_ptr, o_row, mask, period, size):
    """:func:`clamp_ids` of the positions of tokens ``o_row``; without ids, their index in a sequence of ``period``."""
    if position_ids_ptr is None:
        return clamp_ids(o_row % period, size)
    return load_ids(position_ids_ptr, o_row % period, mask, size)


@triton.jit
def packed_positions(cu_seqlens_ptr, o_row, n_offsets, search_steps):
    """The index of packed tokens ``o_row`` in their sequence, by bisection; 0 beyond the last offset."""
    low = o_row * 0
    high = low + n_offsets  # the number of offsets at or before the token is in [low, high]
    for _ in range(search_steps):
        middle = (low + high) // 2
        open = low < high
        offset = tl.load(cu_seqlens_ptr + middle, mask=open, other=0)
        at_or_before = offset <= o_row
        low = tl.where(open & at_or_before, middle + 1, low)
        high = tl.where(open & (~at_or_before), middle, high)
    inside = (low > 0) & (low < n_offsets)
    first = tl.load(cu_seqlens_ptr + low - 1, mask=inside, other=0).to(tl.int64)
    return tl.where(inside, o_row - first, 0)


@triton.jit
def sum_tile(
    word_ptr, position_ptr, type_ptr, word, position, token_type, o_col, mask,
    stride_word_row, stride_word_col, stride_position_row, stride_position_col, stride_type_row, stride_type_col,
):  # fmt: skip
    """The sum of the rows that the ids [ROWS] name, at columns ``o_col``: [ROWS, columns] in fp32, 0 where masked."""
    col = o_col.to(tl.int64)[None, :]
    o_word = word[:, None] * stride_word_row + col * stride_word_col
    z = tl.load(word_ptr + o_word, mask=mask, other=0.0).to(tl.float32)
    if position_ptr is not None:
        o_position = position[:, None] * stride_position_row + col * stride_position_col
        z += tl.load(position_ptr + o_position, mask=mask, other=0.0).to(tl.float32)
    if type_ptr is not None:
        o_type = token_type[:, None] * stride_type_row + col * stride_type_col
        z += tl.load(type_ptr + o_type, mask=mask, other=0.0).to(tl.float32)
    return z


@triton.jit(do_not_specialize=["threshold", "search_steps"])
def forward_kernel(
    out_ptr, mean_ptr, rstd_ptr, positions_ptr, in_range_ptr,
    input_ids_ptr, position_ids_ptr, token_type_ids_ptr, cu_seqlens_ptr,
    word_ptr, position_ptr, type_ptr, weight_ptr, bias_ptr, key_ptr,
    stride_word_row, stride_word_col, stride_position_row, stride_position_col, stride_type_row, stride_type_col,
    n_rows, n_cols, period, n_words, n_positions, n_types, n_offsets, search_steps, eps, scale, threshold,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A pointer that is None stands for an input that isn't there. positions_ptr: those that cu_seqlens gives.
    in_range_ptr: [3, n_rows], whether the word, position and type ids are."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    o_col = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_row = o_row < n_rows
    m_col = o_col < n_cols
    mask = m_row[:, None] & m_col[None, :]
    word, word_in_range = load_ids(input_ids_ptr, o_row, m_row, n_words)
    token_type, type_in_range = load_ids(token_type_ids_ptr, o_row, m_row, n_types)
    if cu_seqlens_ptr is not None:
        position, position_in_range = clamp_ids(
            packed_positions(cu_seqlens_ptr, o_row, n_offsets, search_steps), n_positions
        )
        tl.store(positions_ptr + o_row, position, mask=m_row)
    else:
        position, position_in_range = load_positions(position_ids_ptr, o_row, m_row, period, n_positions)
    o_flag = in_range_ptr + o_row
    tl.store(o_flag, word_in_range, mask=m_row)
    tl.store(o_flag + n_rows, position_in_range, mask=m_row)
    tl.store(o_flag + 2 * n_rows, type_in_range, mask=m_row)

    z = sum_tile(
        word_ptr, position_ptr, type_ptr, word, position, token_type, o_col, mask,
        stride_word_row, stride_word_col, stride_position_row, stride_position_col, stride_type_row, stride_type_col,
    )  # fmt: skip
    mean = row_mean(z, mask, n_cols)  # [BLOCK_ROWS]
    centred = tl.where(mask, z - mean[:, None], 0.0)  # [BLOCK_ROWS, BLOCK_N]
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / n_cols + eps)
    tl.store(mean_ptr + o_row, mean, mask=m_row)
    tl.store(rstd_ptr + o_row, rstd, mask=m_row)
    out = centred * rstd[:, None]
    if weight_ptr is not None:
        out *= tl.load(weight_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    if key_ptr is not None:
        out = dropout_tile(
            out, key_ptr, o_row, 0, tl.full((), 0, tl.int32), threshold, scale, BLOCK_ROWS, BLOCK_N
        )
    tl.store(out_ptr + o_row[:, None] * n_cols + o_col[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Lookup:
    """What is looked up: ids, contiguous, int32 or int64, and tables ``[rows, hidden]`` of one dtype, any strides.

    Attributes:
        input_ids: ``[tokens]``.
        position_ids: ``[period]``, or None: token i is at position ``position_ids[i % period]``, or ``i % period``.
        token_type_ids: ``[tokens]``, or None for 0.
        word_weight, position_weight, token_type_weight: the tables; the last two may be None.
        period: of the positions: the length of padded sequences, or the number of tokens.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    token_type_ids: Tensor | None
    word_weight: Tensor
    position_weight: Tensor | None
    token_type_weight: Tensor | None
    period: int

    def arguments(self) -> dict[str, Any]:
        """The kernels' arguments by name."""
        tables = {"word": self.word_weight, "position": self.position_weight, "type": self.token_type_weight}
        arguments: dict[str, Any] = {
            "input_ids_ptr": self.input_ids,
            "position_ids_ptr": self.position_ids,
            "token_type_ids_ptr": self.token_type_ids,
            "n_rows": self.input_ids.shape[0],
            "n_cols": self.word_weight.shape[1],
            "period": self.period,
        }
        for name, table in tables.items():
            arguments[f"{name}_ptr"] = table
            arguments[f"stride_{name}_row"] = 0 if table is None else table.stride(0)
            arguments[f"stride_{name}_col"] = 0 if table is None else table.stride(1)
            # Where there is no table every id is in range.
            arguments[f"n_{name}s"] = 2**31 - 1 if table is None else table.shape[0]
        return arguments


def forward(
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    positions: Tensor | None,
    in_range: Tensor,
    lookup: Lookup,
    cu_seqlens: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_key: Tensor | None,
    eps: float,
    dropout_p: float,
    config: RowConfig,
) -> None:
    """Launch the forward kernel; it writes out, mean, rstd, in_range and, with cu_seqlens, positions.

    Shapes: out ``[tokens, hidden]`` contiguous; mean, rstd ``[tokens]`` fp32; positions ``[tokens]`` int32; in_range
    bool ``[3, tokens]``; weight, bias ``[hidden]`` contiguous; cu_seqlens int32 ``[sequences + 1]`` contiguous. With
    cu_seqlens the lookup has no position_ids: they are each token's index in its sequence.
    """
    n_rows = out.shape[0]
    if n_rows == 0:
        return
    arguments = forward_arguments(
        out, mean, rstd, positions, in_range, lookup, cu_seqlens, weight, bias, dropout_key, eps, dropout_p,
        config,
    )  # fmt: skip
    with device_guard(out):
        forward_kernel[(triton.cdiv(n_rows, config.block_rows),)](**arguments, num_warps=config.num_warps)


def forward_arguments(
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    positions: Tensor | None,
    in_range: Tensor,
    lookup: Lookup,
    cu_seqlens: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_key: Tensor | None,
    eps: float,
    dropout_p: float,
    config: RowConfig,
) -> dict[str, Any]:
    """The kernel's arguments by name."""
    n_offsets = 0 if cu_seqlens is None else cu_seqlens.shape[0]
    return {
        "out_ptr": out,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "positions_ptr": positions,
        "in_range_ptr": in_range,
        **lookup.arguments(),
        "cu_seqlens_ptr": cu_seqlens,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "key_ptr": dropout_key,
        "n_offsets": n_offsets,
        "search_steps": n_offsets.bit_length(),
        "eps": eps,
        "scale": keep_scale(dropout_p),
        "threshold": threshold_bits(dropout_p),
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_N": config.block_n,
    }
