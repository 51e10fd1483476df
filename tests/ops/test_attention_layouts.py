"""Attention's Triton kernels on tensors as they lie in memory: strides, offsets beyond 2**31, copies, what is saved."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyaccel import dispatch
from pyaccel.ops.attention.api import attention_probs
from pyaccel.reference import attention as reference
from tests.assertions import assert_bits_equal
from tests.ops import attention_cases as cases
from tests.ops.attention_cases import Call

RESULTS = ("out", "lse", "dq", "dk", "dv", "dmask")


def assert_same_results(a: dict[str, Any], b: dict[str, Any]) -> None:
    for name in RESULTS:
        if a.get(name) is not None:
            assert_bits_equal(a[name], b[name], name=name)


# --- strides ------------------------------------------------------------------------------------------------


def contiguous(call: Call) -> Call:
    """The same call of tensors that lie in memory as they are written."""
    options = dict(call.options)
    if options.get("attn_mask") is not None:
        options["attn_mask"] = options["attn_mask"].contiguous()
    return dataclasses.replace(call, qkv=[t.contiguous() for t in call.qkv], options=options)


# Every layout of the inputs, every layout of the gradient.
STRIDES = list(zip(cases.LAYOUTS, itertools.cycle(cases.GRADIENTS)))


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize(("layout", "gradient"), STRIDES)
def test_strides_do_not_change_a_bit(layout: str, gradient: str, kind: str, device: torch.device) -> None:
    """Of query, key and value, of the output's gradient, and of a mask."""
    changes: dict[str, Any] = {"layout": layout, "gradient": gradient, "dtype": "bf16"}
    if kind == "padded":
        changes |= {"heads": (2, 4, 2), "lengths": (17, 17), "mask": "bias bhqk", "mask_layout": "transposed"}
    else:
        changes |= {"heads": (4, 2), "lengths": ([5, 0, 12], [5, 0, 12])}
    call = getattr(cases, kind)(device, **changes)
    strided = cases.run(call)
    plain = cases.run(contiguous(call), dy=strided["dy"].contiguous(), dlse=strided["dlse"].contiguous())
    assert_same_results(strided, plain)


@pytest.mark.parametrize("mask", ["bool bhqk", "bool 1h1k", "bool b1q1", "float b11k", "bias hqk"])
def test_strides_of_a_mask_do_not_change_a_bit(mask: str, device: torch.device) -> None:
    call = cases.padded(device, heads=(2, 2, 2), lengths=(17, 33), mask=mask)
    plain = cases.run(call)
    given = call.options["attn_mask"]
    for name in ("transposed", "sliced", "expanded"):
        view = given.expand(2, 2, 17, 33) if name == "expanded" else cases.MASK_LAYOUTS[name](given)
        strided = dataclasses.replace(call, options={**call.options, "attn_mask": view})
        found = cases.run(strided, dy=plain["dy"], dlse=plain["dlse"])
        if call.mask_needs_grad and name == "expanded":  # which has a gradient for every element
            del found["dmask"]
        assert_same_results(found, plain)


def test_strides_of_a_padding_mask_do_not_change_a_bit(device: torch.device) -> None:
    call = cases.padded(device, mask="padding holes", heads=(3, 1, 1))
    keys = call.options["key_padding_mask"]
    plain = cases.run(call)
    wide = torch.stack([~keys, keys], -1)[..., 1]
    for view in (cases.in_order(keys, 1, 0), wide, cases.off_alignment(keys)):
        strided = dataclasses.replace(call, options={**call.options, "key_padding_mask": view})
        assert_same_results(plain, cases.run(strided, dy=plain["dy"], dlse=plain["dlse"]))


def test_strides_of_the_offsets_do_not_change_a_bit(device: torch.device) -> None:
    call = cases.packed(device)
    plain = cases.run(call)
    spread = tuple(torch.stack([t, t + 1], -1)[..., 0] for t in call.args[:2])
    strided = dataclasses.replace(call, args=(*spread, *call.args[2:]))
    assert_same_results(plain, cases.run(strided, dy=plain["dy"], dlse=plain["dlse"]))


# --- copies, and what is kept for the backward pass -----------------------------------------------------------


