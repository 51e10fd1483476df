"""Numbers at the edges: products that overflow, NaN and infinity that count or are masked, memory of results."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pyaccel import dispatch, use_backend
from pyaccel.errors import NotSupportedError
from pyaccel.ops import attention_probs, scaled_dot_product_attention, varlen_attention
from pyaccel.ops.attention.matmul import serve
from pyaccel.reference import attention as reference
from tests.assertions import assert_close_to_truth
from tests.ops.attention_helpers import BACKENDS, BF16, F16, F32, NAN, lengths_mask

F64 = torch.float64
INF = math.inf
every_backend = pytest.mark.parametrize("backend", BACKENDS)
MODES: dict[str, dict[str, Any]] = {"plain": {}, "lse": {"return_lse": True}, "causal": {"is_causal": True}}


def output(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def dtypes_of(backend: str) -> list[torch.dtype]:
    return [F32, F16, BF16] if backend == "triton" else [F32, F16, BF16, F64]


# --- overflow -----------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scale", [-0.3, 0.0, -2])
@pytest.mark.parametrize("length", [7, 19])
def test_a_causal_mask_hides_whatever_the_sign_of_the_scale(
    length: int, scale: float, packed: bool, backend: str, device: torch.device
) -> None:
    """Times a negative scale, the -inf of what is hidden would be +inf; times 0, NaN."""
    generator = torch.Generator().manual_seed(3)
    q, k, v, d_out = (torch.randn(2, 1, length, 16, generator=generator).to(device) for _ in range(4))
    cu = torch.tensor([0, length, 2 * length], dtype=torch.int32, device=device)
    found = []
    for compute, upcast in ((None, False), (reference, True), (reference, False)):
        leaves = [(t.double() if upcast else t.clone()).requires_grad_() for t in (q, k, v)]
        if compute is not None:
            out = reference.scaled_dot_product_attention(*leaves, is_causal=True, scale=scale, upcast=upcast)
        elif packed:
            rows = [t.transpose(1, 2).flatten(0, 1) for t in leaves]
            with dispatch.use_backend(backend):
                out = varlen_attention(*rows, cu, cu, length, length, is_causal=True, scale=scale)
            out = out.unflatten(0, (2, length)).transpose(1, 2)
        else:
            with dispatch.use_backend(backend):
                out = scaled_dot_product_attention(*leaves, is_causal=True, scale=scale)
        found.append([out, *torch.autograd.grad(out, leaves, d_out.to(out.dtype))])
    for name, *three in zip(("output", "dq", "dk", "dv"), *found, strict=True):
        assert_close_to_truth(*three, name=name)


@every_backend
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.5}], ids=str)
def test_gradients_of_no_queries_are_zeros_of_their_own(
    options: dict[str, Any], backend: str, device: torch.device
) -> None:
    q = torch.randn(1, 4, 0, 8, device=device).requires_grad_()
    k, v = (torch.randn(1, 4, 8, 8, device=device).requires_grad_() for _ in range(2))
    with dispatch.use_backend(backend):
        out = scaled_dot_product_attention(q, k, v, **options)
    _, dk, dv = torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
    assert out.shape == q.shape
    assert dk.shape == dv.shape == k.shape
    assert not dk.any()
    assert not dv.any()
    assert dk.untyped_storage().data_ptr() != dv.untyped_storage().data_ptr()


@every_backend
@pytest.mark.parametrize("shape", [(3, 5, 1), (5, 0), (1, 1)], ids=str)
def test_gradients_of_a_float_mask_of_no_keys(
    shape: tuple[int, ...], backend: str, device: torch.device
) -> None:
    q = torch.randn(2, 3, 5, 8, device=device).requires_grad_()
    k, v = (torch.randn(2, 3, 0, 8, device=device).requires_grad_() for _ in range(2))
    mask = torch.zeros(shape, device=device).requires_grad_()
    with dispatch.use_backend(backend):
        out = scaled_dot_product_attention(q, k, v, mask)
    assert not out.any()
    gradients = torch.autograd.grad(out.sum(), (q, k, v, mask), allow_unused=True)
    for x, grad in zip((q, k, v), gradients, strict=False):
        assert grad.shape == x.shape
        assert not grad.any()
    assert gradients[3] is None or not gradients[3].any()


@every_backend
@pytest.mark.parametrize("shape", [(2, 3, 5, 13), (3, 5, 1), (5, 13), (2, 1, 1, 13)], ids=str)
@pytest.mark.parametrize("number", [torch.finfo(F32).min, -1e4, 3e3])
def test_gradients_of_rows_whose_mask_is_one_large_number(
    number: float, shape: tuple[int, ...], backend: str, device: torch.device
) -> None:
    """As padding has it. An LSE that is that number is no sum of weights."""
    for dtype in dtypes_of(backend):
        generator = torch.Generator().manual_seed(3)
        q, k, v = (torch.randn(2, 3, n, 16, generator=generator).to(device, dtype) for n in (5, 13, 13))
        upstream = torch.randn(2, 3, 5, 16, generator=generator).to(device, dtype)
        mask = torch.zeros(shape, device=device)
        mask[..., 1:3, :] = number
        if shape[-2] == 1:
            mask[:] = number
        found = []
        for compute, upcast in ((None, False), (reference, True), (reference, False)):
            leaves = [(t.double() if upcast else t.clone()).requires_grad_() for t in (q, k, v)]
            if compute is None:
                with dispatch.use_backend(backend):
                    out = scaled_dot_product_attention(*leaves, mask)
            else:
                out = reference.scaled_dot_product_attention(*leaves, mask, upcast=upcast)
            found.append([out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))])
        for name, *three in zip(("output", "dq", "dk", "dv"), *found, strict=True):
            assert_close_to_truth(*three, name=name)


@every_backend
@pytest.mark.parametrize("mode", MODES)
def test_products_of_fp16_do_not_overflow(backend: str, mode: str, device: torch.device) -> None:
    """q.k is 102400 before its scale, and dout.v, of the gradient, 184320; what comes of either fits."""
    q = torch.full((1, 1, 2, 64), 40.0, dtype=F16, device=device).requires_grad_()
    v = (
        torch.tensor([47.0, 48.0], dtype=F16, device=device)
        .view(1, 1, 2, 1)
        .repeat(1, 1, 1, 64)
        .requires_grad_()
    )
    dout = torch.full((1, 1, 2, 64), 60.0, dtype=F16, device=device)
    with use_backend(backend):
        out = output(scaled_dot_product_attention(q, q, v, **MODES[mode]))
    wide = [t.detach().double().requires_grad_() for t in (q, v)]
    truth = output(reference.scaled_dot_product_attention(wide[0], wide[0], wide[1], **MODES[mode]))
    torch.testing.assert_close(out.double(), truth, rtol=1e-3, atol=0.0)
    grads, rights = (torch.autograd.grad(o, t, dout.to(o.dtype)) for o, t in ((out, (q, v)), (truth, wide)))
    for grad, right in zip(grads, rights, strict=True):
        torch.testing.assert_close(
            grad.double(), right, rtol=1e-3, atol=1e-3
        )  # dq is a difference of 184320s


@every_backend
def test_probs_of_fp16_do_not_overflow(backend: str, device: torch.device) -> None:
    q = torch.full((1, 1, 2, 64), 40.0, dtype=F16, device=device)
    with use_backend(backend):
        _, lse = scaled_dot_product_attention(q, q, q, return_lse=True)
        probs = attention_probs(q, q, lse)
    assert torch.equal(probs, torch.full_like(probs, 0.5))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_dropout_of_fp16_in_a_graph_does_not_overflow(backend: str) -> None:
    torch._dynamo.reset()
    q = torch.full((1, 1, 2, 64), 40.0, dtype=F16)
    run = torch.compile(
        lambda q: scaled_dot_product_attention(q, q, torch.ones_like(q), dropout_p=0.5),
        backend="eager",
        fullgraph=True,
    )
    with use_backend(backend):
        out = run(q)
    assert set(out.unique().tolist()) <= {0.0, 1.0, 2.0}


def test_products_on_a_cpu_do_not_serve_fp16() -> None:
    """Whatever was measured on this machine."""
    query = torch.randn(9, 2, 8, dtype=F16)
    assert not any(serve(query, 9, training=t, dropout_p=p)[0] for t in (True, False) for p in (0.0, 0.1))


# --- NaN and infinity that count ----------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("length", [1, 3, 7, 9, 17])
@pytest.mark.parametrize("causal", [False, True])
def test_a_nan_query_or_key_shows_at_any_length(
    backend: str, length: int, causal: bool, device: torch.device
) -> None:
    for dtype in dtypes_of(backend):
        for name in ("query", "key"):
            given = {
                n: torch.randn(1, 2, length, 16, device=device).to(dtype) for n in ("query", "key", "value")
            }
            given[name][0, 0, 0, 5] = NAN
            with use_backend(backend):
                out = scaled_dot_product_attention(**given, is_causal=causal)
            rows = slice(0, 1) if name == "query" else slice(None)  # all queries see the first key
            assert out[0, 0, rows].isnan().all(), (dtype, name)
            assert out[0, 1].isfinite().all()


@every_backend
@pytest.mark.parametrize("kind", ["key padding", "bool", "float", "window", "grouped"])
def test_a_nan_key_that_a_mask_leaves_alone_shows(backend: str, kind: str, device: torch.device) -> None:
    """The last one of nine: of a mask's row nothing else counts."""
    heads = 4 if kind == "grouped" else 2
    q, v = torch.randn(1, heads, 9, 16, device=device), torch.randn(1, 2, 9, 16, device=device)
    k = torch.randn(1, 2, 9, 16, device=device)
    k[0, 0, 8] = NAN
    last = torch.arange(9, device=device) == 8
    options: dict[str, Any] = {
        "key padding": {"key_padding_mask": last[None]},
        "bool": {"attn_mask": last.expand(9, 9)},
        "float": {"attn_mask": torch.zeros(9, 9, device=device).masked_fill(~last, -INF)},
        "window": {"window_size": (-1, -1), "key_padding_mask": last[None]},
        "grouped": {"key_padding_mask": last[None], "enable_gqa": True},
    }[kind]
    with use_backend(backend):
        out = scaled_dot_product_attention(q, k, v, **options)
    assert out[0, : heads // 2].isnan().all()
    assert out[0, heads // 2 :].isfinite().all()


@every_backend
@pytest.mark.parametrize("lens", [[4], [3, 4, 4], [9, 1]])
def test_a_nan_query_of_a_packed_sequence_shows(backend: str, lens: list[int], device: torch.device) -> None:
    q, k, v = torch.randn(3, sum(lens), 2, 16, device=device).unbind()
    q[0, 0, 0] = NAN
    cu = torch.tensor([0, *lens], device=device).cumsum(0).int()
    with use_backend(backend):
        out = varlen_attention(q, k, v, cu, cu, max(lens), max(lens))
    assert out[0, 0].isnan().all()
    assert out[1:].isfinite().all()
    assert out[0, 1].isfinite().all()


def test_a_nan_query_shows_in_a_graph() -> None:
    torch._dynamo.reset()
    q, k = torch.randn(2, 1, 2, 4, 16).unbind()
    q[0, 0, 0] = NAN
    for options in ({}, {"attn_mask": torch.ones(4, 4, dtype=torch.bool)}, {"is_causal": True}):
        out = torch.compile(scaled_dot_product_attention, backend="eager", fullgraph=True)(q, k, k, **options)
        assert out[0, 0, 0].isnan().all()
        assert out[0, 0, 1:].isfinite().all()


MASK_VALUES = {"nan": NAN, "inf": INF, "-inf": -INF}


@every_backend
@pytest.mark.parametrize("length", [3, 40])
@pytest.mark.parametrize("value", MASK_VALUES)
@pytest.mark.parametrize("shape", ["column", "row", "element", "all", "key vector"])
def test_what_a_float_mask_may_hold(
    backend: str, shape: str, value: str, length: int, device: torch.device
) -> None:
    """NaN and +inf make NaN of the rows that have them, -inf masks; gradients agree."""
    mask = torch.zeros(1 if shape == "key vector" else length, length, device=device)
    where: Any = {
        "column": (slice(None), 1), "row": (1, slice(None)), "element": (1, 2), "all": (slice(None), slice(None)),
        "key vector": (0, 1),
    }[shape]  # fmt: skip
    mask[where] = MASK_VALUES[value]
    leaves = [t.requires_grad_() for t in torch.randn(3, 1, 2, length, 16, device=device).unbind()]
    dout = torch.randn(1, 2, length, 16, device=device)
    results = []
    for name in (backend, "reference"):
        with use_backend(name):
            out = scaled_dot_product_attention(*leaves, mask)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    has_nan = (mask.isnan() | (mask == INF)).any(-1).expand(length)
    assert torch.equal(results[0][0].isnan().all(-1)[0, 0], has_nan)
    for ours, right in zip(*results, strict=True):
        if value == "-inf":
            assert ours.isfinite().all()
        torch.testing.assert_close(ours, right, equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("shape", [(1, 9), (9, 9), (2, 1, 9, 9)])
def test_a_mask_of_fp32_is_read_as_such_beside_fp64(backend: str, shape: tuple[int, ...]) -> None:
    """PyTorch's own kernel for CPUs takes its memory for fp64's, and reads beyond it."""
    q, k, v = torch.randn(3, 2, 2, 9, 16, dtype=F64).unbind()
    mask = torch.randn(shape)
    with use_backend(backend):
        out = scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, mask.double()))


@every_backend
def test_scores_of_minus_infinity_alone_are_a_row_without_keys(backend: str, device: torch.device) -> None:
    """As in PyTorch."""
    q, k = torch.randn(1, 1, 3, 16, device=device), torch.ones(1, 1, 9, 16, device=device)
    q[0, 0, 0, 0] = -INF
    with use_backend(backend):
        out, lse = scaled_dot_product_attention(q, k, k, return_lse=True)
        also = scaled_dot_product_attention(q, k, k)
    assert not out[0, 0, 0].any()
    assert not also[0, 0, 0].any()
    assert lse[0, 0, 0] == -INF
    assert out[0, 0, 1:].isfinite().all()


# --- NaN and infinity that are masked -----------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["key padding", "bool", "float"])
def test_what_is_masked_does_not_leak(backend: str, kind: str, bad: float, device: torch.device) -> None:
    """A key that no query sees, and all of a batch row without keys: output and gradients."""
    for dtype in dtypes_of(backend):
        keys = lengths_mask([5, 0], 9, device)
        given = torch.randn(3, 2, 2, 9, 16, device=device).to(dtype)
        clean = [t.clone().requires_grad_() for t in given]
        given[1:, 0, :, 5:] = bad
        given[:, 1] = bad
        leaves = [t.requires_grad_() for t in given.unbind()]
        mask = keys[:, None, None].expand(2, 1, 9, 9)
        options: dict[str, Any] = {
            "key padding": {"key_padding_mask": keys},
            "bool": {"attn_mask": mask},
            "float": {"attn_mask": torch.zeros(mask.shape, device=device).masked_fill(~mask, -INF)},
        }[kind]
        with use_backend(backend):
            out, right = (scaled_dot_product_attention(*t, **options) for t in (leaves, clean))
        assert not out[1].any()
        torch.testing.assert_close(out, right)
        dout = torch.randn(out.shape, device=device).to(dtype)
        grads, rights = (torch.autograd.grad(o, t, dout) for o, t in ((out, leaves), (right, clean)))
        for grad, expected in zip(grads, rights, strict=True):
            torch.testing.assert_close(grad, expected)


# --- memory -------------------------------------------------------------------------------------------------


def assert_own_memory(given: dict[str, Tensor], results: dict[str, Tensor | None]) -> None:
    owners = {t.untyped_storage().data_ptr(): name for name, t in given.items()}
    for name, t in results.items():
        if t is None or not t.numel():
            continue
        owner = owners.setdefault(t.untyped_storage().data_ptr(), name)
        assert owner == name, f"{name} shares memory with {owner}"


@every_backend
@pytest.mark.parametrize("seq", [(1, 1), (3, 3), (1, 9), (9, 1)])
@pytest.mark.parametrize("kind", ["plain", "lse", "causal", "mask", "grouped", "dropout"])
def test_results_of_padded_share_no_memory(
    backend: str, kind: str, seq: tuple[int, int], device: torch.device
) -> None:
    heads, mask = 4 if kind == "grouped" else 2, torch.zeros(seq, device=device, requires_grad=True)
    shapes = ((1, heads, seq[0], 8), (1, 2, seq[1], 8), (1, 2, seq[1], 8))
    given = {n: torch.randn(s, device=device).requires_grad_() for n, s in zip("qkv", shapes, strict=True)}
    options: dict[str, Any] = {
        "lse": {"return_lse": True}, "causal": {"is_causal": True}, "mask": {"attn_mask": mask},
        "grouped": {"enable_gqa": True}, "dropout": {"dropout_p": 0.3},
    }.get(kind, {})  # fmt: skip
    with use_backend(backend):
        result = scaled_dot_product_attention(*given.values(), **options)
    if kind == "mask":
        given["mask"] = mask
    out, lse = result if isinstance(result, tuple) else (result, None)
    outs = [out] if lse is None else [out, lse]
    douts = [torch.randn_like(o) for o in outs]
    grads = torch.autograd.grad(outs, list(given.values()), douts)
    named = {"out": out, "lse": lse, **{f"d{n}": g for n, g in zip(given, grads, strict=True)}}
    assert_own_memory(given | {f"dout {i}": d for i, d in enumerate(douts)}, named)


@every_backend
@pytest.mark.parametrize("lens", [[1], [3], [1, 1, 1], [9, 9], [4, 0, 7]])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_results_of_packed_share_no_memory(
    backend: str, dtype: torch.dtype, lens: list[int], device: torch.device
) -> None:
    given = {n: torch.randn(sum(lens), 2, 8, device=device).to(dtype).requires_grad_() for n in "qkv"}
    cu = torch.tensor([0, *lens], device=device).cumsum(0).int()
    for options in ({}, {"dropout_p": 0.3}, {"return_lse": True}):
        with use_backend(backend):
            result = varlen_attention(*given.values(), cu, cu, max(lens), max(lens), **options)
            with torch.no_grad():
                still = varlen_attention(*given.values(), cu, cu, max(lens), max(lens), **options)
        out = output(result)
        dout = torch.randn_like(out)
        grads = torch.autograd.grad(out, list(given.values()), dout)
        named = {"out": out, **{f"d{n}": g for n, g in zip(given, grads, strict=True)}}
        assert_own_memory(given | {"dout": dout}, named | {"without gradient": output(still)})


def test_the_reference_of_packed_says_that_it_reads_offsets() -> None:
    q = torch.empty(4, 2, 8, device="meta")
    cu = torch.empty(2, dtype=torch.int32, device="meta")
    with use_backend("reference"), pytest.raises(NotSupportedError, match="reads cu_seqlens"):
        varlen_attention(q, q, q, cu, cu, 4, 4)
