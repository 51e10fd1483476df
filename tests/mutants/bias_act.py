"""Bugs that a fused bias + activation has had somewhere, or might: each must be caught by the family's tests."""

from __future__ import annotations

from tests.mutants import Mutant

TESTS = ("tests/kernels/test_bias_act.py", "tests/ops/test_bias_gelu.py")

KERNEL = "kernels/bias_act/kernels.py"
TILE = "kernels/common/activations.py"
QUANTIZE = "kernels/common/tiles.py"
ROW = "kernels/common/tiles.py"
CONFIG = "kernels/bias_act/config.py"
OP = "pyaccel/ops/bias_act/api.py"

MUTANTS = [
    Mutant("erf GELU: the tanh one in its place", TILE, "        return 0.5 * x * (1.0 + tl.math.erf(x * SQRT_HALF))", "        return x * tl.sigmoid((x + x * x * x * CUBIC) * SQRT_8_OVER_PI)"),
    Mutant("tanh GELU: the cubic term's constant is off", TILE, "CUBIC = tl.constexpr(0.044715)", "CUBIC = tl.constexpr(0.0447)"),
    Mutant("tanh GELU: half of the sigmoid's argument", TILE, "        return x * tl.sigmoid((x + x * x * x * CUBIC) * SQRT_8_OVER_PI)", "        return x * tl.sigmoid((x + x * x * x * CUBIC) * SQRT_8_OVER_PI * 0.5)"),
    Mutant("ReLU: NaN becomes zero", TILE, "tl.where(x <= 0.0, 0.0, x)", "tl.where(x > 0.0, x, 0.0)"),
    Mutant("SiLU: the sigmoid of the tanh GELU's approximation", TILE, "        return x * tl.sigmoid(x)", "        return x * tl.sigmoid(x * 1.702)"),
    Mutant("derivative: of the erf GELU, wrong sign of the density", TILE, "return cdf + x * tl.exp", "return cdf - x * tl.exp"),
    Mutant("derivative: of the erf GELU, a density of another width", TILE, "tl.exp(-0.5 * x * x)", "tl.exp(x * x * -1.0)"),
    Mutant("derivative: of the tanh GELU, without the inner one", TILE, "return s + x * ds * slope", "return s + x * ds * SQRT_8_OVER_PI"),
    Mutant("derivative: of the tanh GELU, a third of the inner cubic term", TILE, "x * x * (3.0 * CUBIC)", "x * x * CUBIC"),
    Mutant("derivative: of the sigmoid, not of its mirror below zero", TILE, "tl.where(u >= 0.0, r, e * r)", "r + 0.0 * u"),
    Mutant("derivative: of the sigmoid, overflowing", TILE, "e = tl.exp(-tl.abs(u))", "e = tl.exp(-u)"),
    Mutant("derivative: of SiLU, wrong sign", TILE, "return s + x * ds\n", "return s - x * ds\n"),
    Mutant("derivative: of ReLU at zero", TILE, "tl.where(x <= 0.0, 0.0, 1.0)", "tl.where(x < 0.0, 0.0, 1.0)"),
    Mutant("forward: bias after the activation", KERNEL, "    out = activation_tile(x, ACTIVATION)\n", "    out = activation_tile(x, ACTIVATION)\n    if bias_ptr is not None:\n        b = tl.load(bias_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]\n        out = activation_tile(x - b, ACTIVATION) + b\n"),
    Mutant("forward: the sum is rounded first", KERNEL, "    out = activation_tile(x, ACTIVATION)\n", "    out = activation_tile(x.to(tl.bfloat16).to(tl.float32), ACTIVATION)\n"),
    Mutant("forward: the last columns unmasked", KERNEL, "o_col[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)", "o_col[None, :], out.to(out_ptr.dtype.element_ty), mask=(o_row < n_rows)[:, None])"),
    Mutant("forward: the last rows unmasked", KERNEL, "o_col[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)", "o_col[None, :], out.to(out_ptr.dtype.element_ty), mask=m_col[None, :])"),
    Mutant("forward: the last part of a row left out", KERNEL, "-(-n_rows // config.block_rows) * -(-n_cols // config.block_n)", "-(-n_rows // config.block_rows) * max(n_cols // config.block_n, 1)"),
    Mutant("rows' stride of the inputs: ignored", ROW, "offset = row * stride_row +", "offset = row * (stride_row * 0 + 1) +"),
    Mutant("columns' stride of the inputs: ignored", ROW, "o_col.to(tl.int64)[None, :] * stride_col", "o_col.to(tl.int64)[None, :]"),
    Mutant("offsets of columns: 32 bits", ROW, "o_col.to(tl.int64)[None, :] * stride_col", "o_col[None, :] * stride_col"),
    Mutant("offsets of rows: 32 bits", KERNEL, "    o_row = (pid // col_blocks).to(tl.int64) * BLOCK_ROWS", "    o_row = (pid // col_blocks) * BLOCK_ROWS"),
    Mutant("backward: bias left out", KERNEL, "            x += bias\n", "            x += bias * 0.0\n"),
    Mutant("backward: dy of x's strides", KERNEL, "mask, stride_dy_row, stride_dy_col)", "mask, stride_x_row, stride_x_col)"),
    Mutant("backward: only a program's last rows count in dbias", KERNEL, "            b_dbias += dx", "            b_dbias = dx"),
    Mutant("backward: dbias is the sum of dy", KERNEL, "            b_dbias += dx", "            b_dbias += dy"),
    Mutant("backward: dbias of the rounded dx", KERNEL, "            b_dbias += dx", "            b_dbias += dx.to(tl.bfloat16).to(tl.float32)"),
    Mutant("backward: partial sums of another row", KERNEL, "o_partial = first_block.to(tl.int64) * n_cols", "o_partial = tl.maximum(first_block - 1, 0).to(tl.int64) * n_cols"),
    Mutant("backward: partial sums numbered by the program, not its rows", KERNEL, "o_partial = first_block.to(tl.int64) * n_cols", "o_partial = pid.to(tl.int64) * n_cols"),
    Mutant("backward: partial sums' last columns unmasked", KERNEL, "tl.sum(b_dbias, axis=0), mask=m_col)", "tl.sum(b_dbias, axis=0))"),
    Mutant("backward: dx's last rows unmasked", KERNEL, "dx.to(dx_ptr.dtype.element_ty), mask=mask)", "dx.to(dx_ptr.dtype.element_ty), mask=m_col[None, :])"),
    Mutant("backward: programs step over rows", KERNEL, "tl.cdiv(n_rows, BLOCK_ROWS), n_programs)", "tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0))"),
    Mutant("backward: the last rows left out", KERNEL, "range(first_block, tl.cdiv(n_rows, BLOCK_ROWS)", "range(first_block, n_rows // BLOCK_ROWS"),
    Mutant("int8: the largest value counts masked columns", QUANTIZE, "x = tl.where(mask, x, 0.0)", "x = tl.where(mask, x, 1.0)"),
    Mutant("int8: a scale of 128 steps", QUANTIZE, "INT8_MAX = tl.constexpr(127.0)", "INT8_MAX = tl.constexpr(128.0)"),
    Mutant("int8: zeros have scale zero", QUANTIZE, "tl.where(scale == 0.0, 1.0, scale)", "scale"),
    Mutant("bias_gelu, int8: rounded towards zero", QUANTIZE, "((codes + ROUND) - ROUND).to(tl.int8)", "codes.to(tl.int8)"),
    Mutant("int8: the largest value without its sign", QUANTIZE, "tl.max(tl.abs(x), axis=1)", "tl.max(x, axis=1)"),
    Mutant("int8: NaN is passed over", QUANTIZE, "tl.where(has_nan, float(\"nan\"), tl.math", "tl.where(has_nan & (amax < 0), float(\"nan\"), tl.math"),
    Mutant("int8: without the bias", KERNEL, "    codes, scale = quantize_rows(activation_tile(x, ACTIVATION), mask)", "    if bias_ptr is not None:\n        x -= tl.load(bias_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]\n    codes, scale = quantize_rows(activation_tile(x, ACTIVATION), mask)"),
    Mutant("int8: of the rounded result", KERNEL, "quantize_rows(activation_tile(x, ACTIVATION), mask)", "quantize_rows(activation_tile(x, ACTIVATION).to(x_ptr.dtype.element_ty).to(tl.float32), mask)"),
    Mutant("int8: the last rows' scales unmasked", KERNEL, "tl.store(scale_ptr + o_row, scale, mask=m_row)", "tl.store(scale_ptr + o_row, scale)"),
    Mutant("int8: rows longer than a block are cut", CONFIG, "block_n = max(next_power_of_2(n_cols), 512)\n    return RowConfig(max(2048 // block_n, 1), block_n, num_warps=min(", "block_n = min(max(next_power_of_2(n_cols), 512), 8192)\n    return RowConfig(max(2048 // block_n, 1), block_n, num_warps=min("),
    Mutant("int8: given although a gradient is needed", OP, "    if quantize_output and _needs_gradient(x, bias):", "    if quantize_output and _needs_gradient(x, None):"),
    Mutant("dbias: in x's dtype", "pyaccel/ops/bias_act/triton.py", "dtype = x.dtype if bias is None else bias.dtype", "dtype = x.dtype"),
    Mutant("a copy of x is saved", "pyaccel/ops/bias_act/triton.py", "ctx.save_for_backward(x, bias)", "ctx.save_for_backward(x.clone(), bias)"),
    Mutant("the bias gradient is summed where it is not needed", "pyaccel/ops/bias_act/triton.py", "want_dx, want_dbias = ctx.needs_input_grad[:2]\n", "want_dx, want_dbias = ctx.needs_input_grad[0], bias is not None\n"),
    Mutant("a bias of any stride is taken as contiguous", OP, "bias = None if bias is None else bias.contiguous()", "bias = bias"),
]  # fmt: skip
