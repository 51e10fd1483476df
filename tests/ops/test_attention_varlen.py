"""Attention over packed batches: the public function against the fp64 truth, on every backend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyaccel import dispatch, tuning
from pyaccel.ops import common
from pyaccel.ops.attention import varlen as varlen_backend
from pyaccel.ops.attention.packed import varlen_attention
from pyaccel.ops.dropout import dropout_key
from pyaccel.reference import attention as reference
from tests.assertions import assert_bits_equal, assert_close_to_truth, assert_statistic
from tests.ops.attention_helpers import Options, check, leaf, under_its_mask

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAN = float("nan")
H, D = 4, 16


@pytest.fixture(params=["host", "device", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Triton, and both torch implementations: in groups on the host, and padded on the device, which runs here too."""
    if request.param == "device":
        monkeypatch.setattr(common, "on_host", lambda x: False)
    with dispatch.use_backend("triton" if request.param == "triton" else "torch"):
        yield request.param


PACKED: dict[str, tuple[list[int], list[int], Options]] = {
    "mixed": ([5, 5, 3, 0, 7, 1, 7, 7], [], {}),
    "causal": ([5, 5, 3, 0, 7, 1, 7, 7], [], {"is_causal": True}),
    "window": ([9, 9, 17, 1], [], {"window_size": (2, 1)}),
    "one length": ([5, 5, 5], [], {}),
    "one length, cross": ([5, 5], [3, 3], {}),
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


DTYPES = {"fp32": F32, "bf16": BF16, "fp16": F16}
# By Triton's kernels, whose dtypes test_attention_triton.py has meet all else, each case in one dtype.
CASES = [
    *((path, case, dtype) for case in PACKED for dtype in DTYPES for path in ("host", "device")),
    *(("triton", case, dtype) for case, dtype in zip(PACKED, itertools.cycle(DTYPES))),
]


@pytest.mark.parametrize(
    ("path", "case", "dtype"),
    [pytest.param(path, case, DTYPES[dtype], id=f"{path}-{case}-{dtype}") for path, case, dtype in CASES],
    indirect=["path"],
)
def test_packed_is_as_right_as_plain_torch(
    case: str, dtype: torch.dtype, path: str, device: torch.device, poison: None
) -> None:
    lens_q, lens_k, options = PACKED[case]
    inputs, args = packed_inputs(lens_q, lens_k, dtype, device)
    own = path == "host" and device.type == "cpu"
    check(varlen_attention, reference.varlen_attention, inputs, *args, own_mask=own, **options)
    truth, extra = reference.varlen_attention, dict(options)
    if own and "dropout_p" in options:
        truth, extra = under_its_mask(varlen_attention, truth, dtype, *args, **options), {}
    with torch.no_grad():  # another way is taken where no gradient is recorded
        torch.manual_seed(5)
        out = varlen_attention(*inputs, *args, **options)
        torch.manual_seed(5)
        if "dropout_p" in extra:
            extra["dropout_key"] = dropout_key(device)
        wide = [t.double() for t in inputs]
        both = (truth(*(wide if u else inputs), *args, **extra, upcast=u) for u in (True, False))
        assert_close_to_truth(out, *both, name="out, no gradient")
        assert not out[-3:].any()


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.3}], ids=str)
def test_packed_grouped_heads(options: Options, path: str, device: torch.device) -> None:
    inputs, args = packed_inputs([5, 5, 0, 9], [4, 4, 3, 9], F32, device, kv_heads=2)
    check(
        varlen_attention,
        reference.varlen_attention,
        inputs,
        *args,
        own_mask=path == "host" and device.type == "cpu",
        **options,
    )


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_packed_lse(dtype: torch.dtype, path: str, device: torch.device) -> None:
    inputs, args = packed_inputs([5, 5, 0, 4, 9], [3, 3, 6, 0, 12], dtype, device)
    out, lse = varlen_attention(*inputs, *args, return_lse=True)
    truth, truth_lse = reference.varlen_attention(*inputs, *args, return_lse=True)
    assert out.shape == truth.shape
    assert_statistic(lse, truth_lse, scale=1.0, name="lse")
    assert (lse[:, 10:14] == -math.inf).all()  # the sequence without keys


def test_packed_lse_has_a_gradient(path: str, device: torch.device) -> None:
    inputs, args = packed_inputs([5, 5, 0, 4, 9], [3, 3, 6, 0, 12], F32, device)
    d_out = torch.randn(inputs[0].shape, device=device)
    d_lse = torch.randn(H, inputs[0].shape[0], device=device)
    results = []
    for upcast in (None, True, False):
        given = [leaf(t, torch.float64 if upcast else None) for t in inputs]
        options: Options = {} if upcast is None else {"upcast": upcast}
        call = varlen_attention if upcast is None else reference.varlen_attention
        out, lse = call(*given, *args, return_lse=True, **options)
        loss = (out * d_out).sum() + lse.masked_fill(lse == -math.inf, 0.0).mul(d_lse).sum()
        results.append(torch.autograd.grad(loss, given))
    for name, *found in zip(("dq", "dk", "dv"), *results, strict=True):
        assert_close_to_truth(*found, name=name)


