"""A linear layer in int8 with straight-through gradients, in plain torch: the definition.

The operands are quantised and dequantised again in the forward, and a rounded value has the gradient of what it was
made from (the straight-through estimator: Y. Bengio, N. Leonard, A. Courville, arXiv:1308.3432; for weights and
activations of int8 networks B. Jacob et al., arXiv:1712.05877). Autograd through this is what
:func:`pyaccel.ops.int8_linear` computes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel.reference.activation import activation as activate
from pyaccel.reference.quantize import (
    INT8_MAX,
    dequantize,
    quantize_per_channel,
    quantize_per_tensor,
    quantize_per_token_with_offset,
)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    weight_scale: Tensor | None = None,
    input_scale: Tensor | None = None,
    smooth_scale: Tensor | None = None,
    weight_only: bool = False,
    upcast: bool = True,
) -> Tensor:
    """``activation(fake_quantize(x) @ fake_quantize(weight)^T + bias)``.

    Args:
        x: ``[..., in_features]``, floating point.
        weight: ``[out_features, in_features]``, floating point, or int8 codes with ``weight_scale``.
        bias: ``[out_features]`` or None.
        activation: a name of :func:`pyaccel.reference.activation`, or None.
        weight_scale: fp32 ``[out_features]`` of int8 codes.
        input_scale: fp32 scalar: x is quantised by it (static), not by a scale for each token.
        smooth_scale: fp32 ``[in_features]``, multiplies x first, in fp32.
        weight_only: x is not quantised at all.
        upcast: True computes in fp64 and returns fp64; False in fp32, rounded to x's dtype at the end.
    """
    wide = torch.float64 if upcast else torch.float32
    if weight_scale is None:
        w = _straight_through(weight, dequantize(*quantize_per_channel(weight.detach())), wide)
    else:
        w = dequantize(weight, weight_scale).to(wide)
    dtype = x.dtype
    if smooth_scale is not None:
        x = x.to(wide if x.dtype == torch.float64 else torch.float32) * smooth_scale
    if weight_only:
        a = x.to(wide)
    elif input_scale is None:
        codes, scale, offset = quantize_per_token_with_offset(x.detach())
        a = _straight_through(x, dequantize(codes, scale).to(wide) + offset.unsqueeze(-1), wide)
    else:
        codes, _ = quantize_per_tensor(x.detach(), input_scale)
        # What is at the end of the range was clamped, or might have been: nothing flows there.
        a = _straight_through(
            x.masked_fill(codes.abs() == INT8_MAX, 0.0), dequantize(codes, input_scale), wide
        )
    out = activate(F.linear(a, w, None if bias is None else bias.to(wide)), activation)
    return out if upcast else out.to(dtype)


def _straight_through(x: Tensor, rounded: Tensor, wide: torch.dtype) -> Tensor:
    """The value of ``rounded`` with the gradient of ``x``."""
    x = x.to(wide)
    return rounded.to(wide) + (x - x.detach())
