"""Memory of every op: operands of any strides and expansions, results and gradients that share no storage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyaccel import dispatch, ops
from pyaccel.ops.linear import onednn
from tests.assertions import assert_bits_equal, assert_equivalent
from tests.ops.op_calls import CALLS, DIFFERENTIABLE, Inputs, OpCall

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
every_backend = pytest.mark.parametrize("backend", ["torch", "triton", "reference"])


def every_other(t: Tensor) -> Tensor:
    """t's values, every other element of a larger buffer whose other elements are NaN (or far off)."""
    odd = torch.full_like(t, float("nan") if t.is_floating_point() else 99)
    return torch.stack([t, odd], dim=-1)[..., 0]


def column_major(t: Tensor) -> Tensor:
    """t's values with the strides of a transposed matrix; of a vector or scalar, a slice that doesn't begin at 0."""
    return t.mT.contiguous().mT if t.ndim > 1 else torch.stack([torch.zeros_like(t), t])[1]


def expanded(t: Tensor) -> Tensor:
    """t's first element (of a matrix its first column), read again and again: strides of 0."""
    if t.ndim == 0:
        return t
    return t[..., :1].expand_as(t)


def repeated_row(t: Tensor) -> Tensor:
    return t[:1].expand_as(t) if t.ndim else t


def apart(t: Tensor) -> Tensor:
    """A contiguous copy with memory of its own, whatever t's strides."""
    return t.detach().clone(memory_format=torch.contiguous_format)


def made(name: str, backend: str, device: torch.device) -> tuple[OpCall, Inputs]:
    dtype = F16 if backend == "triton" and "weight_only" in name else F32  # the kernel takes 16 bits alone
    return CALLS[name], {n: t.to(device) for n, t in CALLS[name].make(dtype).items()}


def run(call: OpCall, inputs: Inputs) -> list[Tensor]:
    """Outputs, then the gradients of what has one."""
    inputs = {n: t.detach() for n, t in inputs.items()}
    for name in call.differentiable:
        inputs[name].requires_grad_()
    outs = call.call(inputs)
    floating = [out for out in outs if out.requires_grad]
    if not floating:
        return list(outs)
    torch.manual_seed(1)
    grads = torch.autograd.grad(
        floating, call.leaves(inputs), [torch.randn(out.shape).to(out) for out in floating]
    )
    return [*(out.detach() for out in outs), *grads]


@every_backend
@pytest.mark.parametrize("layout", [every_other, column_major, expanded, repeated_row])
@pytest.mark.parametrize("name", CALLS)
def test_any_strides(
    name: str, layout: Callable[[Tensor], Tensor], backend: str, device: torch.device
) -> None:
    """With and without gradients: what comes out is what contiguous copies give."""
    call, given = made(name, backend, device)
    # One offset for all is no packing.
    names = [n for n in given if n != "cu_seqlens" or layout not in (expanded, repeated_row)]
    if name.startswith("masked_lm") and layout is expanded:
        names.remove("weight")  # equal logits: the gradient cancels to 0
    # Kernels take strides as they come: all of them together. Where PyTorch chooses a path by them, each in turn.
    for changed in [names] if backend == "triton" else [[n] for n in names]:
        strided = {n: layout(t) if n in changed else t for n, t in given.items()}
        copied = {n: apart(t) for n, t in strided.items()}
        with dispatch.use_backend(backend):
            results = [run(call, inputs) for inputs in (strided, copied)]
            if backend == "torch":
                with torch.inference_mode():
                    results = [
                        [*found, *call.call(inputs)]
                        for found, inputs in zip(results, (strided, copied), strict=True)
                    ]
        codes, numbers = zip(*(split(found) for found in results), strict=True)
        for out, expected in zip(*codes, strict=True):
            assert_bits_equal(out, expected, name=", ".join(changed))
        assert_equivalent(*numbers, name=", ".join(changed))


