"""What every op's public function and backend share: autocast, rows, modes, gradients with memory of their own."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import CustomOpDef

_PLAIN = (Tensor, nn.Parameter)
_MODES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def on_host(x: Tensor) -> bool:
    """Whether a value of ``x`` may be read: it costs no device sync, and nothing records or transforms the call.

    False in a graph (``torch.compile``, ``torch.export``, ``torch.jit.trace``, ``make_fx``), which would keep what the
    value was; under a ``torch.func`` transform, and for fake tensors and other subclasses, which may hold no value.
    """
    return x.is_cpu and not torch.compiler.is_compiling() and type(x) in _PLAIN and not _recorded()


def _recorded() -> bool:
    if torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in _MODES)


def runs_now(*tensors: Tensor | None) -> bool:
    """Whether these tensors hold memory of their own and the call is neither traced nor transformed.

    False in a graph (``torch.compile``, ``torch.export``, ``torch.jit.trace``), under a function transform (``vmap``,
    ``torch.func.grad``), in a dispatch mode (``FakeTensorMode``, ``FlopCounterMode``) and for tensor subclasses.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return all(t is None or type(t) in _PLAIN for t in tensors)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast's products on ``device``; None where autocast is off or, as for meta, there is none.

    torch's own question is an error for a device that it doesn't know.
    """
    kind = device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A block in which ``device`` has no autocast."""
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def rows(x: Tensor) -> Tensor:
    """``[..., cols]`` as ``[rows, cols]``, without a copy where strides allow it; any size may be 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


class _OwnGradient(torch.autograd.Function):
    """The identity, whose gradient is a copy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """x."""
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()


def own_gradient(x: Tensor, other: Tensor) -> Tensor:
    """x, to be added to ``other``: autograd gives both terms of a sum one gradient, and here x's is a copy.

    Accumulating into the gradient of one leaf in place would change the other's where views hide from autograd that the
    two share memory.
    """
    if torch.is_grad_enabled() and x.requires_grad and other.requires_grad and runs_now(x, other):
        out: Tensor = _OwnGradient.apply(x)
        return out
    return x


def differentiable_once(op: Callable[..., Any], name: str, others: str) -> Callable[..., Any]:
    """``op``, a backward pass, whose own gradient is an error that says which backends have it.

    An autograd Function that ``torch.func`` can transform; ``custom_op.register_autograd`` makes one that it can't.
    """
    message = (
        f"pyaccel.ops.{name}: a double backward (the gradient of a gradient) was asked for, and only other backends "
        f"have one: {others}."
    )

    class Once(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError(message)

    def apply(*args: Any) -> Any:
        # AOTAutograd refuses a double backward itself, and TorchDynamo passes a ``forward`` of any arguments a context.
        return op(*args) if torch.compiler.is_compiling() else Once.apply(*args)

    return apply


def custom_op(name: str, outputs: Callable[..., Any]) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """``torch.library.custom_op`` of a function that mutates nothing, with its fake.

    Args:
        name: ``"pyaccel::..."``.
        outputs: makes the op's empty results of some of its arguments, which it names as the op does.
    """
    wanted = tuple(inspect.signature(outputs).parameters)

    def registered(function: Callable[..., Any]) -> CustomOpDef:
        names = tuple(inspect.signature(function).parameters)
        places = tuple(names.index(each) for each in wanted)
        op = torch.library.custom_op(name, function, mutates_args=())
        op.register_fake(lambda *args: outputs(*(args[place] for place in places)))
        return op

    return registered
