"""Symmetric int8 quantization in plain torch, bit for bit, and products of what it gives: the definitions.

A group of values shares ``scale = amax / 127`` in fp32, and each becomes ``round_half_to_even(x / scale)``,
clamped to [-127, 127]; -128 is not used, so that negation is exact. The scheme is that of B. Jacob et al.,
arXiv:1712.05877 (2017), without zero points.

Everything is one fp32 division and one rounding a value, whatever the dtype of ``x``, so every backend must
give these very bits: there is no fp64 truth beside them and no ``upcast`` argument.

Products of int8 are accumulated exactly in int32 and have a floating-point epilogue:
``act((a @ b^T) * a_scale * b_scale + bias) + residual``; of floating activations and an int8 weight,
``act((x @ b^T) * b_scale + bias)``. In :func:`int8_linear` operands are quantized and dequantized in the forward, and a
rounded value has the gradient of what it was made from (the straight-through estimator: Y. Bengio, N. Leonard,
A. Courville, arXiv:1308.3432). Autograd through it is what :func:`pyaccel.ops.int8_linear` computes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel.reference.activation import activation as activate

INT8_MAX = 127


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for each row: int8 ``[..., features]`` and fp32 ``[...]`` of ``x [..., features]``."""
    scale = (
        scale_of(x.float().abs().amax(-1)) if x.shape[-1] else x.new_ones(x.shape[:-1], dtype=torch.float32)
    )
    return encode(x, scale.unsqueeze(-1)), scale


def quantize_per_token_with_offset(
    x: Tensor, *, factor: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row around the middle of its range: int8 ``[..., features]``, fp32 scales and offsets ``[...]``.

    ``x - offset`` is quantized symmetrically, by its own scale: a row of one sign, such as an activation's output, or
    with one outlier, keeps up to a bit more. ``offset = max(x) / 2 + min(x) / 2`` in fp32. ``factor``, fp32
    ``[features]``, multiplies x first, in fp32.
    """
    x = scaled(x, factor)
    if not x.shape[-1]:
        return *quantize_per_token(x), x.new_zeros(x.shape[:-1])
    # Adding 0 makes -0 to 0: which of the two a maximum returns is anybody's choice.
    offset = x.amax(-1) * 0.5 + x.amin(-1) * 0.5 + 0.0
    return *quantize_per_token(x - offset.unsqueeze(-1)), offset


def quantize_per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for each output channel: int8 ``[out, in]`` and fp32 ``[out]`` of ``weight [out, in]``."""
    return quantize_per_token(weight)


def quantize_per_tensor(
    x: Tensor, scale: Tensor | None = None, *, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One scale for all of ``x * factor``: the given (static) fp32 scalar, or amax / 127; the rest is clamped."""
    x = scaled(x, factor)
    scale = tensor_scale(x) if scale is None else scale.clone()  # a result is no input
    return encode(x, scale), scale


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    """``x * factor`` in fp32; a factor is fp32 ``[features]``."""
    return x.float() if factor is None else x.float() * factor


def tensor_scale(x: Tensor) -> Tensor:
    """The fp32 scale of all of ``x``: amax / 127."""
    return scale_of(x.float().abs().amax() if x.numel() else x.new_zeros((), dtype=torch.float32))


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """``q * scale`` in fp32; a scale for each row is fp32 of ``q.shape[:-1]``, one for all a scalar."""
    return q.float() * (scale.unsqueeze(-1) if scale.dim() else scale)


def scale_of(amax: Tensor) -> Tensor:
    """``amax / 127``, and 1 where that is 0, so that dividing by it is always defined: zeros give zeros."""
    scale = amax / INT8_MAX
    return torch.where(scale == 0, 1.0, scale)


def encode(x: Tensor, scale: Tensor) -> Tensor:
    """int8 codes of ``x`` for a broadcastable ``scale``.

    A group with NaN or inf in it has a NaN or inf scale, so what is dequantized from it is NaN and shows; NaN
    itself gets code 0, since converting it to an integer is undefined.
    """
    codes = (x.float() / scale).round_().clamp_(-INT8_MAX, INT8_MAX)
    return codes.nan_to_num_(nan=0.0).to(torch.int8)


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
    """Product of quantized activations and a quantized weight.

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
            quantized per token from the epilogue's own result, before any cast.
        a_offset: fp32, of ``a``'s leading shape: ``a * a_scale + a_offset`` is what was quantized.
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
    """Product of floating activations and a quantized weight.

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
        input_scale: fp32 scalar: x is quantized by it (static), not by a scale for each token.
        smooth_scale: fp32 ``[in_features]``, multiplies x first, in fp32.
        weight_only: x is not quantized at all.
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
