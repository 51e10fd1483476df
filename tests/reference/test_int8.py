"""The int8 references against cases worked out by hand and plain integer and floating-point products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from pyaccel.reference.int8 import (
    accumulate,
    dequantize,
    int8_matmul,
    quantize_per_channel,
    quantize_per_tensor,
    quantize_per_token,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_codes_by_hand(dtype: torch.dtype) -> None:
    x = torch.tensor(
        [
            [127.0, -63.5, 0.5, 1.5, -2.5, 3.0],  # scale 1: halves go to the even neighbor
            [-254.0, 127.0, 1.0, 3.0, -5.0, 0.0],  # scale 2: the largest is negative
            [0.0, -0.0, 0.0, 0.0, 0.0, 0.0],
        ],
        dtype=dtype,
    )
    codes, scale = quantize_per_token(x)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.tolist() == [1.0, 2.0, 1.0]
    assert codes.tolist() == [[127, -64, 0, 2, -2, 3], [-127, 64, 0, 2, -2, 0], [0] * 6]
    assert_close(dequantize(codes, scale)[1], torch.tensor([-254.0, 128.0, 0.0, 4.0, -4.0, 0.0]))


def test_scale_is_amax_over_127_in_fp32() -> None:
    x = torch.randn(5, 33) * torch.tensor([1e-3, 1.0, 50.0, 1e4, 1e-30])[:, None]
    codes, scale = quantize_per_token(x)
    assert torch.equal(scale, x.abs().amax(1) / 127)
    assert (codes.abs().amax(1) == 127).all()
    assert ((x.double() / scale.double()[:, None] - codes).abs() <= 0.5).all()


def test_rows_and_channels_are_the_last_dimension_and_the_first() -> None:
    weight = torch.randn(3, 8) * torch.tensor([0.1, 1.0, 10.0])[:, None]
    codes, scale = quantize_per_channel(weight)
    assert codes.shape == (3, 8)
    assert scale.shape == (3,)
    assert_close(scale, weight.abs().amax(1) / 127)
    codes, scale = quantize_per_token(weight.view(3, 2, 4))
    assert codes.shape == (3, 2, 4)
    assert scale.shape == (3, 2)


def test_one_scale_for_all_clamps_what_lies_beyond() -> None:
    x = torch.tensor([[0.5, -1.0], [100.0, -3000.0]])
    codes, scale = quantize_per_tensor(x, torch.tensor(0.5))
    assert codes.tolist() == [[1, -2], [127, -127]]
    assert scale.item() == 0.5
    codes, scale = quantize_per_tensor(x)
    assert scale == torch.tensor(3000.0) / 127
    assert codes.tolist() == [[0, 0], [4, -127]]
    assert quantize_per_tensor(torch.zeros(2, 0))[1] == 1.0


def test_what_is_not_finite_shows_and_the_rest_is_untouched() -> None:
    codes, scale = quantize_per_token(torch.tensor([[1.0, NAN], [INF, 1.0], [1.0, -0.5]]))
    assert scale[0].isnan()
    assert scale[1].isinf()
    assert codes[0].tolist() == [0, 0]
    assert codes[2].tolist() == [127, -64]
    assert dequantize(codes, scale)[:2].isnan().any(1).all()


def test_the_smallest_numbers() -> None:
    tiny = torch.tensor([[1e-45, 0.0], [2e-43, -1e-44]])  # subnormal; the first row's amax / 127 is 0
    codes, scale = quantize_per_token(tiny)
    assert scale[0] == 1.0
    assert codes[0].tolist() == [0, 0]
    assert codes[1, 0] == 127
    assert codes.min() >= -127


@pytest.mark.parametrize(
    ("rows", "n_in", "n_out"), [(1, 1, 1), (3, 2000, 5), (7, 33, 4), (2, 0, 3), (0, 4, 2)]
)
def test_accumulation_is_the_integer_product(rows: int, n_in: int, n_out: int) -> None:
    a = torch.randint(-128, 128, (rows, n_in), dtype=torch.int8)
    b = torch.randint(-128, 128, (n_out, n_in), dtype=torch.int8)
    a[:1], b[:1] = -128, -128  # a sum of 2000 * 2**14, beyond what fp32 counts exactly
    exact = (a.long().unsqueeze(1) * b.long()).sum(-1).int()
    assert torch.equal(accumulate(a, b), exact)


def test_epilogue_by_hand() -> None:
    a = torch.tensor([[1, 2], [3, -4]], dtype=torch.int8)
    b = torch.tensor([[5, 6], [-7, 8], [1, 0]], dtype=torch.int8)  # products: [17, 9, 1], [-9, -53, 3]
    a_scale, b_scale = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.25, 4.0])
    bias, residual = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([[10.0, 20.0, 30.0], [-1.0, -2.0, -3.0]])
    out = int8_matmul(a, b, a_scale, b_scale, bias, "relu", residual)
    # Scaled: [8.5, 1.125, 2], [-18, -26.5, 24]; with bias [9.5, -0.875, 2], [-17, -28.5, 24]; then relu, then
    # +.
    assert out.tolist() == [[19.5, 20.0, 32.0], [-1.0, -2.0, 21.0]]
    assert out.dtype == torch.float64
    scalar = int8_matmul(a, b, torch.tensor(0.5), torch.tensor(2.0), upcast=False, out_dtype=torch.bfloat16)
    assert scalar.tolist() == [[17.0, 9.0, 1.0], [-9.0, -53.0, 3.0]]
    assert scalar.dtype == torch.bfloat16
    codes, scale = int8_matmul(a, b, a_scale, b_scale, quantize_output=True, upcast=False)
    # Rows [8.5, 1.125, 2] and [-18, -26.5, 24].
    assert codes.tolist() == [[127, 17, 30], [-86, -127, 115]]
    assert_close(scale, torch.tensor([8.5, 26.5]) / 127)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu"])
def test_it_is_the_linear_of_the_dequantized_operands(activation: str | None) -> None:
    a, a_scale = quantize_per_token(torch.randn(2, 5, 32) * torch.tensor([0.1, 1.0, 4.0, 9.0, 0.5])[:, None])
    b, b_scale = quantize_per_channel(torch.randn(12, 32) * 0.2)
    bias = torch.randn(12)
    x, weight = (
        codes.double() * scale.double().unsqueeze(-1) for codes, scale in ((a, a_scale), (b, b_scale))
    )
    expected = F.linear(x, weight, bias.double())
    if activation == "relu":
        expected = expected.clamp(min=0)
    elif activation is not None:
        inner = expected / 2**0.5
        if activation == "gelu_tanh":
            inner = (2 / torch.pi) ** 0.5 * (expected + 0.044715 * expected**3)
        expected = (
            0.5 * expected * (1 + (torch.tanh(inner) if activation == "gelu_tanh" else torch.erf(inner)))
        )
    assert_close(int8_matmul(a, b, a_scale, b_scale, bias, activation), expected)
