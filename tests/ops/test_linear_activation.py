"""linear_activation on Triton: the public function against the fp64 truth, and what it saves, refuses and records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyaccel import dispatch, ops, triton_support
from pyaccel.errors import NotSupportedError
from pyaccel.kernels.bias_act import kernels as bias_gelu
from pyaccel.kernels.common import reduce as column_sum
from pyaccel.kernels.linear import kernels as kernel
from pyaccel.ops.linear import onednn
from pyaccel.ops.linear import triton as triton_backend
from pyaccel.ops.linear.api import ACTIVATIONS
from pyaccel.reference import activation as apply_activation
from tests.assertions import assert_bits_equal, assert_close_to_truth
from tests.pairwise import pairwise

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

CASES = pairwise(
    {
        "backend": ["triton", "torch"],
        "activation": ACTIVATIONS,
        # x with weight, and bias.
        "dtypes": [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, BF16), (BF16, None)],
        # Rows, in, out: one element; parts of a tile; several tiles and groups; both configurations.
        "size": [(1, 1, 1), (7, 40, 24), (33, 32, 64), (130, 72, 100), (200, 96, 33)],
    }
)


def label(case: dict[str, Any]) -> str:
    return "-".join(str(value).replace("torch.", "").replace(" ", "") for value in case.values())


def call(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = "gelu",
    *, backend: str = "triton",
) -> Tensor:  # fmt: skip
    with dispatch.use_backend(backend):
        return ops.linear_activation(x, weight, bias, activation)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = "gelu") -> Tensor:
    """F.linear and the activation, in x's dtype."""
    return apply_activation(F.linear(x, weight, None if bias is None else bias.to(x.dtype)), activation)


def with_gradients(out: Tensor, given: list[Tensor], dout: Tensor) -> list[Tensor]:
    return [out, *torch.autograd.grad(out, given, dout.to(out.dtype))]


