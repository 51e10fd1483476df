"""Attention over padded batches: the public functions against the fp64 truth, on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyaccel import dispatch
from pyaccel.ops.attention import sdpa as sdpa_backend
from pyaccel.ops.attention.api import attention_probs, scaled_dot_product_attention
from pyaccel.ops.attention.packed import varlen_attention
from pyaccel.reference import attention as reference
from tests.assertions import assert_bits_equal, assert_statistic
from tests.ops.attention_helpers import (
    BACKENDS,
    BF16,
    CASES,
    F16,
    F32,
    NAN,
    B,
    L,
    Options,
    check,
    leaf,
    lengths_mask,
    padded_inputs,
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_padded_is_as_right_as_plain_torch(
    case: str, dtype: torch.dtype, backend: str, device: torch.device, poison: None
) -> None:
    shape, options = CASES[case]
    inputs = padded_inputs(shape, dtype, device)
    with dispatch.use_backend(backend):
        check(
            scaled_dot_product_attention,
            reference.scaled_dot_product_attention,
            inputs,
            own_mask=backend == "torch" and device.type == "cpu",
            **options(device),
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_lse_is_an_fp32_statistic(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    inputs = padded_inputs("", dtype, device)
    options = {"key_padding_mask": lengths_mask([19, 7, 0], L, device), "is_causal": True}
    with dispatch.use_backend(backend):
        out, lse = scaled_dot_product_attention(*inputs, **options, return_lse=True)
    _, truth_lse = reference.scaled_dot_product_attention(*inputs, **options, return_lse=True)
    assert out.dtype == dtype
    assert_statistic(lse, truth_lse, scale=1.0, name="lse")
    assert (lse[2] == -math.inf).all()
    assert not out[2].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("how", ["padding", "bool", "float", "by head", "causal"])
def test_masked_nan_and_inf_never_leak(
    how: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Sequence 1 has three real keys, sequence 2 none; causal leaves the last three keys without a query."""
    clean = [(torch.randn(3, 4, n, 16, device=device) + 0.3).to(dtype) for n in (6, 9, 9)]
    keys = lengths_mask([9, 3, 0], 9, device)
    options: Options = {
        "padding": {"key_padding_mask": keys},
        "bool": {"attn_mask": keys[:, None, None, :]},
        "float": {
            "attn_mask": torch.zeros(3, 1, 1, 9, device=device).masked_fill(~keys[:, None, None], -math.inf)
        },
        "by head": {"attn_mask": keys[:, None, None, :].repeat(1, 4, 6, 1)},
        "causal": {"is_causal": True},
    }[how]
    if how == "causal":
        keys = lengths_mask([6, 6, 6], 9, device)
    dirty = [t.clone() for t in clean]
    for t, bad in zip(dirty[1:], (NAN, math.inf), strict=True):
        t.masked_fill_(~keys[:, None, :, None], bad)
    if how != "causal":
        dirty[0][2] = NAN
    results = []
    for inputs in (clean, dirty):
        leaves = [leaf(t) for t in inputs]
        with dispatch.use_backend(backend):
            out = scaled_dot_product_attention(*leaves, **options)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for name, a, b in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_bits_equal(a + 0.0, b + 0.0, name=name)  # + 0.0: the sign of a zero may differ
    if how != "causal":
        assert not any(t[2].any() for t in results[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_attends_to_itself(backend: str, device: torch.device) -> None:
    q, k, v = (torch.randn(2, 3, 1, 8, device=device, requires_grad=True) for _ in range(3))
    with dispatch.use_backend(backend):
        out = scaled_dot_product_attention(q, k, v)
    (dv,) = torch.autograd.grad(out, v, torch.full_like(out, 2.5))
    assert_bits_equal(out, v)
    assert_bits_equal(dv, torch.full_like(v, 2.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_summed_output_has_the_gradient_of_ones(backend: str, device: torch.device) -> None:
    inputs = [leaf(t) for t in padded_inputs("", F32, device)]
    with dispatch.use_backend(backend):
        out = scaled_dot_product_attention(*inputs, is_causal=True)
    ones = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    for a, b in zip(torch.autograd.grad(torch.cat([out, out]).sum() / 2, inputs), ones, strict=True):
        torch.testing.assert_close(a, b)
        assert a.any()


def test_padding_mask_is_never_expanded(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    masks, inputs = [], padded_inputs("", F32, device)
    sdpa = sdpa_backend.torch_sdpa

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        masks.append(None if attn_mask is None else tuple(attn_mask.shape))
        return sdpa(q, k, v, attn_mask, *args, **kwargs)

    monkeypatch.setattr(sdpa_backend, "torch_sdpa", spy)
    for lens in ([19, 7, 0], [19, 19, 19]):
        with dispatch.use_backend("torch"):
            scaled_dot_product_attention(*inputs, key_padding_mask=lengths_mask(lens, L, device))
    assert masks[0] == (B, 1, 1, L)
    assert masks[1] in (None, (B, 1, 1, L))


@pytest.mark.parametrize("case", ["key padding", "bool mask", "float mask", "window, longer queries"])
def test_torch_is_never_handed_a_query_without_keys(
    case: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """What its backends make of such a row differs, and what this CPU's does proves nothing for others."""
    sdpa, masks = sdpa_backend.torch_sdpa, []

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        masks.append(attn_mask if attn_mask.dtype == torch.bool else attn_mask > -math.inf)
        return sdpa(q, k, v, attn_mask, *args, **kwargs)

    monkeypatch.setattr(sdpa_backend, "torch_sdpa", spy)
    shape, options = CASES[case]
    with dispatch.use_backend("torch"):
        scaled_dot_product_attention(*padded_inputs(shape, F32, device), **options(device))
    assert masks[0].any(-1).all()
    assert not masks[0].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_replays_under_checkpointing_and_by_seed(backend: str, device: torch.device) -> None:
    inputs = [leaf(t) for t in padded_inputs("", F32, device)]

    def attend(*qkv: Tensor, dropout_p: float = 0.4) -> Tensor:
        with dispatch.use_backend(backend):
            return scaled_dot_product_attention(*qkv, dropout_p=dropout_p)

    grads = []
    for run in (attend, lambda *qkv: checkpoint(attend, *qkv, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(run(*inputs).square().sum(), inputs))
    for a, b in zip(*grads, strict=True):
        assert_bits_equal(a, b)
    assert not torch.equal(attend(*inputs), attend(*inputs))
    assert not attend(*inputs, dropout_p=1.0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "seq_q", "seq_k"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0)])
def test_empty_padded(batch: int, seq_q: int, seq_k: int, backend: str, device: torch.device) -> None:
    q, k = (torch.randn(batch, 2, n, 8, device=device, requires_grad=True) for n in (seq_q, seq_k))
    padding = torch.ones(batch, seq_k, dtype=torch.bool, device=device)
    for options in (
        {}, {"key_padding_mask": padding}, {"is_causal": True}, {"return_lse": True}, {"dropout_p": 0.5},
        {"attn_mask": padding[:, None, None]}, {"attn_mask": torch.randn(seq_q, seq_k, device=device)},
    ):  # fmt: skip
        with dispatch.use_backend(backend):
            out = scaled_dot_product_attention(q, k, k, **options)
        out, lse = out if isinstance(out, tuple) else (out, None)
        assert out.shape == (batch, 2, seq_q, 8)
        assert not out.any()
        assert lse is None or (lse.shape == out.shape[:3] and (lse == -math.inf).all())
        for grad, t in zip(torch.autograd.grad(out.sum(), (q, k)), (q, k), strict=True):
            assert grad.shape == t.shape
            assert not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_to_its_dtype(backend: str, device: torch.device) -> None:
    q, k, v = padded_inputs("", F32, device)
    narrow = [t.bfloat16() for t in (q, k, v)]
    packed = [t[0].transpose(0, 1) for t in (q, k, v)]
    cu = torch.tensor([0, 7, L], dtype=torch.int32, device=device)
    with dispatch.use_backend(backend), torch.no_grad():
        with torch.autocast(device.type, BF16):
            mixed, lse = scaled_dot_product_attention(q, k.bfloat16(), value=v, return_lse=True)
            rows = varlen_attention(packed[0], packed[1].bfloat16(), packed[2], cu, cu, L, L)
            weights = attention_probs(q, k.bfloat16(), lse)
            with pytest.raises(ValueError, match="share one dtype"):
                scaled_dot_product_attention(q.int(), k.int(), v.int())
        assert_bits_equal(mixed, scaled_dot_product_attention(*narrow, return_lse=True)[0])
        assert_bits_equal(rows, varlen_attention(*(t.bfloat16() for t in packed), cu, cu, L, L))
        assert_bits_equal(weights, attention_probs(*narrow[:2], lse))


# The other two are in test_registration.py and test_attention_transforms.py.
@pytest.mark.parametrize(("backend", "dynamic"), [("triton", True), ("torch", False)])
def test_compiled_equals_eager(backend: str, dynamic: bool, device: torch.device) -> None:
    inputs = [leaf(t) for t in padded_inputs("", F32, device)]
    mask = lengths_mask([19, 7, 0], L, device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = scaled_dot_product_attention(q, k, v, key_padding_mask=mask, return_lse=True)
        # On a CPU torch draws its own mask in eager mode, and ours in a graph, where lse is asked for: one mask then.
        dropped = scaled_dot_product_attention(
            q, k, v, key_padding_mask=mask, dropout_p=0.3, return_lse=True
        )[0]
        return dropped + out, lse

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for function in (attend, compiled):
        torch.manual_seed(2)
        with dispatch.use_backend(backend):
            out, lse = function(*inputs)
        loss = out.square().sum() + lse[:2].square().sum()
        results.append([out, lse, *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
