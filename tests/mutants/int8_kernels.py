"""Bugs of the int8 kernels: each must be caught by the tests of their launchers."""

from __future__ import annotations

from tests.mutants import Mutant

TESTS = ("tests/kernels/test_int8_quantize.py", "tests/kernels/test_int8.py", "tests/ops/test_int8.py")

ROWS = "kernels/int8/quantize.py"
TILE = "kernels/common/tiles.py"
MATMUL = "kernels/int8/matmul.py"
EPILOGUE = "kernels/int8/epilogue.py"
WEIGHT_ONLY = "kernels/int8/weight_only.py"
CONFIG = "kernels/int8/config.py"
OP = "pyaccel/ops/int8/triton.py"

MUTANTS = [
    Mutant("quantize: the factor forgotten", ROWS, "    if factor_ptr is not None:\n        x *= tl.load", "    if factor_ptr is not None:\n        x += 0.0 * tl.load"),
    Mutant("quantize: the offset is not taken off", ROWS, "        x -= offset[:, None]\n", ""),
    Mutant("quantize: the last rows' offsets unmasked", ROWS, "tl.store(offset_ptr + o_row, offset, mask=m_row)", "tl.store(offset_ptr + o_row, offset)"),
    Mutant("quantize: the last columns' codes unmasked", ROWS, "codes, mask=mask)\n    tl.store(scale_ptr", "codes, mask=m_row[:, None])\n    tl.store(scale_ptr"),
    Mutant("quantize: a given scale for the first tile alone", ROWS, "encode(x, tl.load(scale_ptr)), mask=mask)", "encode(x, tl.load(scale_ptr) + pid), mask=mask)"),
    Mutant("quantize: the middle of the range counts masked columns", TILE, "high = tl.max(tl.where(mask, x, float(\"-inf\")), axis=1)", "high = tl.max(x, axis=1)"),
    Mutant("quantize: the middle is the largest value", TILE, "high * 0.5 + low * 0.5 + 0.0)", "high + low * 0.0 + 0.0)"),
    Mutant("quantize: not clamped", TILE, "    codes = tl.minimum(tl.maximum(codes, -INT8_MAX), INT8_MAX)\n", ""),
    Mutant("row sums: the tail counts what is beyond", ROWS, "mask = m_row[:, None] & (o_col < n_cols)[None, :]\n        total", "mask = m_row[:, None] & (o_col < n_cols + BLOCK_N)[None, :]\n        total"),
    Mutant("row sums: only the last block counts", ROWS, "        total += tl.load(", "        total = tl.load("),
    Mutant("int8 tiles: the last column's weight is read in place of the one before", MATMUL, "b_row = tl.minimum(o_n, n_out - 1)", "b_row = tl.where(o_n == n_out - 2, n_out - 1, tl.minimum(o_n, n_out - 1))"),
    Mutant("int8 tiles: a persistent program makes one tile", MATMUL, "tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=TMA)", "tl.range(tl.program_id(0), tl.program_id(0) + 1, 1, flatten=TMA)"),
    Mutant("int8 sums: the inner dimension's tail is not masked", MATMUL, '"EVEN_K": n_in % config.block_k == 0', '"EVEN_K": True'),
    Mutant("int8 sums: the tail is masked in one operand, by the block", MATMUL, "m_k = (start + tl.arange(0, BLOCK_K) < n_in)", "m_k = (tl.arange(0, BLOCK_K) < n_in)"),
    Mutant("int8 sums: only the last block counts", MATMUL, "                sums = tl.dot(a, tl.trans(b), sums, out_dtype=tl.int32)\n                a_ptrs", "                sums = tl.dot(a, tl.trans(b), sums * 0, out_dtype=tl.int32)\n                a_ptrs"),
    Mutant("int8 split: every part sums from the beginning", MATMUL, "first_k = split * per_split", "first_k = split * 0"),
    Mutant("int8 split: parts overlap", MATMUL, "last_k = tl.minimum(first_k + per_split, n_in)", "last_k = tl.minimum(first_k + per_split + BLOCK_K, n_in)"),
    Mutant("int8 split: all parts in one place", MATMUL, "out_ptr += split.to(tl.int64) * n_rows * n_out", "out_ptr += split.to(tl.int64) * 0"),
    Mutant("int8 epilogue: halves of a tile exchanged", MATMUL, "left, right = tl.split", "right, left = tl.split"),
    Mutant("int8 epilogue: the second half over the first", MATMUL, "out_ptr, right, o_m, first_n + HALF,", "out_ptr, right, o_m, first_n,"),
    Mutant("int8 epilogue: the last rows unmasked", MATMUL, "mask = (o_m < n_rows)[:, None] & (o_n < n_out)[None, :]", "mask = (o_n < n_out)[None, :]"),
    Mutant("int8 epilogue: the first row's scale for all", EPILOGUE, "a_scale_ptr + o_m * strides[0]", "a_scale_ptr + o_m * 0"),
    Mutant("int8 epilogue: a scale for each channel is never one number", EPILOGUE, "b_scale_ptr + o_n * strides[1]", "b_scale_ptr + o_n"),
    Mutant("int8 epilogue: the offset's part after the weight's scale", EPILOGUE, "x += offset * tl.load(b_sum_ptr + o_n, mask=m_n, other=0).to(tl.float32)[None, :]\n", "x += offset * tl.load(b_sum_ptr + o_n, mask=m_n, other=0).to(tl.float32)[None, :] / tl.load(b_scale_ptr + o_n * strides[1], mask=m_n, other=1.0)[None, :]\n"),
    Mutant("int8 epilogue: bias after the activation", EPILOGUE, "    if residual_ptr is not None:\n", "    if bias_ptr is not None and ACTIVATION is not None:\n        b = tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]\n        x += b * 0.01\n    if residual_ptr is not None:\n"),
    Mutant("int8 epilogue: residual before the activation", EPILOGUE, "    if ACTIVATION is not None:\n        x = activation_tile(x, ACTIVATION)\n    if residual_ptr is not None:\n        offset_residual", "    if residual_ptr is not None:\n        offset_residual"),
    Mutant("int8 epilogue: the residual is contiguous", EPILOGUE, "o_m.to(tl.int64)[:, None] * strides[2] + o_n.to(tl.int64)[None, :] * strides[3]", "o_m.to(tl.int64)[:, None] * n_out + o_n.to(tl.int64)[None, :]"),
    Mutant("int8 finish: a part of the split is left out", EPILOGUE, "for _ in range(1, n_splits):", "for _ in range(2, n_splits):"),
    Mutant("int8 finish: the sums are fp32 before they are added", EPILOGUE, "sums += tl.load(sums_ptr + offset, mask=mask, other=0)", "sums = (sums.to(tl.float16) + tl.load(sums_ptr + offset, mask=mask, other=0).to(tl.float16)).to(tl.int32)"),
    Mutant("int8 finish: codes of the rounded result", EPILOGUE, "        x, scale = quantize_rows(x, mask)", "        x, scale = quantize_rows(x.to(tl.float16).to(tl.float32), mask)"),
    Mutant("weight only: scales left out", WEIGHT_ONLY, "tl.load(weight_scale_ptr + o_n, mask=m_n, other=0.0)[None, :]  #", "1.0  #"),
    Mutant("weight only: sums rounded from block to block", WEIGHT_ONLY, "        x_ptrs += BLOCK_K\n", "        acc = acc.to(x.dtype).to(tl.float32)\n        x_ptrs += BLOCK_K\n"),
    Mutant("weight only: the last columns unmasked", WEIGHT_ONLY, "mask = (o_m < n_rows)[:, None] & m_n[None, :]", "mask = (o_m < n_rows)[:, None]"),
    Mutant("int8 op: what is beyond a row's end is what the memory holds", OP, "padded = F.pad(x, (0, -x.shape[1] % 16))", "padded = F.pad(x, (0, -x.shape[1] % 16), value=1)"),
    Mutant("int8 op: an offset without the weight's sums of this call", OP, "quantize.row_sum(b_sum, b, config.int8_row_sum())", "quantize.row_sum(b_sum, a[: len(b)], config.int8_row_sum())"),
    Mutant("int8 configurations: few rows are never split", CONFIG, "return max(1, min(wanted, steps // MIN_STEPS))", "return 1"),
]  # fmt: skip
