"""The module: nn.LayerNorm's state dict, BERT's arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyaccel.nn import ResidualLayerNorm
from tests.assertions import assert_bits_equal


def test_state_dict_is_nn_layernorms_both_ways() -> None:
    stock, ours = nn.LayerNorm(24, eps=1e-12), ResidualLayerNorm(24)
    nn.init.normal_(stock.weight)
    nn.init.normal_(stock.bias)
    assert list(stock.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(stock.state_dict())
    x, residual = torch.randn(2, 3, 24).unbind()
    assert_bits_equal(ours(x, residual), stock(x + residual))
    assert_bits_equal(ours(x), stock(x))
    stock.load_state_dict(ours.state_dict())
    assert isinstance(ours, nn.LayerNorm)
    assert list(ResidualLayerNorm(8, bias=False).state_dict()) == ["weight"]
    assert list(ResidualLayerNorm(8, elementwise_affine=False).state_dict()) == []


def test_dropout_in_training_only_and_parameters_get_gradients() -> None:
    norm = ResidualLayerNorm(24, dropout_p=0.5)
    x, residual = torch.randn(2, 3, 24).unbind()
    _, total = norm(x, residual, return_sum=True)
    assert not torch.equal(total, x + residual)
    norm(x, residual, x_bias=torch.ones(24)).square().sum().backward()
    assert norm.weight.grad is not None
    assert norm.weight.grad.abs().sum() > 0
    assert norm.bias.grad is not None
    assert norm.bias.grad.abs().sum() > 0
    _, total = norm.eval()(x, residual, return_sum=True)
    assert_bits_equal(total, x + residual)
    assert "dropout_p=0.5" in repr(norm)


def test_normalized_shape_must_be_one_dimension() -> None:
    with pytest.raises(ValueError, match="last dimension"):
        ResidualLayerNorm((3, 4))  # type: ignore[arg-type]
