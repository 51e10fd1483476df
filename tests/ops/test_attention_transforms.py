"""Attention under torch.func's transforms, in traces, exports and modes: as in eager mode, or a clear error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pyaccel import packing, use_backend
from pyaccel.errors import NotSupportedError
from pyaccel.ops import attention_probs, scaled_dot_product_attention, varlen_attention
from tests.ops.attention_helpers import BACKENDS
from tests.pairwise import pairwise

every_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPE = (2, 2, 5, 8)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bool mask": {"attn_mask": torch.tensor([[1, 1, 0, 1, 1]] * 4 + [[0] * 5]).bool()},
    "float mask": {"attn_mask": torch.linspace(-1.0, 1.0, 25).view(5, 5)},
    "key padding": {"key_padding_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()},
    "causal": {"is_causal": True},
    "lse": {"return_lse": True},
}
every_option = pytest.mark.parametrize("option", OPTIONS)


def function_of(option: str, device: torch.device) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Attention as a function of its query alone, and a query."""
    key, value = torch.randn(2, *SHAPE, device=device).unbind()
    options = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in OPTIONS[option].items()}

    def attend(query: Tensor) -> Tensor:
        result = scaled_dot_product_attention(query, key, value, **options)
        return result[0] * result[1].clamp(min=-9.0)[..., None] if isinstance(result, tuple) else result

    return attend, torch.randn(SHAPE, device=device)


@every_backend
@every_option
def test_torch_func(backend: str, option: str, device: torch.device) -> None:
    """grad, vjp, jacrev, vmap and vmap of grad."""
    attend, query = function_of(option, device)
    dout = torch.randn(SHAPE, device=device)

    def loss(query: Tensor) -> Tensor:
        return (attend(query) * dout).sum()

    with use_backend(backend):
        leaf = query.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(loss)(query), expected)
        torch.testing.assert_close(torch.func.vjp(attend, query)[1](dout)[0], expected)
        jacobian = torch.func.jacrev(lambda q: attend(q)[1, 0, 0])(query)
        rows = [torch.autograd.grad(attend(leaf)[1, 0, 0, i], leaf)[0] for i in range(SHAPE[3])]
        torch.testing.assert_close(jacobian, torch.stack(rows))
        queries = torch.stack([query, query + 1.0])
        torch.testing.assert_close(torch.func.vmap(attend)(queries), torch.stack([*map(attend, queries)]))
        each = torch.stack([*map(torch.func.grad(loss), queries)])
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(queries), each)


@every_option
def test_forward_mode(option: str, device: torch.device) -> None:
    attend, query = function_of(option, device)
    step = torch.randn(SHAPE, device=device)
    with use_backend("reference"):
        _, expected = torch.func.jvp(attend, (query,), (step,))
    with use_backend("torch"):
        _, found = torch.func.jvp(attend, (query,), (step,))
    torch.testing.assert_close(found, expected)
    with use_backend("triton"), pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(attend, (query,), (step,))


def test_forward_mode_of_probs_and_packed(device: torch.device) -> None:
    query = torch.randn(SHAPE, device=device)
    lse = torch.randn(SHAPE[:3], device=device)
    packed, cu = query[0].transpose(0, 1), torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    functions: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda q: attention_probs(q, query, lse), query),
        (lambda q: varlen_attention(q, packed, packed, cu, cu, 3, 3), packed),
    ]
    for function, x in functions:
        with use_backend("reference"):
            _, expected = torch.func.jvp(function, (x,), (x,))
        with use_backend("torch"):
            torch.testing.assert_close(torch.func.jvp(function, (x,), (x,))[1], expected)
        with use_backend("triton"), pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(function, (x,), (x,))


@pytest.mark.parametrize("under", ["autograd", "torch.func"])
def test_the_kernels_have_no_double_backward_and_say_so(under: str, device: torch.device) -> None:
    attend, query = function_of("plain", device)

    def twice_by_autograd() -> None:
        query.requires_grad_()
        (grad,) = torch.autograd.grad(attend(query).square().sum(), query, create_graph=True)
        grad.sum().backward()

    def twice_by_func() -> None:
        inner = torch.func.grad(lambda q: attend(q).square().sum())
        torch.func.grad(lambda q: inner(q).square().sum())(query)

    run = twice_by_autograd if under == "autograd" else twice_by_func
    with use_backend("triton"), pytest.raises(RuntimeError, match="double backward"):
        run()


