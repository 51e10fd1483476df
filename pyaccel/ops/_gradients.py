"""Gradients with memory of their own, and backward passes that have no gradient themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyaccel.ops._modes import runs_now


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
