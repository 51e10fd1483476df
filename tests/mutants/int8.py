"""Bugs of quantization, of its product and of training through it: each must be caught by the family's tests."""

from __future__ import annotations

from tests.mutants import Mutant

TESTS = (
    "tests/ops/test_int8.py",
    "tests/nn/test_int8_linear.py",
    "tests/ops/test_int8_linear.py",
    "tests/ops/test_edges.py::test_fp16_gradients_of_int8_linear",
)

CPU = "pyaccel/ops/int8/cpu.py"
OP = "pyaccel/ops/int8/linear.py"
MATMUL = "pyaccel/ops/int8/matmul.py"
MODULE = "pyaccel/nn/int8_linear.py"

MUTANTS = [
    Mutant("int8 codes: truncated, not rounded", CPU, "out=scratch).round_())", "out=scratch).trunc_())"),
    Mutant("int8 codes: multiplied by a rounded reciprocal", CPU, "torch.div(x, scale.unsqueeze(-1), out=scratch)", "torch.mul(x, 1 / scale.unsqueeze(-1), out=scratch)"),
    Mutant("int8 scale: of 128 steps", CPU, "torch.div(amax, reference.INT8_MAX, out=scale)", "torch.div(amax, 128, out=scale)"),
    Mutant("int8 scale: zero for a row of zeros", CPU, "    scale.masked_fill_(scale == 0, 1.0)\n", ""),
    Mutant("int8 scale: subnormal ones taken as ordinary", CPU, "if low >= SMALLEST_SCALE and", "if low >= 0 and"),
    Mutant("int8 offset: the lower end of the range", CPU, "torch.add(high * 0.5, low * 0.5, out=middle)", "torch.add(high * 0.0, low, out=middle)"),
    Mutant("int8 offset: the scale forgets the lower end", CPU, "torch.maximum(high - middle, middle - low)", "high"),
    Mutant("int8 blocks: the scales of the first rows for all", CPU, "x.mul_(a_scale if by_row is None else by_row[block])", "x.mul_(a_scale if by_row is None else by_row[: len(x)])"),
    Mutant("int8 product: more terms than fp32 can sum", CPU, "EXACT_TERMS = 1024", "EXACT_TERMS = 4096"),
    Mutant("int8 product: PyTorch's, whatever the CPU", CPU, "    if int_mm_is_exact():", "    if True:"),
    Mutant("int8 product: the offset's part left out", CPU, "x.add_(a_offset[block] * b_sum)", "x.add_(a_offset[block] * 0.0)"),
    Mutant("int8 product: the offset's part after the weight's scale", CPU, "            x.add_(a_offset[block] * b_sum)\n        x.mul_(b_scale)\n", "            x.mul_(b_scale).add_(a_offset[block] * b_sum)\n        else:\n            x.mul_(b_scale)\n"),
    Mutant("int8 product: codes of the rounded output", CPU, "        if scale is not None:\n            quantize_block(x,", "        if scale is not None:\n            x = x.bfloat16().float()\n            quantize_block(x,"),
    Mutant("int8 product: a gradient is lost without a word", MATMUL, "    if torch.is_grad_enabled() and differentiable:", "    if torch.is_grad_enabled() and not differentiable:"),
    Mutant("int8_linear: the weight's gradient without the offset", OP, "x = x + offset.unsqueeze(-1)", "x = x + 0 * offset.unsqueeze(-1)"),
    Mutant("int8_linear: the weight's gradient without the scales", OP, "else dequantize(codes, scale)\n", "else codes.float()\n"),
    Mutant("int8_linear: the input's gradient without the scales", OP, "dx = grad @ dequantize(w_codes, w_scale).to(compute)", "dx = grad @ w_codes.to(compute)"),
    Mutant("int8_linear: the activation's derivative left out", OP, "grad = activations.ACTIVATIONS[options.activation].gradient(grad.float(), pre).to(compute)", "grad = grad + 0 * pre.to(compute)"),
    Mutant("int8_linear: the pre-activation made again without its offset", OP, "pre = int8_matmul(codes, w_codes, scale, w_scale, bias, a_offset=offset)", "pre = int8_matmul(codes, w_codes, scale, w_scale, bias)"),
    Mutant("int8_linear: a gradient where a static scale has clamped", OP, "        if options.static:\n            dx =", "        if False:\n            dx ="),
    Mutant("int8_linear: the bias's gradient in 16 bits", OP, "by_row.sum(0, dtype=torch.float32)", "by_row.sum(0)"),
    Mutant("int8_linear: the input itself is saved", OP, "            (x if weight_only else codes) if needs_input else None,", "            x if needs_input else None,"),
    Mutant("Int8Linear: scales follow a cast", MODULE, "setattr(self, name, moved if same else _moved(scale, moved))", "setattr(self, name, moved)"),
    Mutant("Int8Linear: smoothing forgotten on the way back", MODULE, "                    values = values * self.smooth_scale\n", "                    values = values * 1.0\n"),
    Mutant("Int8Linear: frozen weights load into trainable ones as floats", MODULE, "(saved.dtype == torch.int8) != self.is_frozen", "saved.dtype == torch.int16"),
    Mutant("int8_linear: the input's gradient without smoothing", OP, "            dx = dx.float() * smooth_scale\n", "            dx = dx.float() * 1.0\n"),
    Mutant("int8_linear: the input's gradient by products of codes", OP, "dx = grad @ dequantize(w_codes, w_scale).to(compute)\n", "dx = (grad.float() * w_scale).to(compute) @ w_codes.to(compute)\n"),
    Mutant("weight only: the bias before the scales", "pyaccel/ops/int8/weight_only.py", "    out = out * b_scale\n    if bias is not None:\n        out = out + bias.float()\n", "    if bias is not None:\n        out = out + bias.float()\n    out = out * b_scale\n"),
]  # fmt: skip
