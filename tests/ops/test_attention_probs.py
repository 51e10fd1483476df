"""The log-sum-exp, its gradient, and the weights that are rebuilt from it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyaccel import dispatch
from pyaccel.errors import NotSupportedError
from pyaccel.ops.attention.api import attention_probs, scaled_dot_product_attention
from pyaccel.reference import attention as reference
from tests.assertions import assert_bits_equal, assert_close_to_truth, assert_statistic
from tests.ops.attention_helpers import (
    BACKENDS,
    BF16,
    CASES,
    F16,
    F32,
    NAN,
    B,
    D,
    H,
    L,
    Options,
    leaf,
    lengths_mask,
    padded_inputs,
)


def whole_truth(options: Options, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, LSE and weights in fp64, by autograd's own logsumexp."""
    mask = torch.zeros(q.shape[0], q.shape[1], q.shape[2], k.shape[2], dtype=torch.float64, device=q.device)
    if "attn_mask" in options:
        mask = mask + options["attn_mask"].double()
    if "key_padding_mask" in options:
        mask = mask.masked_fill(~options["key_padding_mask"][:, None, None], -math.inf)
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + mask
    lse = torch.logsumexp(scores, -1)
    probs = torch.exp(scores - lse[..., None])
    return probs @ v, lse, probs


LSE_OPTIONS: dict[str, Callable[[torch.device], Options]] = {
    "plain": lambda d: {},
    "padding": lambda d: {"key_padding_mask": lengths_mask([19, 7, 1], L, d)},
    "float mask": lambda d: {"attn_mask": torch.randn(H, 1, L, device=d) * 2},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", LSE_OPTIONS)
def test_lse_has_a_gradient(options: str, backend: str, device: torch.device) -> None:
    inputs, given = padded_inputs("", F32, device), LSE_OPTIONS[options](device)
    d_out, d_lse = torch.randn(B, H, L, D, device=device), torch.randn(B, H, L, device=device)
    ours, truths = [leaf(t) for t in inputs], [leaf(t, torch.float64) for t in inputs]
    naive = [leaf(t) for t in inputs]
    with dispatch.use_backend(backend):
        out, lse = scaled_dot_product_attention(*ours, **given, return_lse=True)
    truth, truth_lse, _ = whole_truth(given, *truths)
    plain, plain_lse = reference.scaled_dot_product_attention(*naive, **given, return_lse=True, upcast=False)
    assert_statistic(lse, truth_lse, scale=1.0, name="lse")
    for losses in (
        ((lse, d_lse), (truth_lse, d_lse), (plain_lse, d_lse)),  # the LSE alone: nothing reaches value
        (
            (out * d_out, lse * d_lse),
            (truth * d_out, truth_lse * d_lse),
            (plain * d_out, plain_lse * d_lse),
        ),
    ):
        grads = [
            torch.autograd.grad(
                sum(part.sum() for part in loss) if loss[1] is not d_lse else (loss[0] * d_lse).sum(),
                leaves, retain_graph=True, allow_unused=True, materialize_grads=True,
            )
            for loss, leaves in zip(losses, (ours, truths, naive), strict=True)
        ]  # fmt: skip
        for name, *found in zip(("dq", "dk", "dv"), *grads, strict=True):
            assert_close_to_truth(*found, name=name)


def test_no_gradient_of_the_lse_of_a_query_without_keys(device: torch.device) -> None:
    for backend in BACKENDS:
        inputs = [leaf(t) for t in padded_inputs("", F32, device)]
        with dispatch.use_backend(backend):
            _, lse = scaled_dot_product_attention(
                *inputs, key_padding_mask=lengths_mask([19, 7, 0], L, device), return_lse=True
            )
        dq, dk = torch.autograd.grad(lse, inputs[:2], torch.ones_like(lse))
        for grad in (dq, dk):
            assert grad.isfinite().all()
            assert grad[:2].any()
            assert not grad[2].any()


PROBS_CASES = [
    "plain", "scale", "key padding", "bool mask by head", "float mask", "causal, longer queries", "window",
    "causal and padding", "grouped, padding", "grouped, mask by head", "odd sizes", "window, longer queries",
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", PROBS_CASES)
def test_probs_are_the_weights(
    case: str, dtype: torch.dtype, backend: str, device: torch.device, poison: None
) -> None:
    shape, make_options = CASES[case]
    options = make_options(device)
    q, k, v = padded_inputs(shape, dtype, device)
    with dispatch.use_backend(backend), torch.no_grad():
        _, lse = scaled_dot_product_attention(q, k, v, **options, return_lse=True)
        probs = attention_probs(q, k, lse, **options)
    _, truth_lse, truth = reference.scaled_dot_product_attention(
        q, k, v, **options, return_lse=True, return_probs=True
    )
    assert probs.dtype == dtype
    assert_close_to_truth(probs, truth, reference.attention_probs(q, k, lse, **options, upcast=False))
    assert_close_to_truth(
        reference.attention_probs(q, k, truth_lse, **options).float(), truth, truth.float(), name="reference"
    )
    assert not probs[truth == 0].any()


def test_probs_are_differentiable_in_torch(device: torch.device) -> None:
    q, k, v = padded_inputs("", F32, device)
    mask = torch.randn(H, 1, L, device=device)
    _, lse = scaled_dot_product_attention(q, k, v, mask, return_lse=True)
    d_probs = torch.randn(B, H, L, L, device=device)
    results = []
    for upcast in (None, True, False):
        given = [leaf(t, torch.float64 if upcast else None) for t in (q, k, lse, mask)]
        if upcast is None:
            with dispatch.record() as choices:
                probs = attention_probs(*given)
            assert [c.backend for c in choices] == ["torch"]
        elif upcast:
            probs = torch.exp(given[0] @ given[1].mT / math.sqrt(D) + given[3] - given[2][..., None])
        else:
            probs = reference.attention_probs(*given, upcast=False)
        results.append(torch.autograd.grad((probs * d_probs).sum(), given))
    for name, *found in zip(("dq", "dk", "dlse", "dmask"), *results, strict=True):
        assert_close_to_truth(*found, name=name)
    with dispatch.use_backend("triton"), pytest.raises(NotSupportedError, match="no gradient"):
        attention_probs(leaf(q), k, lse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_probs_of_masked_nan(backend: str, device: torch.device) -> None:
    q, k, v = padded_inputs("", F32, device)
    keys = lengths_mask([19, 7, 0], L, device)
    results = []
    for bad in (0.0, NAN):
        k = k.masked_fill(~keys[:, None, :, None], bad)
        q[2] = bad
        with dispatch.use_backend(backend), torch.no_grad():
            _, lse = scaled_dot_product_attention(q, k, v, key_padding_mask=keys, return_lse=True)
            results.append(attention_probs(q, k, lse, key_padding_mask=keys))
    assert_bits_equal(*results)
    assert not results[0][2].any()
    # A row whose LSE is -inf has no weights, whatever its mask here says.
    with dispatch.use_backend(backend), torch.no_grad():
        assert not attention_probs(q[:2], k[:2], torch.full((2, H, L), -math.inf, device=device)).any()
