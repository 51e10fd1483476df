"""Bugs of the Function that makes hidden states and activation again in its backward."""

from __future__ import annotations

from tests.mutants import Mutant

OP = "pyaccel/ops/linear/mlp.py"
TESTS = ["tests/ops/test_feed_forward.py"]

MUTANTS = [
    Mutant("layernorm_mlp: the second weight's gradient of the pre-activation", OP, "dweight2 = dout.mT @ activation_again(pre, None, activation)", "dweight2 = dout.mT @ pre"),
    Mutant("layernorm_mlp: the first weight's gradient of the sum", OP, "dweight1 = dpre.mT @ hidden.to(weight1.dtype)", "dweight1 = dpre.mT @ total.to(weight1.dtype)"),
    Mutant("layernorm_mlp: the hidden states' own gradient is lost", OP, "dhidden = _add_product(dhidden, dpre, weight1)", "dhidden = _add_product(None, dpre, weight1)"),
    Mutant("layernorm_mlp: hidden states made again without the LayerNorm's bias", OP, "total, None, ln_weight, ln_bias, None, None", "total, None, ln_weight, None, None, None"),
    Mutant("layernorm_mlp: the first product's bias left out", OP, "pre = F.linear(operand, weight1, bias1)", "pre = F.linear(operand, weight1)"),
    Mutant("layernorm_mlp: active dropout in evaluation", OP, "dropout_p = dropout_p if training else 0.0", "dropout_p = dropout_p"),
]  # fmt: skip
