"""Function transforms, traces and modes of every op: the right numbers, or one clear error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pyaccel import dispatch
from tests.assertions import assert_equivalent
from tests.ops.op_calls import CALLS, DIFFERENTIABLE, Inputs, OpCall

F32, F16 = torch.float32, torch.float16
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
every_backend = pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
every_op = pytest.mark.parametrize("name", CALLS)


def made(name: str, backend: str, device: torch.device) -> tuple[OpCall, Inputs]:
    dtype = F16 if backend == "triton" and "weight_only" in name else F32  # the kernel takes 16 bits alone
    return CALLS[name], {n: t.to(device) for n, t in CALLS[name].make(dtype).items()}


def loss_of(call: OpCall, inputs: Inputs) -> Callable[..., Tensor]:
    """A scalar of what has a gradient, as a function of the tensors that have one."""

    def loss(*leaves: Tensor) -> Tensor:
        given = {**inputs, **dict(zip(call.differentiable, leaves, strict=True))}
        return sum(out.float().pow(2).sum() for out in call.call(given) if out.is_floating_point())  # type: ignore[return-value]

    return loss


def eager_gradients(call: OpCall, inputs: Inputs) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in call.leaves(inputs)]
    return torch.autograd.grad(loss_of(call, inputs)(*leaves), leaves)


@every_backend
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_func_grad_and_vjp(name: str, backend: str, device: torch.device) -> None:
    call, inputs = made(name, backend, device)
    leaves = call.leaves(inputs)
    with dispatch.use_backend(backend):
        expected = eager_gradients(call, inputs)
        loss = loss_of(call, inputs)
        found = torch.func.grad(loss, argnums=tuple(range(len(leaves))))(*leaves)
        _, pull = torch.func.vjp(loss, *leaves)
        again = pull(torch.ones((), device=device))
    for grad, other, right in zip(found, again, expected, strict=True):
        assert_equivalent(grad, right)
        assert_equivalent(other, right)


@backends
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_jacrev(name: str, backend: str, device: torch.device) -> None:
    """One backward for each of two numbers, all together under vmap."""
    call, inputs = made(name, backend, device)
    leaves = call.leaves(inputs)
    loss = loss_of(call, inputs)
    factors = torch.tensor([1.0, -2.0], device=device)
    with dispatch.use_backend(backend):
        (expected, *_) = eager_gradients(call, inputs)
        found = torch.func.jacrev(lambda first: loss(first, *leaves[1:]) * factors)(leaves[0])
    for row, factor in zip(found, factors, strict=True):
        assert_equivalent(row, expected * factor)


@backends
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_batched_gradients(name: str, backend: str, device: torch.device) -> None:
    """By PyTorch's older vmap, whose tensors say that they are plain."""
    call, inputs = made(name, backend, device)
    leaves = [leaf.detach().requires_grad_() for leaf in call.leaves(inputs)]
    factors = torch.tensor([1.0, -2.0], device=device)
    with dispatch.use_backend(backend):
        expected = eager_gradients(call, inputs)
        found = torch.autograd.grad(loss_of(call, inputs)(*leaves), leaves, factors, is_grads_batched=True)
    for grad, right in zip(found, expected, strict=True):
        for row, factor in zip(grad, factors, strict=True):
            assert_equivalent(row, right * factor)


@backends
@every_op
def test_vmap(name: str, backend: str, device: torch.device) -> None:
    """Over the first tensor: what a loop gives."""
    call, inputs = made(name, backend, device)
    first, *others = inputs
    batch = torch.stack([inputs[first], inputs[first].flip(0)])
    rest = {n: inputs[n] for n in others}
    with dispatch.use_backend(backend), torch.no_grad():
        found = torch.func.vmap(lambda x: call.call({first: x, **rest}))(batch)
        expected = [call.call({first: x, **rest}) for x in batch]
    for i, one in enumerate(expected):
        for out, right in zip(found, one, strict=True):
            if right.is_floating_point():
                assert_equivalent(out[i], right)
            else:
                assert torch.equal(out[i], right)


@every_backend
@every_op
def test_fake_tensors(name: str, backend: str, device: torch.device) -> None:
    """Shapes, dtypes and devices without data, and nothing that a later call could stumble over."""
    call, inputs = made(name, backend, device)
    with dispatch.use_backend(backend), torch.no_grad():
        expected = call.call(inputs)
        with FakeTensorMode() as mode:
            fake = call.call({n: mode.from_tensor(t) for n, t in inputs.items()})
        again = call.call(inputs)
    for out, right, after in zip(fake, expected, again, strict=True):
        assert (out.shape, out.dtype, out.device) == (right.shape, right.dtype, right.device)
        assert torch.equal(after, right)


@every_backend
@every_op
def test_meta_tensors(name: str, backend: str, device: torch.device) -> None:
    call, inputs = made(name, backend, device)
    if backend == "torch" and name.startswith(("int8_matmul", "int8_linear")):
        backend = "auto"  # torch._int_mm has no kernel for them
    with dispatch.use_backend("auto" if backend == "triton" else backend), torch.no_grad():
        expected = call.call(inputs)
        found = call.call({n: t.to("meta") for n, t in inputs.items()})
    for out, right in zip(found, expected, strict=True):
        assert (out.shape, out.dtype, out.device.type) == (right.shape, right.dtype, "meta")


