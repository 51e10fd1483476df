"""Bugs that a fused masked-language-model loss has had somewhere, or might: each must be caught by its tests."""

from __future__ import annotations

from tests.mutants import Mutant

TESTS = ("tests/kernels/test_mlm_loss.py", "tests/ops/test_masked_lm_cross_entropy.py")

KERNEL = "kernels/mlm_loss/cross_entropy.py"
CONFIG = "kernels/mlm_loss/config.py"
OPS = "pyaccel/ops/mlm_loss/chunked.py"
PUBLIC = "pyaccel/ops/mlm_loss/api.py"
REFERENCE = "pyaccel/reference/mlm_loss.py"

MUTANTS = [
    Mutant("mlm loss: the padding counts", KERNEL, "tl.where(o_col < n_cols, x, float(\"-inf\"))", "tl.where(o_col < width, x, float(\"-inf\"))"),
    Mutant("mlm loss: the last part of a tile unmasked", KERNEL, "mask=o_col < width)", "mask=o_col < width + BLOCK_N)"),
    Mutant("mlm loss: the padding's gradient unwritten", KERNEL, "mask=o_col < width)", "mask=o_col < n_cols)"),
    Mutant("mlm loss: without the maximum", KERNEL, "row_max = tl.max(b_max, axis=0)", "row_max = tl.max(b_max, axis=0) * 0.0"),
    Mutant("mlm loss: lanes' sums aren't brought to one maximum", KERNEL, "tl.sum(b_sum * tl.exp(b_max - row_max), axis=0)", "tl.sum(b_sum, axis=0)"),
    Mutant("mlm loss: an old sum isn't decayed", KERNEL, "b_sum * decay + 1.0", "b_sum + 1.0"),
    Mutant("mlm loss: lanes' maxima begin at -inf", KERNEL, "-3.4028234663852886e38", "float(\"-inf\")"),
    Mutant("mlm loss: large logits cost digits", KERNEL, "tl.log(total) + (row_max - target)", "(tl.log(total) + row_max) - target"),
    Mutant("mlm loss: the target without its bias", KERNEL, "target += tl.load(bias_ptr + label)", "target += 0.0 * tl.load(bias_ptr + label)"),
    Mutant("mlm loss: the label's gradient forgets its one", KERNEL, "grad - one, grad)", "grad - one * 0.0, grad)"),
    Mutant("mlm loss: the label's one isn't scaled", KERNEL, "            one = tl.load(scale_ptr + row)\n            scale *= one", "            scale *= tl.load(scale_ptr + row)"),
    Mutant("mlm loss: the gradient of another label", KERNEL, "o_col == label", "o_col == label + 1"),
    Mutant("mlm loss: offsets of rows in 32 bits", KERNEL, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    Mutant("mlm loss: rows narrower than their padding", CONFIG, "return -(-n_cols // 64) * 64", "return n_cols // 64 * 64 + 32"),
    Mutant("mlm loss: only the last chunk counts in dweight", OPS, "_add_product(dweight, logits.t(), x, first == 0)", "_add_product(dweight, logits.t(), x, True)"),
    Mutant("mlm loss: only the last chunk counts in dbias", OPS, "dbias += logits.sum(0, dtype=dbias.dtype)", "dbias.copy_(logits.sum(0, dtype=dbias.dtype))"),
    Mutant("mlm loss: dbias rounded to 16 bits each chunk", OPS, "logits.sum(0, dtype=dbias.dtype)", "logits.sum(0)"),
    Mutant("mlm loss: ignored tokens' gradients unwritten", OPS, "for out in (losses, dhidden, dbias) if index.shape[0] else outputs:", "for out in (losses, dbias) if index.shape[0] else outputs:"),
    Mutant("mlm loss: nothing is written where no label counts", OPS, "(losses, dhidden, dbias) if index.shape[0] else outputs", "(losses, dhidden, dbias)"),
    Mutant("mlm loss: each chunk with the first rows' factors", OPS, "None if row_scale is None else row_scale[chosen]", "None if row_scale is None else row_scale[: chosen.shape[0]].contiguous()"),
    Mutant("mlm loss: ignored is -100, whatever is asked for", OPS, "real = labels != ignore_index", "real = labels != -100"),
    Mutant("mlm loss: labels outside the vocabulary pass", OPS, "(labels < 0) | (labels >= vocab)", "(labels < -1) | (labels > vocab)"),
    Mutant("mlm loss: torch's softmax without the bias", OPS, "x = x + bias[:vocab]", "x = x + 0 * bias[:vocab]"),
    Mutant("mlm loss: the incoming gradient rounded to 16 bits", OPS, "torch.mul(grad, dloss.to(_wide(grad.dtype)).reshape(1), out=out)", "torch.mul(grad, dloss.to(grad.dtype), out=out)"),
    Mutant("mlm loss: the incoming gradient left out", OPS, "torch.mul(grad, dloss.to(_wide(grad.dtype)).reshape(1), out=out)", "out.copy_(grad)"),
    Mutant("mlm loss: gradients nobody wants", OPS, "hidden.new_empty(vocab if want_dbias else 0, dtype=wide)", "hidden.new_empty(vocab, dtype=wide)"),
    Mutant("mlm loss: autocast lowers fp64", OPS, "if dtype is None or hidden.dtype == torch.float64:", "if dtype is None:"),
    Mutant("mlm loss: the mean of a micro-batch's own labels", PUBLIC, "total / items(real, num_items)", "total / items(real, None)"),
    Mutant("mlm loss: a mean over all tokens", PUBLIC, "total / items(real, num_items)", "total / items(real | True, num_items)"),
    Mutant("mlm loss: no label is NaN", REFERENCE, "torch.where(count == 0, 1, count)", "count"),
]  # fmt: skip
