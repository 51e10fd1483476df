"""Int8Linear: one layer in training and deployment, moved, cast, copied, saved."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from pyaccel.nn import Int8Linear, ObservedLinear
from tests.assertions import assert_bits_equal

METHODS = ["dynamic", "static", "weight_only"]


def layer(method: str, device: torch.device, *, smooth: bool = False) -> Int8Linear:
    linear = nn.Linear(24, 10, device=device)
    module = Int8Linear.from_linear(linear, method=method, input_scale=0.03 if method == "static" else None)
    assert module.weight is linear.weight
    assert module.bias is linear.bias
    if smooth and method != "weight_only":
        module.smooth_scale = torch.rand(24, device=device) + 0.5
    return module


@pytest.mark.parametrize("smooth", [False, True], ids=["plain", "smooth"])
@pytest.mark.parametrize("method", METHODS)
def test_frozen_gives_the_bits_of_training(method: str, smooth: bool, device: torch.device) -> None:
    module = layer(method, device, smooth=smooth)
    x = torch.randn(3, 5, 24, device=device)
    trained = module(x)
    assert not module.is_frozen
    weight = module.weight.detach().clone()
    assert module.freeze() is module
    assert module.freeze().is_frozen
    assert module.weight.dtype == torch.int8
    assert not module.weight.requires_grad
    assert_bits_equal(module(x), trained)
    assert_bits_equal(
        module.linear_activation(x, "gelu"), layer_again(module, weight).linear_activation(x, "gelu")
    )
    thawed = module.unfreeze()
    assert thawed.weight.requires_grad
    assert (thawed.weight - weight).abs().max() <= weight.abs().amax() / 254 * 1.001


def layer_again(module: Int8Linear, weight: torch.Tensor) -> Int8Linear:
    other = copy.deepcopy(module)
    other.weight, other.weight_scale = nn.Parameter(weight.clone()), None
    return other


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_files(method: str, device: torch.device) -> None:
    module = layer(method, device, smooth=True).freeze()
    x = torch.randn(4, 24, device=device)
    expected = module(x)
    assert_bits_equal(copy.deepcopy(module)(x), expected)
    assert_bits_equal(pickle.loads(pickle.dumps(module))(x), expected)
    state = module.state_dict()
    more = {"dynamic": {"smooth_scale"}, "static": {"smooth_scale", "input_scale"}, "weight_only": set()}
    assert state.keys() == {"weight", "bias", "weight_scale"} | more[method]
    fresh = Int8Linear(24, 10, method=method, device=device)
    fresh.load_state_dict(state)
    assert fresh.is_frozen
    assert_bits_equal(fresh(x), expected)
    trainable = layer(method, device)
    fresh.load_state_dict(trainable.state_dict())  # and back
    assert not fresh.is_frozen
    assert fresh.weight_scale is None
    assert fresh.smooth_scale is None
    assert_bits_equal(fresh(x), trainable(x))
    del state["weight_scale"]
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*weight_scale"):
        Int8Linear(24, 10, method=method, device=device).load_state_dict(state)


def test_a_state_dict_of_another_method_is_an_error(device: torch.device) -> None:
    static, dynamic = layer("static", device), layer("dynamic", device)
    with pytest.raises(RuntimeError, match=r"(?s)Unexpected key.*input_scale"):
        dynamic.load_state_dict(static.state_dict())
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*input_scale"):
        static.load_state_dict(layer("dynamic", device).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scales_and_codes_survive_a_cast(dtype: torch.dtype, device: torch.device) -> None:
    module = layer("static", device, smooth=True).freeze()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.to(dtype)
    assert module.bias is not None
    assert module.bias.dtype == dtype
    for name in ("weight", "weight_scale", "input_scale", "smooth_scale"):
        assert_bits_equal(getattr(module, name), before[name])
    module.to("meta")
    assert {t.device.type for t in module.state_dict().values()} == {"meta"}
    assert module.weight_scale is not None
    assert module.weight_scale.dtype == torch.float32
    module.to_empty(device=device)
    module.load_state_dict(before)
    assert_bits_equal(module.weight_scale, before["weight_scale"])


def test_back_to_a_linear(device: torch.device) -> None:
    for smooth in (False, True):
        module = layer("dynamic", device, smooth=smooth).freeze()
        x = torch.randn(6, 24, device=device)
        linear = module.to_linear()
        assert type(linear) is nn.Linear
        assert linear.bias is module.bias
        error = (linear(x) - module(x)).abs().max()
        assert 0 < error < 0.05  # what quantizing x costs
    without = Int8Linear.from_linear(
        nn.Linear(24, 10, bias=False, dtype=torch.bfloat16, device=device)
    ).freeze()
    assert without.to_linear().weight.dtype == torch.bfloat16
    assert without.unfreeze().weight.dtype == torch.bfloat16


def test_errors(device: torch.device) -> None:
    with pytest.raises(ValueError, match="unknown method 'fp8'"):
        Int8Linear(3, 4, method="fp8")
    with pytest.raises(ValueError, match="'static' needs an input_scale"):
        Int8Linear.from_linear(nn.Linear(3, 4), method="static")
    with pytest.raises(ValueError, match="scalar above 0"):
        Int8Linear.from_linear(nn.Linear(3, 4), method="static", input_scale=0.0)
    assert "int8" in repr(layer("dynamic", device).freeze())


def test_observed_linear(device: torch.device) -> None:
    linear = nn.Linear(5, 4, device=device)
    x = torch.randn(2, 3, 5, device=device)
    expected, seen = linear(x), []
    ObservedLinear.watch(linear, lambda a, b: seen.append((a, b)))
    assert_bits_equal(linear(x), expected)
    assert [tuple(t.shape) for t in seen[0]] == [(6, 5), (6, 4)]
    with pytest.raises(TypeError, match=r"only an nn\.Linear"):
        ObservedLinear.watch(linear, print)
    linear.release()
    assert type(linear) is nn.Linear
    assert_bits_equal(linear(x), expected)
    assert len(seen) == 1
