"""Bugs that an attention kernel has had somewhere, or might: each must be caught by the family's tests."""

from __future__ import annotations

from tests.mutants import Mutant

# Every kernel with small tiles, and every configuration.
TESTS = ("tests/kernels/test_attention.py",)

TILE = "kernels/attention/tile.py"
FORWARD = "kernels/attention/forward.py"
SHORT = "kernels/attention/short.py"
DQUERY = "kernels/attention/dq.py"
DKEY = "kernels/attention/dkv.py"
SCORES = "kernels/attention/scores.py"
CALL = "kernels/attention/params.py"

MUTANTS = [
    Mutant("scale: off by 1 %", CALL, '"scale": self.scale,', '"scale": self.scale * 1.01,'),
    Mutant("forward: LSE in the wrong base", TILE, "tl.log(row_sum)", "tl.log2(row_sum)"),
    Mutant("forward: LSE without the scale", FORWARD, "m_m, m * scale if FOLD_SCALE else m, row_sum", "m_m, m, row_sum"),
    Mutant("forward: earlier keys not rescaled", FORWARD, "acc * alpha[:, None]", "acc"),
    Mutant("forward: last block without a mask", FORWARD, "full_end) // BLOCK_N * BLOCK_N, end", "full_end) // BLOCK_N * BLOCK_N, end // BLOCK_N * BLOCK_N"),
    Mutant("forward: keys beyond the last count", TILE, "        s = tl.where(allowed, s, float(\"-inf\"))", "        s = tl.where(allowed | True, s, float(\"-inf\"))"),
    Mutant("causal: off by one", TILE, "        high = tl.minimum(high, 0)", "        high = tl.minimum(high, -1)"),
    Mutant("causal: a whole block counts as allowed too early", TILE, "full_end = tl.minimum(start_m + 1 + high, len_k)", "full_end = tl.minimum(start_m + BLOCK_M + high, len_k)"),
    Mutant("stride of value: that of key", FORWARD, "(first_k + o_n) * stride_v[2]", "(first_k + o_n) * stride_k[2]"),
    Mutant("scale: folded in although it isn't positive", CALL, "return self.scale > 0.0 and comes_last", "return comes_last"),
    Mutant("window: aligned top left", TILE, "        shift = len_k - len_q\n", "        shift = len_k * 0\n"),
    Mutant("attn_mask: rows' stride ignored", FORWARD, "o_m.to(tl.int64)[:, None] * stride_mask[2] if", "o_m.to(tl.int64)[:, None] * 1 if"),
    Mutant("attn_mask: a masked NaN leaks", TILE, "        s = tl.where(bias == float(\"-inf\"), bias, s + bias)", "        s = s + bias"),
    Mutant("values that no query reads are read", FORWARD, "                m_n &= any_counts(bias, 0)\n", ""),
    Mutant("stride of the head dimension: ignored", TILE, "    o_dim = tl.arange(0, BLOCK_D)\n    ptrs = ptr + offset[:, None] + o_dim.to(tl.int64)[None, :] * stride_dim\n    mask = None", "    o_dim = tl.arange(0, BLOCK_D)\n    ptrs = ptr + offset[:, None] + o_dim.to(tl.int64)[None, :]\n    mask = None"),
    Mutant("dkey: a masked NaN leaks", DKEY, "ds = tl.where(p == 0.0, 0.0, ds)", "ds = tl.where(p == 0.0, ds, ds)"),
    Mutant("dmask: not summed over batches", SCORES, "tl.where(mask_batch == n_batch, mask_of_batch + 1, n_batch)", "mask_of_batch + 1"),
    Mutant("LSE: what rounding took is not stored", TILE, "(maximum - lse) + log_sum)", "(maximum - lse) * 0)"),
    Mutant("LSE: what rounding took is not taken off", TILE, "s -= tl.expand_dims(lse_error, AXIS)", "s -= 0.0"),
    Mutant("dkey: keys that the band keeps from every query are read", DKEY, "m_read = m_n & (o_n >= low) & (o_n < len_q + high)", "m_read = m_n"),
    Mutant("grouped heads: in turn instead of in runs", FORWARD, "(head // group).to(tl.int64)", "(head % (n_heads // group)).to(tl.int64)"),
    Mutant("packed: rows beyond the last offset are left as they are", TILE, "for start in range(begin * stride[2] + pid * BLOCK, end", "for start in range(begin * stride[2] + pid * BLOCK, begin"),
    Mutant("dropout: the same mask for all heads", FORWARD, "keep_tile(key_ptr, o_m, start_n, stream, threshold", "keep_tile(key_ptr, o_m, start_n, stream * 0, threshold"),
    Mutant("dquery: dropout mask shifted", DQUERY, "keep_tile(key_ptr, o_m, start_n, stream", "keep_tile(key_ptr, o_m, start_n + 4, stream"),
    Mutant("dquery: dropped weights keep their gradient", DQUERY, "dp = tl.where(keep, dp * keep_scale, 0.0)", "dp = tl.where(keep, dp * keep_scale, dp)"),
    Mutant("dquery: LSE's gradient with the wrong sign", DQUERY, "delta -= tl.load(dlse_ptr", "delta += tl.load(dlse_ptr"),
    Mutant("dkey: wrong where nothing is causal", DKEY, "first, last = full_begin, end_of_head", "first, last = full_begin, tl.maximum(end_of_head - BLOCK_M, 0)"),
    Mutant("dkey: a whole block counts as allowed too early", DKEY, "full_begin = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - high, 0), BLOCK_M)", "full_begin = tl.cdiv(tl.maximum(start_n - high, 0), BLOCK_M)"),
    Mutant("dvalue: without dropout's scale", DKEY, "tl.where(keep, p * keep_scale, 0.0)", "tl.where(keep, p, 0.0)"),
    Mutant("dkey: only one head of a group counts", DKEY, "head = kv_head * group + member", "head = kv_head * group + member * 0"),
    Mutant("short forward: keys beyond the last count", SHORT, " & (o_n < len_k)\n", " & (o_n < len_k + 1)\n"),
    Mutant("short forward: a program's last tile left out", SHORT, "range(first_tile, tl.minimum(first_tile + TILES, n_tiles))", "range(first_tile, tl.minimum(first_tile + TILES - 1, n_tiles))"),
    Mutant("short backward: dropout mask shifted", SHORT, "keep_tile(key_ptr, o_m, start_n, stream", "keep_tile(key_ptr, o_m, start_n + 4, stream"),
    Mutant("short backward: dquery of the last block of keys alone", SHORT, "dq = tl.dot(ds, k, dq, input_precision=PRECISION)", "dq = tl.dot(ds, k, input_precision=PRECISION)"),
    Mutant("weights: those of masked keys remain", SCORES, "s = mask_scores(s, bias, m_n[None, :], o_m[:, None], o_n[None, :], low, high, BANDED)", "s = mask_scores(s, None, m_n[None, :], o_m[:, None], o_n[None, :], low, high, BANDED)"),
]  # fmt: skip
