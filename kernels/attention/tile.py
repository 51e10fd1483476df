"""What the attention kernels share: where a sequence lies, which scores count, and tiles of rows.

Rows are queries and columns are keys, each by its index within the sequence. Strides come as tuples: (batch,
head, row, dim) of query, key, value and their like, (batch, head, row, column) of attn_mask, (batch, head,
column) of key_mask. A packed batch has batch stride 0 and its sequences begin where cu_seqlens says.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(1 << 29)  # beyond any index; a sum of three stays within 32 bits


@triton.jit
def sequence(cu_seqlens_ptr, batch, seq_len):
    """First row (int64) and length of a sequence; in a padded batch 0 and the one length that all have."""
    if cu_seqlens_ptr is None:
        return batch.to(tl.int64) * 0, seq_len + batch * 0
    else:
        first = tl.load(cu_seqlens_ptr + batch)
        return first.to(tl.int64), tl.load(cu_seqlens_ptr + batch + 1) - first


@triton.jit
def band(len_q, len_k, window_left, window_right, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The lowest and highest ``column - row`` allowed: causal is aligned top left, a window bottom right.

    Where both leave nothing, they are far apart: no range of rows or columns has anything then.
    """
    low = len_q * 0 - FAR
    high = len_q * 0 + FAR
    if HAS_WINDOW:
        shift = len_k - len_q
        low = tl.where(window_left < 0, low, shift - window_left)
        high = tl.where(window_right < 0, high, shift + window_right)
    if IS_CAUSAL:
        high = tl.minimum(high, 0)
    if HAS_WINDOW:
        empty = low > high
        low, high = tl.where(empty, FAR, low), tl.where(empty, -FAR, high)
    return low, high


@triton.jit
def live_keys(key_mask_ptr, stride, len_k, BLOCK: tl.constexpr):
    """The range of keys outside of which key_mask (of this batch and head) allows none."""
    begin = len_k
    end = len_k * 0
    for start in range(0, len_k, BLOCK):
        o_col = start + tl.arange(0, BLOCK)
        m_col = tl.load(key_mask_ptr + o_col.to(tl.int64) * stride, mask=o_col < len_k, other=0) != 0
        begin = tl.minimum(begin, tl.min(tl.where(m_col, o_col, len_k), axis=0))
        end = tl.maximum(end, tl.max(tl.where(m_col, o_col + 1, 0), axis=0))
    return begin, end