@every_backend
def test_torch_func_of_packed_and_of_probs(backend: str, device: torch.device) -> None:
    packed, cu = (
        torch.randn(5, 2, 8, device=device),
        torch.tensor([0, 2, 5], dtype=torch.int32, device=device),
    )

    def attend(query: Tensor) -> Tensor:
        return varlen_attention(query, packed, packed, cu, cu, 3, 3)

    lse = torch.randn(SHAPE[:3], device=device)

    def weigh(query: Tensor) -> Tensor:
        return attention_probs(query, query, lse)

    with use_backend(backend):
        leaf = packed.clone().requires_grad_()
        (expected,) = torch.autograd.grad(attend(leaf).square().sum(), leaf)
        found = torch.func.grad(lambda q: attend(q).square().sum())(packed)
        torch.testing.assert_close(found, expected)
        both = torch.stack([packed, packed + 1.0])
        torch.testing.assert_close(torch.func.vmap(attend)(both), torch.stack([*map(attend, both)]))
        queries = torch.randn(2, *SHAPE, device=device)
        torch.testing.assert_close(torch.func.vmap(weigh)(queries), torch.stack([*map(weigh, queries)]))
    if backend != "triton":
        with use_backend(backend):
            assert torch.func.grad(lambda q: weigh(q).sum())(queries[0]).isfinite().all()


# --- graphs and traces --------------------------------------------------------------------------------------


GRAPHS = pairwise(
    {
        "backend": BACKENDS,
        "option": [{"dropout_p": 0.1}, {"return_lse": True}, {"is_causal": True}, {}],
        "kv_heads": [2, 1],
        "how": ["eager", "aot_eager"],
    }
)


@pytest.mark.parametrize(
    ("backend", "kv_heads", "option", "how"),
    [(case["backend"], case["kv_heads"], case["option"], case["how"]) for case in GRAPHS],
    ids=str,
)
def test_without_a_mask_it_is_one_graph(
    backend: str, kv_heads: int, option: dict[str, Any], how: str, device: torch.device
) -> None:
    torch._dynamo.reset()

    def attend(query: Tensor, key: Tensor) -> Any:
        return scaled_dot_product_attention(query, key, key, enable_gqa=kv_heads == 1, **option)

    with use_backend(backend):
        compiled = torch.compile(attend, backend=how, fullgraph=True, dynamic=True)
        for seq in (5, 9):
            query = torch.randn(2, 2, seq, 8, device=device, requires_grad=how == "aot_eager")
            key = torch.randn(2, kv_heads, seq, 8, device=device)
            out = compiled(query, key)
            assert (out[0] if isinstance(out, tuple) else out).shape == query.shape


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        ("torch", "offsets"),
        *((b, k) for b in ("torch", "reference") for k in ("key padding", "bool", "float")),
    ],
)
def test_a_trace_keeps_nothing_that_a_mask_held(backend: str, kind: str) -> None:
    query = torch.randn(2, 1, 4, 8)
    full = torch.ones(2, 4, dtype=torch.bool)
    padded = full.clone()
    padded[1, 2:] = False
    padded[0] = False
    packed = query[:, 0, :, None]

    def attend(q: Tensor, mask: Tensor) -> Tensor:
        if kind == "offsets":
            return varlen_attention(*(packed.flatten(0, 1),) * 3, mask, mask, 8, 8)
        if kind == "key padding":
            return scaled_dot_product_attention(q, q, q, key_padding_mask=mask)
        return scaled_dot_product_attention(q, q, q, mask)

    masks: list[Tensor] = [full, padded]
    if kind == "bool":
        masks = [m[:, None, None] for m in masks]
    if kind == "float":
        masks = [torch.zeros(m.shape).masked_fill(~m, -torch.inf)[:, None, None] for m in masks]
    if kind == "offsets":
        masks = [torch.tensor(cu, dtype=torch.int32) for cu in ([0, 4, 8], [0, 3, 5])]
    with use_backend(backend):
        traced = torch.jit.trace(attend, (query, masks[0]), check_trace=False)
        torch.testing.assert_close(traced(query, masks[1]), attend(query, masks[1]))


