"""Symmetric int8 quantization: the public functions.

Every backend gives the bits of :mod:`pyaccel.reference.int8`, which says what scale and codes are.
Nothing here records gradients: a rounded value has none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyaccel import dispatch
from pyaccel.ops import common
from pyaccel.ops.int8 import cpu as on_cpu
from pyaccel.ops.int8 import triton as on_gpu
from pyaccel.reference import int8 as reference

# The torch backend: on a CPU in blocks; elsewhere the definition is itself well-chosen plain PyTorch.


@torch.no_grad()
def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row by its own scale: dynamic quantization of activations.

    Args:
        x: ``[..., features]``, fp16, bf16, fp32 or fp64; any strides.

    Returns:
        int8 codes ``[..., features]`` and fp32 scales ``[...]``, so that ``codes * scale`` approximates
        ``x``. A row of zeros gives zeros and scale 1; one with NaN or inf gives a NaN or inf scale.

    Raises:
        ValueError: ``x`` has no dimension, or isn't floating point.
    """
    dispatch.invalid("quantize_per_token", not_supported_reasons("x", x))
    return _by_rows("quantize_per_token", x)


@torch.no_grad()
def quantize_per_token_with_offset(
    x: Tensor, *, factor: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each row around the middle of its range: ``codes * scale + offset`` approximates ``x``.

    With two fp32 numbers a row the codes stay symmetric and a row that isn't keeps up to a bit more; the offset's part
    of a matrix product is of rank 1 (``a_offset`` of :func:`pyaccel.ops.int8_matmul`).

    Args:
        x: ``[..., features]``, fp16, bf16, fp32 or fp64; any strides.
        factor: fp32 ``[features]``, by which x is multiplied first, in fp32 and in the same pass (SmoothQuant,
            arXiv:2211.10438), or None.

    Returns:
        int8 codes ``[..., features]``, fp32 scales ``[...]`` and fp32 offsets ``[...]``. A row of one value has codes
        0, scale 1 and that value as its offset; one with NaN or inf a NaN scale.

    Raises:
        ValueError: ``x`` has no dimension, or isn't floating point; ``factor`` doesn't fit it.
    """
    reasons = not_supported_reasons("x", x) + _factor_reasons(x, factor)
    dispatch.invalid("quantize_per_token_with_offset", reasons)
    backend = _choose("quantize_per_token_with_offset", on_gpu.rows_reasons(x, factor))
    if backend == "triton":
        return on_gpu.quantize_per_token_with_offset(x, factor)
    if backend == "torch" and _in_blocks(x):
        return on_cpu.quantize_per_token_with_offset(x, factor)
    return reference.quantize_per_token_with_offset(x, factor=factor)


@torch.no_grad()
def quantize_per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight ``[out_features, in_features]`` by one scale for each output channel.

    Returns:
        int8 codes ``[out_features, in_features]`` and fp32 scales ``[out_features]``.

    Raises:
        ValueError: ``weight`` isn't a floating-point matrix.
    """
    dispatch.invalid("quantize_per_channel", not_supported_reasons("weight", weight, dim=2))
    return _by_rows("quantize_per_channel", weight)


@torch.no_grad()
def quantize_per_tensor(
    x: Tensor, scale: Tensor | None = None, *, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize all of ``x`` by one scale: static quantization, with a scale that calibration found.

    Args:
        x: any shape, floating point.
        scale: fp32 scalar tensor on x's device, above 0; values beyond ``127 * scale`` are clamped. By
            default ``amax(|x|) / 127``.
        factor: fp32 ``[features]``, by which x is multiplied first, as of :func:`quantize_per_token_with_offset`.

    Returns:
        int8 codes of x's shape, and the scale, a copy of the given one.

    Raises:
        ValueError: ``x`` isn't floating point, ``scale`` isn't an fp32 scalar, or ``factor`` doesn't fit x.
    """
    reasons = not_supported_reasons("x", x, dim=x.dim()) + _factor_reasons(x, factor)
    if scale is not None and (scale.dtype != torch.float32 or scale.dim() or scale.device != x.device):
        got = f"{scale.dtype} {tuple(scale.shape)} on {scale.device}"
        reasons.append(f"scale must be an fp32 scalar tensor on {x.device}, got {got}")
    dispatch.invalid("quantize_per_tensor", reasons)
    if _choose("quantize_per_tensor", on_gpu.tensor_reasons(x, factor)) == "triton":
        if scale is None:
            scale = reference.tensor_scale(reference.scaled(x, factor))
        return on_gpu.quantize_per_tensor(x, scale, factor), scale.clone()
    return reference.quantize_per_tensor(x, scale, factor=factor)


def _by_rows(op: str, x: Tensor) -> tuple[Tensor, Tensor]:
    backend = _choose(op, on_gpu.rows_reasons(x))
    if backend == "triton":
        return on_gpu.quantize_per_token(x)
    if backend == "torch" and _in_blocks(x):
        return on_cpu.quantize_per_token(x)
    return reference.quantize_per_token(x)


def _choose(op: str, triton_reasons: list[str]) -> str:
    return dispatch.choose(op, {"triton": triton_reasons, "torch": [], "reference": []}).backend


def _in_blocks(x: Tensor) -> bool:
    return x.dtype != torch.float64 and common.on_host(x)


def _factor_reasons(x: Tensor, factor: Tensor | None) -> list[str]:
    if factor is None:
        return []
    if factor.dtype != torch.float32 or factor.shape != x.shape[-1:] or factor.device != x.device:
        got = f"{factor.dtype} {tuple(factor.shape)} on {factor.device}"
        return [f"factor must be float32 {tuple(x.shape[-1:])} on {x.device}, got {got}"]
    return []


def not_supported_reasons(name: str, x: Tensor, dim: int | None = None) -> list[str]:
    """Why ``x`` can't be quantized: it must be floating point, of ``dim`` dimensions, or of one at least."""
    reasons = []
    if not x.is_floating_point():
        reasons.append(f"{name} must be floating point, got {x.dtype}")
    if x.dim() == 0 if dim is None else x.dim() != dim:
        wanted = "[..., features]" if dim is None else f"of {dim} dimensions"
        reasons.append(f"{name} must be {wanted}, got {tuple(x.shape)}")
    return reasons
