"""What the cases of ops share: a call's tensors, its answers with their gradients, and the variants each op has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyaccel import dispatch
from pyaccel.benchmarks.case import Variant, no_triton

MODES = ("forward", "forward+backward")
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """What a case's functions are called with.

    Attributes:
        leaves: floating tensors, whose gradients "forward+backward" computes too.
        mode: of :data:`MODES`, or what a case has beside.
        grad: the output's gradient; None of a loss.
        fixed: tensors of integers, given after the leaves.
    """

    leaves: Outputs
    mode: str
    grad: Tensor | None = None
    fixed: Outputs = ()

    def __post_init__(self) -> None:
        for leaf in self.leaves:
            leaf.requires_grad_(self.backward)

    @property
    def backward(self) -> bool:
        """Whether gradients are computed."""
        return self.mode == "forward+backward"

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.leaves[0].device

    def by(self, function: Callable[..., Any]) -> Outputs:
        """What the mode asks of a function: its outputs, or its output and the gradients of the leaves."""
        out = function(*self.leaves, *self.fixed)
        if self.backward:
            return (out, *torch.autograd.grad(out, self.leaves, self.grad))
        return out if isinstance(out, tuple) else (out,)

    def exactly_by(self, function: Callable[..., Any]) -> Outputs:
        """The same in fp64."""
        grad = None if self.grad is None else self.grad.double()
        return replace(self, leaves=tuple(t.detach().double() for t in self.leaves), grad=grad).by(function)


def normal(dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    """``draw(*shape, scale=1.0)``: normal numbers, the same in every run."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    return draw


def variants(
    op: str,
    ours: Callable[[Problem], Callable[..., Any]],
    plain: Callable[[Problem], Callable[..., Any]],
    outputs: Callable[[Any, Outputs], Outputs] = lambda p, given: given,
) -> tuple[Variant, ...]:
    """Our backends, and plain PyTorch in eager mode and compiled."""

    def backend(name: str) -> Callable[[Problem], Callable[[], Outputs]]:
        def prepare(p: Problem) -> Callable[[], Outputs]:
            function = ours(p)

            def call(*given: Tensor) -> Any:
                with dispatch.use_backend(name, ops=[op]):
                    return function(*given)

            return lambda: p.by(call)

        return prepare

    def compiled(p: Problem) -> Callable[[], Outputs]:
        function = torch.compile(plain(p), dynamic=False)
        return lambda: p.by(function)

    return (
        Variant("pyaccel triton", backend("triton"), lambda p: no_triton(p.device), outputs),
        Variant("pyaccel torch", backend("torch"), outputs=outputs),
        Variant("eager", lambda p: lambda: p.by(plain(p)), outputs=outputs),
        Variant("torch.compile", compiled, outputs=outputs),
    )