def split(found: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Integers, and all that is floating in one: a gradient that cancels to 0 has the others' scale."""
    floating = [t.reshape(-1).float() for t in found if t.is_floating_point()]
    return [t for t in found if not t.is_floating_point()], torch.cat(floating)


@every_backend
@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_have_memory_of_their_own(
    name: str, backend: str, device: torch.device
) -> None:
    call, inputs = made(name, backend, device)
    with dispatch.use_backend(backend):
        found = {f"input {n}": t for n, t in inputs.items()}
        found |= {f"result {i}": t for i, t in enumerate(run(call, inputs))}
        found |= {f"result in inference {i}": t for i, t in enumerate(call.call(inputs))}
    owners: dict[int, str] = {}
    for what, t in found.items():
        if t.numel():
            pointer = t.untyped_storage().data_ptr()
            assert pointer not in owners, f"{what} shares its memory with {owners[pointer]}"
            owners[pointer] = what


@every_backend
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("views", [False, True], ids=["leaves", "views"])
def test_accumulated_steps_add_up(name: str, views: bool, backend: str, device: torch.device) -> None:
    """Two backward passes give twice the gradient of one, also where leaves are viewed before the call."""
    call, inputs = made(name, backend, device)
    for leaf in call.leaves(inputs):
        leaf.requires_grad_()
    given = {n: t.view(t.shape) if views else t for n, t in inputs.items()}

    def loss() -> Tensor:
        return sum((out * out).sum() for out in call.call(given) if out.requires_grad)  # type: ignore[return-value]

    with dispatch.use_backend(backend):
        once = [g.clone() for g in torch.autograd.grad(loss(), call.leaves(inputs))]
        for _ in range(2):
            loss().backward()
    for leaf, grad in zip(call.leaves(inputs), once, strict=True):
        assert leaf.grad is not None
        assert_equivalent(leaf.grad, 2 * grad)


# Those that this CPU's oneDNN multiplies at full speed: fp32 on every one, bf16 where there are instructions for it.
ONEDNN_DTYPES = [dtype for dtype in (F32, BF16) if dtype in onednn.supported_dtypes()]


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("layout", [every_other, column_major, expanded, repeated_row])
@pytest.mark.parametrize("dtype", ONEDNN_DTYPES, ids=[str(d).removeprefix("torch.") for d in ONEDNN_DTYPES])
def test_onednn_gets_what_it_can_read(
    dtype: torch.dtype, layout: Callable[[Tensor], Tensor], activation: str | None
) -> None:
    """Each operand of the private products of any strides, and of another dtype than x's."""
    x, weight, residual = torch.randn(5, 16), torch.randn(24, 16), torch.randn(5, 24)
    given = {"x": x, "weight": weight, "bias": torch.randn(24), "residual": residual}
    given = {n: t.to(dtype) for n, t in given.items()}
    for argument in given:
        operands = {**given, argument: layout(given[argument])}
        copied = {n: apart(t) for n, t in operands.items()}
        for o in (operands, {**operands, "bias": operands["bias"].float()}):
            sums = [
                onednn.evaluate_with_residual(t["x"], t["residual"], t["weight"], t["bias"])
                for t in (o, copied)
            ]
            outs = [onednn.by_onednn(t["x"], t["weight"], t["bias"], activation) for t in (o, copied)]
            assert_equivalent(*sums, name=argument)
            assert_equivalent(*outs, name=argument)
    if onednn.can_prepack():
        packed = onednn.prepacked(layout(given["weight"]))
        out = onednn.by_onednn(given["x"], packed, every_other(given["bias"]), activation)
        assert_equivalent(
            out, onednn.by_onednn(given["x"], apart(layout(given["weight"])), given["bias"], activation)
        )


def test_onednn_gets_operands_of_the_inputs_dtype() -> None:
    x, weight = torch.randn(5, 16), torch.randn(24, 16)
    bias, residual = torch.randn(24).bfloat16(), torch.randn(5, 24).bfloat16()
    expected = onednn.by_onednn(x, weight, bias.float(), residual=residual.float())
    assert_equivalent(onednn.by_onednn(x, weight, bias, residual=residual), expected, name="sum")
    assert_equivalent(
        onednn.by_onednn(x, weight, bias), onednn.by_onednn(x, weight, bias.float()), name="out"
    )


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@every_backend
def test_nan_shows_through_activations(activation: str, backend: str, device: torch.device) -> None:
    """A maximum with 0 makes 0 of NaN: of the fused product's epilogue, and of every kernel."""
    x = torch.ones(4, 16, device=device)
    x[1] = float("nan")
    weight = torch.ones(8, 16, device=device)
    with dispatch.use_backend(backend), torch.no_grad():
        outs = [ops.linear_activation(x, weight, None, activation), ops.bias_gelu(x, None, activation)]
    for out in outs:
        assert out[1].isnan().all()
        assert not out[[0, 2, 3]].isnan().any()
