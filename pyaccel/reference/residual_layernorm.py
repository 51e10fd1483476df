"""Bias + dropout + residual + LayerNorm, in plain torch: the definition.

Layer normalisation: J. Ba, J. Kiros, G. Hinton, arXiv:1607.06450 (2016). The post-norm and pre-norm
placements: R. Xiong et al., arXiv:2002.04745 (2020).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel.reference.philox import dropout


class ResidualLayerNormOutput(NamedTuple):
    """What the reference computes: output, sum, and the row statistics (fp64 truth, or fp32)."""

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
    upcast: bool = True,
    out_dtype: torch.dtype | None = None,
) -> ResidualLayerNormOutput:
    """``LayerNorm(dropout(x + x_bias) + residual) * weight + bias`` over the last dimension.

    Args:
        x, residual: ``[..., hidden]``, any floating dtypes.
        weight, bias, x_bias: ``[hidden]`` or None.
        dropout_key: int64 ``[2]``; needed where ``dropout_p > 0``. Rows are numbered over the flattened
            leading dimensions.
        upcast: True computes and returns fp64, the truth. False is what good plain PyTorch does in the
            dtypes given: an add, a dropout, an add and ``F.layer_norm``, each rounded to its own dtype.
        out_dtype: dtype of the output where ``upcast`` is False; that of the sum by default.
    """
    if upcast:
        x, out_dtype = x.double(), torch.float64
        residual, weight, bias, x_bias = (
            None if t is None else t.double() for t in (residual, weight, bias, x_bias)
        )
    hidden = x.shape[-1]
    branch = x if x_bias is None else x + x_bias.to(x.dtype)
    if dropout_p > 0.0:
        if dropout_key is None:
            raise ValueError("residual_layernorm: dropout_p > 0 needs a dropout_key to replay")
        branch = dropout(branch.reshape(-1, hidden), dropout_key, dropout_p).reshape(branch.shape)
    total = branch if residual is None else branch + residual
    # LayerNorm in fp32 for a 16-bit sum with fp32 parameters, as autocast runs it.
    wide = (
        total
        if weight is None or weight.dtype == total.dtype
        else total.to(torch.promote_types(total.dtype, weight.dtype))
    )
    weight = None if weight is None else weight.to(wide.dtype)
    bias = None if bias is None else bias.to(wide.dtype)
    output = F.layer_norm(wide, (hidden,), weight, bias, eps).to(out_dtype or total.dtype)
    stats = total.to(torch.float64 if upcast else torch.float32)
    variance, mean = torch.var_mean(stats, dim=-1, correction=0)
    return ResidualLayerNormOutput(output, total, mean, torch.rsqrt(variance + eps))
