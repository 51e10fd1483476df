"""What attention has one number for each score of: its weights, and the gradient of a float attn_mask.

Both are rebuilt from the saved log-sum-exp, a tile at a time; nothing of that size is kept between forward and
backward. For padded batches, which are what a mask or the weights can be asked for.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pyaccel.kernels.attention.config import AttentionConfig
from pyaccel.kernels.attention.params import AttentionCall
from pyaccel.kernels.attention.tile import (
    band,
    dot_rows,
    load_bias,
    load_lse,
    load_rows,
    mask_scores,
    probs_tile,
)
from pyaccel.kernels.common.device import device_guard
from pyaccel.kernels.common.philox import keep_tile


@triton.jit
def _probs(
    q, lse_ptr, lse_error_ptr, k_ptr, key_mask_ptr, mask_ptr,
    stride_lse, stride_k, stride_key_mask, stride_mask,
    batch, head, kv_head, o_m, m_m, o_n, m_n, low, high, scale,
    HEAD_DIM: tl.constexpr, BANDED: tl.constexpr, MASK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of weights [queries, keys], 0 where masked or beyond the last."""
    offset_k = batch * stride_k[0] + kv_head * stride_k[1] + o_n.to(tl.int64) * stride_k[2]
    k = load_rows(k_ptr, offset_k, stride_k[3], m_n, HEAD_DIM, BLOCK_D)
    s = dot_rows(q, k, PRECISION) * scale
    bias = None
    if mask_ptr is not None:
        row_offset = o_m.to(tl.int64)[:, None] * stride_mask[2] if MASK_ROWS else tl.zeros((1, 1), tl.int64)
        m_tile = (m_m[:, None] & m_n[None, :]) if MASK_ROWS else m_n[None, :]
        base = mask_ptr + batch * stride_mask[0] + head * stride_mask[1]
        bias = load_bias(base, row_offset, o_n.to(tl.int64)[None, :] * stride_mask[3], m_tile)
    if key_mask_ptr is not None:
        offset = (
            batch * stride_key_mask[0] + head * stride_key_mask[1] + o_n.to(tl.int64) * stride_key_mask[2]
        )
        m_n &= tl.load(key_mask_ptr + offset, mask=m_n, other=0) != 0
    s = mask_scores(s, bias, m_n[None, :], o_m[:, None], o_n[None, :], low, high, BANDED)
    offset_lse = batch * stride_lse[0] + head * stride_lse[1] + o_m
    lse = load_lse(lse_ptr, offset_lse, m_m)
    lse_error = None if lse_error_ptr is None else tl.load(lse_error_ptr + offset_lse, mask=m_m, other=0.0)
    return tl.where(
        lse[:, None] == float("inf"), 0.0, probs_tile(s, lse, lse_error, 1)
    )  # they may hold anything


