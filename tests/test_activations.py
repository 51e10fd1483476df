"""The table says the same as the reference, which is its own definition."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from pyaccel import reference
from pyaccel.activations import ACTIVATIONS, HIDDEN_ACTS, activation_name


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_functions_are_the_references(name: str) -> None:
    one = ACTIVATIONS[name]
    x = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    expected = reference.activation(x, name)
    torch.testing.assert_close(one.module()(x), expected)
    upstream = torch.linspace(1, 2, 41, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(expected, x, upstream)
    torch.testing.assert_close(one.gradient(upstream, x.detach()), gradient)
    given = x.detach().clone()
    torch.testing.assert_close(one.in_place(given), expected.detach())
    torch.testing.assert_close(given, expected.detach())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_modules_are_known_by_their_classes(name: str) -> None:
    one = ACTIVATIONS[name]
    assert activation_name(one.module()) == name
    for act in one.hidden_acts:
        assert activation_name(ACT2FN[act]) == name
        assert HIDDEN_ACTS[act] is one


def test_what_is_not_in_the_table_has_no_name() -> None:
    assert activation_name(torch.nn.Tanh()) is None
    assert activation_name(torch.nn.functional.gelu) is None
