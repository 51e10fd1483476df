"""Symmetric int8 quantisation in plain torch: the definition, bit for bit.

A group of values shares ``scale = amax / 127`` in fp32, and each becomes ``round_half_to_even(x / scale)``,
clamped to [-127, 127]; -128 is not used, so that negation is exact. The scheme is that of B. Jacob et al.,
arXiv:1712.05877 (2017), without zero points.

Everything is one fp32 division and one rounding a value, whatever the dtype of ``x``, so every backend must
give these very bits: there is no fp64 truth beside them and no ``upcast`` argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

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

    ``x - offset`` is quantised symmetrically, by its own scale: a row of one sign, such as an activation's output, or
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

    A group with NaN or inf in it has a NaN or inf scale, so what is dequantised from it is NaN and shows; NaN
    itself gets code 0, since converting it to an integer is undefined.
    """
    codes = (x.float() / scale).round_().clamp_(-INT8_MAX, INT8_MAX)
    return codes.nan_to_num_(nan=0.0).to(torch.int8)
