"""Whether a call computes numbers now; private ops and raw memory are not for traces, transforms and modes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


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


class _OwnGradient(torch.autograd.Function):
    """The identity, whose gradient is a copy."""

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

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)


def own_gradient(x: Tensor, other: Tensor) -> Tensor:
    """x, to be added to ``other``: autograd gives both terms of a sum one gradient, and here x's is a copy.

    Accumulating into the gradient of one leaf in place would change the other's where views hide from autograd that the
    two share memory.
    """
    if torch.is_grad_enabled() and x.requires_grad and other.requires_grad and runs_now(x, other):
        out: Tensor = _OwnGradient.apply(x)
        return out
    return x
