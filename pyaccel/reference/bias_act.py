"""Bias + activation, in plain torch: the definition. Erf GELU: D. Hendrycks, K. Gimpel, arXiv:1606.08415 (2016)."""

from __future__ import annotations

import torch
from torch import Tensor

from pyaccel.reference.activation import activation as apply_activation
from pyaccel.reference.int8 import quantize_per_token
from pyaccel.reference.layernorm import add_bias


def bias_gelu(
    x: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    quantize_output: bool = False,
    upcast: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """``activation(x + bias)`` over the last dimension.

    Args:
        x: ``[..., features]``, any floating dtype; bias: ``[features]`` in any other, or None.
        activation: a name that :func:`pyaccel.reference.activation` knows.
        quantize_output: int8 codes ``[..., features]`` and fp32 scales ``[...]`` of the result instead of the result.
        upcast: True computes in fp64 and returns that, the truth. False is what good plain PyTorch does in x's
            dtype: an add and an activation, each rounded; before int8 codes it is the add and activation in fp32.
    """
    x = x.to(
        torch.float64
        if upcast
        else torch.promote_types(x.dtype, torch.float32)
        if quantize_output
        else x.dtype
    )
    y = apply_activation(x if bias is None else add_bias(x, bias), activation)
    return quantize_per_token(y) if quantize_output else y
