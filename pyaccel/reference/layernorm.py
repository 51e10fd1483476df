"""Bias + dropout + residual + LayerNorm, in plain torch: the definition.

Layer normalization: J. Ba, J. Kiros, G. Hinton, arXiv:1607.06450 (2016); by the root mean square alone: B. Zhang,
R. Sennrich, arXiv:1910.07467 (2019). The post-norm and pre-norm placements: R. Xiong et al., arXiv:2002.04745 (2020).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel.reference.philox import dropout


class ResidualLayerNormOutput(NamedTuple):
    """What the reference computes: output, sum, and the row statistics (fp64 truth, or fp32; RMSNorm's mean is 0)."""

    output: Tensor
    sum: Tensor
    mean: Tensor
    rstd: Tensor


def residual_layernorm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    x_bias: Tensor | None = None,
    dropout_key: Tensor | None = None,
    rms_norm: bool = False,
    upcast: bool = True,
    out_dtype: torch.dtype | None = None,
) -> ResidualLayerNormOutput:
    """``LayerNorm(dropout(x + x_bias) + residual) * weight + bias`` over the last dimension.

    An int8 output is :func:`pyaccel.reference.quantize_per_token` of the output with ``out_dtype`` fp32.

    Args:
        x, residual: ``[..., hidden]``, any floating dtypes.
        weight, bias, x_bias: ``[hidden]`` or None.
        dropout_key: int64 ``[2]``; needed where ``dropout_p > 0``. Rows are numbered over the flattened
            leading dimensions.
        rms_norm: divide by the root mean square, without taking off the mean.
        upcast: True computes and returns fp64, the truth. False is what good plain PyTorch does in the
            dtypes given: an add, a dropout, an add and ``F.layer_norm``, each rounded to its own dtype.
        out_dtype: dtype of the output where ``upcast`` is False; that of the sum by default.
    """
    if upcast:
        x, out_dtype = x.double(), torch.float64
        residual, weight, bias, x_bias = (
            None if t is None else t.double() for t in (residual, weight, bias, x_bias)
        )
    branch = x if x_bias is None else add_bias(x, x_bias)
    if dropout_p > 0.0:
        if dropout_key is None:
            raise ValueError("residual_layernorm: dropout_p > 0 needs a dropout_key to replay")
        branch = dropout(branch.reshape(-1, x.shape[-1]), dropout_key, dropout_p).reshape(branch.shape)
    total = branch if residual is None else branch + residual
    if total is x:
        total = x.clone()  # a result is no input
    output = normalize(total, weight, bias, eps=eps, rms_norm=rms_norm, out_dtype=out_dtype or total.dtype)
    stats = total.to(torch.float64 if upcast else torch.float32)
    variance, mean = torch.var_mean(stats, dim=-1, correction=0)
    if rms_norm:
        variance, mean = stats.square().mean(-1), torch.zeros_like(mean)
    return ResidualLayerNormOutput(output, total, mean, torch.rsqrt(variance + eps))


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """``x + bias`` in x's dtype. A row alone gets a dimension: added to its like, both would get one gradient."""
    return x + bias.to(x.dtype) if x.dim() > 1 else (x[None] + bias.to(x.dtype))[0]


def normalize(
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    rms_norm: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """torch's own norm of the sum, in the widest dtype there is: fp32 for a 16-bit sum with fp32 parameters, as
    autocast runs it.

    In fp32 too where a CPU's 16-bit kernel is no measure: it adds up the rows of the parameters' gradients in 16 bits,
    and keeps fp16 statistics in fp16, which doesn't hold 1 / sqrt(1e-12).
    """
    dtype = torch.promote_types(total.dtype, out_dtype)
    for vector in (weight, bias):
        dtype = dtype if vector is None else torch.promote_types(dtype, vector.dtype)
    if total.is_cpu and dtype.itemsize == 2 and (dtype == torch.float16 or _trained(weight, bias)):
        dtype = torch.float32
    total = total.to(dtype)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    if not rms_norm:
        return F.layer_norm(total, total.shape[-1:], weight, bias, eps).to(out_dtype)
    out = F.rms_norm(total, total.shape[-1:], weight, eps)
    return (out if bias is None else out + bias).to(out_dtype)


def _trained(*parameters: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters)
