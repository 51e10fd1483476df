"""Linear layers with their epilogues: oneDNN's and plain, against the fp64 truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pyaccel import dispatch, ops
from pyaccel.errors import InvalidArgumentError
from pyaccel.ops.linear import api as linear
from pyaccel.reference import activation as apply_activation
from tests.assertions import assert_bits_equal, assert_close_to_truth

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("backend", ["auto", *dispatch.BACKENDS])
@pytest.mark.parametrize("activation", linear.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(3, 5, 40), (1, 40), (40,), (0, 40)], ids=str)
def test_linear_activation(
    shape: tuple[int, ...], dtype: torch.dtype, activation: str | None, backend: str, device: torch.device
) -> None:
    x = (torch.randn(shape, device=device) + 0.5).to(dtype)
    weight, bias = (
        (torch.randn(24, 40, device=device) * 0.3).to(dtype),
        torch.randn(24, device=device).to(dtype),
    )
    for b in (bias, None):
        with dispatch.use_backend(backend):
            out = ops.linear_activation(x, weight, b, activation)
        truth = apply_activation(
            F.linear(x.double(), weight.double(), None if b is None else b.double()), activation
        )
        assert_close_to_truth(out, truth, apply_activation(F.linear(x, weight, b), activation))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_linear_residual_layernorm(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x, residual = (
        torch.randn(2, 7, 40, device=device).to(dtype),
        torch.randn(2, 7, 24, device=device).to(dtype) + 1,
    )
    weight = (torch.randn(24, 40, device=device) * 0.3).to(dtype)
    bias, ln_weight, ln_bias = torch.randn(3, 24, device=device).to(dtype).unbind()
    with dispatch.use_backend(backend, ops=["residual_layernorm"]), dispatch.record() as choices:
        out = ops.linear_residual_layernorm(x, weight, bias, residual, ln_weight, ln_bias)
    assert [(c.op, c.backend) for c in choices] == [("residual_layernorm", backend)]
    given = (x, weight, bias, residual, ln_weight, ln_bias)
    results = []
    for dtype_ in (torch.float64, dtype):
        x_, w, b, r, lw, lb = (t.to(dtype_) for t in given)
        results.append(F.layer_norm(F.linear(x_, w, b) + r, (24,), lw, lb, 1e-12))
    assert_close_to_truth(out, *results)


def test_gradients_are_recorded_where_they_are_wanted(device: torch.device) -> None:
    shapes = [(6, 40), (24, 40), (24,), (6, 24), (24,), (24,)]
    given = [torch.randn(s, device=device) for s in shapes]
    results = []
    for dtype in (F32, torch.float64, F32):
        tensors = [t.detach().to(dtype).requires_grad_() for t in given]
        x, w, b, r, lw, lb = tensors
        if not results:
            out = ops.linear_residual_layernorm(
                ops.linear_activation(x, torch.eye(40), None, "gelu"), w, b, r, lw, lb
            )
        else:
            out = F.layer_norm(F.linear(F.gelu(x), w, b) + r, (24,), lw, lb, 1e-12)
        results.append((out, *torch.autograd.grad(out, tensors, given[3].to(dtype))))
    for ours, truth, naive in zip(*results, strict=True):
        assert_close_to_truth(ours, truth, naive)


def test_the_product_follows_every_change_of_its_weight() -> None:
    """oneDNN reads the plain weight each time: no reordered copy that could go stale."""
    x, weight, bias = torch.randn(9, 40), torch.nn.Parameter(torch.randn(24, 40)), torch.randn(24)
    with torch.no_grad():
        before = ops.linear_activation(x, weight, bias)
        weight.data.mul_(2.0)
        after = ops.linear_activation(x, weight, bias)
    assert_close_to_truth(
        after, F.linear(x.double(), weight.double(), bias.double()), F.linear(x, weight, bias)
    )
    assert not torch.equal(before, after)


def test_strided_input_and_weight() -> None:
    base, weight = torch.randn(20, 80), torch.randn(40, 24)
    x = base[::2, ::2]
    out = ops.linear_activation(x, weight.t(), None, "relu")
    assert_bits_equal(out, ops.linear_activation(x.contiguous(), weight.t().contiguous(), None, "relu"))


def test_fused_only_where_it_is_right() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    with dispatch.record() as choices:
        with torch.no_grad():
            ops.linear_activation(x, weight, None, "gelu")
            ops.linear_activation(x.double(), weight.double(), None, "gelu")
            ops.linear_activation(x, weight, None, "silu")
            with torch.autocast("cpu", torch.bfloat16):
                assert ops.linear_activation(x, weight, None, "gelu").dtype == BF16
        ops.linear_activation(x, weight.requires_grad_(), None, "gelu")
    reasons = [c.reason for c in choices]
    expected = ["oneDNN, bias", "float64", "no fused silu", "autocast", "gradients are recorded"]
    for reason, words in zip(reasons, expected, strict=True):
        assert words in reason


def test_bad_arguments_are_named(device: torch.device) -> None:
    x, weight = torch.randn(4, 8, device=device), torch.randn(5, 8, device=device)
    with pytest.raises(ValueError, match=r"weight \[out_features, in_features\].*unknown activation 'swish'"):
        ops.linear_activation(x, weight.t(), None, "swish")
    with pytest.raises(ValueError, match=r"bias must be \[5\]"):
        ops.linear_activation(x, weight, x[0])
    with pytest.raises(ValueError, match=r"residual must be \(4, 5\)"):
        ops.linear_residual_layernorm(x, weight, None, x, None, None)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference", "triton"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eps": -1e-5}, "eps must be at least 0"),
        ({"ln_bias": torch.zeros(3)}, "bias must be"),
        ({"weight": torch.zeros(8, 16, dtype=torch.float64)}, "cast one of them"),
        ({"x": torch.zeros(4, 16, dtype=torch.int8)}, "cast one of them"),
        ({"dropout_p": 1.5}, "dropout_p must be between 0 and 1"),
    ],
)
def test_every_backend_refuses_the_same_layernorms(backend: str, changes: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {
        "x": torch.zeros(4, 16), "weight": torch.zeros(8, 16), "bias": torch.zeros(8), "residual": torch.zeros(4, 8),
        "ln_weight": torch.ones(8), "ln_bias": torch.zeros(8),
    }  # fmt: skip
    asked = dispatch.use_backend(backend, ops=["residual_layernorm"])
    with torch.no_grad(), asked, pytest.raises(InvalidArgumentError, match=said):
        ops.linear_residual_layernorm(**{**given, **changes})
