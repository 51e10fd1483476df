"""Attention, padded and packed: the public functions against the fp64 truth, on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyaccel import dispatch
from pyaccel.ops import attention as module
from pyaccel.ops._dropout import dropout_key
from pyaccel.ops.attention import scaled_dot_product_attention, varlen_attention
from pyaccel.reference import attention as reference
from tests.assertions import assert_bits_equal, assert_close_to_truth, assert_statistic

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAN = float("nan")
BACKENDS = ["torch", "reference"]
B, H, L, D = 3, 4, 19, 16

Options = dict[str, Any]


def lengths_mask(lens: list[int], seq: int, device: torch.device) -> Tensor:
    return torch.arange(seq, device=device) < torch.tensor(lens, device=device)[:, None]


def random_mask(*shape: int, device: torch.device) -> Tensor:
    """Bool, about half of it True, with a query (and a whole batch of them) that sees nothing."""
    mask = torch.rand(shape, device=device) < 0.5
    mask[..., -1, :] = False
    return mask


def float_mask(*shape: int, device: torch.device) -> Tensor:
    """Float, a third of it -inf, the last query's all of it."""
    mask = torch.randn(shape, device=device) * 2
    return mask.masked_fill(torch.rand(shape, device=device) < 0.3, -math.inf).index_fill(
        -2, torch.tensor([shape[-2] - 1], device=device), -math.inf
    )


# name: (shape of q, k, v where it isn't the usual one; options from a device)
SHAPES: dict[str, tuple[int, ...]] = {
    # batch, heads, kv_heads, seq_q, seq_k, head_dim, value_dim
    "longer keys": (2, 4, 4, 13, 21, 16, 16),
    "longer queries": (2, 4, 4, 21, 13, 16, 16),
    "grouped": (2, 8, 2, 7, 11, 16, 16),
    "one query": (2, 3, 3, 1, 6, 16, 16),
    "odd": (1, 3, 3, 13, 29, 17, 17),
    "wide": (1, 2, 2, 33, 18, 256, 256),
    "value_dim": (2, 4, 4, 7, 11, 16, 24),
}
CASES: dict[str, tuple[str, Callable[[torch.device], Options]]] = {
    "plain": ("", lambda d: {}),
    "scale": ("", lambda d: {"scale": 0.1}),
    "one query": ("one query", lambda d: {}),
    "odd sizes": ("odd", lambda d: {}),
    "head_dim 256": ("wide", lambda d: {}),
    "value_dim": ("value_dim", lambda d: {}),
    "key padding": ("", lambda d: {"key_padding_mask": lengths_mask([19, 7, 0], L, d)}),
    "no padding": ("", lambda d: {"key_padding_mask": lengths_mask([19, 19, 19], L, d)}),
    "bool mask": ("", lambda d: {"attn_mask": random_mask(B, 1, L, L, device=d)}),
    "bool mask by head": ("", lambda d: {"attn_mask": random_mask(H, L, L, device=d)}),
    "bool mask of queries": ("", lambda d: {"attn_mask": lengths_mask([19, 7, 0], L, d)[:, None, :, None]}),
    "float mask": ("", lambda d: {"attn_mask": float_mask(B, 1, L, L, device=d)}),
    "mask with a gradient": ("", lambda d: {"attn_mask": torch.randn(H, 1, L, device=d).requires_grad_()}),
    "mask with a gradient and -inf": (
        "",
        lambda d: {"attn_mask": float_mask(1, 1, L, L, device=d).requires_grad_()},
    ),
    "causal": ("", lambda d: {"is_causal": True}),
    "causal, longer keys": ("longer keys", lambda d: {"is_causal": True}),
    "causal, longer queries": ("longer queries", lambda d: {"is_causal": True}),
    "causal and padding": (
        "",
        lambda d: {"is_causal": True, "key_padding_mask": lengths_mask([19, 7, 0], L, d).flip(1)},
    ),
    "window": ("", lambda d: {"window_size": (3, 2)}),
    "window, longer queries": ("longer queries", lambda d: {"window_size": (2, 0)}),
    "window, causal, mask": (
        "longer keys",
        lambda d: {"window_size": (6, -1), "is_causal": True, "attn_mask": float_mask(13, 21, device=d)},
    ),
    "grouped": ("grouped", lambda d: {"enable_gqa": True}),
    "grouped, mask by head": (
        "grouped",
        lambda d: {"enable_gqa": True, "attn_mask": random_mask(8, 7, 11, device=d)},
    ),
    "grouped, padding": (
        "grouped",
        lambda d: {"enable_gqa": True, "key_padding_mask": lengths_mask([11, 4], 11, d)},
    ),
    "dropout": ("", lambda d: {"dropout_p": 0.3, "key_padding_mask": lengths_mask([19, 7, 0], L, d)}),
    "grouped, causal, dropout": (
        "grouped",
        lambda d: {"enable_gqa": True, "is_causal": True, "dropout_p": 0.15},
    ),
}


