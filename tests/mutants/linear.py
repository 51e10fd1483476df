"""Bugs that a matrix product with an epilogue has had somewhere, or might: each must be caught by the family's tests."""

from __future__ import annotations

from tests.mutants import Mutant

TESTS = ("tests/kernels/test_linear.py", "tests/ops/test_linear_activation.py")

KERNEL = "kernels/linear/kernels.py"
ORDER = "kernels/common/tiles.py"
CONFIG = "kernels/linear/config.py"
TRITON = "pyaccel/ops/linear/triton.py"
OP = "pyaccel/ops/linear/api.py"

MUTANTS = [
    Mutant("the last group has as many row tiles as the others", ORDER, "tl.minimum(blocks_m - first_m, GROUP_M)", "GROUP_M"),
    Mutant("groups: one column tile short", ORDER, "per_group = GROUP_M * blocks_n", "per_group = GROUP_M * tl.maximum(blocks_n - 1, 1)"),
    Mutant("groups: along the columns first", ORDER, "return first_m + in_group % group_m, in_group // group_m", "return first_m + in_group // blocks_n, in_group % blocks_n"),
    Mutant("rows beyond the last are read", KERNEL, "x_row = tl.minimum(o_m, n_rows - 1)", "x_row = o_m"),
    Mutant("the last row is read in place of the one before", KERNEL, "x_row = tl.minimum(o_m, n_rows - 1)", "x_row = tl.where(o_m == n_rows - 2, n_rows - 1, tl.minimum(o_m, n_rows - 1))"),
    Mutant("columns beyond the last but one are not read", KERNEL, "tl.minimum(o_n, n_out - 1)", "tl.minimum(o_n, tl.maximum(n_out - 2, 0))"),
    Mutant("offsets of rows of x: 32 bits", KERNEL, "tl.minimum(o_m, n_rows - 1).to(tl.int64)", "tl.minimum(o_m, n_rows - 1)"),
    Mutant("offsets of rows of the weight: 32 bits", KERNEL, "tl.minimum(o_n, n_out - 1).to(tl.int64)", "tl.minimum(o_n, n_out - 1)"),
    Mutant("offsets of inner elements: 32 bits", KERNEL, "o_k = tl.arange(0, BLOCK_K).to(tl.int64)", "o_k = tl.arange(0, BLOCK_K)"),
    Mutant("columns' stride of x: ignored", KERNEL, "o_k[None, :] * stride_x_col", "o_k[None, :]"),
    Mutant("columns' stride of the weight: ignored", KERNEL, "o_k[None, :] * stride_weight_col", "o_k[None, :]"),
    Mutant("columns' stride of x: ignored from block to block", KERNEL, "x_ptrs += block_k * stride_x_col", "x_ptrs += block_k"),
    Mutant("columns' stride of the weight: that of x from block to block", KERNEL, "weight_ptrs += block_k * stride_weight_col", "weight_ptrs += block_k * stride_x_col"),
    Mutant("rows' stride of the weight: that of x", KERNEL, "weight_row * stride_weight_row", "weight_row * stride_x_row"),
    Mutant("the inner dimension's tail is not masked", KERNEL, '"EVEN_K": n_in % config.block_k == 0', '"EVEN_K": True'),
    Mutant("the inner dimension's tail is left out", KERNEL, "for start in range(0, n_in, BLOCK_K):", "for start in range(0, n_in // BLOCK_K * BLOCK_K, BLOCK_K):"),
    Mutant("the inner dimension's tail: masked in x alone", KERNEL, "weight = tl.load(weight_ptrs, mask=m_k, other=0.0)", "weight = tl.load(weight_ptrs)"),
    Mutant("the inner dimension's tail: a block's length off", KERNEL, "m_k = (o_k < n_in - start)", "m_k = (o_k < n_in % BLOCK_K)"),
    Mutant("sums: only the last block counts", KERNEL, "acc = tl.dot(x, tl.trans(weight), acc,", "acc = tl.dot(x, tl.trans(weight), acc * 0.0,"),
    Mutant("sums: rounded from block to block", KERNEL, "        x_ptrs += block_k", "        acc = acc.to(out_ptr.dtype.element_ty).to(tl.float32)\n        x_ptrs += block_k"),
    Mutant("epilogue: the halves of a wide tile are exchanged", KERNEL, "left, right = tl.split", "right, left = tl.split"),
    Mutant("epilogue: neighbors are taken for halves", KERNEL, "tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))", "tl.split(tl.reshape(acc, (BLOCK_M, HALF, 2)))"),
    Mutant("epilogue: the second half over the first", KERNEL, "right, o_m, first_n + HALF,", "right, o_m, first_n,"),
    Mutant("epilogue: the last rows unmasked", KERNEL, "mask = (o_m < n_rows)[:, None] & m_n[None, :]", "mask = m_n[None, :]"),
    Mutant("epilogue: the last columns unmasked", KERNEL, "mask = (o_m < n_rows)[:, None] & m_n[None, :]", "mask = (o_m < n_rows)[:, None]"),
    Mutant("epilogue: bias of the first columns for all", KERNEL, "tl.load(bias_ptr + o_n, mask", "tl.load(bias_ptr + (o_n - first_n), mask"),
    Mutant("epilogue: bias rounded to x's dtype with the sum", KERNEL, "    if ACTIVATION is not None:\n", "    acc = acc.to(out_ptr.dtype.element_ty).to(tl.float32)\n    if ACTIVATION is not None:\n"),
    Mutant("epilogue: bias after the activation", KERNEL, "    tl.store(out_ptr + offset", "    if ACTIVATION is not None and bias_ptr is not None:\n        b = tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]\n        acc = acc + b\n    tl.store(out_ptr + offset"),
    Mutant("epilogue: the activation twice", KERNEL, "        acc = activation_tile(acc, ACTIVATION)", "        acc = activation_tile(activation_tile(acc, ACTIVATION), ACTIVATION)"),
    Mutant("pre-activation: the output in its place", KERNEL, "tl.store(pre_ptr + offset, acc.to(pre_ptr.dtype.element_ty)", "tl.store(pre_ptr + offset, activation_tile(acc, ACTIVATION if ACTIVATION is not None else 'gelu').to(pre_ptr.dtype.element_ty)"),
    Mutant("launch: one column of tiles short", KERNEL, "triton.cdiv(n_out, config.block_n),)", "max(n_out // config.block_n, 1),)"),
    Mutant("launch: empty outputs are launched, and of no inner elements nothing is", KERNEL, "if out.numel() == 0:", "if x.numel() == 0:"),
    Mutant("configurations: the widest tiles for rows that aren't aligned", CONFIG, "n_in % 16 == 0 or ", "n_in > 0 or "),
    Mutant("configurations: the smallest tiles for all", CONFIG, "if enough and", "if not enough and"),
    Mutant("backward: dbias in x's dtype", TRITON, "empty(pre, bias_dtype, pre.shape[1])", "empty(pre, pre.dtype, pre.shape[1])"),
    Mutant("backward: without an activation, dbias summed in 16 bits", TRITON, "dout.sum(0, dtype=torch.float32).to(bias_dtype)", "dout.sum(0).to(bias_dtype)"),
    Mutant("backward: dweight of the gradient before the activation", TRITON, "dpre.mT @ x if", "dout.mT @ x if"),
    Mutant("backward: a copy of x is saved", TRITON, "            x if want_dweight else None", "            x.clone() if want_dweight else None"),
    Mutant("backward: x is saved although the weight is frozen", TRITON, "            x if want_dweight else None", "            x"),
    Mutant("backward: the output is saved for the pre-activation", TRITON, "None if activation is None else output[1]", "None if activation is None else output[0]"),
    Mutant("backward: the bias gradient is summed where it is not needed", TRITON, "bias_dtype = ctx.bias_dtype if want_dbias else None", "bias_dtype = ctx.bias_dtype"),
    Mutant("backward: a double backward through the pre-activation is forgotten", TRITON, "        ctx.set_materialize_grads(False)", "        ctx.mark_non_differentiable(output[1])\n        ctx.set_materialize_grads(False)"),
    Mutant("inference: a pre-activation is written", TRITON, "x.shape[0] if want_pre else 0, n_out", "x.shape[0], n_out"),
    Mutant("the bias of a linear layer: any stride is taken as contiguous", TRITON, "bias = None if bias is None else bias.contiguous()", "bias = bias"),
    Mutant("fp32 is rounded to TF32 unasked", TRITON, "x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32", "x.dtype == torch.float32"),
    Mutant("autocast: ignored", TRITON, "    if dtype is not None:\n", "    if dtype is None and x.is_meta:\n"),
    Mutant("dispatch: Triton by itself", OP, '"triton" if measured == "triton" else "torch",', '"triton",'),
    Mutant("torch: bias twice on a GPU", OP, "return bias_gelu(F.linear(x, weight), bias", "return bias_gelu(F.linear(x, weight, None if bias is None else bias.to(x.dtype)), bias"),
]  # fmt: skip
