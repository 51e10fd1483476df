"""The reference itself: against torch.nn.functional, and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import reference
from pyaccel.reference.int8 import dequantize

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def test_by_hand() -> None:
    x, bias = torch.tensor([[1.0, -2.0], [0.0, 3.0]]), torch.tensor([0.5, 1.0])
    out = reference.bias_gelu(x, bias)
    total = [[1.5, -1.0], [0.5, 4.0]]
    expected = [[t * 0.5 * math.erfc(-t / math.sqrt(2)) for t in row] for row in total]
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    assert reference.bias_gelu(x, bias, "relu").tolist() == [[1.5, 0.0], [0.5, 4.0]]
    assert reference.bias_gelu(x, None, "relu").tolist() == [[1.0, 0.0], [0.0, 3.0]]


@pytest.mark.parametrize("upcast", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_torch(activation: str, upcast: bool) -> None:
    x, bias = torch.randn(4, 5, 33, dtype=torch.float64), torch.randn(33, dtype=torch.float64)
    expected = ACTIVATIONS[activation]
    assert torch.equal(reference.bias_gelu(x, bias, activation, upcast=upcast), expected(x + bias))
    assert torch.equal(reference.bias_gelu(x, None, activation, upcast=upcast), expected(x))


def test_naive_rounds_as_plain_torch_does() -> None:
    x, bias = torch.randn(5, 64).bfloat16(), torch.randn(64)
    out = reference.bias_gelu(x, bias, upcast=False)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, F.gelu(x + bias.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_int8_codes_are_those_of_the_result_in_fp32(dtype: torch.dtype) -> None:
    x, bias = torch.randn(2, 3, 64).to(dtype), torch.randn(64)
    codes, scale = reference.bias_gelu(x, bias, quantize_output=True, upcast=False)
    wide = torch.promote_types(dtype, torch.float32)
    expected = reference.quantize_per_token(F.gelu(x.to(wide) + bias))
    for a, b in zip((codes, scale), expected, strict=True):
        assert torch.equal(a, b)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (
        torch.int8,
        x.shape,
        torch.float32,
        (2, 3),
    )
    codes, scale = reference.bias_gelu(x, bias, quantize_output=True)
    error = (dequantize(codes, scale) - reference.bias_gelu(x, bias)).abs()
    assert (error <= 0.5001 * scale[..., None]).all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_gradients_by_finite_differences(activation: str) -> None:
    given = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (7,))]
    assert torch.autograd.gradcheck(lambda x, bias: reference.bias_gelu(x, bias, activation), given)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        reference.bias_gelu(torch.ones(2, 3), None, "tanh")
