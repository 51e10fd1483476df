"""Bugs of attention and dropout in training on a CPU."""

from __future__ import annotations

from tests.mutants import Mutant

PRODUCTS = "pyaccel/ops/attention/matmul.py"
DROPOUT = "pyaccel/ops/dropout.py"
SUM = "pyaccel/ops/layernorm/api.py"
TESTS = ["tests/ops/test_dropout.py", "tests/ops/test_attention_products.py"]

MUTANTS = [
    Mutant("products: dropped weights keep their gradient", PRODUCTS, "                dweights.masked_fill_(weights < 0.0, 0.0)\n", ""),
    Mutant("products: dropped weights count in the sum of a row", PRODUCTS, "weights = weights.abs()", "weights = weights.relu()"),
    Mutant("products: dvalue of dropped weights too", PRODUCTS, "kept = weights.relu() if saved", "kept = weights.abs() if saved"),
    Mutant("products: what is kept isn't rescaled", PRODUCTS, "saved, rescale = [], 1.0 / (1.0 - dropout_p)", "saved, rescale = [], 1.0"),
    Mutant("products: dkey without the scale", PRODUCTS, "dscores.transpose(1, 2), q, ctx.scale", "dscores.transpose(1, 2), q, 1.0"),
    Mutant("products: every chunk has the first one's weights", PRODUCTS, "saved[i] if saved", "saved[0] if saved"),
    Mutant("products: weights are saved without dropout", PRODUCTS, "            _put(o, _product(weights, v, rescale))", "            saved.append(weights)\n            _put(o, _product(weights, v, rescale))"),
    Mutant("products: no dropout where no gradient is recorded", "pyaccel/ops/attention/varlen.py", "scratch = None if training or dropout_p > 0.0 else", "scratch = None if training else"),
    Mutant("mask on the host: the upper halves have no sign", DROPOUT, ".random_().bitwise_left_shift_(1)", ".random_()"),
    Mutant("mask on the host: drops what it should keep", DROPOUT, ">= min(2 * dropped", "< min(2 * dropped"),
    Mutant("mask on the host: one draw for both halves", DROPOUT, "draws.view(torch.int16)[:count]", "draws.view(torch.int16)[::2].repeat_interleave(2)[:count]"),
    Mutant("sum on the host: what is kept isn't rescaled", "pyaccel/ops/layernorm/eager.py", "keep, value=1.0 / (1.0 - dropout_p))", "keep, value=1.0)"),
]  # fmt: skip
