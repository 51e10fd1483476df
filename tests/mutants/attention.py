"""Bugs that an attention kernel has had somewhere, or might: each must be caught by the family's tests."""

from __future__ import annotations

from tests.mutants import Mutant

# Small cases on every path first; the matrix finds what they let pass.
TESTS = ("tests/kernels/test_attention.py", "tests/ops/test_attention.py", "tests/ops/test_attention_triton.py")

TILE = "kernels/attention_tile.py"
FORWARD = "kernels/attention.py"
SHORT = "kernels/attention_short.py"
DQUERY = "kernels/attention_dquery.py"
DKEY = "kernels/attention_dkey_dvalue.py"
SCORES = "kernels/attention_scores.py"
CALL = "kernels/attention_call.py"
OP = "pyaccel/ops/_attention_triton.py"

MUTANTS = [
    Mutant("scale: off by 1 %", CALL, '"scale": self.scale,', '"scale": self.scale * 1.01,'),
    Mutant("scale: of the padded head dimension", OP, "1.0 / math.sqrt(query.shape[-1])", "1.0 / math.sqrt(max(16, 1 << (query.shape[-1] - 1).bit_length()))"),
    Mutant("scale: folded in although it isn't positive", CALL, "self.scale > 0.0 and (mask is None", "(mask is None"),
    Mutant("forward: LSE in the wrong base", FORWARD, "tl.log(row_sum)", "tl.log2(row_sum)"),
    Mutant("short forward: LSE in the wrong base", SHORT, "tl.log(row_sum)", "tl.log2(row_sum)"),
    Mutant("forward: LSE without the scale", FORWARD, "lse = (m * scale if FOLD_SCALE else m)", "lse = m"),
    Mutant("forward: earlier keys not rescaled", FORWARD, "acc * alpha[:, None]", "acc"),
    Mutant("forward: earlier sum not rescaled", FORWARD, "row_sum * alpha + tl.sum", "row_sum + tl.sum"),
    Mutant("forward: last block without a mask", FORWARD, "full_end) // BLOCK_N * BLOCK_N, end", "full_end) // BLOCK_N * BLOCK_N, end // BLOCK_N * BLOCK_N"),
    Mutant("forward: keys beyond the last count", TILE, "        s = tl.where(allowed, s, float(\"-inf\"))", "        s = tl.where(allowed | True, s, float(\"-inf\"))"),
    Mutant("forward: dropout before the sum", FORWARD, "                row_sum = row_sum * alpha + tl.sum(p, axis=1)\n", "                row_sum = row_sum * alpha + tl.sum(tl.where(keep_tile(key_ptr, o_m, start_n, stream, threshold, BLOCK_M, BLOCK_N), p, 0.0) if key_ptr is not None else p, axis=1)\n"),
    Mutant("forward: NaN of a row without keys", FORWARD, "tl.where(row_sum == 0.0, float(\"-inf\"), lse)", "lse"),
    Mutant("causal: aligned bottom right", TILE, "        high = tl.minimum(high, 0)", "        high = tl.minimum(high, len_k - len_q)"),
    Mutant("causal: off by one", TILE, "        high = tl.minimum(high, 0)", "        high = tl.minimum(high, -1)"),
    Mutant("causal: a whole block counts as allowed too early", TILE, "full_end = tl.minimum(start_m + 1 + high, len_k)", "full_end = tl.minimum(start_m + BLOCK_M + high, len_k)"),
    Mutant("window: aligned top left", TILE, "        shift = len_k - len_q\n", "        shift = len_k * 0\n"),
    Mutant("window: the left side ignored", TILE, "low = tl.where(window_left < 0, low, shift - window_left)", "low = tl.where(window_left < 0, low, low)"),
    Mutant("key mask: of the first head for all", FORWARD, "batch * stride_key_mask[0] + head * stride_key_mask[1]\n", "batch * stride_key_mask[0]\n"),
    Mutant("key mask: ends with the first hole", TILE, "end = tl.maximum(end, tl.max(tl.where(m_col, o_col + 1, 0), axis=0))", "end = tl.maximum(end, tl.sum(m_col.to(tl.int32), axis=0) + tl.minimum(begin, 0))"),
    Mutant("attn_mask: rows' stride ignored", FORWARD, "o_m.to(tl.int64)[:, None] * stride_mask[2] if", "o_m.to(tl.int64)[:, None] * 1 if"),
    Mutant("attn_mask: True masks", TILE, "mask=m_tile, other=0) != 0, 0.0", "mask=m_tile, other=0) == 0, 0.0"),
    Mutant("attn_mask: scaled like a score", TILE, "        s = tl.where(bias == float(\"-inf\"), bias, s + bias)", "        s = tl.where(bias == float(\"-inf\"), bias, s + bias * 0.25)"),
    Mutant("attn_mask: a masked NaN leaks", TILE, "        s = tl.where(bias == float(\"-inf\"), bias, s + bias)", "        s = s + bias"),
    Mutant("values that no query reads are read", FORWARD, "                m_n &= tl.max(bias, axis=0) > float(\"-inf\")\n", ""),
    Mutant("stride of value: that of key", FORWARD, "(first_k + o_n) * stride_v[2]", "(first_k + o_n) * stride_k[2]"),
    Mutant("stride of the head dimension: ignored", TILE, "    o_dim = tl.arange(0, BLOCK_D)\n    ptrs = ptr + offset[:, None] + o_dim.to(tl.int64)[None, :] * stride_dim\n    mask = None", "    o_dim = tl.arange(0, BLOCK_D)\n    ptrs = ptr + offset[:, None] + o_dim.to(tl.int64)[None, :]\n    mask = None"),
    Mutant("head dimension: what lies beyond is read", TILE, "        m_dim = (o_dim < DIM)[None, :]", "        m_dim = (o_dim < BLOCK_D)[None, :]"),
    Mutant("grouped heads: in turn instead of in runs", FORWARD, "(head // group).to(tl.int64)", "(head % (n_heads // group)).to(tl.int64)"),
    Mutant("packed: every sequence has the first one's keys", FORWARD, "first_k, len_k = sequence(cu_k_ptr, batch, seq_k)", "first_k, len_k = sequence(cu_k_ptr, batch * 0, seq_k)"),
    Mutant("packed: rows beyond the last offset are left as they are", TILE, "for start in range(begin * stride[2] + pid * BLOCK, end", "for start in range(begin * stride[2] + pid * BLOCK, begin"),
    Mutant("dropout: the same mask for all heads", FORWARD, "keep_tile(key_ptr, o_m, start_n, stream, threshold", "keep_tile(key_ptr, o_m, start_n, stream * 0, threshold"),
    Mutant("dropout: no scale", FORWARD, "keep_scale if key_ptr is not None else 1.0", "1.0"),
    Mutant("dquery: dropout mask shifted", DQUERY, "keep_tile(key_ptr, o_m, start_n, stream", "keep_tile(key_ptr, o_m, start_n + 4, stream"),
    Mutant("dquery: dropped weights keep their gradient", DQUERY, "dp = tl.where(keep, dp * keep_scale, 0.0)", "dp = tl.where(keep, dp * keep_scale, dp)"),
    Mutant("dquery: delta left out", DQUERY, "                ds = p * (dp - delta[:, None])", "                ds = p * dp"),
    Mutant("dquery: scale left out", DQUERY, "dq * scale, HEAD_DIM", "dq, HEAD_DIM"),
    Mutant("dquery: LSE's gradient with the wrong sign", DQUERY, "delta -= tl.load(dlse_ptr", "delta += tl.load(dlse_ptr"),
    Mutant("dquery: output's stride for its gradient", DQUERY, "row * stride_do[2]", "row * stride_out[2]"),
    Mutant("dkey: wrong where nothing is causal", DKEY, "first, last = full_begin, end_of_head", "first, last = full_begin, tl.maximum(end_of_head - BLOCK_M, 0)"),
    Mutant("dkey: a whole block counts as allowed too early", DKEY, "full_begin = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - high, 0), BLOCK_M)", "full_begin = tl.cdiv(tl.maximum(start_n - high, 0), BLOCK_M)"),
    Mutant("dkey: dropout mask shifted", DKEY, "keep_tile(key_ptr, o_m, start_n, stream", "keep_tile(key_ptr, o_m + 1, start_n, stream"),
    Mutant("dvalue: without dropout's scale", DKEY, "tl.where(keep, p * keep_scale, 0.0)", "tl.where(keep, p, 0.0)"),
    Mutant("dkey: only one head of a group counts", DKEY, "head = kv_head * group + member", "head = kv_head * group + member * 0"),
    Mutant("dkey: NaN of a row without keys", DKEY, "                        m_m &= lse < float(\"inf\")\n", "                        m_m &= lse <= float(\"inf\")\n"),
    Mutant("dkey: a masked NaN leaks", DKEY, "ds = tl.where(p == 0.0, 0.0, ds)", "ds = tl.where(p == 0.0, ds, ds)"),
    Mutant("short forward: keys beyond the last count", SHORT, " & (o_n < len_k)\n", " & (o_n < len_k + 1)\n"),
    Mutant("short forward: a program's last tile left out", SHORT, "range(first_tile, tl.minimum(first_tile + TILES, n_tiles))", "range(first_tile, tl.minimum(first_tile + TILES - 1, n_tiles))"),
    Mutant("short backward: dropout mask shifted", SHORT, "keep_tile(key_ptr, o_m, start_n, stream", "keep_tile(key_ptr, o_m, start_n + 4, stream"),
    Mutant("short backward: delta of the gradient with itself", SHORT, "delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), axis=1)", "delta = tl.sum(do.to(tl.float32) * do.to(tl.float32), axis=1)"),
    Mutant("short backward: dquery of the last block of keys alone", SHORT, "dq = tl.dot(ds, k, dq, input_precision=PRECISION)", "dq = tl.dot(ds, k, input_precision=PRECISION)"),
    Mutant("short backward: NaN of a row without keys", SHORT, "m_read = (m_m & (lse < float(\"inf\"))) if IDLE_ROWS else m_m", "m_read = m_m"),
    Mutant("dmask: not summed over batches", SCORES, "tl.where(mask_batch == n_batch, mask_of_batch + 1, n_batch)", "mask_of_batch + 1"),
    Mutant("dmask: rows not summed", SCORES, "tl.where(o_m[:, None] == 0, tl.sum(acc, axis=0)[None, :], 0.0)", "tl.where(o_m[:, None] == 0, acc, 0.0)"),
    Mutant("dmask: dropout left out", SCORES, "dp = tl.where(keep, dp * keep_scale, 0.0)", "dp = tl.where(keep, dp, dp)"),
    Mutant("weights: those of masked keys remain", SCORES, "s = mask_scores(s, bias, m_n[None, :], o_m[:, None], o_n[None, :], low, high, BANDED)", "s = mask_scores(s, None, m_n[None, :], o_m[:, None], o_n[None, :], low, high, BANDED)"),
    Mutant("offsets of rows: 32 bits", TILE, "        return first.to(tl.int64), tl.load", "        return first, tl.load"),
]  # fmt: skip