def inputs(
    rows: int, n_in: int, n_out: int, device: torch.device, dtypes: tuple[Any, Any] = (F32, F32)
) -> list[Tensor]:
    """x, weight and, unless its dtype is None, bias: pre-activations of size 1 to 2, of either sign."""
    x = torch.randn(rows, n_in, device=device).to(dtypes[0])
    weight = (torch.randn(n_out, n_in, device=device) * n_in**-0.5).to(dtypes[0])
    bias = [] if dtypes[1] is None else [torch.randn(n_out, device=device).to(dtypes[1])]
    return [x, weight, *bias]


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """What is saved for backward inside, in order."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        yield saved


NAMES = ("out", "dx", "dweight", "dbias")


@pytest.mark.parametrize("case", CASES, ids=label)
def test_output_and_gradients_are_as_right_as_plain_torch(
    case: dict[str, Any], device: torch.device, poison: None
) -> None:
    rows, n_in, n_out = case["size"]
    given = inputs(rows, n_in, n_out, device, case["dtypes"])
    dout = (torch.randn(rows, n_out, device=device) + 0.3).to(given[0].dtype)
    results = []
    for kind in ("ours", "truth", "naive"):
        leaves = [t.to(torch.float64 if kind == "truth" else t.dtype).requires_grad_() for t in given]
        padded = leaves if len(leaves) == 3 else [*leaves, None]
        if kind == "ours":
            out = call(*padded, case["activation"], backend=case["backend"])
        else:
            out = plain(*padded, case["activation"])
        results.append(with_gradients(out, leaves, dout))
    assert [t.dtype for t in results[0]] == [given[0].dtype, *(t.dtype for t in given)]
    for name, ours, truth, naive in zip(NAMES, *results, strict=False):
        assert_close_to_truth(ours, truth, naive, name=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_is_that_of_the_unrounded_sum(activation: str | None, device: torch.device) -> None:
    """In 16 bits the output is the fp32 one, rounded once, whether the pre-activation is written or not."""
    x, weight, bias = inputs(40, 48, 40, device, (BF16, BF16))
    exact = call(x.float(), weight.float(), bias.float(), activation)
    training = call(x, weight.clone().requires_grad_(), bias, activation)
    for out in (call(x, weight, bias, activation), training):
        assert_bits_equal(out, exact.to(BF16), name=str(activation))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_backward_takes_the_derivative_at_the_rounded_pre_activation(
    dtype: torch.dtype, device: torch.device
) -> None:
    """What is saved is the pre-activation with its bias in x's dtype; dbias isn't rounded before it is summed."""
    x, weight, bias = inputs(40, 48, 40, device, (dtype, F32))
    dout = torch.randn(40, 40, device=device).to(dtype)
    weight.requires_grad_()
    bias.requires_grad_()
    out = call(x, weight, bias)
    dweight, dbias = torch.autograd.grad(out, (weight, bias), dout)
    pre = call(x, weight.detach(), bias.detach(), None)
    assert pre.dtype == dtype
    wide = pre.float().requires_grad_()
    with dispatch.use_backend("triton"):
        (dpre,) = torch.autograd.grad(ops.bias_gelu(wide), wide, dout.float())
    assert_bits_equal(dweight, dpre.to(dtype).mT @ x)
    assert_close_to_truth(dbias, dpre.double().sum(0), dpre.sum(0))
    (dbias,) = torch.autograd.grad(call(x, weight, bias, None), bias, dout)
    assert_close_to_truth(dbias, dout.double().sum(0), dout.float().sum(0))


@pytest.mark.parametrize("view", ["transposed", "sliced", "every_second", "expanded", "3d", "offset"])
def test_strided_inputs_and_gradients(view: str, device: torch.device) -> None:
    strided = {
        "transposed": lambda t: t[:40, :6].t(),
        "sliced": lambda t: t[:6, 3:43],
        "every_second": lambda t: t[:12:2, :80:2],
        "expanded": lambda t: t[:1, :40].expand(6, 40),
        "3d": lambda t: t[:6, :40].view(2, 3, 40).transpose(0, 1),
        "offset": lambda t: t[5:11, 1:41],
    }[view]
    base = torch.randn(160, 40 if view == "3d" else 160, device=device)
    bias = torch.randn(80, device=device)[::2]
    square = torch.randn(160, 160, device=device)
    weight = square[:80:2, 1:81:2] if view == "every_second" else square[:40, 7:47].t()
    x, grad = strided(base), strided(base * 2 - 1)
    results = []
    for copy in (False, True):
        leaves = [(t.contiguous() if copy else t).detach().requires_grad_() for t in (x, weight, bias)]
        out = call(*leaves)
        results.append(with_gradients(out, leaves, grad.contiguous() if copy else grad))
        results[-1].append(call(*(t.detach() for t in leaves)))
    for name, a, b in zip((*NAMES, "inference"), *results, strict=True):
        # PyTorch's products may sum in another order where strides differ.
        if name in ("dx", "dweight"):
            assert_close_to_truth(a, b.double(), b, name=name)
        else:
            assert_bits_equal(a, b, name=name)


def test_a_gradient_of_stride_zero_and_a_cat_after_the_op(device: torch.device) -> None:
    given = inputs(6, 16, 24, device)
    results = []
    for kind in ("ours", "truth", "naive"):
        leaves = [t.to(torch.float64 if kind == "truth" else F32).detach().requires_grad_() for t in given]
        out = call(*leaves) if kind == "ours" else plain(*leaves)
        results.append(torch.autograd.grad(torch.cat([out, out[:2]]).sum() + out.sum(), leaves))
    for name, ours, truth, naive in zip(NAMES[1:], *results, strict=True):
        assert_close_to_truth(ours, truth, naive, name=name)
    leaves = [t.detach().requires_grad_() for t in given]
    expanded, whole = (
        torch.autograd.grad(call(*leaves), leaves, dout)
        for dout in (torch.tensor(2.0, device=device).expand(6, 24), torch.full((6, 24), 2.0, device=device))
    )
    for a, b in zip(expanded, whole, strict=True):
        assert_bits_equal(a, b)


@pytest.mark.parametrize("activation", ["gelu", None])
@pytest.mark.parametrize(("rows", "n_in", "n_out"), [(0, 16, 32), (3, 0, 32), (3, 16, 0), (0, 0, 0)])
def test_empty_sizes(
    rows: int, n_in: int, n_out: int, activation: str | None, device: torch.device, poison: None
) -> None:
    given = [torch.randn(s, device=device) for s in ((rows, n_in), (n_out, n_in), (n_out,))]
    results = []
    for function, dtype in ((call, F32), (plain, torch.float64), (plain, F32)):
        leaves = [t.to(dtype).detach().requires_grad_() for t in given]
        out = function(*leaves, activation)
        inference = function(*(t.detach() for t in leaves), activation)
        results.append([out, *torch.autograd.grad(out.sum(), leaves), inference])
    for ours, truth, naive in zip(*results, strict=True):
        assert ours.shape == naive.shape
        assert_close_to_truth(ours, truth, naive)


def test_leading_dimensions_are_rows(device: torch.device) -> None:
    x, weight, bias = inputs(30, 48, 20, device)
    flat = call(x, weight, bias)
    assert_bits_equal(call(x.view(2, 3, 5, 48), weight, bias), flat.view(2, 3, 5, 20))
    assert call(x[0], weight, bias).shape == (20,)


def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    given, dout = inputs(150, 80, 70, device), torch.randn(150, 70, device=device)
    runs = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in given]
        runs.append(with_gradients(call(*leaves), leaves, dout))
    for a, b in zip(*runs, strict=True):
        assert_bits_equal(a, b)


@pytest.mark.parametrize("activation", ["gelu", None])
def test_it_saves_x_weight_and_the_pre_activation_and_nothing_unneeded(
    activation: str | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, dout = inputs(5, 16, 32, device), torch.randn(5, 32, device=device)
    leaves = [t.clone().requires_grad_() for t in given]
    whole = torch.autograd.grad(call(*leaves, activation), leaves, dout)
    pre = [] if activation is None else [call(*given, None)]
    for wanted, kept in (((0,), (1,)), ((1,), (0,)), ((2,), ()), ((0, 1, 2), (0, 1))):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(given)]
        with saved_tensors() as saved:
            out = call(*leaves, activation)
        assert [t.data_ptr() for t in saved[: len(kept)]] == [leaves[i].data_ptr() for i in kept]
        assert len(saved) == len(kept) + len(pre)
        for a, b in zip(saved[len(kept) :], pre, strict=True):
            assert_bits_equal(a, b)
        with monkeypatch.context() as patch:
            if 2 not in wanted:  # no bias gradient: no partial sums, no second launch
                patch.setattr(column_sum, "column_sum", None)
            grads = torch.autograd.grad(out, [leaves[i] for i in wanted], dout)
        for i, grad in zip(wanted, grads, strict=True):
            assert_bits_equal(grad, whole[i])
    with torch.no_grad(), monkeypatch.context() as patch:  # without a gradient no pre-activation is made
        patch.setattr(triton_backend.LinearActivationFunction, "apply", None)
        call(*leaves, activation)
    assert triton_backend.forward_op(*given, activation, False)[1].numel() == 0
    sizes = [[t.numel() for t in triton_backend.backward_op(dout, dout, "gelu", *w)]
             for w in ((True, F32), (True, None), (False, F32))]  # fmt: skip
    assert sizes == [[160, 32], [160, 0], [0, 32]]


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_autocast_is_that_of_a_linear_layer(backend: str, device: torch.device) -> None:
    given = inputs(9, 16, 32, device)
    results = []
    for kind in ("ours", "truth", "naive"):
        leaves = [t.to(torch.float64 if kind == "truth" else F32).detach().requires_grad_() for t in given]
        if kind == "truth":
            out = plain(*leaves)
        else:
            with torch.autocast(device.type, BF16):
                out = call(*leaves, backend=backend) if kind == "ours" else plain(*leaves)
        results.append(with_gradients(out, leaves, torch.ones_like(out)))
    assert [t.dtype for t in results[0]] == [BF16, F32, F32, F32]
    # The gradients have been through bf16: so has plain torch's error, by which they are judged.
    for name, ours, truth, naive in zip(NAMES, *results, strict=True):
        assert_close_to_truth(ours, truth, naive, name=name)
    with torch.autocast(device.type, BF16):  # a 16-bit x beside fp32 parameters
        assert call(given[0].to(BF16), *given[1:], backend=backend).dtype == BF16


def test_gradient_checkpointing(device: torch.device) -> None:
    given, dout = inputs(6, 48, 40, device), torch.randn(6, 40, device=device)
    results = []
    for checkpointed in (False, True):
        leaves = [t.clone().requires_grad_() for t in given]
        out = checkpoint(call, *leaves, use_reentrant=False) if checkpointed else call(*leaves)
        results.append(with_gradients(out, leaves, dout))
    for a, b in zip(*results, strict=True):
        assert_bits_equal(a, b)


@pytest.mark.parametrize("leaf", [0, 1, 2])
def test_a_double_backward_says_what_to_do(leaf: int, device: torch.device) -> None:
    leaves = [t.requires_grad_() for t in inputs(3, 16, 8, device)]
    (grad,) = torch.autograd.grad(call(*leaves).sum(), leaves[leaf], create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"double backward.*use_backend\('torch', ops=\['linear_activation'"
    ):
        grad.sum().backward()


def test_without_an_activation_a_double_backward_is_right(device: torch.device) -> None:
    given = inputs(3, 16, 8, device)
    results = []
    for function, dtype in ((call, F32), (plain, torch.float64), (plain, F32)):
        leaves = [t.to(dtype).detach().requires_grad_() for t in given]
        (dx,) = torch.autograd.grad(function(*leaves, None).square().sum(), leaves[0], create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), leaves))
    for ours, truth, naive in zip(*results, strict=True):
        assert_close_to_truth(ours, truth, naive)


def test_offsets_beyond_two_to_the_31(device: torch.device) -> None:
    """Rows, or columns, 2**30 elements apart: the last begins at 3 * 2**30. Memory not touched isn't taken."""
    big = torch.empty(3 * 2**30 + 16, dtype=F16, device=device)
    near, other = torch.randn(2, 4, 16, device=device).to(F16).unbind()
    by_rows, by_columns = big.as_strided((4, 16), (2**30, 1)), big.as_strided((4, 4), (1, 2**30))
    by_rows.copy_(near)
    assert_bits_equal(call(by_rows, other), call(near, other))
    assert_bits_equal(call(other, by_rows), call(other, near))
    by_columns.copy_(near[:, :4])
    near, other = near[:, :4].contiguous(), other[:, :4].contiguous()
    assert_bits_equal(call(by_columns, other), call(near, other))
    assert_bits_equal(call(other, by_columns), call(other, near))


