"""The torch backend's way to PyTorch's own kernel for packed batches: when it is taken, and what is made of it.

That kernel runs on NVIDIA GPUs alone. Elsewhere the decision is asked of tensors that only say they are on one, and a
fake stands in for the kernel: right where that is documented to be, and NaN wherever it leaves memory as it was.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pyaccel import dispatch
from pyaccel.ops import common
from pyaccel.ops.attention import varlen as torch_backend
from pyaccel.ops.attention.packed import varlen_attention
from pyaccel.ops.attention.params import AttentionParams, CuSeqlens
from pyaccel.reference import attention as reference
from tests.assertions import assert_statistic
from tests.ops.attention_helpers import BF16, F16, F32, NAN, Options, check, leaf

H, D = 4, 16
CUDA = torch.device("cuda", 0)


class OnCuda:
    """A tensor that says it is on a GPU."""

    def __init__(self, tensor: Tensor, device: torch.device = CUDA) -> None:
        self.tensor, self.device = tensor, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


def reasons(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[str]:
    """Of a call that varlen_attn serves, but for the changes."""
    flash = changes.pop("flash", True)
    monkeypatch.setattr(torch_backend, "_has_flash_kernels", lambda device: flash)
    dtype, dims = changes.pop("dtype", BF16), changes.pop("dims", (D, D, D))
    kv_heads, gradient = changes.pop("kv_heads", H), changes.pop("gradient", False)
    heads = (H, kv_heads, kv_heads)
    device = changes.pop("device", CUDA)
    q, k, v = (
        OnCuda(torch.zeros(9, h, dim, dtype=dtype, requires_grad=gradient), device)
        for h, dim in zip(heads, dims, strict=True)
    )
    if changes.pop("transposed", False):
        k = OnCuda(torch.zeros(9, D, H, dtype=dtype).mT)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    offsets = CuSeqlens(cu, cu.clone() if changes.pop("cross", False) else cu, 5, 5)
    return torch_backend.varlen_attn_reasons(q, k, v, AttentionParams(**changes, cu_seqlens=offsets))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": F16, "kv_heads": 2, "scale": 0.3},
        {"is_causal": True, "window_size": (3, 2)},
        {"window_size": (3, -1)},
        {"cross": True, "gradient": True},
        {"return_lse": True},
        {"dims": (256, 256, 256)},
    ],
    ids=str,
)
def test_varlen_attn_serves(changes: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reasons(monkeypatch, **changes) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cpu")}, "for CUDA, not cpu"),
        ({"flash": False}, "compute capability 8.0"),
        ({"dtype": F32}, "fp16 and bf16, not torch.float32"),
        ({"dims": (16, 16, 24)}, "one head_dim"),
        ({"dims": (20, 20, 20)}, "a multiple of 8"),
        ({"dims": (264, 264, 264)}, "up to 256"),
        ({"transposed": True}, "stride 1"),
        ({"dropout_p": 0.1}, "no dropout"),
        ({"cross": True, "is_causal": True}, "one tensor as both offsets"),
        ({"cross": True, "window_size": (3, 2)}, "one tensor as both offsets"),
        ({"return_lse": True, "gradient": True}, "its LSE has no gradient"),
    ],
    ids=str,
)
def test_varlen_attn_does_not_serve(changes: Options, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = reasons(monkeypatch, **changes)
    assert len(found) == 1
    assert reason in found[0]


def test_an_older_varlen_attn_has_fewer_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "_parameters", ("query", "return_aux"))
    assert reasons(monkeypatch, return_lse=True) == []
    found = reasons(monkeypatch, kv_heads=2, scale=0.3, is_causal=True)
    assert found == ["this PyTorch's has no enable_gqa, scale, window_size"]


def test_the_parameters_that_are_passed_exist() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    assert torch_backend._varlen_attn_parameters() == tuple(inspect.signature(varlen.varlen_attn).parameters)


class FakeVarlenAttn(torch.autograd.Function):
    """The reference, but NaN in rows and gradients beyond the last offsets, and LSE +inf for queries without keys."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, options: Options
    ) -> Any:
        ctx.save_for_backward(q, k, v, cu_q, cu_k)
        ctx.options = options
        out, lse = reference.varlen_attention(
            q, k, v, cu_q, cu_k, 0, 0, **options, return_lse=True, upcast=False
        )
        out[cu_q[-1] :] = NAN
        lse = lse.masked_fill(lse == -math.inf, math.inf)
        lse[:, cu_q[-1] :] = NAN
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, _: Any) -> Any:
        *qkv, cu_q, cu_k = ctx.saved_tensors
        with torch.enable_grad():
            given = [leaf(t) for t in qkv]
            out = reference.varlen_attention(*given, cu_q, cu_k, 0, 0, **ctx.options, upcast=False)
        grads = torch.autograd.grad(out, given, d_out)
        for grad, cu in zip(grads, (cu_q, cu_k, cu_k), strict=True):
            grad[cu[-1] :] = NAN
        return *grads, None, None, None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """What varlen_attn is called with, now that everything but the device and the dtype decides whether it is."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    calls: list[Options] = []

    def fake(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **given: Any
    ) -> Any:
        calls.append(given)
        options = {n: x for n, x in given.items() if n in ("scale", "window_size")}
        if q.shape[1] != k.shape[1]:
            assert given["enable_gqa"]
        out, lse = FakeVarlenAttn.apply(q, k, v, cu_q, cu_k, options)
        return (out, lse) if given.get("return_aux") else out

    why_not = torch_backend.varlen_attn_reasons

    def on_cuda(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> list[str]:
        found = why_not(OnCuda(query), OnCuda(key), OnCuda(value), *args)
        return [reason for reason in found if "fp16 and bf16" not in reason]

    monkeypatch.setattr(varlen, "varlen_attn", fake)
    monkeypatch.setattr(common, "on_host", lambda x: False)
    monkeypatch.setattr(torch_backend, "_has_flash_kernels", lambda device: True)
    monkeypatch.setattr(torch_backend, "_parameters", torch_backend._varlen_attn_parameters())
    monkeypatch.setattr(torch_backend, "varlen_attn_reasons", on_cuda)
    return calls


SERVED: dict[str, tuple[list[int], list[int], int, Options, Options]] = {
    # lengths of queries, of keys ([]: the very same), kv_heads, our options, what varlen_attn gets
    "plain": ([5, 3, 0, 7], [], 4, {}, {}),
    "causal": ([5, 3, 0, 7], [], 4, {"is_causal": True}, {"window_size": (-1, 0)}),
    "window": ([5, 3, 0, 7], [], 4, {"window_size": (2, 1)}, {"window_size": (2, 1)}),
    "causal and window": (
        [5, 3, 0, 7], [], 4, {"window_size": (2, 1), "is_causal": True}, {"window_size": (2, 0)},
    ),
    "grouped, scale": ([5, 3], [], 2, {"scale": 0.3}, {"enable_gqa": True, "scale": 0.3}),
    "cross, some without keys or queries": ([5, 4, 0, 7], [3, 0, 6, 2], 4, {}, {}),
}  # fmt: skip


def packed(
    lens_q: list[int], lens_k: list[int], kv_heads: int, dtype: torch.dtype
) -> tuple[list[Tensor], Any]:
    """NaN in 3 rows that belong to no sequence, and in the keys of sequences without queries."""
    cu_q = torch.tensor([0, *lens_q]).cumsum(0).int()
    cu_k = torch.tensor([0, *lens_k]).cumsum(0).int() if lens_k else cu_q
    sizes = ((int(cu_q[-1]), H), (int(cu_k[-1]), kv_heads), (int(cu_k[-1]), kv_heads))
    qkv = [(torch.randn(n + 3, heads, D) + 0.3).to(dtype) for n, heads in sizes]
    for t in qkv:
        t[-3:] = NAN
    for i, n in enumerate(lens_q):
        if n == 0:
            for t in qkv[1:]:
                t[cu_k[i] : cu_k[i + 1]] = NAN
    return qkv, (cu_q, cu_k, max(lens_q), max(lens_k or lens_q))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", SERVED)
def test_what_varlen_attn_leaves_undefined_is_defined(
    case: str, dtype: torch.dtype, calls: list[Options]
) -> None:
    lens_q, lens_k, kv_heads, options, passed = SERVED[case]
    qkv, args = packed(lens_q, lens_k, kv_heads, dtype)
    with dispatch.use_backend("torch"):
        check(varlen_attention, reference.varlen_attention, qkv, *args, **options)
        assert calls == [passed]
        out, lse = varlen_attention(*qkv, *args, **options, return_lse=True)
    assert calls[1].pop("return_aux").lse
    assert calls[1] == passed
    _, truth_lse = reference.varlen_attention(*qkv, *args, **options, return_lse=True)
    assert_statistic(lse, truth_lse, scale=1.0, name="lse")
    assert out.isfinite().all()
    assert not out[-3:].any()


@pytest.mark.parametrize("options", [{"dropout_p": 0.3}, {"return_lse": True}, {"is_causal": True}], ids=str)
def test_what_varlen_attn_cannot_do_is_done_padded(options: Options, calls: list[Options]) -> None:
    qkv, args = packed([5, 3], [4, 6], 4, F32)
    with dispatch.use_backend("torch"):
        varlen_attention(*(leaf(t) for t in qkv), *args, **options)
    assert calls == []


def test_an_empty_batch_calls_nothing(calls: list[Options]) -> None:
    cu = torch.zeros(3, dtype=torch.int32)
    q = torch.randn(3, 2, 8)
    with dispatch.use_backend("torch"):
        assert not varlen_attention(q, q, q, cu, cu, 0, 0).any()
    assert calls == []


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("return_lse", [False, True])
def test_the_call_is_one_that_varlen_attn_takes(
    kv_heads: int, return_lse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By tensors without memory: PyTorch's function itself, up to its kernel."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(torch_backend, "varlen_attn_reasons", lambda *args: [])
    calls = []
    kernel = varlen.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", lambda *args, **kw: calls.append(kw) or kernel(*args, **kw))
    with dispatch.use_backend("torch"):
        q = torch.empty(9, H, D, dtype=BF16, device="meta", requires_grad=not return_lse)
        k = torch.empty(9, kv_heads, D, dtype=BF16, device="meta")
        cu = torch.empty(3, dtype=torch.int32, device="meta")
        result = varlen_attention(q, k, k, cu, cu, 5, 5, is_causal=True, scale=0.3, return_lse=return_lse)
    out, lse = result if return_lse else (result, None)
    assert len(calls) == 1
    assert (out.shape, out.dtype, out.device.type) == (q.shape, BF16, "meta")
    if lse is None:
        assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape
    else:
        assert (lse.shape, lse.dtype) == ((H, 9), F32)
