"""Bugs at the edge of PyTorch's contracts, in any op: memory, gradients, transforms, numbers."""

from __future__ import annotations

from tests.mutants import Mutant

TESTS = (
    "tests/ops/test_memory.py",
    "tests/ops/test_edges.py",
    "tests/ops/test_dropout.py::test_it_is_drawn_on_the_host_whatever_the_default_device",
    "tests/ops/test_transforms.py",
)

LAYERNORM = "pyaccel/ops/layernorm/api.py"
FEED_FORWARD = "pyaccel/ops/linear/mlp.py"
LINEAR = "pyaccel/ops/linear/api.py"
GRADIENTS = "pyaccel/ops/common.py"
ROW_TILE = "kernels/common/tiles.py"
LAYERNORM_REFERENCE = "pyaccel/reference/layernorm.py"
EMBEDDINGS = "pyaccel/ops/embeddings/api.py"

MUTANTS = [
    Mutant(
        "LayerNorm: x's gradient is the residual's too",
        "pyaccel/ops/layernorm/triton.py",
        "*dtypes)\n        return *[g if n",
        "*dtypes)\n        out = (out[0], out[0], *out[2:])\n        return *[g if n",
    ),
    Mutant(
        "layernorm_mlp: dx shares the residual's memory",
        FEED_FORWARD,
        "        gradients = (*found, dweight1",
        "        found = (found[0], found[0], *found[2:])\n        gradients = (*found, dweight1",
    ),
    Mutant("torch: dx shares the residual's memory", GRADIENTS, "return grad.clone()", "return grad"),
    Mutant(
        "the sum is the input where nothing is added", LAYERNORM, "if return_sum and total is x:", "if False:"
    ),
    Mutant(
        "oneDNN: operands of any strides",
        "pyaccel/ops/linear/onednn.py",
        "x.dtype is dtype and x.is_contiguous()",
        "x.dtype is dtype",
    ),
    Mutant(
        "oneDNN: operands of any dtype",
        "pyaccel/ops/linear/onednn.py",
        "x.dtype is dtype and x.is_contiguous()",
        "x.is_contiguous()",
    ),
    Mutant(
        "oneDNN: ReLU in the product",
        "pyaccel/activations.py",
        '("none", ""),  # oneDNN',
        '("relu", ""),  # oneDNN',
    ),
    Mutant(
        "quantize: the given scale comes back",
        "pyaccel/reference/int8.py",
        "else scale.clone()",
        "else scale",
    ),
    Mutant(
        "a double backward gives 0",
        GRADIENTS,
        "            raise RuntimeError(message)",
        "            return (None,) * 20",
    ),
    Mutant(
        "the mean isn't corrected",
        ROW_TILE,
        "return mean + tl.sum(tl.where(mask, x - mean[:, None], 0.0), axis=1) / n_cols",
        "return mean",
    ),
    Mutant(
        "LayerNorm: gradients added up in 16 bits", LAYERNORM_REFERENCE, " or _trained(weight, bias))", ")"
    ),
    Mutant(
        "LayerNorm: fp16 statistics", LAYERNORM_REFERENCE, "(dtype == torch.float16 or _trained", "(_trained"
    ),
    Mutant(
        "embeddings: gradients added up in 16 bits",
        EMBEDDINGS,
        "table.dtype.itemsize == 2",
        "table.dtype.itemsize == 1",
    ),
    Mutant(
        "embeddings, 16 bits: the padding row has a gradient",
        EMBEDDINGS,
        "if ctx.padding is not None:",
        "if False:",
    ),
    Mutant(
        "weight only: products of codes in fp16",
        "pyaccel/ops/int8/weight_only.py",
        "if x.dtype != torch.float16:",
        "if True:",
    ),
    Mutant(
        "a helper tensor without its device",
        "pyaccel/ops/dropout.py",
        ', device="cpu").random_',
        ").random_",
    ),
]