@triton.jit
def key_range(
    start_m, len_q, len_k, low, high, key_mask_ptr, stride_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The keys that some query of a block may attend to, from begin to end; and where, if there are no other
    masks than causal, the blocks of keys end that all of these queries attend to."""
    begin = tl.maximum(start_m + low, 0)
    end = tl.minimum(tl.minimum(start_m + BLOCK_M, len_q) + high, len_k)
    full_end = tl.minimum(start_m + 1 + high, len_k) // BLOCK_N * BLOCK_N
    if key_mask_ptr is not None:
        live_begin, live_end = live_keys(key_mask_ptr, stride_key, len_k, 1024)
        begin, end = tl.maximum(begin, live_begin), tl.minimum(end, live_end)
    return begin, end, full_end


@triton.jit
def load_rows(ptr, offset, stride_dim, m_row, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile [rows, BLOCK_D] at the rows' offsets (int64): 0 where m_row is False, and beyond DIM.

    m_row is None where all rows exist.
    """
    o_dim = tl.arange(0, BLOCK_D)
    ptrs = ptr + offset[:, None] + o_dim.to(tl.int64)[None, :] * stride_dim
    mask = None
    if m_row is not None:
        mask = m_row[:, None]
    if DIM != BLOCK_D:
        m_dim = (o_dim < DIM)[None, :]
        mask = m_dim if mask is None else mask & m_dim
    if mask is None:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, offset, stride_dim, m_row, x, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store a tile [rows, BLOCK_D], but for the rows where m_row is False and what lies beyond DIM."""
    o_dim = tl.arange(0, BLOCK_D)
    ptrs = ptr + offset[:, None] + o_dim.to(tl.int64)[None, :] * stride_dim
    mask = m_row[:, None]
    if DIM != BLOCK_D:
        mask = mask & (o_dim < DIM)[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def dot_rows(a, b, PRECISION: tl.constexpr):
    """``a @ b^T``: the products of all rows of a with all rows of b."""
    return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def load_bias(mask_ptr, row_offset, col_offset, m_tile):
    """attn_mask (uint8: 0 masks; float: is added, and -inf masks) as a tile of fp32 to add, -inf where masked.

    The offsets (int64) broadcast to the tile; where m_tile is False the tile is -inf.
    """
    offset = row_offset + col_offset
    if mask_ptr.dtype.element_ty == tl.uint8:
        return tl.where(tl.load(mask_ptr + offset, mask=m_tile, other=0) != 0, 0.0, float("-inf"))
    else:
        return tl.load(mask_ptr + offset, mask=m_tile, other=float("-inf")).to(tl.float32)


@triton.jit
def any_counts(bias, AXIS: tl.constexpr):
    """Whether some score along the axis counts by a tile of :func:`load_bias`. One of NaN does: it is a value."""
    return tl.max((bias != float("-inf")).to(tl.int32), axis=AXIS) > 0


@triton.jit
def apply_band(x, o_row, o_col, low, high):
    """-inf where ``column - row`` isn't from low to high; o_row and o_col broadcast to the tile."""
    return tl.where((o_col - o_row >= low) & (o_col - o_row <= high), x, float("-inf"))


@triton.jit
def mask_scores(s, bias, allowed, o_row, o_col, low, high, BANDED: tl.constexpr):
    """Scores with every mask applied: -inf where one masks, whatever the score, so that a masked NaN stays out.

    bias (of :func:`load_bias`) and allowed (bool) may be None; all but the scores broadcast to the tile.
    """
    if bias is not None:
        s = tl.where(bias == float("-inf"), bias, s + bias)
    if allowed is not None:
        s = tl.where(allowed, s, float("-inf"))
    if BANDED:
        s = apply_band(s, o_row, o_col, low, high)
    return s


@triton.jit
def probs_tile(s, lse, lse_error, AXIS: tl.constexpr):
    """``exp(scores - lse)``: 0 where the score is -inf. AXIS is the one that the rows' lse hasn't.

    The difference comes first: it is small where it matters, and a factor rounds both of its sides before.
    """
    s -= tl.expand_dims(lse, AXIS)
    if lse_error is not None:
        s -= tl.expand_dims(lse_error, AXIS)
    return tl.math.exp2(s * LOG2E)


@triton.jit
def load_lse(lse_ptr, offset, m_row):
    """LSE of some rows, for :func:`probs_tile`: +inf for rows that don't exist or have no key."""
    lse = tl.load(lse_ptr + offset, mask=m_row, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def store_lse(lse_ptr, lse_error_ptr, offset, m_row, maximum, row_sum):
    """Store ``lse = maximum + log(row_sum)``, -inf for rows without keys, and what rounding took from it.

    A float mask may move the scores of a whole row so far (to the lowest number, say) that their LSE can't hold
    the logarithm: without its error the weights rebuilt from it would be 1, and not 1 / n.
    """
    log_sum = tl.log(row_sum)
    lse = tl.where(row_sum == 0.0, float("-inf"), maximum + log_sum)
    if lse_ptr is not None:
        tl.store(lse_ptr + offset, lse, mask=m_row)
    if lse_error_ptr is not None:
        error = tl.where(row_sum == 0.0, 0.0, (maximum - lse) + log_sum)
        tl.store(lse_error_ptr + offset, error, mask=m_row)


@triton.jit
def clear_tail(ptr, value, cu_seqlens_ptr, n_sequences, total, stride, n_parts, first_program):
    """Fill the rows beyond the last offset of a packed tensor. The programs from first_program on share it out.

    A row takes ``stride[2]`` elements, one behind the other; there are n_parts such tensors, ``stride[1]`` apart.
    """
    BLOCK: tl.constexpr = 1024
    pid = tl.program_id(0) - first_program
    n_programs = tl.num_programs(0) - first_program
    begin = tl.load(cu_seqlens_ptr + n_sequences).to(tl.int64)
    end = begin * 0 + total
    for part in range(n_parts):
        for start in range(begin * stride[2] + pid * BLOCK, end * stride[2], n_programs * BLOCK):
            o = start + tl.arange(0, BLOCK)
            fill = tl.full((BLOCK,), value, ptr.dtype.element_ty)
            tl.store(ptr + (begin * 0 + part) * stride[1] + o, fill, mask=o < end * stride[2])
