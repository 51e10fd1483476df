"""What arguments attention takes, as PyTorch does; what it refuses, and how; and which backend serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from pyaccel import dispatch, triton_support, tuning
from pyaccel.errors import InvalidArgumentError, NotSupportedError
from pyaccel.ops.attention import api as module
from pyaccel.ops.attention import checks as arguments
from pyaccel.ops.attention.api import attention_probs, scaled_dot_product_attention
from pyaccel.ops.attention.packed import varlen_attention
from tests.assertions import assert_bits_equal, assert_close_to_truth
from tests.ops.attention_helpers import (
    BACKENDS,
    BF16,
    F32,
    B,
    L,
    Options,
    leaf,
    lengths_mask,
    padded_inputs,
    random_mask,
)

# name: shapes of query, key, value and, if given, attn_mask; options
TORCH_SHAPES: dict[str, tuple[list[tuple[int, ...]], Options]] = {
    "2-D": ([(5, 8), (7, 8), (7, 6)], {}),
    "2-D, mask": ([(5, 8), (7, 8), (7, 6), (5, 7)], {}),
    "2-D, causal": ([(5, 8), (7, 8), (7, 8)], {"is_causal": True}),
    "3-D": ([(3, 5, 8), (3, 7, 8), (3, 7, 6)], {}),
    "3-D, mask by its leading dimension": ([(3, 5, 8), (3, 7, 8), (3, 7, 6), (3, 1, 7)], {}),
    "3-D, one key for all": ([(3, 5, 8), (1, 7, 8), (1, 7, 6), (5, 1)], {}),
    "3-D, grouped": ([(4, 5, 8), (2, 7, 8), (2, 7, 8)], {"enable_gqa": True}),
    "3-D query, 4-D keys": ([(3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)], {}),
    "2-D query, 4-D keys": ([(5, 8), (2, 3, 7, 8), (2, 3, 7, 8)], {}),
    "4-D query, 3-D keys": ([(2, 3, 5, 8), (3, 7, 8), (3, 7, 8), (2, 1, 1, 7)], {}),
    "one query for the batch": ([(1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)], {}),
    "one key for the batch": ([(2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8), (2, 3, 5, 7)], {}),
    "one head of keys": ([(2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)], {}),
    "one head of keys, mask by head": ([(2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8), (3, 1, 7)], {}),
    "one head of queries": ([(2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)], {}),
    "one head of keys, several of values": ([(2, 3, 5, 8), (2, 1, 7, 8), (1, 3, 7, 8)], {}),
    "one head of queries and values": ([(2, 1, 5, 8), (2, 3, 7, 8), (2, 1, 7, 8)], {"is_causal": True}),
    "all of it": ([(1, 3, 5, 8), (2, 1, 7, 8), (1, 1, 7, 8), (5, 7)], {"scale": 0.3}),
    "grouped, one key for the batch": ([(2, 6, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8)], {"enable_gqa": True}),
    "grouped, keys and values apart": ([(2, 6, 5, 8), (2, 2, 7, 8), (2, 3, 7, 8)], {"enable_gqa": True}),
    "grouped, one head of keys": ([(2, 6, 5, 8), (2, 1, 7, 8), (2, 2, 7, 8)], {"enable_gqa": True}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", TORCH_SHAPES)
def test_shapes_mean_what_they_mean_in_torch(case: str, backend: str, device: torch.device) -> None:
    shapes, options = TORCH_SHAPES[case]
    inputs = [torch.randn(shape, device=device) + 0.2 for shape in shapes]
    results = []
    for dtype in (F32, torch.float64, None):
        given = [leaf(t, dtype) for t in inputs]
        if dtype == F32:
            with dispatch.use_backend(backend):
                out, lse = scaled_dot_product_attention(*given, **options, return_lse=True)
                alone = scaled_dot_product_attention(*given, **options)
        else:
            out = F.scaled_dot_product_attention(*given, **options)
        d_out = torch.linspace(-1, 2, out.numel(), device=device).view(out.shape).to(out.dtype)
        results.append([out, *torch.autograd.grad(out, given, d_out)])
    for name, *found in zip(("out", "dq", "dk", "dv", "dmask"), *results, strict=False):
        assert_close_to_truth(*found, name=name)
    assert lse.shape == out.shape[:-1]
    assert_close_to_truth(alone, results[1][0], results[2][0], name="without LSE")
    with dispatch.use_backend(backend), torch.no_grad():
        if case in (
            "2-D",
            "3-D, mask by its leading dimension",
            "3-D, grouped",
            "4-D query, 3-D keys",
            "all of it",
        ):
            mask = inputs[3] if len(inputs) == 4 else None
            probs = attention_probs(*inputs[:2], lse, mask, **options)
            assert probs.shape == (*lse.shape, inputs[1].shape[-2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_dimension_more_is_refused(which: str, masked: bool, backend: str, device: torch.device) -> None:
    given = {name: torch.randn(2, 3, 8, 1, device=device) for name in ("query", "key", "value")}
    given[which] = given[which].unsqueeze(-1)
    mask = torch.ones(1, 3, 8, 8, dtype=torch.bool, device=device) if masked else None
    with (
        dispatch.use_backend(backend),
        pytest.raises(ValueError, match=r"must be \[batch, heads, seq, head_dim\]"),
    ):
        scaled_dot_product_attention(**given, attn_mask=mask)


def test_broadcast_dimensions_are_views(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    q = torch.randn(2, 4, 5, 8, device=device)
    k, v = torch.randn(1, 1, 7, 8, device=device), torch.randn(1, 1, 7, 8, device=device)
    q4, k4, v4 = arguments.padded_views(q, k, v)
    assert q4 is q
    for view, t in ((k4, k), (v4, v)):
        assert view.data_ptr() == t.data_ptr()
        assert view.shape == (2, 1, 7, 8)  # one head for all stays one


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_biases_of_torch(backend: str, device: torch.device) -> None:
    """They are tensors in name only: what lies in their memory means nothing."""
    q, k, v = padded_inputs("longer keys", F32, device)
    with dispatch.use_backend(backend):
        for bias, options in (
            (causal_upper_left(13, 21), {"is_causal": True}),
            (causal_lower_right(13, 21), {"window_size": (-1, 0)}),
        ):
            out = scaled_dot_product_attention(q, k, v, bias)
            assert_bits_equal(out, scaled_dot_product_attention(q, k, v, **options))
            torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, bias))
        out = scaled_dot_product_attention(q, k, v, causal_lower_right(13, 21), window_size=(4, 3))
        assert_bits_equal(out, scaled_dot_product_attention(q, k, v, window_size=(4, 0)))
        with pytest.raises(ValueError, match="CausalBias"):
            scaled_dot_product_attention(q, k, v, causal_upper_left(13, 20))


def test_in_the_place_of_torchs_own(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    inputs = padded_inputs("", F32, device)
    options = {"attn_mask": random_mask(B, 1, L, L, device=device)}
    expected = scaled_dot_product_attention(*inputs, **options)
    rows, cu = (
        [t[0].transpose(0, 1) for t in inputs],
        torch.tensor([0, 7, L], dtype=torch.int32, device=device),
    )
    packed = varlen_attention(*rows, cu, cu, L, L)
    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled_dot_product_attention)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", scaled_dot_product_attention)
    for backend in BACKENDS:
        with dispatch.use_backend(backend):
            torch.testing.assert_close(F.scaled_dot_product_attention(*inputs, **options), expected)
            torch.testing.assert_close(varlen_attention(*rows, cu, cu, L, L), packed)
    layer = torch.nn.MultiheadAttention(16, 2, batch_first=True, device=device)
    x = torch.randn(2, 5, 16, device=device)
    out, _ = layer(x, x, x, need_weights=False)
    monkeypatch.undo()
    torch.testing.assert_close(out, layer(x, x, x, need_weights=False)[0])


# --- what is refused ----------------------------------------------------------------------------------------


def test_every_reason_is_named_at_once(device: torch.device) -> None:
    q = torch.randn(2, 4, 5, 8, device=device)
    with pytest.raises(ValueError, match="scaled_dot_product_attention") as info:
        scaled_dot_product_attention(
            q, q[:, :2].half(), q[:, :2], torch.ones(2, 3, dtype=torch.int64, device=device), 1.5,
            key_padding_mask=torch.ones(2, 4, device=device), window_size=(-2, 0),
        )  # fmt: skip
    for reason in (
        "share one dtype", "enable_gqa=True", "attn_mask must be bool", "can't be broadcast",
        "key_padding_mask must be bool", "[batch, seq_k] = (2, 5)", "dropout_p", "window_size",
    ):  # fmt: skip
        assert reason in str(info.value)
    for bad, message in (
        ((q[None], q[None], q[None]), r"must be \[batch, heads, seq, head_dim\]"),
        ((q[:, 0, 0, 0],) * 3, r"must be \[batch, heads, seq, head_dim\]"),
        ((q[0, 0, 0, 0],) * 3, r"must be \[batch, heads, seq, head_dim\]"),
        ((q, q[0, 0, 0], q), r"must be \[batch, heads, seq, head_dim\]"),
        ((q, torch.cat([q, q[:1]]), q), "batch sizes of query, key and value must be equal or 1"),
        ((q, q[:, :2], q[:, :2]), "query has 4 heads, key 2, value 2: pass enable_gqa=True"),
        ((q, q[:, :3], q[:, :3]), "they must be equal, or 1"),
        ((q, q[..., :4], q), "head_dim 8, key 4"),
        ((q, q, q[:, :, :3]), "must match key"),
        ((q[:, :0], q[:, :0], q[:, :0]), "there must be a head"),
        ((q.int(), q.int(), q.int()), "share one dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            scaled_dot_product_attention(*bad)
    with pytest.raises(ValueError, match="must be a multiple"):
        scaled_dot_product_attention(q, q[:, :3], q[:, :3], enable_gqa=True)
    with pytest.raises(ValueError, match="must be a multiple"):
        scaled_dot_product_attention(q[:, :1], q, q, enable_gqa=True)  # PyTorch's rule, too


def test_odd_types_are_reasons_too(device: torch.device) -> None:
    q = torch.randn(2, 4, 5, 8, device=device)
    with pytest.raises(ValueError, match="attn_mask must be a tensor, got str") as info:
        scaled_dot_product_attention(q, q, q, "causal", "0.1", scale="1", key_padding_mask=[1], window_size=3)
    for reason in (
        "dropout_p must be a number, got str", "scale must be a number or None, got str",
        "key_padding_mask must be a tensor, got list", "window_size must be (left, right)",
    ):  # fmt: skip
        assert reason in str(info.value)
    for mask, reason in (
        (torch.ones(5, 5, device=device).to_sparse(), "attn_mask must be a dense tensor"),
        (torch.nested.nested_tensor([q[0, 0], q[0, 0]]), "attn_mask must be a dense tensor"),
        (object(), "attn_mask must be a tensor"),
    ):
        with pytest.raises(ValueError, match=reason):
            scaled_dot_product_attention(q, q, q, mask)
    for autocast in (False, True):
        with torch.autocast(device.type, BF16, enabled=autocast):
            for bad in ((None, q, q), (q, 3, q), (q, q, [q])):
                with pytest.raises(ValueError, match="must be a tensor"):
                    scaled_dot_product_attention(*bad)


@pytest.mark.parametrize("base", [ValueError, RuntimeError])
def test_the_error_is_both_ours_and_pytorchs(base: type[Exception], device: torch.device) -> None:
    q = torch.randn(4, 8, device=device)
    with pytest.raises(base, match="head_dim 8, key 4"):
        scaled_dot_product_attention(q, q[:, :4], q)


def test_the_kernels_reasons_come_with_the_arguments() -> None:
    query = torch.zeros(1, 1, 2, 5, 300, dtype=torch.float64)
    key = torch.zeros(1, 1, 2, 5, 300, dtype=torch.float64, device="meta")
    with dispatch.use_backend("triton"), pytest.raises(InvalidArgumentError) as info:
        scaled_dot_product_attention(query, key, key, torch.zeros(3), 1.5)
    for reason in (
        "not float64", "up to 256, not 300", "on one device, got cpu, meta, meta", "got (1, 1, 2, 5, 300)",
        "attn_mask (3,) can't be broadcast", "dropout_p must be between 0 and 1, got 1.5",
    ):  # fmt: skip
        assert str(info.value).count(reason) == 1
    with pytest.raises(InvalidArgumentError) as info:
        scaled_dot_product_attention(query, key, key, torch.zeros(3), 1.5)
    assert "the kernels take" not in str(info.value)
    # Where the arguments make sense and only the backend can't, that is what is said.
    wide = torch.zeros(1, 1, 2, 300, dtype=torch.float64)
    with (
        dispatch.use_backend("triton"),
        pytest.raises(NotSupportedError, match=r"not float64.*not 300"),
    ):
        scaled_dot_product_attention(wide, wide, wide)
    cu = torch.tensor([0, 2], dtype=torch.int32)
    with dispatch.use_backend("triton"), pytest.raises(InvalidArgumentError, match="not float64"):
        varlen_attention(wide, wide[0], wide[0], cu, cu, 2, 2)
    with dispatch.use_backend("triton"), pytest.raises(InvalidArgumentError, match="not float64"):
        attention_probs(wide, wide, torch.zeros(1, 1, 3))


def test_bad_arguments_of_probs(device: torch.device) -> None:
    q = torch.randn(2, 4, 5, 8, device=device)
    lse = torch.randn(2, 4, 5, device=device)
    for bad, message in (
        ((q, q, lse.half()), "lse must be torch.float32"),
        ((q, q, lse[..., None]), r"lse must be \[batch, heads, seq_q\] = \(2, 4, 5\), got \(2, 4, 5, 1\)"),
        ((q, q, None), "lse must be a tensor"),
        ((q, q.half(), lse), "query and key must share one dtype"),
        ((q, q, lse.to("meta")), "lse is on meta"),
        ((q, q, lse, torch.ones(4, device=device)), "can't be broadcast"),
        ((q, q[:, :2], lse), "enable_gqa=True"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_probs(*bad)


# --- which backend ------------------------------------------------------------------------------------------


def test_the_kernels_are_preferred_on_a_gpu(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    q = torch.randn(2, 4, 5, 8, device=device)
    cu = torch.tensor([0, 2], dtype=torch.int32, device=device)
    with tuning.disabled(), dispatch.record() as choices, torch.no_grad():
        _, lse = scaled_dot_product_attention(q, q, q, return_lse=True)
        attention_probs(q, q, lse)
        varlen_attention(q[0], q[0], q[0], cu, cu, 2, 2)
    nothing = "nothing near was measured on this machine: `pyaccel tune` does"
    on_the_cpu = f"on the CPU, SDPA by groups of equal lengths ({nothing})"
    chosen = (
        {("triton", "the fastest that serves this call")}
        if device.type == "cuda"
        else {("torch", "on the CPU"), ("torch", on_the_cpu)}
    )
    assert {(c.backend, c.reason) for c in choices} == chosen
    assert [c.op for c in choices] == ["scaled_dot_product_attention", "attention_probs", "varlen_attention"]


@pytest.mark.parametrize("mask", ["ones", "padding"])
def test_triton_reads_no_mask_on_the_host(
    mask: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    q = torch.randn(2, 4, 5, 8, device=device)
    keys = lengths_mask([5, 5] if mask == "ones" else [5, 2], 5, device)
    given = []

    def padded(*args: Any) -> Tensor:
        given.append(args[3].key_padding_mask)
        return q

    monkeypatch.setattr(module.triton_backend, "padded", padded)
    with dispatch.use_backend("triton"):
        scaled_dot_product_attention(q, q, q, key_padding_mask=keys)
    assert given[0] is keys


def test_on_a_gpu_triton_serves_but_not_where_it_would_spill() -> None:
    """fp32 has no matrix instructions: wide heads are left to PyTorch, and the choice says why."""
    with FakeTensorMode(), dispatch.record() as choices:
        for dtype, dim in ((torch.bfloat16, 128), (torch.float32, 64), (torch.float32, 80)):
            q = torch.empty(2, 4, 16, dim, dtype=dtype, device="cuda")
            scaled_dot_product_attention(q, q, q)
    if triton_support.has_triton():
        assert [choice.backend for choice in choices] == ["triton", "triton", "torch"]
    assert "at a head dimension of 80 the kernels spill" in choices[-1].reason
