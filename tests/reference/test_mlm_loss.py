"""The reference itself: against torch.nn.functional, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pyaccel import reference

F64 = torch.float64


def test_by_hand() -> None:
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    weight = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(2.0)]])
    bias = torch.tensor([0.0, math.log(2.0)])
    labels = torch.tensor([0, 1, -100])
    # Row 0: exp of the logits 3 and 2; row 1: 1 and 4; row 2 doesn't count.
    expected = torch.tensor([math.log(5 / 3), math.log(5 / 4), 0.0], dtype=F64)
    given = (hidden, weight, bias, labels)
    losses = reference.masked_lm_cross_entropy(*given, reduction="none")
    assert losses.dtype == F64
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    for options, divisor in (
        ({"reduction": "sum"}, 1),
        ({}, 2),
        ({"num_items": 5}, 5),
        ({"num_items": torch.tensor(5)}, 5),
    ):
        loss = reference.masked_lm_cross_entropy(*given, **options)
        torch.testing.assert_close(loss, expected.sum() / divisor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("upcast", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_torch(reduction: str, upcast: bool) -> None:
    hidden, weight = torch.randn(2, 5, 7, dtype=F64), torch.randn(11, 7, dtype=F64)
    bias = torch.randn(11, dtype=F64)
    labels = torch.tensor([[0, -100, 10, 3, 3], [-100, -100, 1, 9, 10]])
    loss = reference.masked_lm_cross_entropy(hidden, weight, bias, labels, reduction=reduction, upcast=upcast)
    logits = F.linear(hidden, weight, bias).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), reduction=reduction)
    torch.testing.assert_close(loss, expected.view(loss.shape), rtol=1e-14, atol=1e-14)


def test_naive_rounds_the_logits_alone() -> None:
    hidden, weight, bias = torch.randn(6, 16), torch.randn(30, 16), torch.randn(30)
    given = [t.bfloat16() for t in (hidden, weight, bias)]
    labels = torch.randint(0, 30, (6,))
    loss = reference.masked_lm_cross_entropy(*given, labels, upcast=False)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(*given).float(), labels), rtol=1e-6, atol=0)


def test_no_label_that_counts() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    labels = torch.full((3,), 7)
    for options in ({}, {"reduction": "sum"}, {"num_items": 0}):
        loss = reference.masked_lm_cross_entropy(
            hidden, torch.randn(9, 4), None, labels, ignore_index=7, **options
        )
        assert loss.item() == 0.0
        (grad,) = torch.autograd.grad(loss, hidden)
        assert not grad.any()


def test_what_is_ignored_does_not_leak() -> None:
    hidden, weight = torch.randn(4, 6), torch.randn(9, 6, requires_grad=True)
    labels = torch.tensor([1, -100, 3, -100])
    dirty = hidden.clone()
    dirty[1], dirty[3] = float("nan"), float("inf")
    results = []
    for x in (hidden, dirty):
        loss = reference.masked_lm_cross_entropy(x, weight, None, labels)
        results.append((loss, *torch.autograd.grad(loss, weight)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_gradients_by_finite_differences() -> None:
    hidden, weight = torch.randn(5, 3, dtype=F64), torch.randn(7, 3, dtype=F64)
    given = [t.requires_grad_() for t in (hidden, weight, torch.randn(7, dtype=F64))]
    labels = torch.tensor([1, -100, 6, 0, 6])
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda *t, reduction=reduction: reference.masked_lm_cross_entropy(
                *t, labels, reduction=reduction
            ),
            given,
        )