def test_the_reference_of_packed_is_not_traced() -> None:
    q, cu = torch.randn(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    with use_backend("reference"), pytest.raises(NotSupportedError, match="reads cu_seqlens"):
        torch.jit.trace(lambda q: varlen_attention(q, q, q, cu, cu, 4, 4), (q,), check_trace=False)


class Masked(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, keys: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, key, key_padding_mask=keys)


@pytest.mark.parametrize("strict", [False, True])
@every_backend
def test_export_keeps_sizes_open(backend: str, strict: bool, device: torch.device) -> None:
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=512)
    sizes = {0: batch, 2: length}

    def inputs(batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        query, key = torch.randn(2, batch, 2, length, 8, device=device).unbind()
        return query, key, torch.rand(batch, length, device=device) < 0.6

    with use_backend(backend):
        exported = torch.export.export(
            Masked(), inputs(3, 7), dynamic_shapes=(sizes, sizes, {0: batch, 1: length}), strict=strict
        )
        for given in (inputs(5, 11), inputs(2, 4)):
            torch.testing.assert_close(exported.module()(*given), Masked()(*given))


# --- modes --------------------------------------------------------------------------------------------------


@every_backend
@every_option
@pytest.mark.parametrize("kind", ["meta", "fake", "default device"])
def test_tensors_and_devices_that_are_not_real(kind: str, option: str, backend: str) -> None:
    """Shapes without data, forward and backward; and a default device that nothing here is on."""
    device = torch.device("meta" if kind == "meta" else "cpu")
    mode: Any = {
        "meta": torch.no_grad,
        "fake": FakeTensorMode,
        "default device": lambda: torch.device("meta"),
    }[kind]
    options = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in OPTIONS[option].items()}
    real = None if kind == "fake" else torch.zeros(SHAPE, device=device, requires_grad=True)
    if kind == "fake":
        mode = lambda: FakeTensorMode(allow_non_fake_inputs=True)  # noqa: E731
    with mode(), torch.enable_grad(), use_backend(backend):
        query = torch.zeros(SHAPE, requires_grad=True) if real is None else real
        result = scaled_dot_product_attention(query, query, query, **options)
        out = result[0] if isinstance(result, tuple) else result
        out.sum().backward()
    assert out.shape == SHAPE
    assert query.grad is not None
    assert query.grad.device == device


def test_packing_names_its_device() -> None:
    full = torch.ones(2, 5, dtype=torch.bool)
    padded = full.clone()
    padded[0, 3:] = False
    with torch.device("meta"):
        for mask in (full, padded, padded.flip(0)):
            for by_length in (False, True):
                layout = packing.layout(mask, sort_by_length=by_length)
                assert {layout.indices.device.type, layout.cu_seqlens.device.type} == {"cpu"}
        again = packing.layout_from_cu_seqlens(layout.cu_seqlens, layout.max_seqlen, layout.total_tokens)
    assert again.indices.device.type == "cpu"


def test_packing_under_torch_func() -> None:
    layout = packing.layout(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    padded = torch.randn(4, 2, 3, 5)

    def there_and_back(x: Tensor) -> Tensor:
        return packing.unpack(packing.pack(x, layout).square(), layout)

    torch.testing.assert_close(
        torch.func.vmap(there_and_back)(padded), torch.stack([*map(there_and_back, padded)])
    )
    grad = torch.func.grad(lambda x: there_and_back(x).sum())(padded[0])
    assert grad[0, 2].eq(0).all()
    torch.testing.assert_close(grad[0, :2], 2.0 * padded[0, 0, :2])
    each = torch.func.vmap(torch.func.grad(lambda x: there_and_back(x).sum()))(padded)
    torch.testing.assert_close(each[0], grad)
