"""The torch and the reference backend of residual_layernorm: stock PyTorch ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import reference
from pyaccel.ops import common
from pyaccel.ops.common import own_gradient, runs_now
from pyaccel.ops.dropout import dropout_key, keep_mask_on_host
from pyaccel.reference.layernorm import add_bias, normalize


def _drops_on_host(x: Tensor, residual: Tensor) -> bool:
    """Whether dropout and sum can be one pass, by a mask that takes less time than PyTorch's."""
    return x.dtype == residual.dtype and common.on_host(x) and runs_now(x, residual)


def torch_backend(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    x_bias: Tensor | None,
    rms_norm: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    total = x if x_bias is None else add_bias(x, x_bias)
    if residual is not None and 0.0 < dropout_p < 1.0 and _drops_on_host(total, residual):
        keep = keep_mask_on_host(total.shape, dropout_p).to(total.dtype)
        total = torch.addcmul(residual, total, keep, value=1.0 / (1.0 - dropout_p))
    else:
        if dropout_p > 0.0:
            total = F.dropout(total, dropout_p)
        if residual is not None:
            total = total + own_gradient(residual, total)
    return normalize(total, weight, bias, eps=eps, rms_norm=rms_norm, out_dtype=out_dtype), total


def reference_backend(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    x_bias: Tensor | None,
    rms_norm: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    result = reference.residual_layernorm(
        x,
        None if residual is None else own_gradient(residual, x),
        weight,
        bias,
        eps=eps,
        dropout_p=dropout_p,
        x_bias=x_bias,
        dropout_key=dropout_key(x.device) if dropout_p > 0.0 else None,
        rms_norm=rms_norm,
        upcast=False,
        out_dtype=out_dtype,
    )
    return result.output, result.sum
