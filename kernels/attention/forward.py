"""Scaled-dot-product attention, forward, for sequences of any length: tiles of keys and an online softmax.

Source: T. Dao, arXiv:2307.08691 (2023), algorithm 1; the online softmax is M. Milakov and N. Gimelshein,
arXiv:1805.02867 (2018). A program holds BLOCK_M queries of one head and walks the keys they may attend to.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pyaccel.kernels.attention.config import AttentionConfig
from pyaccel.kernels.attention.params import AttentionCall
from pyaccel.kernels.attention.tile import (
    LOG2E,
    any_counts,
    apply_band,
    band,
    clear_tail,
    dot_rows,
    key_range,
    load_bias,
    load_rows,
    mask_scores,
    sequence,
    store_lse,
    store_rows,
)
from pyaccel.kernels.common.launch import Launcher
from pyaccel.kernels.common.philox import keep_tile
from pyaccel.kernels.common.tma import launch


@triton.jit(do_not_specialize=["threshold"])
def forward_kernel(
    out_ptr, lse_ptr, lse_error_ptr,
    q_ptr, k_ptr, v_ptr, key_mask_ptr, mask_ptr, cu_q_ptr, cu_k_ptr, key_ptr,
    stride_out, stride_lse, stride_q, stride_k, stride_v, stride_key_mask, stride_mask,
    total, n_streams, n_heads, group, seq_q, seq_k, scale, window_left, window_right, keep_scale, threshold,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, MASK_ROWS: tl.constexpr, FOLD_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n_blocks = tl.cdiv(seq_q, BLOCK_M)
    stream = pid // n_blocks  # batch * heads + head
    if cu_q_ptr is not None and stream >= n_streams:
        n_sequences, first = n_streams // n_heads, n_streams * n_blocks
        clear_tail(out_ptr, 0.0, cu_q_ptr, n_sequences, total, stride_out, 1, first)
        if lse_ptr is not None:
            clear_tail(lse_ptr, float("-inf"), cu_q_ptr, n_sequences, total, stride_lse, n_heads, first)
        return
    batch, head = stream // n_heads, stream % n_heads
    first_q, len_q = sequence(cu_q_ptr, batch, seq_q)
    first_k, len_k = sequence(cu_k_ptr, batch, seq_k)
    start_m = (
        n_blocks - 1 - pid % n_blocks
    ) * BLOCK_M  # under a causal mask the last queries have most to do
    if start_m >= len_q:
        return
    batch, head, kv_head = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    o_m = start_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_m = o_m < len_q
    offset_q = batch * stride_q[0] + head * stride_q[1] + (first_q + o_m) * stride_q[2]
    q = load_rows(q_ptr, offset_q, stride_q[3], m_m, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    base_k = batch * stride_k[0] + kv_head * stride_k[1]
    base_v = batch * stride_v[0] + kv_head * stride_v[1]

    low, high = band(len_q, len_k, window_left, window_right, IS_CAUSAL, HAS_WINDOW)
    if key_mask_ptr is not None:
        key_mask_ptr += batch * stride_key_mask[0] + head * stride_key_mask[1]
    begin, end, full_end = key_range(
        start_m, len_q, len_k, low, high, key_mask_ptr, stride_key_mask[2], BLOCK_M, BLOCK_N
    )
    if mask_ptr is not None:
        mask_ptr += batch * stride_mask[0] + head * stride_mask[1]
        # A mask that is the same for all rows is read as one row.
        row_offset = o_m.to(tl.int64)[:, None] * stride_mask[2] if MASK_ROWS else tl.zeros((1, 1), tl.int64)

    if TMA:  # rows from the end on come as zeros
        size = tl.maximum(end, 1)
        k_tensor = tl.make_tensor_descriptor(
            k_ptr + base_k + first_k * stride_k[2], [size, HEAD_DIM], [stride_k[2], 1], [BLOCK_N, BLOCK_D]
        )
        v_tensor = tl.make_tensor_descriptor(
            v_ptr + base_v + first_k * stride_v[2], [size, VALUE_DIM], [stride_v[2], 1], [BLOCK_N, BLOCK_V]
        )

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # maximum of the scores so far
    row_sum = tl.zeros((BLOCK_M,), tl.float32)  # sum of their exponentials
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    BANDED: tl.constexpr = IS_CAUSAL or HAS_WINDOW
    MASKED: tl.constexpr = HAS_WINDOW or key_mask_ptr is not None or mask_ptr is not None
    for bounds in tl.static_range(1 if MASKED else 0, 2):
        # Blocks without any mask first, where there are such, then those that need one.
        if bounds == 0:
            first, last = end * 0, full_end
        else:
            first, last = (begin if MASKED else full_end) // BLOCK_N * BLOCK_N, end
        for start_n in range(first, last, BLOCK_N):
            o_n = start_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            m_n, bias, live = None, None, True
            if bounds == 1:
                m_n = (o_n >= begin) & (o_n < end)
            if key_mask_ptr is not None:
                m_n &= tl.load(key_mask_ptr + o_n.to(tl.int64) * stride_key_mask[2], mask=m_n, other=0) != 0
            if mask_ptr is not None:
                m_tile = (m_m[:, None] & tl.expand_dims(m_n, 0)) if MASK_ROWS else tl.expand_dims(m_n, 0)
                bias = load_bias(mask_ptr, row_offset, o_n.to(tl.int64)[None, :] * stride_mask[3], m_tile)
                if BANDED:
                    bias = apply_band(bias, o_m[:, None], o_n[None, :], low, high)
                # A key that none of these queries attends to isn't read: 0 * NaN would be NaN.
                m_n &= any_counts(bias, 0)
                live = tl.max(m_n.to(tl.int32), axis=0) > 0
            if live:
                if TMA:
                    k = k_tensor.load([start_n, 0])  # [BLOCK_N, BLOCK_D]
                else:
                    offset_k = base_k + (first_k + o_n) * stride_k[2]
                    k = load_rows(k_ptr, offset_k, stride_k[3], m_n, HEAD_DIM, BLOCK_D)
                s = dot_rows(q, k, PRECISION)  # [BLOCK_M, BLOCK_N]
                if not FOLD_SCALE:
                    s *= scale
                allowed = tl.expand_dims(m_n, 0) if bounds == 1 else None
                s = mask_scores(
                    s,
                    bias,
                    allowed,
                    o_m[:, None],
                    o_n[None, :],
                    low,
                    high,
                    BANDED and bounds == 1 and mask_ptr is None,
                )
                m_new = tl.maximum(m, tl.max(s, axis=1))
                shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key: exp(-inf - 0), not NaN
                if FOLD_SCALE:
                    p = tl.math.exp2(s * (scale * LOG2E) - (shift * (scale * LOG2E))[:, None])
                    alpha = tl.math.exp2((m - shift) * (scale * LOG2E))
                else:
                    p = tl.math.exp2((s - shift[:, None]) * LOG2E)
                    alpha = tl.math.exp2((m - shift) * LOG2E)
                row_sum = row_sum * alpha + tl.sum(p, axis=1)
                m = m_new
                if key_ptr is not None:
                    keep = keep_tile(key_ptr, o_m, start_n, stream, threshold, BLOCK_M, BLOCK_N)
                    p = tl.where(keep, p, 0.0)
                if TMA:
                    v = v_tensor.load([start_n, 0])  # [BLOCK_N, BLOCK_V]
                else:
                    offset_v = base_v + (first_k + o_n) * stride_v[2]
                    v = load_rows(v_ptr, offset_v, stride_v[3], m_n, VALUE_DIM, BLOCK_V)
                acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)

    acc = tl.where(
        row_sum[:, None] == 0.0, 0.0, acc * ((keep_scale if key_ptr is not None else 1.0) / row_sum)[:, None]
    )
    offset_out = batch * stride_out[0] + head * stride_out[1] + (first_q + o_m) * stride_out[2]
    store_rows(out_ptr, offset_out, stride_out[3], m_m, acc, VALUE_DIM, BLOCK_V)
    offset_lse = batch * stride_lse[0] + head * stride_lse[1] + first_q + o_m
    store_lse(lse_ptr, lse_error_ptr, offset_lse, m_m, m * scale if FOLD_SCALE else m, row_sum)


_launch = Launcher(forward_kernel)


def forward(
    out: Tensor, lse: Tensor | None, lse_error: Tensor | None, call: AttentionCall, config: AttentionConfig
) -> None:
    """Launch the forward kernel: ``out`` [batch, heads, seq_q, value_dim], ``lse`` [batch, heads, seq_q] fp32 and, if
    it is wanted, what rounding took from that."""
    n_blocks = triton.cdiv(call.seq_q, config.block_m)
    arguments = forward_arguments(out, lse, lse_error, call, config)
    programs = call.n_streams * n_blocks + call.tail_programs
    run = partial(_launch.named, out, programs, arguments, config.launch_options)
    launch(run, allocates=arguments["TMA"])


def forward_arguments(
    out: Tensor, lse: Tensor | None, lse_error: Tensor | None, call: AttentionCall, config: AttentionConfig
) -> dict[str, Any]:
    """The kernel's arguments by name."""
    return {
        "out_ptr": out,
        "lse_ptr": lse,
        "lse_error_ptr": lse_error,
        "stride_lse": (0, 0, 0),
        **(call.strides(out=out) if lse is None else call.strides(out=out, lse=lse)),
        "total": call.query.shape[2],
        **call.arguments(),
        **call.offsets(),
        **config.blocks,
        "FOLD_SCALE": call.fold_scale,
        "TMA": config.tma and call.tma_can_read(call.key, call.value),
    }