def padded_inputs(shape: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v ``[batch, heads, seq, head_dim]`` by strides; a mean, and another magnitude in every batch."""
    batch, heads, kv_heads, seq_q, seq_k, dim, value_dim = SHAPES.get(shape, (B, H, H, L, L, D, D))
    scale = torch.linspace(0.7, 2.0, batch, device=device)[:, None, None, None]
    sizes = [(batch, seq_q, heads, dim), (batch, seq_k, kv_heads, dim), (batch, seq_k, kv_heads, value_dim)]
    return [(torch.randn(s, device=device) * scale + 0.3).to(dtype).transpose(1, 2) for s in sizes]


def leaf(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.detach().to(dtype or x.dtype).requires_grad_()


def check(
    function: Callable[..., Any], truth: Callable[..., Any], inputs: list[Tensor], *args: Any, **options: Any
) -> None:
    """Output and gradients of ``function``, judged by the policy; all three under one dropout mask."""
    dy = None
    results = []
    mask = options.get("attn_mask")
    differentiable_mask = mask is not None and mask.requires_grad
    for call, dtype in ((function, None), (truth, torch.float64), (truth, None)):
        leaves = [leaf(t, dtype) for t in inputs]
        wrt = list(leaves)
        extra: Options = {}
        if differentiable_mask:
            extra["attn_mask"] = leaf(mask, dtype)
            wrt.append(extra["attn_mask"])
        torch.manual_seed(5)
        if call is truth:
            extra["upcast"] = dtype is not None
            if options.get("dropout_p"):
                extra["dropout_key"] = dropout_key(inputs[0].device)
        out = call(*leaves, *args, **{**options, **extra})
        if dy is None:  # neither ones nor contiguous
            dy = torch.randn(out.mT.shape, device=out.device).to(out.dtype).mT + 0.25
        results.append([out, *torch.autograd.grad(out, wrt, dy.to(out.dtype))])
    for name, *found in zip(("out", "dq", "dk", "dv", "dmask"), *results, strict=False):
        assert_close_to_truth(*found, name=name)


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
    sdpa = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        masks.append(None if attn_mask is None else tuple(attn_mask.shape))
        return sdpa(q, k, v, attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for lens in ([19, 7, 0], [19, 19, 19]):
        scaled_dot_product_attention(*inputs, key_padding_mask=lengths_mask(lens, L, device))
    assert masks[0] == (B, 1, 1, L)
    assert masks[1] in (None, (B, 1, 1, L))


@pytest.mark.parametrize("case", ["key padding", "bool mask", "float mask", "window, longer queries"])
def test_torch_is_never_handed_a_query_without_keys(
    case: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """What its backends make of such a row differs, and what this CPU's does proves nothing for others."""
    sdpa, masks = F.scaled_dot_product_attention, []

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, **kwargs: Any) -> Tensor:
        masks.append(attn_mask if attn_mask.dtype == torch.bool else attn_mask > -math.inf)
        return sdpa(q, k, v, attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    shape, options = CASES[case]
    scaled_dot_product_attention(*padded_inputs(shape, F32, device), **options(device))
    assert masks[0].any(-1).all()
    assert not masks[0].all()


def test_dropout_replays_under_checkpointing_and_by_seed(device: torch.device) -> None:
    inputs = [leaf(t) for t in padded_inputs("", F32, device)]

    def attend(*qkv: Tensor) -> Tensor:
        return scaled_dot_product_attention(*qkv, dropout_p=0.4)

    grads = []
    for run in (attend, lambda *qkv: checkpoint(attend, *qkv, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(run(*inputs).square().sum(), inputs))
    for a, b in zip(*grads, strict=True):
        assert_bits_equal(a, b)
    assert not torch.equal(attend(*inputs), attend(*inputs))
    assert not scaled_dot_product_attention(*inputs, dropout_p=1.0).any()


@pytest.mark.parametrize(("batch", "seq_q", "seq_k"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0)])
def test_empty_padded(batch: int, seq_q: int, seq_k: int, device: torch.device) -> None:
    q, k = (torch.randn(batch, 2, n, 8, device=device, requires_grad=True) for n in (seq_q, seq_k))
    padding = torch.ones(batch, seq_k, dtype=torch.bool, device=device)
    for options in ({}, {"key_padding_mask": padding}, {"is_causal": True}, {"return_lse": True}):
        out = scaled_dot_product_attention(q, k, k, **options)
        out = out[0] if isinstance(out, tuple) else out
        assert out.shape == (batch, 2, seq_q, 8)
        assert not out.any()


def test_autocast_casts_to_its_dtype(device: torch.device) -> None:
    q, k, v = padded_inputs("", F32, device)
    packed = [t[0].transpose(0, 1) for t in (q, k, v)]
    cu = torch.tensor([0, 7, L], dtype=torch.int32, device=device)
    with torch.autocast(device.type, BF16):
        mixed = scaled_dot_product_attention(q, k.bfloat16(), v, dropout_p=0.0)
        rows = varlen_attention(packed[0], packed[1].bfloat16(), packed[2], cu, cu, L, L)
    assert_bits_equal(mixed, scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    assert_bits_equal(rows, varlen_attention(*(t.bfloat16() for t in packed), cu, cu, L, L))


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
        ((q[0], q[0], q[0]), r"must be \[batch, heads, seq, head_dim\]"),
        ((q, q[:1], q[:1]), "batch 2, key 1"),
        ((q, q[..., :4], q), "head_dim 8, key 4"),
        ((q, q, q[:, :, :3]), "must match key"),
        ((q[:, :0], q[:, :0], q[:, :0]), "there must be a head"),
        ((q.int(), q.int(), q.int()), "share one dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            scaled_dot_product_attention(*bad)
    with pytest.raises(ValueError, match="must be a multiple"):
        scaled_dot_product_attention(q, q[:, :3], q[:, :3], enable_gqa=True)
    with dispatch.use_backend("triton"), pytest.raises(dispatch.NotSupportedError, match="triton"):
        scaled_dot_product_attention(q, q, q)


# --- packed -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["host", "device"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both torch implementations: in groups on the host, and padded on the device, which runs here too."""
    if request.param == "device":
        monkeypatch.setattr(module.torch_backend, "on_host", lambda x: False)
    return request.param


PACKED: dict[str, tuple[list[int], list[int], Options]] = {
    "mixed": ([5, 5, 3, 0, 7, 1, 7, 7], [], {}),
    "causal": ([5, 5, 3, 0, 7, 1, 7, 7], [], {"is_causal": True}),
    "window": ([9, 9, 17, 1], [], {"window_size": (2, 1)}),
    "cross": ([5, 5, 0, 4, 9, 2], [3, 3, 6, 0, 12, 2], {"scale": 0.1}),
    "cross, causal": ([5, 5, 0, 4, 9, 2], [3, 3, 6, 0, 12, 2], {"is_causal": True}),
    "cross, window": ([12, 12, 0, 4, 9, 2], [9, 9, 6, 0, 14, 2], {"window_size": (3, 0)}),
    "cross, causal, window": (
        [12, 12, 0, 4, 9, 2],
        [9, 9, 6, 0, 14, 2],
        {"window_size": (3, 5), "is_causal": True},
    ),
    "dropout": ([5, 5, 3, 0, 7], [], {"dropout_p": 0.3}),
    "dropout, cross, causal": ([5, 0, 4, 9], [3, 6, 0, 12], {"dropout_p": 0.2, "is_causal": True}),
    "long": ([100, 96, 96, 20, 130], [], {}),
    "long, cross": ([100, 96, 40], [120, 97, 200], {}),
}


def packed_inputs(
    lens_q: list[int], lens_k: list[int], dtype: torch.dtype, device: torch.device, kv_heads: int = H
) -> tuple[list[Tensor], list[Any]]:
    """q, k, v as views of one packed QKV buffer where the lengths are equal; 3 rows belong to no sequence,
    and
    hold NaN, as do the keys of a sequence without queries."""
    lens_k = lens_k or lens_q
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).int().to(device) for lens in (lens_q, lens_k))
    rows = [sum(lens_q) + 3, sum(lens_k) + 3, sum(lens_k) + 3]
    heads = [H, kv_heads, kv_heads]
    if lens_q == lens_k and kv_heads == H:
        buffer = torch.randn(rows[0], 3 * H * D, device=device) * 1.3 + 0.3
        inputs = list(buffer.to(dtype).view(rows[0], 3, H, D).unbind(1))
    else:
        inputs = [
            (torch.randn(n, h, D, device=device) + 0.3).to(dtype) for n, h in zip(rows, heads, strict=True)
        ]
    for t in inputs:
        t[-3:] = NAN
    for i, (len_q, end) in enumerate(zip(lens_q, cu_k[1:].tolist(), strict=True)):
        if len_q == 0:
            inputs[1][end - lens_k[i] : end] = NAN
            inputs[2][end - lens_k[i] : end] = NAN
    args = [cu_q, cu_q if lens_k is lens_q else cu_k, max(lens_q, default=0), max(lens_k, default=0) + 2]
    return inputs, args


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", PACKED)
def test_packed_is_as_right_as_plain_torch(
    case: str, dtype: torch.dtype, path: str, device: torch.device, poison: None
) -> None:
    lens_q, lens_k, options = PACKED[case]
    inputs, args = packed_inputs(lens_q, lens_k, dtype, device)
    check(varlen_attention, reference.varlen_attention, inputs, *args, **options)
    with torch.no_grad():  # bf16 takes another way where no gradient is recorded
        torch.manual_seed(1)
        out = varlen_attention(*inputs, *args, **options)
        torch.manual_seed(1)
        key = {"dropout_key": dropout_key(device)} if "dropout_p" in options else {}
        both = (reference.varlen_attention(*inputs, *args, **options, **key, upcast=u) for u in (True, False))
        assert_close_to_truth(out, *both, name="out, no gradient")
        assert not out[-3:].any()


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.3}], ids=str)
def test_packed_grouped_heads(options: Options, path: str, device: torch.device) -> None:
    inputs, args = packed_inputs([5, 5, 0, 9], [4, 4, 3, 9], F32, device, kv_heads=2)
    check(varlen_attention, reference.varlen_attention, inputs, *args, **options)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_packed_lse(dtype: torch.dtype, path: str, device: torch.device) -> None:
    inputs, args = packed_inputs([5, 5, 0, 4, 9], [3, 3, 6, 0, 12], dtype, device)
    out, lse = varlen_attention(*inputs, *args, return_lse=True)
    truth, truth_lse = reference.varlen_attention(*inputs, *args, return_lse=True)
    assert out.shape == truth.shape
    assert_statistic(lse, truth_lse, scale=1.0, name="lse")
    assert (lse[:, 10:14] == -math.inf).all()  # the sequence without keys


