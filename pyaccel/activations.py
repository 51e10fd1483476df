"""The activations that ops fuse, by name, and what PyTorch, oneDNN, transformers and config.json call them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """One activation; :func:`pyaccel.reference.activation` defines it.

    Attributes:
        module: makes PyTorch's module of it.
        in_place: applies it to a tensor, in that tensor's memory.
        gradient: the input's gradient from the output's and the input.
        hidden_acts: its names in a ``config.json``.
        classes: of modules that compute it, by full name, since transformers may not be installed.
        onednn: attribute and algorithm of the fused product; None where oneDNN has none.
    """

    module: Callable[[], nn.Module]
    in_place: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    hidden_acts: tuple[str, ...]
    classes: tuple[str, ...]
    onednn: tuple[str, str] | None = None


ACTIVATIONS = {
    "gelu": Activation(
        nn.GELU, _aten.gelu_, _aten.gelu_backward, ("gelu",), ("transformers.activations.GELUActivation",),
        ("gelu", "none"),
    ),
    "gelu_tanh": Activation(
        partial(nn.GELU, approximate="tanh"), partial(_aten.gelu_, approximate="tanh"),
        partial(_aten.gelu_backward, approximate="tanh"), ("gelu_new", "gelu_pytorch_tanh"),
        ("transformers.activations.GELUTanh", "transformers.activations.NewGELUActivation"), ("gelu", "tanh"),
    ),
    "relu": Activation(
        nn.ReLU, Tensor.relu_, lambda grad, pre: _aten.threshold_backward(grad, pre, 0), ("relu",),
        ("torch.nn.modules.activation.ReLU",),
        ("none", ""),  # oneDNN's is max(0, x), which makes 0 of NaN: applied to the product instead
    ),
    "silu": Activation(
        nn.SiLU, partial(F.silu, inplace=True), _aten.silu_backward, ("silu", "swish"),
        ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation"),
    ),
}  # fmt: skip
HIDDEN_ACTS = {name: each for each in ACTIVATIONS.values() for name in each.hidden_acts}
_CLASSES = {name: activation for activation, each in ACTIVATIONS.items() for name in each.classes}


def activation_name(function: Any) -> str | None:
    """The name under which ops fuse an activation module; None: apply it afterwards."""
    if type(function) is nn.GELU:
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    return _CLASSES.get(f"{type(function).__module__}.{type(function).__qualname__}")
