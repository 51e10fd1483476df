"""Scaled-dot-product attention, backward, second half: the gradients of key and value; see dq.py."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pyaccel.kernels.attention.config import AttentionConfig
from pyaccel.kernels.attention.params import AttentionCall
from pyaccel.kernels.attention.tile import (
    any_counts,
    band,
    clear_tail,
    dot_rows,
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
def dkey_dvalue_kernel(
    dk_ptr, dv_ptr,
    do_ptr, lse_ptr, lse_error_ptr, delta_ptr,
    q_ptr, k_ptr, v_ptr, key_mask_ptr, mask_ptr, cu_q_ptr, cu_k_ptr, key_ptr,
    stride_dk, stride_dv, stride_do, stride_lse, stride_q, stride_k, stride_v, stride_key_mask, stride_mask,
    total, n_streams, n_heads, group, seq_q, seq_k, scale, window_left, window_right, keep_scale, threshold,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, MASK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr, SKIP_MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dkey and dvalue. A program holds BLOCK_N keys and walks all queries of all heads that attend to them.

    Scores are transposed, [keys, queries], so that they are a product's left operand as they come out of another.
    Neither queries beyond the last nor keys beyond the last need a mask: the weights of the former are 0 by their
    LSE of +inf, and what is computed for the latter isn't stored.
    """
    pid = tl.program_id(0)
    n_blocks = tl.cdiv(seq_k, BLOCK_N)
    kv_heads = n_heads // group
    n_kv_streams = n_streams // group
    kv_stream = pid // n_blocks
    if cu_k_ptr is not None and kv_stream >= n_kv_streams:
        n_sequences, first_program = n_streams // n_heads, n_kv_streams * n_blocks
        if dk_ptr is not None:
            clear_tail(dk_ptr, 0.0, cu_k_ptr, n_sequences, total, stride_dk, 1, first_program)
        if dv_ptr is not None:
            clear_tail(dv_ptr, 0.0, cu_k_ptr, n_sequences, total, stride_dv, 1, first_program)
        return
    batch, kv_head = kv_stream // kv_heads, kv_stream % kv_heads
    first_q, len_q = sequence(cu_q_ptr, batch, seq_q)
    first_k, len_k = sequence(cu_k_ptr, batch, seq_k)
    start_n = pid % n_blocks * BLOCK_N
    if start_n >= len_k:
        return
    first_stream = batch * n_heads + kv_head * group
    batch, kv_head = batch.to(tl.int64), kv_head.to(tl.int64)
    o_n = start_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_n = o_n < len_k
    low, high = band(len_q, len_k, window_left, window_right, IS_CAUSAL, HAS_WINDOW)
    # A key that the band keeps from every query may hold anything, so it isn't read: 0 * NaN would be NaN.
    m_read = m_n
    if IS_CAUSAL or HAS_WINDOW:
        m_read = m_n & (o_n >= low) & (o_n < len_q + high)
    offset_k = batch * stride_k[0] + kv_head * stride_k[1] + (first_k + o_n) * stride_k[2]
    offset_v = batch * stride_v[0] + kv_head * stride_v[1] + (first_k + o_n) * stride_v[2]
    k = load_rows(k_ptr, offset_k, stride_k[3], m_read, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_ptr, offset_v, stride_v[3], m_read, VALUE_DIM, BLOCK_V)  # [BLOCK_N, BLOCK_V]

    # The queries that attend to some key of this block; from full_begin on, but for other masks, to all of them.
    begin = tl.maximum(start_n - high, 0)
    end = tl.minimum(tl.minimum(start_n + BLOCK_N, len_k) - low, len_q)
    full_begin = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - high, 0), BLOCK_M) * BLOCK_M
    BANDED: tl.constexpr = IS_CAUSAL or HAS_WINDOW
    MASKED: tl.constexpr = key_mask_ptr is not None or mask_ptr is not None
    # A query without keys may hold anything. By a mask of keys alone, it is in a sequence without any; and a causal
    # mask alone leaves each query a key.
    IDLE_ROWS: tl.constexpr = mask_ptr is not None or HAS_WINDOW or (IS_CAUSAL and key_mask_ptr is not None)

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for member in range(group):
        stream = first_stream + member
        head = kv_head * group + member
        base_q = batch * stride_q[0] + head * stride_q[1]
        base_do = batch * stride_do[0] + head * stride_do[1]
        base_lse = batch * stride_lse[0] + head * stride_lse[1]
        allowed, end_of_head = None, end
        if key_mask_ptr is not None:
            offset = (
                batch * stride_key_mask[0] + head * stride_key_mask[1] + o_n.to(tl.int64) * stride_key_mask[2]
            )
            m_key = tl.load(key_mask_ptr + offset, mask=m_n, other=0) != 0  # [BLOCK_N]
            allowed = m_key[:, None]
            end_of_head = tl.where(tl.max(m_key.to(tl.int32), axis=0) > 0, end, 0)
        for banded in tl.static_range(0 if BANDED else 1, 1 if HAS_WINDOW else 2):
            # Blocks that the band cuts first, where there are such, then those that it doesn't.
            if banded == 0:
                first = begin // BLOCK_M * BLOCK_M
                last = end_of_head if HAS_WINDOW else tl.minimum(full_begin, end_of_head)
            else:
                first, last = full_begin, end_of_head
            for start_m in range(first, last, BLOCK_M):
                o_m = start_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
                m_m = o_m < len_q
                bias, live = None, True
                if mask_ptr is not None:
                    base_mask = mask_ptr + batch * stride_mask[0] + head * stride_mask[1]
                    row_offset = (
                        o_m.to(tl.int64)[None, :] * stride_mask[2]
                        if MASK_ROWS
                        else tl.zeros((1, 1), tl.int64)
                    )
                    m_tile = (m_n[:, None] & m_m[None, :]) if MASK_ROWS else m_n[:, None]
                    bias = load_bias(
                        base_mask, row_offset, o_n.to(tl.int64)[:, None] * stride_mask[3], m_tile
                    )
                    if SKIP_MASKED:
                        live = tl.max(any_counts(bias, 1).to(tl.int32), axis=0) > 0
                if live:
                    offset_lse = base_lse + first_q + o_m
                    lse = load_lse(lse_ptr, offset_lse, m_m)  # [BLOCK_M]
                    lse_error = None
                    if lse_error_ptr is not None:
                        lse_error = tl.load(lse_error_ptr + offset_lse, mask=m_m, other=0.0)
                    # Its offset is written out: shared with that of the LSE, it costs registers.
                    delta = tl.load(delta_ptr + base_lse + first_q + o_m, mask=m_m, other=0.0)
                    if IDLE_ROWS:
                        m_m &= lse < float("inf")
                    offset_q = base_q + (first_q + o_m) * stride_q[2]
                    offset_do = base_do + (first_q + o_m) * stride_do[2]
                    q = load_rows(q_ptr, offset_q, stride_q[3], m_m, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
                    do = load_rows(do_ptr, offset_do, stride_do[3], m_m, VALUE_DIM, BLOCK_V)
                    s = dot_rows(k, q, PRECISION) * scale  # [BLOCK_N, BLOCK_M]
                    s = mask_scores(s, bias, allowed, o_m[None, :], o_n[:, None], low, high, banded == 0)
                    p = probs_tile(s, lse, lse_error, 0)
                    if key_ptr is not None:
                        keep = tl.trans(keep_tile(key_ptr, o_m, start_n, stream, threshold, BLOCK_M, BLOCK_N))
                    if dv_ptr is not None:
                        dropped = tl.where(keep, p * keep_scale, 0.0) if key_ptr is not None else p
                        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
                    if dk_ptr is not None:
                        dp = dot_rows(v, do, PRECISION)
                        if key_ptr is not None:
                            dp = tl.where(keep, dp * keep_scale, 0.0)
                        ds = p * (dp - delta[None, :])
                        if MASKED:  # a key that is masked may hold NaN, and then dp is NaN
                            ds = tl.where(p == 0.0, 0.0, ds)
                        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    if dk_ptr is not None:
        offset_dk = batch * stride_dk[0] + kv_head * stride_dk[1] + (first_k + o_n) * stride_dk[2]
        store_rows(dk_ptr, offset_dk, stride_dk[3], m_n, dk * scale, HEAD_DIM, BLOCK_D)
    if dv_ptr is not None:
        offset_dv = batch * stride_dv[0] + kv_head * stride_dv[1] + (first_k + o_n) * stride_dv[2]
        store_rows(dv_ptr, offset_dv, stride_dv[3], m_n, dv, VALUE_DIM, BLOCK_V)


_launch = Launcher(dkey_dvalue_kernel)


def dkey_dvalue(
    dk: Tensor,
    dv: Tensor,
    do: Tensor,
    lse: Tensor,
    lse_error: Tensor | None,
    delta: Tensor,
    call: AttentionCall,
    config: AttentionConfig,
) -> None:
    """Launch the second kernel, which needs delta: it writes dk and dv, laid out as key and value are."""
    programs = call.n_streams // call.group * triton.cdiv(call.seq_k, config.block_n) + call.tail_programs
    # Both sums at once, or, where they don't fit in registers together, one after the other.
    for some_dk, some_dv in ((dk, None), (None, dv)) if config.split else ((dk, dv),):
        arguments = dkey_dvalue_arguments(some_dk, some_dv, do, lse, lse_error, delta, call, config)
        _launch.named(dk, programs, arguments, config.launch_options)


def dkey_dvalue_arguments(
    dk: Tensor | None,
    dv: Tensor | None,
    do: Tensor,
    lse: Tensor,
    lse_error: Tensor | None,
    delta: Tensor,
    call: AttentionCall,
    config: AttentionConfig,
) -> dict[str, Any]:
    """The kernel's arguments by name; what is None isn't computed."""
    return {
        "dk_ptr": dk,
        "dv_ptr": dv,
        "do_ptr": do,
        "lse_ptr": lse,
        "lse_error_ptr": lse_error,
        "delta_ptr": delta,
        "stride_dk": (0, 0, 0, 0),
        "stride_dv": (0, 0, 0, 0),
        **({} if dk is None else call.strides(dk=dk)),
        **({} if dv is None else call.strides(dv=dv)),
        **call.strides(do=do, lse=lse),
        "total": call.key.shape[2],
        **call.arguments(),
        **call.offsets(),
        **config.blocks,
        "SKIP_MASKED": config.skip_masked,
    }
