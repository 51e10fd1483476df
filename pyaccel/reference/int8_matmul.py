"""int8 matrix products with a floating-point epilogue, in plain torch: the definitions.

``act((a @ b^T) * a_scale * b_scale + bias) + residual``, the product accumulated exactly in int32; and, of floating
activations and an int8 weight, ``act((x @ b^T) * b_scale + bias)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyaccel.reference.activation import activation as activate
from pyaccel.reference.quantize import quantize_per_token


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    quantize_output: bool = False,
    *,
    a_offset: Tensor | None = None,
    upcast: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Product of quantised activations and a quantised weight.

    Args:
        a: int8 ``[..., in_features]``.
        b: int8 ``[out_features, in_features]``, as ``nn.Linear`` keeps its weight.
        a_scale: fp32, of ``a``'s leading shape (per token) or a scalar (per tensor).
        b_scale: fp32 ``[out_features]`` (per channel) or a scalar.
        bias: ``[out_features]``, any floating dtype.
        activation: a name of :func:`pyaccel.reference.activation`, or None.
        residual: ``[..., out_features]``, any floating dtype; added after the activation.
        out_dtype: dtype of the result where ``upcast`` is False.
        quantize_output: return int8 ``[..., out_features]`` and fp32 scales of the leading shape instead,
            quantised per token from the epilogue's own result, before any cast.
        a_offset: fp32, of ``a``'s leading shape: ``a * a_scale + a_offset`` is what was quantised.
        upcast: True does the epilogue in fp64 and returns fp64, the truth; False does it in fp32.
    """
    wide = torch.float64 if upcast else torch.float32
    out = accumulate(a, b).to(wide)
    out = out * (a_scale.unsqueeze(-1) if a_scale.dim() else a_scale).to(wide)
    if a_offset is not None:
        out = out + a_offset.unsqueeze(-1).to(wide) * b.sum(1, dtype=torch.int32).to(wide)
    out = out * b_scale.to(wide)
    if bias is not None:
        out = out + bias.to(wide)
    out = activate(out, activation)
    if residual is not None:
        out = out + residual.to(wide)
    if quantize_output:
        return quantize_per_token(out)
    return out if upcast else out.to(out_dtype)


def int8_weight_only_matmul(
    x: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    upcast: bool = True,
) -> Tensor:
    """Product of floating activations and a quantised weight.

    Args:
        x: ``[..., in_features]``, floating.
        b: int8 ``[out_features, in_features]``.
        b_scale: fp32 ``[out_features]``.
        bias: ``[out_features]``, any floating dtype.
        activation: a name of :func:`pyaccel.reference.activation`, or None.
        upcast: True computes in fp64 and returns fp64, the truth; False in fp32, rounded to x's dtype at the end.
    """
    wide = torch.float64 if upcast else torch.float32
    out = (x.to(wide) @ b.to(wide).T) * b_scale.to(wide)
    if bias is not None:
        out = out + bias.to(wide)
    out = activate(out, activation)
    return out if upcast else out.to(x.dtype)


def accumulate(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b^T`` in int32, exact: ``[..., in_features]`` and ``[out_features, in_features]``.

    Through fp64, which holds every integer below 2**53: PyTorch multiplies integer matrices on no GPU, and
    slowly on CPUs.
    """
    return (a.double() @ b.double().T).to(torch.int32)
