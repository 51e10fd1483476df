"""The dropout mask that is drawn on the CPU, and the sum that it goes into."""

from __future__ import annotations

import math

import pytest
import torch

from pyaccel import dispatch, ops
from pyaccel.ops.dropout import keep_mask_on_host
from tests.assertions import MEANS_DIFFER, assert_bits_equal, assert_close_to_truth
from tests.ops.attention_helpers import BF16, F32, leaf

N = 1 << 20


def differs(mean: torch.Tensor, expected: float, count: int) -> float:
    """In standard deviations of a mean of so many draws."""
    return abs(mean.item() - expected) / math.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("dropout_p", [2**-15, 0.1, 0.5, 0.9, 1 - 2**-15])
def test_as_many_are_kept_as_should_be(dropout_p: float) -> None:
    torch.manual_seed(0)
    keep = keep_mask_on_host((N // 4, 4), dropout_p).double()
    kept = round((1 - dropout_p) * 2**15) / 2**15
    assert differs(keep.mean(), kept, N) <= MEANS_DIFFER
    for half in (keep.flatten()[::2], keep.flatten()[1::2]):  # of one draw
        assert differs(half.mean(), kept, N // 2) <= MEANS_DIFFER


@pytest.mark.parametrize("step", [1, 2, 4, 512])
def test_neighbors_know_nothing_of_each_other(step: int) -> None:
    torch.manual_seed(1)
    keep = keep_mask_on_host((N,), 0.3)
    both = (keep[:-step:2] & keep[step::2]).double()
    assert differs(both.mean(), 0.7**2, len(both)) <= MEANS_DIFFER


def test_the_ends() -> None:
    assert keep_mask_on_host((3, 5), 0.0).all()
    assert not keep_mask_on_host((3, 5), 1 - 2**-17).any()
    assert keep_mask_on_host((0, 5), 0.3).shape == (0, 5)
    assert keep_mask_on_host((), 0.3).shape == ()


def test_it_is_drawn_on_the_host_whatever_the_default_device() -> None:
    with torch.device("meta"):
        assert keep_mask_on_host((3, 5), 0.5).device.type == "cpu"


def test_the_seed_says_which() -> None:
    masks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        masks.append(keep_mask_on_host((7, 9), 0.5))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("rms_norm", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_dropout_and_sum_in_one_pass(dtype: torch.dtype, rms_norm: bool) -> None:
    """Values and gradients under the mask that it draws, which a residual of zeros shows."""
    generator = torch.Generator().manual_seed(5)
    x, residual, dy = (torch.randn(13, 40, generator=generator).to(dtype) for _ in range(3))
    x_bias, weight, bias = (torch.randn(40, generator=generator).to(dtype) for _ in range(3))
    options = {"dropout_p": 0.3, "training": True, "rms_norm": rms_norm, "return_sum": True}

    def seeded(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(7)
        x, residual, weight, bias, x_bias = given
        with dispatch.use_backend("torch"):
            out: tuple[torch.Tensor, torch.Tensor] = ops.residual_layernorm(
                x, residual, weight, None if rms_norm else bias, x_bias=x_bias, **options
            )
        return out

    keep = seeded(torch.ones_like(x), torch.zeros_like(x), weight, bias, torch.zeros_like(bias))[1] != 0
    assert 0.5 < keep.double().mean().item() < 0.9

    def plain(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual, weight, bias, x_bias = given
        total = (x + x_bias) * keep / (1 - 0.3) + residual
        if rms_norm:
            return torch.nn.functional.rms_norm(total, (40,), weight, 1e-12), total
        return torch.nn.functional.layer_norm(total, (40,), weight, bias, 1e-12), total

    results = []
    for call, kind in ((seeded, dtype), (plain, torch.float64), (plain, dtype)):
        leaves = [leaf(t, kind) for t in (x, residual, weight, bias, x_bias)]
        out = call(*leaves)
        wrt = [t for t, absent in zip(leaves, (0, 0, 0, rms_norm, 0), strict=True) if not absent]
        grads = torch.autograd.grad(out, wrt, [dy.to(kind), dy.to(kind) * 0.5])
        results.append([*out, *grads])
    for i, found in enumerate(zip(*results, strict=True)):
        assert_close_to_truth(*found, name=f"result {i}")


def test_a_residual_of_another_dtype_and_a_probability_of_one() -> None:
    x, residual, ones = torch.randn(5, 8), torch.randn(5, 8, dtype=BF16), torch.ones(8)
    with dispatch.use_backend("torch"):
        out, total = ops.residual_layernorm(
            x, residual, ones, None, dropout_p=0.5, training=True, return_sum=True
        )
        assert (out.dtype, total.dtype) == (F32, F32)
        _, total = ops.residual_layernorm(x, x, ones, None, dropout_p=1.0, training=True, return_sum=True)
    assert_bits_equal(total, x)
