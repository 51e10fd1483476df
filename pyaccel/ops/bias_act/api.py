"""Bias + activation.

What stands between the two matrix products of a Transformer layer's feed-forward half. Source of the erf GELU, which is
BERT's: arXiv:1606.08415.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from pyaccel import activations, dispatch, reference, triton_support, tuning
from pyaccel.kernels.common.limits import MAX_ROW
from pyaccel.ops.bias_act.triton import OP, BiasGeluFunction, forward_op, quantize_op
from pyaccel.ops.common import apply
from pyaccel.reference.layernorm import add_bias

ACTIVATIONS = tuple(activations.ACTIVATIONS)


def not_supported_reasons(
    x: Tensor, bias: Tensor | None, activation: str, *, quantize_output: bool
) -> list[str]:
    """Every reason why these arguments make no sense, on any backend; empty if they do."""
    reasons = []
    if not x.is_floating_point():
        reasons.append(f"x must be of a floating dtype, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        reasons.append(f"x must be [..., features] with features at least 1, got {tuple(x.shape)}")
    elif bias is not None and bias.shape != x.shape[-1:]:
        reasons.append(f"bias must be [{x.shape[-1]}], the last dimension of x, got {tuple(bias.shape)}")
    if bias is not None:
        if not bias.is_floating_point():
            reasons.append(f"bias must be of a floating dtype, got {bias.dtype}")
        if bias.device != x.device:
            reasons.append(f"bias is on {bias.device} and x on {x.device}: move one of them")
    if activation not in ACTIVATIONS:
        reasons.append(f"unknown activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    if quantize_output and _needs_gradient(x, bias):
        reasons.append(
            "quantize_output=True is for inference: int8 codes have no gradient, and x or bias requires one. Call it "
            "under torch.no_grad(), or leave quantize_output=False"
        )
    return reasons


def _needs_gradient(x: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


@overload
def bias_gelu(
    x: Tensor,
    bias: Tensor | None = ...,
    activation: str = ...,
    *,
    quantize_output: Literal[False] = ...,
) -> Tensor: ...


@overload
def bias_gelu(
    x: Tensor,
    bias: Tensor | None = ...,
    activation: str = ...,
    *,
    quantize_output: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def bias_gelu(
    x: Tensor,
    bias: Tensor | None = ...,
    activation: str = ...,
    *,
    quantize_output: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def bias_gelu(
    x: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    quantize_output: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``activation(x + bias)`` in one pass, forward and backward, saving x and bias alone.

    Args:
        x: ``[..., features]``, floating: a matrix product without its bias. Any strides (leading dimensions that
            can't be viewed as one are copied).
        bias: ``[features]`` in any floating dtype, such as autocast's fp32 beside a 16-bit x, or None.
        activation: ``"gelu"`` (erf, BERT's; arXiv:1606.08415), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.
        quantize_output: return int8 codes and their scales, for an int8 matrix product to follow. Inference only.

    Returns:
        ``[..., features]`` in x's dtype, under autocast too; or int8 codes ``[..., features]`` and fp32 scales
        ``[...]``, the bits that :func:`pyaccel.ops.quantize_per_token` gives of the result in fp32.

    Triton serves float32, float16 and bfloat16, and rows of up to 16384 with ``quantize_output``; it computes in fp32
    and rounds once. The torch backend adds in x's dtype, as ``F.linear`` does with its bias. The gradients have the
    dtypes of x and bias; the bias's is summed in fp32, in an order that two runs share.

    Raises:
        ValueError: naming every argument that makes no sense; ``quantize_output`` where a gradient is needed.
        pyaccel.errors.NotSupportedError: the backend asked for can't serve this call.
    """
    dispatch.invalid(OP, not_supported_reasons(x, bias, activation, quantize_output=quantize_output))
    backend = _choose(x, bias, quantize_output).backend
    if backend == "reference":
        return reference.bias_gelu(x, bias, activation, quantize_output=quantize_output, upcast=False)
    if backend == "torch":
        return _torch_backend(x, bias, activation, quantize_output)
    rows = x.reshape(-1, x.shape[-1])
    bias = None if bias is None else bias.contiguous()
    if quantize_output:
        codes, scale = quantize_op(rows, bias, activation)
        return codes.view(x.shape), scale.view(x.shape[:-1])
    if _needs_gradient(rows, bias):
        return apply(BiasGeluFunction, rows, bias, activation).view(x.shape)
    return forward_op(rows, bias, activation).view(x.shape)


def _choose(x: Tensor, bias: Tensor | None, quantize_output: bool) -> dispatch.Choice:
    triton = triton_support.unsupported_reasons(x, bias)
    if quantize_output and x.shape[-1] > MAX_ROW:
        triton.append(f"the kernel for int8 output takes rows of up to {MAX_ROW}, not {x.shape[-1]}")
    if x.device.type == "cpu":
        return dispatch.choose(OP, {"triton": triton, "torch": [], "reference": []}, "torch", "on the CPU")
    size = (math.prod(x.shape[:-1]), x.shape[-1])
    measured = tuning.preferred(OP, x.device, x.dtype, size, ("triton", "torch"))
    return dispatch.choose(OP, {"triton": triton, "torch": [], "reference": []}, *measured)


def _torch_backend(
    x: Tensor, bias: Tensor | None, activation: str, quantize_output: bool
) -> Tensor | tuple[Tensor, Tensor]:
    if quantize_output:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    y = reference.activation(x if bias is None else add_bias(x, bias), activation)
    return reference.quantize_per_token(y) if quantize_output else y