def test_packed_dropout_replays_under_checkpointing(path: str, device: torch.device) -> None:
    inputs, args = packed_inputs([5, 0, 9], [], F32, device)
    inputs = [leaf(t.nan_to_num()) for t in inputs]

    def attend(*qkv: Tensor) -> Tensor:
        return varlen_attention(*qkv, *args, dropout_p=0.4)

    grads = []
    for run in (attend, lambda *qkv: checkpoint(attend, *qkv, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(run(*inputs).square().sum(), inputs))
    for a, b in zip(*grads, strict=True):
        assert_bits_equal(a, b)


def test_reference_backend_serves_packed(device: torch.device) -> None:
    inputs, args = packed_inputs([5, 0, 9], [4, 3, 9], F32, device)
    with dispatch.use_backend("reference"), dispatch.record() as choices:
        check(varlen_attention, reference.varlen_attention, inputs, *args)
    assert [(c.op, c.backend) for c in choices] == [("varlen_attention", "reference")]


def test_one_call_a_group_on_views_of_the_packed_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v), args = packed_inputs([5, 5, 5, 3, 0, 7, 7, 5], [], F32, torch.device("cpu"))
    calls = []
    sdpa = varlen_backend.torch_sdpa

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(tuple(args[0].shape))
        assert {t.untyped_storage().data_ptr() for t in args[:3]} == {q.untyped_storage().data_ptr()}
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(varlen_backend, "torch_sdpa", spy)
    varlen_attention(q, k, v, *args)
    assert calls == [(3, H, 5, D), (1, H, 3, D), (2, H, 7, D), (1, H, 5, D)]


@pytest.mark.parametrize(
    ("dtype", "gradient", "matmuls"),
    # A sequence at a time without gradient, its scores alone by baddbmm; with one by groups, and both products.
    [(BF16, False, 4), (F32, False, 3), (F16, False, 0), (BF16, True, 8), (F32, True, 0), (F16, True, 0)],
)
def test_long_sequences_take_matrix_products(
    dtype: torch.dtype, gradient: bool, matmuls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, args = packed_inputs([97, 97, 20, 130, 240], [], dtype, torch.device("cpu"))
    calls = []
    baddbmm = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *a, **k: calls.append(a[1].shape) or baddbmm(*a, **k))
    with tuning.disabled():  # by the lengths that hold where nothing was measured
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


def test_a_sequence_does_not_depend_on_its_neighbors(path: str, device: torch.device) -> None:
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


# Static sizes by Triton's kernels: test_registration.py.
@pytest.mark.parametrize(("backend", "dynamic"), [("triton", True), ("torch", False)])
def test_compiled_equals_eager(backend: str, dynamic: bool, device: torch.device) -> None:
    rows, args = packed_inputs([5, 5, 3, 0, 7], [], F32, device)
    rows = [leaf(t) for t in rows]

    def attend(*packed: Tensor) -> Tensor:
        # With the LSE torch draws the same mask in eager mode and in a graph.
        return varlen_attention(*packed, *args, is_causal=True, dropout_p=0.3, return_lse=True)[0]

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for function in (attend, compiled):
        torch.manual_seed(2)
        with dispatch.use_backend(backend):
            out = function(*rows)
        results.append([out, *torch.autograd.grad(out.square().sum(), rows)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_the_lse_of_no_sequence_at_all_has_a_gradient_of_zero(backend: str, device: torch.device) -> None:
    query = torch.randn(5, 2, 16, device=device, requires_grad=True)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    with dispatch.use_backend(backend):
        _, lse = varlen_attention(query, query, query, none, none, 0, 0, return_lse=True)
    assert lse.shape == (2, 5)
    assert (lse == -math.inf).all()
    assert not torch.autograd.grad(lse, query, torch.ones_like(lse))[0].any()


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(0, 1), (2, 0), (0, 0)])
@pytest.mark.parametrize("backend", ["torch", "reference", "triton", "meta"])
def test_where_nothing_attends_all_gradients_are_zero(
    backend: str, queries: int, keys: int, return_lse: bool, device: torch.device
) -> None:
    """Not None, which an optimizer or a hook would take for a parameter that isn't used."""
    place = torch.device("meta") if backend == "meta" else device
    leaves = [torch.randn(n, 2, 16, device=place, requires_grad=True) for n in (queries, keys, keys)]
    cu = [torch.tensor([0, n, n], dtype=torch.int32, device=place) for n in (queries, keys)]
    with dispatch.use_backend("torch" if backend == "meta" else backend):
        result = varlen_attention(*leaves, *cu, queries, keys, return_lse=return_lse)
    out = result[0] if return_lse else result
    for tensor, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert gradient.shape == tensor.shape
        assert gradient.is_meta or not gradient.any()
