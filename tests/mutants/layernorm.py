"""Bugs that a fused LayerNorm has had somewhere, or might: each must be caught by the family's tests."""

from __future__ import annotations

from tests.mutants import Mutant

TESTS = ("tests/kernels/test_layernorm.py", "tests/ops/test_residual_layernorm.py")

FORWARD = "kernels/layernorm/forward.py"
BACKWARD = "kernels/layernorm/backward.py"
COLUMN_SUM = "kernels/common/reduce.py"
PHILOX = "kernels/common/philox.py"
QUANTIZE = "kernels/common/tiles.py"
CONFIG = "kernels/common/configs.py"
OP = "pyaccel/ops/layernorm/api.py"

MUTANTS = [
    Mutant(
        "variance: unbiased",
        FORWARD,
        "tl.sum(centred * centred, axis=1) / n_cols + eps",
        "tl.sum(centred * centred, axis=1) / tl.maximum(n_cols - 1, 1) + eps",
    ),
    Mutant(
        "variance: not of the centred row",
        FORWARD,
        "tl.sum(centred * centred, axis=1) / n_cols + eps",
        "tl.sum(x * x, axis=1) / n_cols - mean * mean + eps",
    ),
    Mutant("variance: counts the columns beyond the row", FORWARD, "tl.where(mask, x - mean[:, None], 0.0)", "x - mean[:, None]"),
    Mutant("mean: over the block, not the row", FORWARD, "row_mean(x, mask, n_cols)", "row_mean(x, mask, BLOCK_N)"),
    Mutant("eps: outside the root", FORWARD, "tl.rsqrt(tl.sum(centred * centred, axis=1) / n_cols + eps)", "1.0 / (tl.sqrt(tl.sum(centred * centred, axis=1) / n_cols) + eps)"),
    Mutant("eps: left out", FORWARD, "/ n_cols + eps)", "/ n_cols)"),
    Mutant(
        "eps: torch's default for BERT's",
        OP,
        "    eps: float = 1e-12,\n    dropout_p: float = 0.0,\n    training: bool = False,\n    x_bias: Tensor | None = None,\n    rms_norm: bool = False,\n    return_output: bool = True,\n",
        "    eps: float = 1e-5,\n    dropout_p: float = 0.0,\n    training: bool = False,\n    x_bias: Tensor | None = None,\n    rms_norm: bool = False,\n    return_output: bool = True,\n",
    ),
    Mutant("statistics: of the sum before it is rounded", FORWARD, "== x_ptr.dtype.element_ty:\n            x = x.to(x_ptr.dtype.element_ty).to(tl.float32)", "== x_ptr.dtype.element_ty:\n            x = x * 1.0"),
    Mutant("weight: ignored", FORWARD, "        out *= tl.load(weight_ptr", "        out *= 1.0 + 0.0 * tl.load(weight_ptr"),
    Mutant("bias: added before the weight", FORWARD, "    out = centred * rstd[:, None]\n", "    out = centred * rstd[:, None] + (tl.load(bias_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :] if bias_ptr is not None else 0.0)\n"),
    Mutant("residual: left out", FORWARD, "        x += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)", "        x += 0.0 * tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)"),
    Mutant("residual: inside the dropout", FORWARD, "    if key_ptr is not None:\n        x = dropout_tile(", "    if key_ptr is not None and residual_ptr is None:\n        x = dropout_tile("),
    Mutant("x_bias: left out", FORWARD, "        x += tl.load(x_bias_ptr + o_col", "        x += 0.0 * tl.load(x_bias_ptr + o_col"),
    Mutant("stride of x: ignored", FORWARD, "x_ptr + row * stride_x_row", "x_ptr + row * n_cols"),
    Mutant("column stride of the residual: ignored", FORWARD, "col.to(tl.int64) * stride_residual_col", "col.to(tl.int64)"),
    Mutant("offsets: 32 bits", FORWARD, "tl.program_id(0).to(tl.int64) * BLOCK_ROWS", "tl.program_id(0) * BLOCK_ROWS"),
    Mutant("row mask: left out of the store", FORWARD, "    tl.store(mean_ptr + o_row, mean, mask=m_row)", "    tl.store(mean_ptr + o_row, mean)"),
    Mutant("column mask: left out of the store", FORWARD, "out.to(out_ptr.dtype.element_ty), mask=mask)", "out.to(out_ptr.dtype.element_ty), mask=m_row[:, None])"),
    Mutant("dropout: mask shifted by a column", PHILOX, "first_col // 4 + tl.arange", "first_col // 4 + 1 + tl.arange"),
    Mutant("dropout: words in another order", PHILOX, "tl.join(tl.join(w0, w2), tl.join(w1, w3))", "tl.join(tl.join(w0, w1), tl.join(w2, w3))"),
    Mutant("dropout: half of the key", PHILOX, "c3 = tl.load(key_ptr + 1).to(tl.uint32)", "c3 = (tl.load(key_ptr + 1) * 0).to(tl.uint32)"),
    Mutant("dropout: no scale", PHILOX, "x * scale, 0.0)", "x, 0.0)"),
    Mutant("dropout: signed comparison", PHILOX, "words >= threshold.to(tl.uint32, bitcast=True)", "words.to(tl.int32, bitcast=True) >= threshold"),
    Mutant("dropout: the same mask for every row", PHILOX, "o_row.to(tl.uint32)[:, None]", "(o_row * 0).to(tl.uint32)[:, None]"),
    Mutant("dropout: active in evaluation", OP, "    dropout_p = dropout_p if training else 0.0\n", ""),
    Mutant("backward: no gradient through the mean", BACKWARD, "dz -= (tl.sum(wdy, axis=1) / n_cols)[:, None]", "dz -= 0.0"),
    Mutant("backward: no gradient through the variance", BACKWARD, "        dz = wdy - x_hat * mean_wdy_x_hat[:, None]\n        if", "        dz = wdy\n        if"),
    Mutant("backward, tiled: no gradient through the variance", BACKWARD, "            dz = wdy - x_hat * mean_wdy_x_hat[:, None]\n            if", "            dz = wdy\n            if"),
    Mutant("backward, tiled: no gradient through the mean", BACKWARD, "dz -= mean_wdy[:, None]", "dz -= 0.0"),
    Mutant("RMSNorm: the mean is taken off", FORWARD, "centred = tl.where(mask, x, 0.0)", "centred = tl.where(mask, x - (tl.sum(x, axis=1) / n_cols)[:, None], 0.0)"),
    Mutant("RMSNorm: a gradient through a mean", BACKWARD, "        if mean_ptr is not None:\n            dz -=", "        if True:\n            dz -="),
    Mutant("int8: codes of the rounded output", FORWARD, "quantize_rows(out, mask)", "quantize_rows(out.to(x_ptr.dtype.element_ty).to(tl.float32), mask)"),
    Mutant("int8: rounded towards zero", QUANTIZE, "((codes + ROUND) - ROUND).to(tl.int8)", "codes.to(tl.int8)"),
    Mutant("int8: half away from zero", QUANTIZE, "((codes + ROUND) - ROUND)", "tl.where(codes < 0.0, tl.math.ceil(codes - 0.5), tl.math.floor(codes + 0.5))"),
    Mutant("int8: a row with NaN has a finite scale", QUANTIZE, "tl.where(has_nan, float(\"nan\"), tl.math.div_rn(amax", "tl.where(has_nan & False, float(\"nan\"), tl.math.div_rn(amax"),
    Mutant("int8: zeros have scale 0", QUANTIZE, "tl.where(scale == 0.0, 1.0, scale)", "scale"),
    Mutant("backward: weight left out of dx", BACKWARD, "        wdy = dy * tl.load(", "        wdy = dy + 0.0 * tl.load("),
    Mutant("backward: dropout mask left out of dx", BACKWARD, "    if key_ptr is not None:\n        dz = dropout_tile(", "    if key_ptr is not None and dsum_ptr is None:\n        dz = dropout_tile("),
    Mutant("backward, tiled: dropout mask of the first tile everywhere", BACKWARD, "dz, key_ptr, o_row, first_col, tl.full(", "dz, key_ptr, o_row, first_col * 0, tl.full("),
    Mutant("backward: gradient of the sum left out", BACKWARD, "        dz += tl.load(dsum_ptr + offset", "        dz += 0.0 * tl.load(dsum_ptr + offset"),
    Mutant("backward: dresidual after the dropout", BACKWARD, "    if dresidual_ptr is not None:\n        tl.store(dresidual_ptr + row * n_cols + col, dz.to(dresidual_ptr.dtype.element_ty), mask=mask)\n    if key_ptr is not None:", "    if dresidual_ptr is not None:\n        tl.store(dresidual_ptr + row * n_cols + col, dz.to(dresidual_ptr.dtype.element_ty), mask=mask & (dz > 0))\n    if key_ptr is not None:"),
    Mutant("backward: column stride of dy ignored", BACKWARD, "col.to(tl.int64) * stride_dy_col", "col.to(tl.int64)"),
    Mutant("backward: dx_bias before the dropout", BACKWARD, "            b_dx_bias += dx", "            b_dx_bias += dz"),
    Mutant("backward: dweight without normalizing", BACKWARD, "            b_dweight += dy * x_hat", "            b_dweight += dy * (x_hat / rstd[:, None])"),
    Mutant("backward: only a program's first rows count", BACKWARD, "            b_dbias += dy", "            b_dbias = dy"),
    Mutant("backward, tiled: partial sums start over at every block", BACKWARD, "tl.int32) > pid)", "tl.int32) < pid)"),
    Mutant("column sum: the last partial sums left out", COLUMN_SUM, "range(0, n_partials, BLOCK_P)", "range(0, n_partials - BLOCK_P + 1, BLOCK_P)"),
    Mutant("column sum: two gradients exchanged", COLUMN_SUM, "_sum_columns(out1_ptr, partial1_ptr", "_sum_columns(out1_ptr, partial0_ptr"),
]  # fmt: skip
