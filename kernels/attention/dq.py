"""Scaled-dot-product attention, backward, first half: the gradient of query.

Source: T. Dao, arXiv:2307.08691 (2023), algorithm 2. Its two sums, over keys and over queries, are a kernel each
(the other is dkv.py), so that every sum has one owner and one order and there are no atomics.
Weights are rebuilt from the scores and their log-sum-exp. Where the log-sum-exp has a gradient too, it is
subtracted from ``delta = sum(dout * out)``: both count for a whole row.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pyaccel.kernels.attention.config import AttentionConfig
from pyaccel.kernels.attention.params import AttentionCall
from pyaccel.kernels.attention.tile import (
    any_counts,
    apply_band,
    band,
    clear_tail,
    dot_rows,
    key_range,
    load_bias,
    load_lse,
    load_rows,
    mask_scores,
    probs_tile,
    sequence,
    store_rows,
)
from pyaccel.kernels.common.launch import Launcher
from pyaccel.kernels.common.philox import keep_tile


@triton.jit(do_not_specialize=["threshold"])
def dquery_kernel(
    dq_ptr, delta_ptr,
    do_ptr, out_ptr, lse_ptr, lse_error_ptr, dlse_ptr,
    q_ptr, k_ptr, v_ptr, key_mask_ptr, mask_ptr, cu_q_ptr, cu_k_ptr, key_ptr,
    stride_dq, stride_do, stride_out, stride_lse, stride_q, stride_k, stride_v, stride_key_mask, stride_mask,
    total, n_streams, n_heads, group, seq_q, seq_k, scale, window_left, window_right, keep_scale, threshold,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, MASK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr, SKIP_MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dquery, and delta (fp32, laid out as the LSE is) for the other kernel. A program holds BLOCK_M queries."""
    pid = tl.program_id(0)
    n_blocks = tl.cdiv(seq_q, BLOCK_M)
    stream = pid // n_blocks  # batch * heads + head
    if cu_q_ptr is not None and stream >= n_streams:
        clear_tail(dq_ptr, 0.0, cu_q_ptr, n_streams // n_heads, total, stride_dq, 1, n_streams * n_blocks)
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
    row = first_q + o_m
    offset_q = batch * stride_q[0] + head * stride_q[1] + row * stride_q[2]
    offset_do = batch * stride_do[0] + head * stride_do[1] + row * stride_do[2]
    offset_out = batch * stride_out[0] + head * stride_out[1] + row * stride_out[2]
    offset_lse = batch * stride_lse[0] + head * stride_lse[1] + row
    lse = load_lse(lse_ptr, offset_lse, m_m)  # [BLOCK_M]
    lse_error = None if lse_error_ptr is None else tl.load(lse_error_ptr + offset_lse, mask=m_m, other=0.0)
    m_read = m_m & (lse < float("inf"))  # a row without keys may hold anything, and so may its gradient
    q = load_rows(q_ptr, offset_q, stride_q[3], m_read, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    do = load_rows(do_ptr, offset_do, stride_do[3], m_read, VALUE_DIM, BLOCK_V)  # [BLOCK_M, BLOCK_V]
    out = load_rows(out_ptr, offset_out, stride_out[3], m_read, VALUE_DIM, BLOCK_V)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), axis=1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + offset_lse, mask=m_read, other=0.0)
    tl.store(delta_ptr + offset_lse, delta, mask=m_m)

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
        row_offset = o_m.to(tl.int64)[:, None] * stride_mask[2] if MASK_ROWS else tl.zeros((1, 1), tl.int64)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
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
                if SKIP_MASKED:
                    live = tl.max(m_n.to(tl.int32), axis=0) > 0
            if live:
                offset_k = base_k + (first_k + o_n) * stride_k[2]
                offset_v = base_v + (first_k + o_n) * stride_v[2]
                k = load_rows(k_ptr, offset_k, stride_k[3], m_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
                v = load_rows(v_ptr, offset_v, stride_v[3], m_n, VALUE_DIM, BLOCK_V)  # [BLOCK_N, BLOCK_V]
                s = dot_rows(q, k, PRECISION) * scale  # [BLOCK_M, BLOCK_N]
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
                p = probs_tile(s, lse, lse_error, 1)
                dp = dot_rows(do, v, PRECISION)
                if key_ptr is not None:
                    keep = keep_tile(key_ptr, o_m, start_n, stream, threshold, BLOCK_M, BLOCK_N)
                    dp = tl.where(keep, dp * keep_scale, 0.0)
                ds = p * (dp - delta[:, None])
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    offset_dq = batch * stride_dq[0] + head * stride_dq[1] + row * stride_dq[2]
    store_rows(dq_ptr, offset_dq, stride_dq[3], m_m, dq * scale, HEAD_DIM, BLOCK_D)


_launch = Launcher(dquery_kernel)


def dquery(
    dq: Tensor,
    delta: Tensor,
    do: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_error: Tensor | None,
    dlse: Tensor | None,
    call: AttentionCall,
    config: AttentionConfig,
) -> None:
    """Launch the first kernel: it writes dq, laid out as query is, and delta, as ``lse`` [batch, heads, seq_q]."""
    programs = call.n_streams * triton.cdiv(call.seq_q, config.block_m) + call.tail_programs
    arguments = dquery_arguments(dq, delta, do, out, lse, lse_error, dlse, call, config)
    _launch.named(dq, programs, arguments, config.launch_options)


def dquery_arguments(
    dq: Tensor,
    delta: Tensor,
    do: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_error: Tensor | None,
    dlse: Tensor | None,
    call: AttentionCall,
    config: AttentionConfig,
) -> dict[str, Any]:
    """The kernel's arguments by name."""
    return {
        "dq_ptr": dq,
        "delta_ptr": delta,
        "do_ptr": do,
        "out_ptr": out,
        "lse_ptr": lse,
        "lse_error_ptr": lse_error,
        "dlse_ptr": dlse,
        **call.strides(dq=dq, do=do, out=out, lse=lse),
        "total": call.query.shape[2],
        **call.arguments(),
        **call.offsets(),
        **config.blocks,
        "SKIP_MASKED": config.skip_masked,
    }
