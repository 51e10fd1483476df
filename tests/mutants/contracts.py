"""Bugs at the edge of PyTorch's contracts, in any op: memory, gradients, transforms, numbers."""

from __future__ import annotations

from tests.mutants import Mutant

TESTS = ("tests/ops/test_memory.py",)

LAYERNORM = "pyaccel/ops/residual_layernorm.py"
FEED_FORWARD = "pyaccel/ops/feed_forward.py"
LINEAR = "pyaccel/ops/linear.py"
MODES = "pyaccel/ops/_modes.py"

MUTANTS = [
    Mutant(
        "LayerNorm: x's gradient is the residual's too",
        LAYERNORM,
        "*column)\n        return *(g if n",
        "*column)\n        out = (out[0], out[0], *out[2:])\n        return *(g if n",
    ),
    Mutant(
        "feed_forward: dx shares the residual's memory",
        FEED_FORWARD,
        "        gradients = (*found, dweight1",
        "        found[1] = found[0]\n        gradients = (*found, dweight1",
    ),
    Mutant("torch: dx shares the residual's memory", MODES, "return grad.clone()", "return grad"),
    Mutant(
        "the sum is the input where nothing is added", LAYERNORM, "if return_sum and total is x:", "if False:"
    ),
    Mutant(
        "oneDNN: operands of any strides",
        LINEAR,
        "x.dtype is dtype and x.is_contiguous()",
        "x.dtype is dtype",
    ),
    Mutant(
        "oneDNN: operands of any dtype", LINEAR, "x.dtype is dtype and x.is_contiguous()", "x.is_contiguous()"
    ),
    Mutant("oneDNN: ReLU in the product", LINEAR, '"relu": ("none", "")', '"relu": ("relu", "")'),
    Mutant(
        "quantize: the given scale comes back",
        "pyaccel/reference/quantize.py",
        "else scale.clone()",
        "else scale",
    ),
]
