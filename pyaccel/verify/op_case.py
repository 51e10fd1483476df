"""One op with one kind of input, and the layouts that gradients come in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Any]  # of tensors, to be spread over arguments of any type


@dataclass(frozen=True)
class OpCase:
    """One op with one kind of input.

    Attributes:
        op: its name.
        kind: of input, in words.
        inputs: makes the floating inputs, which get gradients, in fp32.
        call: the op on these inputs.
        expected: its definition on them; ``upcast`` as for the references.
        gradient: makes the gradient of an output like the one given.
        bits: whether every backend must give the bits of the reference, and there are no gradients.
    """

    op: str
    kind: str
    inputs: Callable[[], Tensors]
    call: Callable[..., Any]
    expected: Callable[..., Any]
    gradient: Callable[[Tensor], Tensor] = lambda out: torch.randn_like(out)
    bits: bool = False


def _stride_0(out: Tensor) -> Tensor:
    """What ``out.sum().backward()`` gives."""
    return torch.ones((), dtype=out.dtype, device=out.device).expand(out.shape)


def _sliced(out: Tensor) -> Tensor:
    """What a slice of a larger output gives: rows far apart and not aligned."""
    wide = torch.randn(*out.shape[:-1], out.shape[-1] + 3, dtype=out.dtype, device=out.device)
    return wide[..., 1 : 1 + out.shape[-1]]


def _transposed(out: Tensor) -> Tensor:
    return torch.randn_like(out.transpose(0, -1).contiguous()).transpose(0, -1)


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda out: torch.randn_like(out),
    ", stride-0 gradient": _stride_0,
    ", sliced gradient": _sliced,
    ", transposed gradient": _transposed,
}