def test_nan_and_inf_stay_in_their_row(device: torch.device) -> None:
    x, weight, bias = inputs(40, 24, 40, device)
    clean = call(x, weight, bias)
    x[39, 5] = float("nan")
    for activation in ACTIVATIONS:
        assert call(x, weight, bias, activation).isnan().all(1).nonzero().tolist() == [[39]]
    assert_bits_equal(call(x, weight, bias)[:39], clean[:39])


def test_it_is_not_chosen_by_itself(device: torch.device) -> None:
    given = inputs(3, 16, 8, device)
    with dispatch.record() as choices:
        ops.linear_activation(*given, "gelu")
        call(*given)
    assert [c.backend for c in choices if c.op == "linear_activation"] == ["torch", "triton"]


def test_tf32_is_taken_where_torch_allows_it(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def arguments(*given: Any, allow_tf32: bool) -> dict[str, Any]:
        found = forward_arguments(*given, allow_tf32=allow_tf32)
        taken.append(found["PRECISION"])
        return found

    forward_arguments = kernel.forward_arguments
    monkeypatch.setattr(kernel, "forward_arguments", arguments)
    x, weight, _ = inputs(3, 16, 8, device)
    before = torch.backends.cuda.matmul.allow_tf32  # monkeypatch can't restore it
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            call(x, weight)
            call(x.to(BF16), weight.to(BF16))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert taken == ["ieee", "ieee", "tf32", "ieee"]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_meta_tensors_have_the_shapes_of_real_ones(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For whoever counts a model's cost without running it."""
    monkeypatch.setattr(triton_support, "unsupported_reasons", lambda *tensors: [])
    leaves = [t.to(BF16).requires_grad_() for t in inputs(4, 16, 8, torch.device("meta"))]
    out = call(*leaves, backend=backend)
    out.sum().backward()
    assert (out.shape, out.dtype) == ((4, 8), BF16)
    assert [t.grad.shape for t in leaves] == [t.shape for t in leaves]


def test_what_cannot_be_served_is_refused_with_every_reason(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = inputs(3, 16, 8, device)
    with pytest.raises(NotSupportedError, match="not float64"):
        call(x.double(), weight.double(), bias)
    with pytest.raises(
        ValueError, match=r"x is torch.bfloat16 and weight torch.float32: cast.*unknown activation"
    ):
        call(x.to(BF16), weight, bias, "swish")
    if device.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(NotSupportedError, match="on the CPU"):
            call(x, weight, bias)


# --- the torch backend of a GPU -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("training", [True, False])
def test_on_a_gpu_torch_leaves_bias_and_activation_to_bias_gelu(
    training: bool, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "on_gpu", lambda x: True)
    monkeypatch.setattr(onednn, "not_supported_reasons", lambda *tensors: ["not on the CPU"])
    given, dout = inputs(9, 48, 24, device, (dtype, F32)), torch.randn(9, 24, device=device)
    results = []
    for kind in ("ours", "truth", "naive"):
        leaves = [
            t.to(torch.float64 if kind == "truth" else t.dtype).detach().requires_grad_(training)
            for t in given
        ]
        if kind == "ours":
            with (
                saved_tensors() as saved,
                dispatch.use_backend("triton", ops=["bias_gelu"]),
                dispatch.use_backend("torch", ops=["linear_activation"]),
                dispatch.record() as choices,
            ):
                out = ops.linear_activation(*leaves, "gelu")
            assert [(c.op, c.backend) for c in choices] == [
                ("linear_activation", "torch"),
                ("bias_gelu", "triton"),
            ]
            # x and weight of the product, and its result with the bias.
            assert sorted(t.numel() for t in saved) == ([24, 9 * 24, 9 * 48, 24 * 48] if training else [])
        else:
            out = plain(*leaves)
        results.append(with_gradients(out, leaves, dout) if training else [out])
    for name, ours, truth, naive in zip(NAMES, *results, strict=False):
        assert_close_to_truth(ours, truth, naive, name=name)


def test_on_a_gpu_torch_is_plain_where_triton_does_not_serve_bias_gelu(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "on_gpu", lambda x: True)
    monkeypatch.setattr(onednn, "not_supported_reasons", lambda *tensors: ["not on the CPU"])
    monkeypatch.setattr(bias_gelu, "forward", None)
    given = inputs(3, 16, 8, device)
    with dispatch.record() as choices:
        assert_bits_equal(call(*given, backend="torch"), plain(*given))
        ops.linear_activation(*(t.double() for t in given), "gelu")
        ops.linear_activation(*given, None)
    assert [c.op for c in choices] == ["linear_activation"] * 3
    assert "the fused product is not measured on this card yet" in choices[1].reason
