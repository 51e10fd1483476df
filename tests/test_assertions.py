"""The policy itself: what it lets through and what it doesn't."""

from __future__ import annotations

import pytest
import torch

from pyaccel.verify.policy import judge, same_bits
from tests.assertions import assert_bits_equal, assert_close_to_truth, assert_statistic


def test_an_error_like_plain_torchs_passes_and_a_larger_one_does_not() -> None:
    truth = torch.randn(100, 50, dtype=torch.float64) + 1
    naive = truth.bfloat16()
    assert_close_to_truth(naive, truth, naive)
    with pytest.raises(AssertionError, match=r"worst at \(7, 3\)"):
        assert_close_to_truth(
            naive.index_put((torch.tensor(7), torch.tensor(3)), torch.tensor(9.0).bfloat16()), truth, naive
        )
    # Everywhere a little off: the maximum is fine, the root mean square is not.
    biased = (truth + 0.015).float().bfloat16()
    verdict = judge(biased, truth, naive)
    assert verdict.max_error <= verdict.max_allowed
    assert not verdict.passed


def test_what_is_not_finite() -> None:
    truth = torch.tensor([1.0, float("-inf"), 2.0], dtype=torch.float64)
    naive = truth.float()
    assert judge(naive, truth, naive).passed
    for wrong in ([1.0, 5.0, 2.0], [float("nan"), float("-inf"), 2.0], [1.0, float("inf"), 2.0]):
        assert not judge(torch.tensor(wrong), truth, naive).passed


def test_what_can_not_be_compared() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="must be float64"):
        judge(x, x, x)
    with pytest.raises(ValueError, match="shapes differ"):
        judge(x, x.double(), x[:2])
    with pytest.raises(ValueError, match=r"the result is torch\.bfloat16"):
        judge(x.bfloat16(), x.double(), x)
    assert judge(x[:0], x[:0].double(), x[:0]).passed


def test_statistics_and_bits() -> None:
    truth = torch.tensor([3.0, float("-inf")], dtype=torch.float64)
    assert_statistic(truth.float(), truth)
    with pytest.raises(AssertionError, match="eps off"):
        assert_statistic(truth.float() * 1.0001, truth)
    with pytest.raises(AssertionError, match="infinities"):
        assert_statistic(torch.tensor([3.0, -1e30]), truth)
    with pytest.raises(AssertionError, match="fp32"):
        assert_statistic(truth.bfloat16(), truth)
    assert_bits_equal(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    with pytest.raises(AssertionError, match="1 of 2 elements"):
        assert_bits_equal(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))


def test_bits_of_one_element_of_any_stride() -> None:
    one = torch.tensor([1.0, 2.0, 3.0])[::2][:1]
    assert one.stride() == (2,)
    assert same_bits(one, torch.ones(1))
    assert not same_bits(one, torch.zeros(1))
    assert same_bits(torch.arange(6.0)[::2], torch.tensor([0.0, 2.0, 4.0]))
    assert not same_bits(torch.arange(6.0)[::2], torch.arange(3.0))