@triton.jit(do_not_specialize=["threshold"])
def probs_kernel(
    probs_ptr,
    lse_ptr, q_ptr, k_ptr, v_ptr, key_mask_ptr, mask_ptr, key_ptr,
    stride_probs, stride_lse, stride_q, stride_k, stride_v, stride_key_mask, stride_mask,
    n_streams, n_heads, group, seq_q, seq_k, scale, window_left, window_right, keep_scale, threshold,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, MASK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The weights before dropout; a program makes one tile of them."""
    pid = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(seq_q, BLOCK_M), tl.cdiv(seq_k, BLOCK_N)
    stream = pid // (blocks_m * blocks_n)
    batch, head = (stream // n_heads).to(tl.int64), (stream % n_heads).to(tl.int64)
    o_m = pid // blocks_n % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    o_n = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_m, m_n = o_m < seq_q, o_n < seq_k
    offset_q = batch * stride_q[0] + head * stride_q[1] + o_m.to(tl.int64) * stride_q[2]
    q = load_rows(q_ptr, offset_q, stride_q[3], m_m, HEAD_DIM, BLOCK_D)
    low, high = band(pid * 0 + seq_q, pid * 0 + seq_k, window_left, window_right, IS_CAUSAL, HAS_WINDOW)
    p = _probs(
        q, lse_ptr, None, k_ptr, key_mask_ptr, mask_ptr, stride_lse, stride_k, stride_key_mask, stride_mask,
        batch, head, head // group, o_m, m_m, o_n, m_n, low, high, scale,
        HEAD_DIM, IS_CAUSAL or HAS_WINDOW, MASK_ROWS, PRECISION, BLOCK_D,
    )  # fmt: skip
    rows = (
        probs_ptr
        + batch * stride_probs[0]
        + head * stride_probs[1]
        + o_m.to(tl.int64)[:, None] * stride_probs[2]
    )
    tl.store(rows + o_n[None, :], p.to(probs_ptr.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["threshold"])
def dmask_kernel(
    dmask_ptr,
    do_ptr, lse_ptr, lse_error_ptr, delta_ptr, q_ptr, k_ptr, v_ptr, key_mask_ptr, mask_ptr, key_ptr,
    stride_dmask, stride_do, stride_lse, stride_q, stride_k, stride_v, stride_key_mask, stride_mask,
    mask_batch, mask_heads, mask_rows, mask_cols,
    n_streams, n_heads, group, seq_q, seq_k, scale, window_left, window_right, keep_scale, threshold,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, MASK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradient of attn_mask ``[1 or batch, 1 or heads, 1 or seq_q, 1 or seq_k]``.

    A program has one tile of the mask, and sums what each batch, head, block of rows and block of columns adds
    that the tile is broadcast over: in a fixed order, and in fp32.
    """
    pid = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(seq_q, BLOCK_M), tl.cdiv(seq_k, BLOCK_N)
    tiles_m, tiles_n = tl.cdiv(mask_rows, BLOCK_M), tl.cdiv(mask_cols, BLOCK_N)
    tile_n, tile_m = pid % tiles_n, pid // tiles_n % tiles_m
    mask_head, mask_of_batch = (
        pid // (tiles_n * tiles_m) % mask_heads,
        pid // (tiles_n * tiles_m) // mask_heads,
    )
    # From the one that the mask is for to the next, or all of them.
    n_batch = n_streams // n_heads
    end_batch = tl.where(mask_batch == n_batch, mask_of_batch + 1, n_batch)
    end_head = tl.where(mask_heads == n_heads, mask_head + 1, n_heads)
    end_m = tl.where(mask_rows == seq_q, tile_m + 1, blocks_m)
    end_n = tl.where(mask_cols == seq_k, tile_n + 1, blocks_n)
    low, high = band(pid * 0 + seq_q, pid * 0 + seq_k, window_left, window_right, IS_CAUSAL, HAS_WINDOW)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for batch_index in range(mask_of_batch, end_batch):
        for head_index in range(mask_head, end_head):
            batch, head = (pid * 0 + batch_index).to(tl.int64), (pid * 0 + head_index).to(tl.int64)
            stream = pid * 0 + batch_index * n_heads + head_index
            for block_m in range(tile_m, end_m):
                o_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
                m_m = o_m < seq_q
                offset_q = batch * stride_q[0] + head * stride_q[1] + o_m.to(tl.int64) * stride_q[2]
                offset_do = batch * stride_do[0] + head * stride_do[1] + o_m.to(tl.int64) * stride_do[2]
                q = load_rows(q_ptr, offset_q, stride_q[3], m_m, HEAD_DIM, BLOCK_D)
                do = load_rows(do_ptr, offset_do, stride_do[3], m_m, VALUE_DIM, BLOCK_V)
                offset_lse = batch * stride_lse[0] + head * stride_lse[1] + o_m
                delta = tl.load(delta_ptr + offset_lse, mask=m_m, other=0.0)
                for block_n in range(tile_n, end_n):
                    o_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
                    m_n = o_n < seq_k
                    p = _probs(
                        q, lse_ptr, lse_error_ptr, k_ptr, key_mask_ptr, mask_ptr, stride_lse, stride_k,
                        stride_key_mask, stride_mask, batch, head, head // group, o_m, m_m, o_n, m_n, low, high, scale,
                        HEAD_DIM, IS_CAUSAL or HAS_WINDOW, MASK_ROWS, PRECISION, BLOCK_D,
                    )  # fmt: skip
                    offset_v = (
                        batch * stride_v[0] + (head // group) * stride_v[1] + o_n.to(tl.int64) * stride_v[2]
                    )
                    v = load_rows(v_ptr, offset_v, stride_v[3], m_n, VALUE_DIM, BLOCK_V)
                    dp = dot_rows(do, v, PRECISION)
                    if key_ptr is not None:
                        keep = keep_tile(key_ptr, o_m, block_n * BLOCK_N, stream, threshold, BLOCK_M, BLOCK_N)
                        dp = tl.where(keep, dp * keep_scale, 0.0)
                    acc += tl.where(p == 0.0, 0.0, p * (dp - delta[:, None]))  # what is masked may be NaN
    o_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Sums over a tile's rows or columns are stored by its first.
    if mask_rows != seq_q:
        acc = tl.where(o_m[:, None] == 0, tl.sum(acc, axis=0)[None, :], 0.0)
    if mask_cols != seq_k:
        acc = tl.where(o_n[None, :] == 0, tl.sum(acc, axis=1)[:, None], 0.0)
    base = dmask_ptr + mask_of_batch.to(tl.int64) * stride_dmask[0] + mask_head.to(tl.int64) * stride_dmask[1]
    offset = o_m.to(tl.int64)[:, None] * stride_dmask[2] + o_n[None, :]
    mask = (o_m < mask_rows)[:, None] & (o_n < mask_cols)[None, :]
    tl.store(base + offset, acc.to(dmask_ptr.dtype.element_ty), mask=mask)


def probs(probs: Tensor, lse: Tensor, call: AttentionCall, config: AttentionConfig) -> None:
    """Launch: write the weights before dropout, ``probs`` [batch, heads, seq_q, seq_k], contiguous."""
    blocks = triton.cdiv(call.seq_q, config.block_m) * triton.cdiv(call.seq_k, config.block_n)
    with device_guard(probs):
        probs_kernel[(call.n_streams * blocks,)](
            **probs_arguments(probs, lse, call, config), **config.launch_options
        )


def probs_arguments(
    probs: Tensor, lse: Tensor, call: AttentionCall, config: AttentionConfig
) -> dict[str, Any]:
    """The kernel's arguments by name."""
    return {
        "probs_ptr": probs,
        "lse_ptr": lse,
        "stride_probs": probs.stride(),
        "stride_lse": lse.stride(),
        **call.arguments(),
        **config.blocks,
    }


def dmask(
    dmask: Tensor,
    do: Tensor,
    lse: Tensor,
    lse_error: Tensor | None,
    delta: Tensor,
    call: AttentionCall,
    config: AttentionConfig,
) -> None:
    """Launch: write the gradient of attn_mask, ``dmask`` [1 or batch, 1 or heads, 1 or seq_q, 1 or seq_k],
    contiguous. ``delta`` is what :func:`pyaccel.kernels.attention.dq.dquery` wrote."""
    batch, heads, rows, cols = dmask.shape
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(cols, config.block_n)
    with device_guard(dmask):
        dmask_kernel[(batch * heads * tiles,)](
            **dmask_arguments(dmask, do, lse, lse_error, delta, call, config), **config.launch_options
        )


def dmask_arguments(
    dmask: Tensor,
    do: Tensor,
    lse: Tensor,
    lse_error: Tensor | None,
    delta: Tensor,
    call: AttentionCall,
    config: AttentionConfig,
) -> dict[str, Any]:
    """The kernel's arguments by name."""
    batch, heads, rows, cols = dmask.shape
    return {
        "dmask_ptr": dmask,
        "do_ptr": do,
        "lse_ptr": lse,
        "lse_error_ptr": lse_error,
        "delta_ptr": delta,
        "stride_dmask": dmask.stride(),
        "stride_do": do.stride(),
        "stride_lse": lse.stride(),
        "mask_batch": batch,
        "mask_heads": heads,
        "mask_rows": rows,
        "mask_cols": cols,
        **call.arguments(),
        **config.blocks,
    }
