"""Attention by products in training on a CPU: gradients by the chunk, under its own dropout mask, and what is saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyaccel import dispatch, tuning
from pyaccel.ops import varlen_attention
from pyaccel.ops.attention import matmul as products
from pyaccel.reference import attention as reference
from tests.assertions import assert_bits_equal
from tests.ops.attention_helpers import BF16, F16, F32, Options, check, leaf

H, D = 3, 8


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each call of the products served; by the lengths that hold where nothing was measured."""
    counted: list[int] = []
    run = products.attention

    def counting(q: Tensor, k: Tensor, v: Tensor, count: int, *args: Any) -> Tensor:
        counted.append(count)
        return run(q, k, v, count, *args)

    monkeypatch.setattr(products, "attention", counting)
    monkeypatch.setitem(products._TRAINING, F32, range(1, 129))
    with tuning.disabled():
        yield counted  # type: ignore[misc]


def batch(lens_q: list[int], lens_k: list[int], dtype: torch.dtype) -> tuple[list[Tensor], list[Any]]:
    """Slices of one buffer; value_dim differs from head_dim where the lengths of keys do from those of queries."""
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k or lens_q))
    if not lens_k:
        buffer = (torch.randn(sum(lens_q), 3, H, D) * 1.3 + 0.3).to(dtype)
        return list(buffer.unbind(1)), [cu_q, cu_q, max(lens_q), max(lens_q)]
    widths = (D, D, D + 4)
    rows = (sum(lens_q), sum(lens_k), sum(lens_k))
    inputs = [(torch.randn(n, H, d) + 0.3).to(dtype) for n, d in zip(rows, widths, strict=True)]
    return inputs, [cu_q, cu_k, max(lens_q), max(lens_k)]


BATCHES: dict[str, tuple[list[int], list[int]]] = {
    "one": ([7], []),
    "of one length": ([9] * 5, []),
    "of one token": ([1] * 4, []),
    "mixed": ([7, 7, 7, 1, 12, 12], []),
    "cross": ([5, 5, 9], [3, 3, 12]),
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.7}, {"dropout_p": 0.3}], ids=str)
@pytest.mark.parametrize("chunk", [1, 500, 2**20])
@pytest.mark.parametrize("name", BATCHES)
def test_values_and_gradients(
    name: str,
    chunk: int,
    options: Options,
    dtype: torch.dtype,
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "_CHUNK", chunk)
    inputs, args = batch(*BATCHES[name], dtype)
    check(varlen_attention, reference.varlen_attention, inputs, *args, own_mask=True, **options)
    assert sum(calls) >= len(BATCHES[name][0])


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_the_derivative_is_the_derivative(dropout_p: float) -> None:
    given = [torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(1)
        return products.attention(q, k, v, 2, 0.6, dropout_p)

    assert torch.autograd.gradcheck(attend, given)


def test_a_gradient_of_any_strides() -> None:
    inputs, args = batch([7, 7], [], F32)
    leaves = [leaf(t) for t in inputs]
    out = varlen_attention(*leaves, *args)
    for grad in (torch.ones(()).expand_as(out), torch.randn(D, H, 14).permute(2, 1, 0)):
        pair = (torch.autograd.grad(out, leaves, g, retain_graph=True) for g in (grad, grad.contiguous()))
        for a, b in zip(*pair, strict=True):
            assert_bits_equal(a, b)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_what_is_saved(dropout_p: float) -> None:
    """Nothing but the three without dropout; with it the weights too, once."""
    inputs, args = batch([7] * 5, [], BF16)
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.data_ptr()] = x.numel()
        return x

    leaves = [leaf(t) for t in inputs]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = varlen_attention(*leaves, *args, dropout_p=dropout_p)
    weights = 5 * H * 7 * 7 if dropout_p else 0
    # What is beside it, the split of the batch's rows, saves nothing.
    assert sum(saved.values()) == sum(t.numel() for t in leaves) + weights
    out.sum().backward()


def test_dropout_without_gradient_drops_too(calls: list[int]) -> None:
    inputs, args = batch([7, 7], [], F32)
    torch.manual_seed(0)
    still = varlen_attention(*inputs, *args)
    assert not torch.equal(varlen_attention(*inputs, *args, dropout_p=0.5), still)
    assert calls == [2]


@pytest.mark.parametrize(
    ("dtype", "lengths", "options"),
    [
        (F16, [5], {}),
        (F32, [5], {"dropout_p": 1.0}),
        (F32, [5], {"is_causal": True}),
        (F32, [5], {"window_size": (1, 1)}),
        (BF16, [1025], {"dropout_p": 0.1}),
        (F32, [129], {}),
    ],
    ids=str,
)
def test_what_products_do_not_serve(
    dtype: torch.dtype, lengths: list[int], options: Options, calls: list[int]
) -> None:
    inputs, args = batch(lengths, [], dtype)
    out = varlen_attention(*(leaf(t) for t in inputs), *args, **options)
    assert out.isfinite().all()
    assert calls == []


def test_under_torch_func_sdpa_serves(calls: list[int]) -> None:
    (q, k, v), args = batch([5, 5], [], F32)
    found = torch.func.grad(lambda q: varlen_attention(q, k, v, *args).square().sum())(q)
    q = leaf(q)
    (expected,) = torch.autograd.grad(varlen_attention(q, k, v, *args).square().sum(), q)
    assert calls == [2]
    torch.testing.assert_close(found, expected)


def test_who_asks_is_told(calls: list[int]) -> None:
    inputs, args = batch([5, 5], [], BF16)
    with dispatch.record() as choices:
        varlen_attention(*map(leaf, inputs), *args)
        varlen_attention(*map(leaf, inputs), *args, dropout_p=0.1)
    assert ["nothing near was measured" in choice.reason for choice in choices] == [True, False]
    assert "with dropout" in choices[1].reason
    assert calls == [2, 2]
