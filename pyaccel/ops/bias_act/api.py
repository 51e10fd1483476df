"""Bias + activation: the registered ops, their autograd Function and the public function.

What stands between the two matrix products of a Transformer layer's feed-forward half. Source of the erf GELU, which is
BERT's: arXiv:1606.08415.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pyaccel import dispatch, reference, tuned
from pyaccel.ops._gradients import differentiable_once
from pyaccel.reference.residual_layernorm import add_bias

OP = "bias_gelu"
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
MAX_QUANTIZED_ROW = 16384  # the kernel for int8 codes holds whole rows


# --- registered ops -------------------------------------------------------------------------------------------
# Functional, of fixed arity and without aliases: what isn't wanted comes back as a tensor of size 0.


@torch.library.custom_op("pyaccel::bias_gelu_forward", mutates_args=())
def forward_op(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Output ``[rows, cols]`` in x's dtype."""
    from pyaccel.kernels import bias_gelu, config

    out = x.new_empty(x.shape)
    bias_gelu.forward(out, x, bias, activation, config.bias_gelu_forward(x.shape[1]))
    return out


@forward_op.register_fake
def _(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("pyaccel::bias_gelu_quantize", mutates_args=())
def quantize_op(x: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """int8 codes ``[rows, cols]`` and fp32 scales ``[rows]`` of the fp32 result."""
    from pyaccel.kernels import bias_gelu, config

    codes, scale = _quantize_outputs(x)
    bias_gelu.quantize(codes, scale, x, bias, activation, config.bias_gelu_quantize(x.shape[1]))
    return codes, scale


def _quantize_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


@quantize_op.register_fake
def _(x: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    return _quantize_outputs(x)


@torch.library.custom_op("pyaccel::bias_gelu_backward", mutates_args=())
def backward_op(
    dy: Tensor, x: Tensor, bias: Tensor | None, activation: str, want_dx: bool, want_dbias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x ``[rows, cols]`` and bias ``[cols]`` in their dtypes; size 0 where it isn't wanted."""
    from pyaccel.kernels import bias_gelu, column_sum, config
    from pyaccel.kernels.device import device_info

    dx, dbias = _backward_outputs(x, bias, want_dx, want_dbias)
    n_rows, n_cols = x.shape
    row_config = config.bias_gelu_backward(n_cols)
    num_sms = device_info(x.device).num_sms
    n_programs = config.programs_per_column(row_config, n_rows, n_cols, num_sms)
    partial = x.new_empty(n_programs, n_cols, dtype=torch.float32) if want_dbias else None
    bias_gelu.backward(dx if want_dx else None, partial, dy, x, bias, activation, n_programs, row_config)
    if want_dbias:
        column_sum.column_sum((dbias, None, None), (partial, None, None), config.column_sum())
    return dx, dbias


def _backward_outputs(
    x: Tensor, bias: Tensor | None, want_dx: bool, want_dbias: bool
) -> tuple[Tensor, Tensor]:
    n_rows, n_cols = x.shape
    dtype = x.dtype if bias is None else bias.dtype
    return (
        x.new_empty(n_rows if want_dx else 0, n_cols),
        x.new_empty(n_cols if want_dbias else 0, dtype=dtype),
    )


@backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, bias: Tensor | None, activation: str, want_dx: bool, want_dbias: bool
) -> tuple[Tensor, Tensor]:
    return _backward_outputs(x, bias, want_dx, want_dbias)


backward_once = differentiable_once(backward_op, OP, f"pyaccel.use_backend('torch', ops=['{OP}'])")


# --- autograd -------------------------------------------------------------------------------------------------


class BiasGeluFunction(torch.autograd.Function):
    """Saves x, the pre-activation without its bias, and bias: no intermediate result."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """The output."""
        return forward_op(x, bias, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, activation = inputs
        ctx.save_for_backward(x, bias)
        ctx.activation = activation

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        want_dx, want_dbias = ctx.needs_input_grad[:2]
        dx, dbias = backward_once(dy, x, bias, ctx.activation, want_dx, want_dbias)
        return dx if want_dx else None, dbias if want_dbias else None, None


# --- the public function --------------------------------------------------------------------------------------


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
        pyaccel.dispatch.NotSupportedError: the backend asked for can't serve this call.
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
        return BiasGeluFunction.apply(rows, bias, activation).view(x.shape)
    return forward_op(rows, bias, activation).view(x.shape)


def _choose(x: Tensor, bias: Tensor | None, quantize_output: bool) -> dispatch.Choice:
    triton = dispatch.triton_reasons(x, bias)
    if quantize_output and x.shape[-1] > MAX_QUANTIZED_ROW:
        triton.append(
            f"the kernel for int8 output takes rows of up to {MAX_QUANTIZED_ROW}, not {x.shape[-1]}"
        )
    if x.device.type == "cpu":
        return dispatch.choose(OP, {"triton": triton, "torch": [], "reference": []}, "torch", "on the CPU")
    size = (math.prod(x.shape[:-1]), x.shape[-1])
    measured = tuned.preferred(OP, x.device, x.dtype, size, ("triton", "torch"))
    return dispatch.choose(OP, {"triton": triton, "torch": [], "reference": []}, *measured)


def _torch_backend(
    x: Tensor, bias: Tensor | None, activation: str, quantize_output: bool
) -> Tensor | tuple[Tensor, Tensor]:
    if quantize_output:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    y = reference.activation(x if bias is None else add_bias(x, bias), activation)
    return reference.quantize_per_token(y) if quantize_output else y
