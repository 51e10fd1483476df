"""What residual_layernorm can't serve, and the dtype of what it gives."""

from __future__ import annotations

import torch
from torch import Tensor

from pyaccel.ops.common import autocast_dtype
from pyaccel.ops.dropout import dropout_reasons

OP = "residual_layernorm"


def not_supported_reasons(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    dropout_p: float,
    x_bias: Tensor | None,
) -> list[str]:
    """Every reason why these arguments make no sense, on any backend; empty if they do."""
    reasons = dropout_reasons(dropout_p)
    if not x.is_floating_point():
        reasons.append(f"x must be of a floating dtype, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        return [*reasons, f"x must be [..., hidden] with hidden at least 1, got {tuple(x.shape)}"]
    if residual is not None and residual.shape != x.shape:
        reasons.append(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    for name, vector in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if vector is not None and vector.shape != (x.shape[-1],):
            reasons.append(
                f"{name} must be [{x.shape[-1]}], the last dimension of x, got {tuple(vector.shape)}"
            )
    for name, tensor in (("residual", residual), ("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if tensor is not None and tensor.device != x.device:
            reasons.append(f"{name} is on {tensor.device} and x on {x.device}: move one of them")
    if not eps >= 0.0:
        reasons.append(f"eps must be at least 0, got {eps}")
    return reasons


def output_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """The output's: the sum's, and float32 under autocast, as ``F.layer_norm``'s is."""
    return sum_dtype(x, residual) if autocast_dtype(x.device) is None else torch.float32


def sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    if residual is None or residual.dtype is x.dtype:
        return x.dtype
    return torch.promote_types(x.dtype, residual.dtype)