@every_backend
@every_op
def test_another_default_device(name: str, backend: str, device: torch.device) -> None:
    """Helper tensors name their device."""
    call, inputs = made(name, backend, device)
    with dispatch.use_backend(backend):
        expected = run(call, inputs)
        with torch.device("meta"):
            found = run(call, inputs)
    for out, right in zip(found, expected, strict=True):
        assert out.device == right.device
        assert torch.equal(out, right)


def run(call: OpCall, inputs: Inputs) -> list[Tensor]:
    inputs = {n: t.detach().requires_grad_(n in call.differentiable) for n, t in inputs.items()}
    outs = call.call(inputs)
    if not call.differentiable:
        return list(outs)
    loss = sum(out.float().pow(2).sum() for out in outs if out.requires_grad)
    return [*outs, *torch.autograd.grad(loss, call.leaves(inputs))]  # type: ignore[arg-type]


class Module(nn.Module):
    """An op of one moving tensor, the others as buffers."""

    def __init__(self, call: OpCall, inputs: Mapping[str, Tensor], moving: tuple[str, ...]) -> None:
        super().__init__()
        self.call, self.moving = call, moving
        for n, t in inputs.items():
            if n not in moving:
                self.register_buffer(n, t)

    def forward(self, *moving: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.moving, moving, strict=True))
        return self.call.call({**dict(self.named_buffers()), **given})


# What is as long as the batch.
ROWS = {
    "x", "residual", "hidden", "labels", "a", "a_scale", "a_offset", "input_ids", "position_ids", "token_type_ids",
}  # fmt: skip


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@every_op
def test_export_with_a_dynamic_batch(name: str, strict: bool) -> None:
    """No size is specialized: the exported program serves another batch as the op does."""
    call, inputs = made(name, "torch", torch.device("cpu"))
    moving = tuple(n for n in inputs if n in ROWS)
    if not moving or "packed" in name:
        moving = tuple(list(inputs)[:1])
    module = Module(call, inputs, moving)
    given = tuple(inputs[n] for n in moving)
    batch = torch.export.Dim("batch", min=2)
    with dispatch.use_backend("torch"), torch.no_grad():
        dynamic: Any = {"moving": tuple({0: batch} for _ in given)}
        program = torch.export.export(module, given, dynamic_shapes=dynamic, strict=strict).module()
        for sizes in (given, tuple(torch.cat([t, t.flip(0)]) for t in given)):
            if "packed" in name and sizes is not given:
                continue  # offsets are of one length
            for out, right in zip(program(*sizes), module(*sizes), strict=True):
                if right.is_floating_point():
                    assert_equivalent(out, right)
                else:
                    assert torch.equal(out, right)


@every_backend
@every_op
def test_one_compiled_graph(name: str, backend: str, device: torch.device) -> None:
    call, inputs = made(name, backend, device)
    torch._dynamo.reset()
    with dispatch.use_backend(backend), torch.no_grad():
        compiled = torch.compile(
            lambda given: call.call(given), backend="eager", fullgraph=True, dynamic=True
        )
        for out, right in zip(compiled(inputs), call.call(inputs), strict=True):
            if right.is_floating_point():
                assert_equivalent(out, right)
            else:
                assert torch.equal(out, right)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_double_backward_is_right_or_refused(name: str, backend: str, device: torch.device) -> None:
    call, inputs = made(name, backend, device)
    inputs = {
        n: t.double() if n in call.differentiable and backend == "torch" else t for n, t in inputs.items()
    }
    if backend == "torch" and name.startswith("int8"):
        inputs = {n: t.float() if n in call.differentiable else t for n, t in inputs.items()}
    leaves = [t.detach().requires_grad_() for t in call.leaves(inputs)]
    with dispatch.use_backend(backend):
        loss = loss_of(call, inputs)(*leaves)
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        total = sum(g.pow(2).sum() for g in grads if g.requires_grad)
        # Without an activation Triton's backward is two products of PyTorch's.
        plain = backend == "torch" or name == "linear_activation-none"
        if plain and not name.startswith(("int8", "masked_lm")):
            found = torch.autograd.grad(total, leaves[0])[0]  # type: ignore[arg-type]
            with dispatch.use_backend("reference"):
                again = torch.autograd.grad(loss_of(call, inputs)(*leaves), leaves, create_graph=True)
                right = torch.autograd.grad(sum(g.pow(2).sum() for g in again), leaves[0])[0]  # type: ignore[arg-type]
            assert_equivalent(found.float(), right.float())
            return
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(total, leaves[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["residual_layernorm", "linear_activation", "bert_embeddings"])
def test_a_jit_trace_serves_other_inputs(name: str) -> None:
    call, inputs = made(name, "torch", torch.device("cpu"))
    first, *others = inputs
    rest = {n: inputs[n] for n in others}
    with dispatch.use_backend("torch"), torch.no_grad():
        traced = torch.jit.trace(lambda x: call.call({first: x, **rest}), (inputs[first],), check_trace=False)
        x = inputs[first].flip(0)
        for out, right in zip(traced(x), call.call({first: x, **rest}), strict=True):
            assert_equivalent(out, right)