def test_reference_backend_serves_packed(device: torch.device) -> None:
    inputs, args = packed_inputs([5, 0, 9], [4, 3, 9], F32, device)
    with dispatch.use_backend("reference"), dispatch.record() as choices:
        check(varlen_attention, reference.varlen_attention, inputs, *args)
    assert [(c.op, c.backend) for c in choices] == [("varlen_attention", "reference")]


def test_one_call_a_group_on_views_of_the_packed_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v), args = packed_inputs([5, 5, 5, 3, 0, 7, 7, 5], [], F32, torch.device("cpu"))
    calls = []
    sdpa = F.scaled_dot_product_attention

    def spy(*qkv: Tensor, **kwargs: Any) -> Tensor:
        calls.append(tuple(qkv[0].shape))
        assert {t.untyped_storage().data_ptr() for t in qkv} == {q.untyped_storage().data_ptr()}
        return sdpa(*qkv, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    varlen_attention(q, k, v, *args)
    assert calls == [(3, H, 5, D), (1, H, 3, D), (2, H, 7, D), (1, H, 5, D)]


@pytest.mark.parametrize(
    ("dtype", "gradient", "matmuls"), [(BF16, False, 3), (BF16, True, 0), (F32, False, 0)]
)
def test_long_bf16_sequences_take_matrix_products(
    dtype: torch.dtype, gradient: bool, matmuls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, args = packed_inputs([97, 97, 20, 130], [], dtype, torch.device("cpu"))
    calls = []
    baddbmm = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *a, **k: calls.append(a[1].shape) or baddbmm(*a, **k))
    varlen_attention(*(map(leaf, inputs) if gradient else inputs), *args)
    assert len(calls) == matmuls


def test_packed_keys_beyond_the_causal_reach_are_not_read(path: str, device: torch.device) -> None:
    inputs, args = packed_inputs([3, 9, 1], [5, 9, 4], F32, device)
    results = []
    for bad in (1.0, NAN):
        with torch.no_grad():
            for t in inputs[1:]:
                t[3:5] = bad  # keys 3 and 4 of a sequence of 3 queries
                t[15:18] = bad
        leaves = [leaf(t) for t in inputs]
        out = varlen_attention(*leaves, *args, is_causal=True)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for name, a, b in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_bits_equal(a + 0.0, b + 0.0, name=name)


def test_a_nan_stays_in_its_sequence(path: str, device: torch.device) -> None:
    inputs, args = packed_inputs([3, 9, 2], [], F32, device)
    inputs = [t.clone() for t in inputs]
    for t in inputs:
        t[0] = NAN
    leaves = [leaf(t) for t in inputs]
    out = varlen_attention(*leaves, *args)
    assert out[:3].isnan().all()
    for t in (out, *torch.autograd.grad(out.sum(), leaves)):
        assert t[3:].isfinite().all()


def test_a_sequence_does_not_depend_on_its_neighbours(path: str, device: torch.device) -> None:
    inputs, args = packed_inputs([5, 5, 3, 0, 7], [], F32, device)
    out = varlen_attention(*inputs, *args)
    assert_bits_equal(out, varlen_attention(*inputs, *args), name="a second run")
    changed = [t.clone() for t in inputs]
    for t in changed:
        t[:5] = 1e4
    assert_bits_equal(varlen_attention(*changed, *args)[5:], out[5:])


@pytest.mark.parametrize(("tokens", "offsets"), [(0, [0]), (0, [0, 0, 0]), (3, [0]), (3, [0, 0])])
def test_packed_and_empty(tokens: int, offsets: list[int], path: str, device: torch.device) -> None:
    q = torch.randn(tokens, 2, 8, device=device, requires_grad=True)
    cu = torch.tensor(offsets, dtype=torch.int32, device=device)
    out, lse = varlen_attention(q, q, q, cu, cu, 4, 4, return_lse=True)
    assert lse.shape == (2, tokens)
    assert (lse == -math.inf).all()
    for result in (out, varlen_attention(q, q, q, cu, cu, 0, 0)):
        assert result.shape == (tokens, 2, 8)
        assert not result.any()
        result.sum().backward()
        assert not q.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": lambda t: t[0]}, r"must be \[total_tokens, heads, head_dim\]"),
        ({"cu_seqlens_q": lambda t: t.long()}, r"cu_seqlens_q must be int32 \[batch \+ 1\], got torch.int64"),
        ({"cu_seqlens_k": lambda t: t[:-1]}, "count the same sequences"),
        ({"cu_seqlens_q": lambda t: t + 1}, "must rise from 0"),
        ({"cu_seqlens_q": lambda t: t.flip(0)}, "must rise from 0"),
        ({"cu_seqlens_k": lambda t: t * 5}, "at most the 11 tokens"),
        ({"max_seqlen_q": lambda n: 3}, "max_seqlen_q is 3, but a sequence has 5 tokens"),
        ({"max_seqlen_k": lambda n: -1}, "must not be negative"),
        ({"key": lambda t: t[:, :3], "value": lambda t: t[:, :3]}, "multiple of key's 3"),
        ({"value": lambda t: t[:-1]}, "must match key"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_packed_errors_say_what_is_wrong(change: dict[str, Callable[[Any], Any]], message: str) -> None:
    inputs, args = packed_inputs([5, 3], [], F32, torch.device("cpu"))
    names = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    given = dict(zip(names, [*inputs, *args], strict=True))
    for name, edit in change.items():
        given[name] = edit(given[name])
    with pytest.raises(ValueError, match=message):
        varlen_attention(**given)


# --- compiled -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(dynamic: bool, device: torch.device) -> None:
    padded = [leaf(t) for t in padded_inputs("", F32, device)]
    mask = lengths_mask([19, 7, 0], L, device)
    rows, args = packed_inputs([5, 5, 3, 0, 7], [], F32, device)
    rows = [leaf(t) for t in rows]

    def both(q: Tensor, k: Tensor, v: Tensor, *packed: Tensor) -> tuple[Tensor, Tensor]:
        return (
            scaled_dot_product_attention(q, k, v, key_padding_mask=mask, dropout_p=0.3),
            varlen_attention(*packed, *args, is_causal=True),
        )

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for function in (both, compiled):
        torch.manual_seed(2)
        outs = function(*padded, *rows)
        results.append([*outs, *torch.autograd.grad(sum(o.square().sum() for o in outs), [*padded, *rows])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
