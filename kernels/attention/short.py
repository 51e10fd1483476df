"""Scaled-dot-product attention of short sequences: single-pass softmax, and backward in one launch.

What BERT mostly sees: up to 128 tokens. A program takes several heads (and sequences) one after the other, so that
the loads of one overlap the products of another. Forward, one tile has all keys of a sequence; backward, one tile has
all its queries, so that every sum over queries or keys is a program's own.
"""

from __future__ import annotations

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
    load_bias,
    load_lse,
    load_rows,
    mask_scores,
    probs_tile,
    sequence,
    store_lse,
    store_rows,
)
from pyaccel.kernels.common.launch import Launcher
from pyaccel.kernels.common.philox import keep_tile


@triton.jit
def _masks(
    key_mask_ptr, mask_ptr, stride_key_mask, stride_mask,
    batch, head, o_m, m_m, o_n, start_m, len_q, len_k, low, high,
    MASK_ROWS: tl.constexpr, BANDED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Which keys are there for these queries [BLOCK_N], and the tile of attn_mask, if there is one."""
    m_n = (
        (o_n >= start_m + low)
        & (o_n < tl.minimum(start_m + BLOCK_M, len_q) + high)
        & (o_n < len_k)
        # None without queries. A scalar condition is no mask to Triton 3.9's interpreter.
        & (start_m + tl.zeros_like(o_n) < len_q)
    )
    if key_mask_ptr is not None:
        offset = (
            batch * stride_key_mask[0] + head * stride_key_mask[1] + o_n.to(tl.int64) * stride_key_mask[2]
        )
        m_n &= tl.load(key_mask_ptr + offset, mask=m_n, other=0) != 0
    if mask_ptr is None:
        return m_n, m_n  # before Triton 3.7 a helper can't return None in a tuple: the caller drops it
    else:
        row_offset = o_m.to(tl.int64)[:, None] * stride_mask[2] if MASK_ROWS else tl.zeros((1, 1), tl.int64)
        m_tile = (m_m[:, None] & m_n[None, :]) if MASK_ROWS else m_n[None, :]
        base = mask_ptr + batch * stride_mask[0] + head * stride_mask[1]
        bias = load_bias(base, row_offset, o_n.to(tl.int64)[None, :] * stride_mask[3], m_tile)
        if BANDED:
            bias = apply_band(bias, o_m[:, None], o_n[None, :], low, high)
        # A key that none of these queries attends to isn't read: 0 * NaN would be NaN.
        return m_n & any_counts(bias, 0), bias


@triton.jit(do_not_specialize=["threshold"])
def forward_short_kernel(
    out_ptr, lse_ptr, lse_error_ptr,
    q_ptr, k_ptr, v_ptr, key_mask_ptr, mask_ptr, cu_q_ptr, cu_k_ptr, key_ptr,
    stride_out, stride_lse, stride_q, stride_k, stride_v, stride_key_mask, stride_mask,
    total, n_streams, n_heads, group, seq_q, seq_k, scale, window_left, window_right, keep_scale, threshold,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, MASK_ROWS: tl.constexpr, FOLD_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """A program has TILES tiles of BLOCK_M queries, each with all the keys of its sequence."""
    n_blocks = tl.cdiv(seq_q, BLOCK_M)
    n_tiles = n_streams * n_blocks
    first_tile = tl.program_id(0) * TILES
    if cu_q_ptr is not None and first_tile >= n_tiles:
        n_sequences, first_program = n_streams // n_heads, tl.cdiv(n_tiles, TILES)
        clear_tail(out_ptr, 0.0, cu_q_ptr, n_sequences, total, stride_out, 1, first_program)
        if lse_ptr is not None:
            clear_tail(
                lse_ptr, float("-inf"), cu_q_ptr, n_sequences, total, stride_lse, n_heads, first_program
            )
        return
    o_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    for tile in range(first_tile, tl.minimum(first_tile + TILES, n_tiles)):
        stream = tile // n_blocks  # batch * heads + head
        start_m = tile % n_blocks * BLOCK_M
        batch, head = (stream // n_heads).to(tl.int64), (stream % n_heads).to(tl.int64)
        kv_head = head // group
        first_q, len_q = sequence(cu_q_ptr, batch, seq_q)
        first_k, len_k = sequence(cu_k_ptr, batch, seq_k)
        low, high = band(len_q, len_k, window_left, window_right, IS_CAUSAL, HAS_WINDOW)
        o_m = start_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        m_m = o_m < len_q
        m_n, bias = _masks(
            key_mask_ptr, mask_ptr, stride_key_mask, stride_mask, batch, head, o_m, m_m, o_n,
            start_m, len_q, len_k, low, high, MASK_ROWS, IS_CAUSAL or HAS_WINDOW, BLOCK_M,
        )  # fmt: skip
        if mask_ptr is None:
            bias = None
        offset_q = batch * stride_q[0] + head * stride_q[1] + (first_q + o_m) * stride_q[2]
        offset_k = batch * stride_k[0] + kv_head * stride_k[1] + (first_k + o_n) * stride_k[2]
        offset_v = batch * stride_v[0] + kv_head * stride_v[1] + (first_k + o_n) * stride_v[2]
        q = load_rows(q_ptr, offset_q, stride_q[3], m_m, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        k = load_rows(k_ptr, offset_k, stride_k[3], m_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = load_rows(v_ptr, offset_v, stride_v[3], m_n, VALUE_DIM, BLOCK_V)  # [BLOCK_N, BLOCK_V]
        s = dot_rows(q, k, PRECISION)  # [BLOCK_M, BLOCK_N]
        if not FOLD_SCALE:
            s *= scale
        s = mask_scores(s, bias, m_n[None, :], o_m[:, None], o_n[None, :], low, high, IS_CAUSAL or HAS_WINDOW)
        m = tl.max(s, axis=1)  # [BLOCK_M]
        shift = tl.where(m == float("-inf"), 0.0, m)  # no key: exp(-inf - 0) is 0, not NaN
        if FOLD_SCALE:
            p = tl.math.exp2(s * (scale * LOG2E) - (shift * (scale * LOG2E))[:, None])
        else:
            p = tl.math.exp2((s - shift[:, None]) * LOG2E)
        row_sum = tl.sum(p, axis=1)
        if key_ptr is not None:
            p = tl.where(keep_tile(key_ptr, o_m, 0, stream, threshold, BLOCK_M, BLOCK_N), p, 0.0)
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        factor = (keep_scale if key_ptr is not None else 1.0) / row_sum
        out = tl.where(row_sum[:, None] == 0.0, 0.0, out * factor[:, None])
        offset_out = batch * stride_out[0] + head * stride_out[1] + (first_q + o_m) * stride_out[2]
        store_rows(out_ptr, offset_out, stride_out[3], m_m, out, VALUE_DIM, BLOCK_V)
        offset_lse = batch * stride_lse[0] + head * stride_lse[1] + first_q + o_m
        store_lse(lse_ptr, lse_error_ptr, offset_lse, m_m, m * scale if FOLD_SCALE else m, row_sum)


@triton.jit(do_not_specialize=["threshold"])
def backward_short_kernel(
    dq_ptr, dk_ptr, dv_ptr,
    do_ptr, out_ptr, lse_ptr, lse_error_ptr, dlse_ptr,
    q_ptr, k_ptr, v_ptr, key_mask_ptr, mask_ptr, cu_q_ptr, cu_k_ptr, key_ptr,
    stride_dq, stride_dk, stride_dv, stride_do, stride_out, stride_lse,
    stride_q, stride_k, stride_v, stride_key_mask, stride_mask,
    total_q, total_k, n_streams, n_heads, group, seq_q, seq_k,
    scale, window_left, window_right, keep_scale, threshold,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, MASK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """All gradients of a head, whose queries are one tile and whose keys it walks; its group must be 1."""
    stream = tl.program_id(0)
    if cu_q_ptr is not None and stream >= n_streams:
        n_sequences = n_streams // n_heads
        clear_tail(dq_ptr, 0.0, cu_q_ptr, n_sequences, total_q, stride_dq, 1, n_streams)
        clear_tail(dk_ptr, 0.0, cu_k_ptr, n_sequences, total_k, stride_dk, 1, n_streams)
        clear_tail(dv_ptr, 0.0, cu_k_ptr, n_sequences, total_k, stride_dv, 1, n_streams)
        return
    o_m = tl.arange(0, BLOCK_M)
    # A query without keys may hold anything, NaN too.
    IDLE_ROWS: tl.constexpr = mask_ptr is not None or key_mask_ptr is not None or HAS_WINDOW
    batch, head = (stream // n_heads).to(tl.int64), (stream % n_heads).to(tl.int64)
    first_q, len_q = sequence(cu_q_ptr, batch, seq_q)
    first_k, len_k = sequence(cu_k_ptr, batch, seq_k)
    low, high = band(len_q, len_k, window_left, window_right, IS_CAUSAL, HAS_WINDOW)
    row = first_q + o_m
    m_m = o_m < len_q
    offset_lse = batch * stride_lse[0] + head * stride_lse[1] + row
    lse = load_lse(lse_ptr, offset_lse, m_m)  # [BLOCK_M]
    lse_error = None if lse_error_ptr is None else tl.load(lse_error_ptr + offset_lse, mask=m_m, other=0.0)
    m_read = (m_m & (lse < float("inf"))) if IDLE_ROWS else m_m
    offset_q = batch * stride_q[0] + head * stride_q[1] + row * stride_q[2]
    offset_do = batch * stride_do[0] + head * stride_do[1] + row * stride_do[2]
    offset_out = batch * stride_out[0] + head * stride_out[1] + row * stride_out[2]
    q = load_rows(q_ptr, offset_q, stride_q[3], m_read, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    do = load_rows(do_ptr, offset_do, stride_do[3], m_read, VALUE_DIM, BLOCK_V)  # [BLOCK_M, BLOCK_V]
    out = load_rows(out_ptr, offset_out, stride_out[3], m_read, VALUE_DIM, BLOCK_V)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), axis=1)  # [BLOCK_M]
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + offset_lse, mask=m_read, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_n in range(0, len_k, BLOCK_N):
        o_n = start_n + tl.arange(0, BLOCK_N)
        m_n, bias = _masks(
            key_mask_ptr, mask_ptr, stride_key_mask, stride_mask, batch, head, o_m, m_m, o_n,
            0, len_q, len_k, low, high, MASK_ROWS, IS_CAUSAL or HAS_WINDOW, BLOCK_M,
        )  # fmt: skip
        if mask_ptr is None:
            bias = None
        offset_k = batch * stride_k[0] + head * stride_k[1] + (first_k + o_n) * stride_k[2]
        offset_v = batch * stride_v[0] + head * stride_v[1] + (first_k + o_n) * stride_v[2]
        k = load_rows(k_ptr, offset_k, stride_k[3], m_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = load_rows(v_ptr, offset_v, stride_v[3], m_n, VALUE_DIM, BLOCK_V)  # [BLOCK_N, BLOCK_V]
        s = dot_rows(q, k, PRECISION) * scale  # [BLOCK_M, BLOCK_N]
        s = mask_scores(s, bias, m_n[None, :], o_m[:, None], o_n[None, :], low, high, IS_CAUSAL or HAS_WINDOW)
        p = probs_tile(s, lse, lse_error, 1)
        dp = dot_rows(do, v, PRECISION)
        dropped = p
        if key_ptr is not None:
            keep = keep_tile(key_ptr, o_m, start_n, stream, threshold, BLOCK_M, BLOCK_N)
            dropped = tl.where(keep, p * keep_scale, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = tl.dot(tl.trans(dropped.to(do.dtype)), do, input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        offset_dk = batch * stride_dk[0] + head * stride_dk[1] + (first_k + o_n) * stride_dk[2]
        offset_dv = batch * stride_dv[0] + head * stride_dv[1] + (first_k + o_n) * stride_dv[2]
        store_rows(dk_ptr, offset_dk, stride_dk[3], o_n < len_k, dk, HEAD_DIM, BLOCK_D)
        store_rows(dv_ptr, offset_dv, stride_dv[3], o_n < len_k, dv, VALUE_DIM, BLOCK_V)
    offset_dq = batch * stride_dq[0] + head * stride_dq[1] + row * stride_dq[2]
    store_rows(dq_ptr, offset_dq, stride_dq[3], m_m, dq * scale, HEAD_DIM, BLOCK_D)


_launch_forward, _launch_backward = Launcher(forward_short_kernel), Launcher(backward_short_kernel)


def forward_short(
    out: Tensor, lse: Tensor | None, lse_error: Tensor | None, call: AttentionCall, config: AttentionConfig
) -> None:
    """Launch the forward kernel, as :func:`pyaccel.kernels.attention.forward`, for ``seq_k <= config.block_n``."""
    tiles = call.n_streams * -(-call.seq_q // config.block_m)
    programs = -(-tiles // config.tiles) + call.tail_programs
    arguments = forward_short_arguments(out, lse, lse_error, call, config)
    _launch_forward.named(out, programs, arguments, config.launch_options)


def forward_short_arguments(
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
        "TILES": config.tiles,
    }


def backward_short(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    do: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_error: Tensor | None,
    dlse: Tensor | None,
    call: AttentionCall,
    config: AttentionConfig,
) -> None:
    """Launch the backward kernel, for ``seq_q <= config.block_m`` and as many key heads as query heads. It writes dq,
    dk and dv, laid out as query, key and value are."""
    arguments = backward_short_arguments(dq, dk, dv, do, out, lse, lse_error, dlse, call, config)
    _launch_backward.named(dq, call.n_streams + call.tail_programs, arguments, config.launch_options)


def backward_short_arguments(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
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
        "dk_ptr": dk,
        "dv_ptr": dv,
        "do_ptr": do,
        "out_ptr": out,
        "lse_ptr": lse,
        "lse_error_ptr": lse_error,
        "dlse_ptr": dlse,
        **call.strides(dq=dq, dk=dk, dv=dv, do=do, out=out, lse=lse),
        "total_q": call.query.shape[2],
        "total_k": call.key.shape[2],
        **call.arguments(),
        **call.offsets(),
        **config.blocks,
    }