class Ops(TorchDispatchMode):
    """Records the ops that run, each with its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((str(func), [a for a in args if isinstance(a, Tensor)]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("layout", ["heads last", "packed projection", "dims strided", "expanded"])
def test_views_reach_the_kernels_without_a_copy(layout: str, kind: str, device: torch.device) -> None:
    changes = {"layout": layout, "gradient": "heads last", "heads": (2, 2, 2) if kind == "padded" else (2, 2)}
    if kind == "padded":
        changes["mask"] = "padding right"
    call = getattr(cases, kind)(device, **changes)
    leaves = [cases.leaf(t) for t in call.qkv]
    out = call.truth(*call.qkv, *call.args, **call.options, upcast=False)[0]
    dy = call.gradient(out)
    with Ops() as ops, dispatch.use_backend(cases.BACKEND):
        out = call.function(*leaves, *call.args, **{**call.options, "return_lse": False})
        torch.autograd.grad(out, leaves, dy)
    copies = {"aten.clone", "aten.copy_", "aten._to_copy", "aten.cat", "aten.constant_pad_nd", "aten.index"}
    large = [name for name, tensors in ops.calls if any(t.numel() >= dy.numel() for t in tensors)]
    assert not [name for name in large if name.rpartition(".")[0] in copies], large
    kernels = [(name, tensors) for name, tensors in ops.calls if name.startswith("pyaccel.")]
    assert [name for name, _ in kernels] == [
        "pyaccel.attention_forward.default",
        "pyaccel.attention_backward.default",
    ]
    for _, tensors in kernels:
        storages = {t.untyped_storage().data_ptr() for t in tensors}
        assert {t.untyped_storage().data_ptr() for t in call.qkv} <= storages
    assert dy.untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in kernels[1][1]}


@pytest.mark.parametrize("mask", ["none", "padding right", "bool b11k", "bias hk"])
def test_nothing_of_a_scores_size_is_kept(mask: str, device: torch.device) -> None:
    """Kept are q, k, v, output, LSE (beside a float mask its error) and what was given; nothing queries x keys."""
    call = cases.padded(device, lengths=(128, 128), mask=mask, dropout=0.1)
    leaves = [cases.leaf(t) for t in call.qkv]
    options = dict(call.options)
    if call.mask_needs_grad:
        options["attn_mask"] = cases.leaf(options["attn_mask"])
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), dispatch.use_backend(cases.BACKEND):
        out, lse = call.function(*leaves, *call.args, **options)
    kept = sum(t.untyped_storage().nbytes() for t in saved.values())
    given = sum(
        t.untyped_storage().nbytes() for t in (*leaves, out, lse, *([lse] if call.mask_needs_grad else []))
    )
    masks = [t for t in (options.get("attn_mask"), options.get("key_padding_mask")) if t is not None]
    assert kept <= given + sum(t.untyped_storage().nbytes() for t in masks) + 64
    assert all(t.numel() < 128 * 128 for t in saved.values())


# --- offsets beyond 2**31 -----------------------------------------------------------------------------------
# The strides fit in 32 bits, the offsets don't. Memory that is never touched isn't taken.

Far = Callable[..., list[Tensor]]


@pytest.fixture(scope="module")
def far(device: torch.device) -> Far:
    """``far(dim, *tensors)``: their values, in memory whose last element along `dim` is 2**31 beyond the first."""
    buffers: dict[torch.dtype, Tensor] = {}
    room = 2**16  # for all elements of one index along `dim`

    def spread(dim: int, *tensors: Tensor) -> list[Tensor]:
        views = []
        for slot, x in enumerate(tensors):
            gap = -(-(2**31) // (x.shape[dim] - 1))
            assert gap <= 2**30, "a stride of over 31 bits would be passed, and multiplied, as 64 bits"
            if x.dtype not in buffers:
                buffers[x.dtype] = torch.empty(2**31 + 8 * room, dtype=x.dtype, device=device)
            strides = list(
                torch.empty([n for i, n in enumerate(x.shape) if i != dim], device="meta").stride()
            )
            strides.insert(dim, gap)
            assert x.numel() // x.shape[dim] <= room
            views.append(buffers[x.dtype].as_strided(x.shape, strides, slot * room).copy_(x))
        for view, x in zip(views, tensors, strict=True):
            assert torch.equal(view, x), "two tensors were put in one place"
        return views

    return spread


def check_far(far: Far, dim: int, call: Call) -> None:
    """Query, key, value and the gradient, each with its dimension `dim` spread, give the bits of the compact ones."""
    plain = cases.run(call)
    *qkv, dy = far(dim, *call.qkv, plain["dy"])
    found = cases.run(dataclasses.replace(call, qkv=qkv), dy=dy, dlse=plain["dlse"])
    assert found["dy"].data_ptr() == dy.data_ptr()
    assert_same_results(plain, found)


@pytest.mark.parametrize("dim", ["batch", "head", "row", "dim"])
def test_padded_offsets_beyond_two_to_the_31(dim: str, far: Far, device: torch.device) -> None:
    call = cases.padded(device, heads=(3, 3, 3), lengths=(5, 6), dtype="bf16")
    check_far(far, ("batch", "head", "row", "dim").index(dim), call)


@pytest.mark.parametrize(
    ("dim", "heads"), [("batch", (3, 1, 1)), ("head", (1, 6, 3)), ("row", (1, 2, 1)), ("dim", (1, 1, 1))]
)
def test_offsets_of_long_sequences_beyond_two_to_the_31(
    dim: str, heads: tuple[int, int, int], far: Far, device: torch.device
) -> None:
    """In the kernels that walk over tiles."""
    call = cases.padded(device, heads=heads, lengths=(70, 300), dtype="fp16", causal=True)
    check_far(far, ("batch", "head", "row", "dim").index(dim), call)


@pytest.mark.parametrize("lengths", [([2, 0, 3], [3, 1, 4]), ([70, 5], [9, 200])], ids=str)
@pytest.mark.parametrize("dim", ["row", "head", "dim"])
def test_packed_offsets_beyond_two_to_the_31(
    dim: str, lengths: tuple[list[int], list[int]], far: Far, device: torch.device
) -> None:
    call = cases.packed(device, heads=(3, 3), lengths=lengths, dtype="bf16")
    for t in call.qkv:
        t[-3:] = 0.0  # equal to themselves, as NaN isn't
    check_far(far, ("row", "head", "dim").index(dim), call)


@pytest.mark.parametrize("mask", ["bool bhqk", "bias bhqk", "bool 1h1k"])
@pytest.mark.parametrize("lengths", [(5, 6), (70, 80)], ids=str)
def test_mask_offsets_beyond_two_to_the_31(
    lengths: tuple[int, int], mask: str, far: Far, device: torch.device
) -> None:
    call = cases.padded(
        device, heads=(3, 3, 3) if lengths == (5, 6) else (1, 1, 1), lengths=lengths, dtype="bf16", mask=mask
    )
    plain = cases.run(call)
    given = call.options["attn_mask"]
    for dim in range(given.dim()):
        if given.shape[dim] > 2:
            options = {**call.options, "attn_mask": far(dim, given)[0]}
            found = cases.run(dataclasses.replace(call, options=options), dy=plain["dy"], dlse=plain["dlse"])
            assert_same_results(plain, found)


@pytest.mark.parametrize("dim", ["batch", "key"])
def test_padding_mask_offsets_beyond_two_to_the_31(dim: str, far: Far, device: torch.device) -> None:
    call = cases.padded(device, heads=(3, 1, 1), lengths=(5, 6), mask="padding holes")
    plain = cases.run(call)
    options = {
        **call.options,
        "key_padding_mask": far(("batch", "key").index(dim), call.options["key_padding_mask"])[0],
    }
    found = cases.run(dataclasses.replace(call, options=options), dy=plain["dy"], dlse=plain["dlse"])
    assert_same_results(plain, found)


@pytest.mark.parametrize("dim", ["batch", "head", "row", "dim"])
def test_weights_from_offsets_beyond_two_to_the_31(dim: str, far: Far, device: torch.device) -> None:
    call = cases.padded(device, heads=(3, 3, 3), lengths=(5, 6), dtype="bf16", mask="float bhqk")
    query, key, value = call.qkv
    mask = call.options["attn_mask"]
    _, lse = reference.scaled_dot_product_attention(query, key, value, mask, return_lse=True, upcast=False)
    with dispatch.use_backend(cases.BACKEND):
        plain = attention_probs(query, key, lse, mask)
        query, key, mask = far(("batch", "head", "row", "dim").index(dim), query, key, mask)
        assert_bits_equal(attention_probs(query, key, lse, mask), plain)
