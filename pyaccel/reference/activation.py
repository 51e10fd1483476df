"""The activations of BERT-family feed-forward layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def activation(x: Tensor, name: str | None) -> Tensor:
    """Apply None, ``"gelu"`` (erf; arXiv:1606.08415), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``."""
    if name is None:
        return x
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "relu":
        return F.relu(x)
    if name == "silu":
        return F.silu(x)
    raise ValueError(f"unknown activation {name!r}: expected None, gelu, gelu_tanh, relu or silu")
