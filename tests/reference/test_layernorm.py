"""The reference itself: against torch.nn.functional, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pyaccel import reference
from pyaccel.reference.philox import keep_mask


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    residual = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    weight, bias, x_bias = (
        torch.tensor([1.0, 2.0, -1.0]),
        torch.tensor([0.5, 0.0, 1.0]),
        torch.tensor([1.0, 0.0, -1.0]),
    )
    result = reference.residual_layernorm(x, residual, weight, bias, eps=0.0625, x_bias=x_bias)
    # Row 0: sum 2, 3, 4; mean 3, variance 2/3. Row 1: sum 7, 6, 5; mean 6, variance 2/3.
    rstd = 1 / math.sqrt(2 / 3 + 0.0625)
    expected = [[-rstd + 0.5, 0.0, -rstd + 1.0], [rstd + 0.5, 0.0, rstd + 1.0]]
    assert result.output.dtype == torch.float64
    torch.testing.assert_close(
        result.output, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14
    )
    assert result.sum.tolist() == [[2.0, 3.0, 4.0], [7.0, 6.0, 5.0]]
    assert result.mean.tolist() == [3.0, 6.0]
    torch.testing.assert_close(result.rstd, torch.full((2,), rstd, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("upcast", [True, False])
def test_against_torch(upcast: bool) -> None:
    x, residual = torch.randn(2, 4, 5, 33, dtype=torch.float64).unbind()
    weight, bias, x_bias = torch.randn(3, 33, dtype=torch.float64).unbind()
    result = reference.residual_layernorm(x, residual, weight, bias, eps=1e-5, x_bias=x_bias, upcast=upcast)
    assert torch.equal(result.output, F.layer_norm(x + x_bias + residual, (33,), weight, bias, 1e-5))
    assert torch.equal(result.sum, x + x_bias + residual)
    plain = reference.residual_layernorm(x, None, None, None, eps=1e-5, upcast=upcast)
    assert torch.equal(plain.output, F.layer_norm(x, (33,), eps=1e-5))


def test_rms_norm_against_torch() -> None:
    x, residual = torch.randn(2, 4, 33, dtype=torch.float64).add_(1.0).unbind()
    weight, bias = torch.randn(2, 33, dtype=torch.float64).unbind()
    result = reference.residual_layernorm(x, residual, weight, None, eps=1e-5, rms_norm=True)
    assert torch.equal(result.output, F.rms_norm(x + residual, (33,), weight, 1e-5))
    assert not result.mean.any()
    rms = (x + residual).square().mean(-1)
    torch.testing.assert_close(result.rstd, (rms + 1e-5) ** -0.5, rtol=1e-14, atol=0)
    biased = reference.residual_layernorm(x, residual, weight, bias, eps=1e-5, rms_norm=True)
    assert torch.equal(biased.output, result.output + bias)


def test_dropout_is_between_bias_and_residual() -> None:
    x, residual = torch.randn(2, 3, 6, 16, dtype=torch.float64).unbind()
    x_bias, key = torch.randn(16, dtype=torch.float64), torch.tensor([3, 4])
    result = reference.residual_layernorm(
        x, residual, None, None, dropout_p=0.5, x_bias=x_bias, dropout_key=key
    )
    keep = keep_mask(key, torch.arange(18)[:, None], torch.arange(16), 0.5).view(3, 6, 16)
    assert torch.equal(result.sum, torch.where(keep, (x + x_bias) * 2.0, 0.0) + residual)
    with pytest.raises(ValueError, match="dropout_key"):
        reference.residual_layernorm(x, residual, None, None, dropout_p=0.5)


def test_naive_rounds_as_plain_torch_does() -> None:
    x, residual = torch.randn(2, 5, 64).bfloat16().unbind()
    weight, bias = torch.randn(2, 64).bfloat16().unbind()
    result = reference.residual_layernorm(x, residual, weight, bias, upcast=False)
    assert result.output.dtype == result.sum.dtype == torch.bfloat16
    assert torch.equal(result.sum, x + residual)
    assert torch.equal(result.output, F.layer_norm(x + residual, (64,), weight, bias, 1e-12))
    mixed = reference.residual_layernorm(x, residual.float(), weight.float(), bias.float(), upcast=False)
    assert mixed.output.dtype == torch.float32
    assert torch.equal(
        mixed.output, F.layer_norm(x + residual.float(), (64,), weight.float(), bias.float(), 1e-12)
    )


def test_gradients_by_finite_differences() -> None:
    given = [torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    given += [torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    key = torch.tensor([1, 2])

    def run(x, residual, weight, bias, x_bias):  # type: ignore[no-untyped-def]
        result = reference.residual_layernorm(
            x, residual, weight, bias, dropout_p=0.3, x_bias=x_bias, dropout_key=key
        )
        return result.output, result.sum

    assert torch.autograd.gradcheck(run, given)
