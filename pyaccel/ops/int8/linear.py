"""A linear layer that multiplies in int8 and trains: the autograd Function and the public function.

What is saved for the backward is what was multiplied: int8 codes and their scales, a quarter of fp32's bytes and half
of 16 bits'. The gradients are straight-through (arXiv:1308.3432): those of the product of the dequantized operands.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyaccel import activations, dispatch
from pyaccel.ops.common import autocast_dtype, differentiable_once, rows
from pyaccel.ops.int8.matmul import int8_matmul
from pyaccel.ops.int8.quantize import (
    quantize_per_channel,
    quantize_per_tensor,
    quantize_per_token,
    quantize_per_token_with_offset,
)
from pyaccel.ops.int8.weight_only import int8_weight_only_matmul
from pyaccel.ops.linear.api import ACTIVATIONS
from pyaccel.reference.int8 import INT8_MAX, dequantize

OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    int8_grad_input: bool = False,
) -> Tensor:
    """``activation(x @ weight^T + bias)`` with both operands quantized to int8, or the weight alone; differentiable.

    Args:
        x: ``[..., in_features]``, fp32, bf16 or fp16.
        weight: ``[out_features, in_features]``: floating point, quantized in every call by a scale for each output
            channel (training), or int8 codes with ``weight_scale`` (deployed): the same bits come out.
        bias: ``[out_features]``, floating point, or None.
        activation: None, ``"gelu"`` (erf, BERT's), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.
        weight_scale: fp32 ``[out_features]``, with an int8 weight only.
        input_scale: fp32 scalar: x is quantized by this one (static); by default each token by its own,
            around the middle of its range (dynamic).
        smooth_scale: fp32 ``[in_features]``, multiplies x in the pass that quantizes it (SmoothQuant,
            arXiv:2211.10438).
        weight_only: x is multiplied as it is (in autocast's dtype), see
            :func:`pyaccel.ops.int8_weight_only_matmul`: for few rows, where the weight's bytes are what takes time, and
            closer to the floating layer. Saved for the backward is x then, not codes.
        int8_grad_input: the gradient of x too is an int8 product: the incoming gradient quantized per token, the weight
            per input channel. Faster where int8 is, and biased by their rounding.

    Returns:
        ``[..., out_features]`` in x's dtype, or in autocast's.

    The gradients of x and weight are straight-through: as if rounding were the identity. With a static scale, x has
    none where its code is at the end of the range (-127 or 127), where it may have been clamped. Products of the
    backward are in the output's dtype (fp32 sums); the bias's gradient is summed in fp32. Saved for the backward are
    the int8 codes and scales of both operands, and of an activation the bias: its pre-activation is made again from
    them. Definition: :func:`pyaccel.reference.int8_linear`. There is no double backward.

    Raises:
        ValueError: naming every argument that makes no sense.
        pyaccel.errors.NotSupportedError: the backend asked for can't serve this call.
    """
    reasons = not_supported_reasons(x, weight, bias, activation, weight_scale, input_scale, smooth_scale)
    if weight_only and (input_scale is not None or smooth_scale is not None):
        reasons.append(
            "input_scale and smooth_scale go with a quantized input; weight_only leaves it as it is"
        )
    dispatch.invalid("int8_linear", reasons)
    out_dtype = autocast_dtype(x.device) or x.dtype
    arguments = (x, weight, bias, weight_scale, input_scale, smooth_scale, activation, out_dtype, weight_only)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return Int8LinearFunction.apply(*arguments, int8_grad_input)[0]
    return _forward(*arguments)[0]


def not_supported_reasons(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    weight_scale: Tensor | None,
    input_scale: Tensor | None,
    smooth_scale: Tensor | None,
) -> list[str]:
    """Every reason why these arguments make no sense, on any backend; empty if they do."""
    reasons = []
    if x.dtype not in OUT_DTYPES:
        reasons.append(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[-1]:
        got = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        return [*reasons, f"x must be [..., in_features] and weight [out_features, in_features], got {got}"]
    if weight.dtype == torch.int8:
        if weight_scale is None:
            reasons.append("an int8 weight needs its weight_scale")
    elif not weight.is_floating_point():
        reasons.append(f"weight must be floating point or int8, got {weight.dtype}")
    elif weight_scale is not None:
        reasons.append(f"weight_scale goes with an int8 weight, and this one is {weight.dtype}")
    shape = (weight.shape[0],)
    if weight_scale is not None and (
        weight_scale.dtype != torch.float32 or tuple(weight_scale.shape) != shape
    ):
        got = f"{weight_scale.dtype} {tuple(weight_scale.shape)}"
        reasons.append(f"weight_scale must be float32 {shape}, got {got}")
    if input_scale is not None and (input_scale.dtype != torch.float32 or input_scale.dim()):
        got = f"{input_scale.dtype} {tuple(input_scale.shape)}"
        reasons.append(f"input_scale must be a float32 scalar, got {got}")
    if smooth_scale is not None and (
        smooth_scale.dtype != torch.float32 or smooth_scale.shape != x.shape[-1:]
    ):
        got = f"{smooth_scale.dtype} {tuple(smooth_scale.shape)}"
        reasons.append(f"smooth_scale must be float32 {tuple(x.shape[-1:])}, got {got}")
    if bias is not None and (not bias.is_floating_point() or tuple(bias.shape) != shape):
        reasons.append(f"bias must be floating point {shape}, got {bias.dtype} {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        reasons.append(f"unknown activation {activation!r}: expected one of {ACTIVATIONS}")
    others = {
        "weight": weight,
        "bias": bias,
        "weight_scale": weight_scale,
        "input_scale": input_scale,
        "smooth_scale": smooth_scale,
    }
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            reasons.append(f"{name} is on {tensor.device} and x on {x.device}: move one of them")
    for name in ("weight_scale", "input_scale", "smooth_scale"):
        scale = others[name]
        if torch.is_grad_enabled() and scale is not None and scale.requires_grad:
            reasons.append(f"a gradient is wanted of {name}, and this op has none: detach() it")
    return reasons


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    input_scale: Tensor | None,
    smooth_scale: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    weight_only: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
    """The output; codes, scale and offset of x, those there are; codes and scale of the weight."""
    w_codes, w_scale = quantize_per_channel(weight) if weight_scale is None else (weight, weight_scale)
    if weight_only:
        out = int8_weight_only_matmul(x.to(out_dtype), w_codes, w_scale, bias, activation)
        return out, None, None, None, w_codes, w_scale
    codes: Tensor
    offset: Tensor | None = None
    if input_scale is None:
        codes, scale, offset = quantize_per_token_with_offset(x, factor=smooth_scale)
    else:
        codes, scale = quantize_per_tensor(x, input_scale, factor=smooth_scale)
    out = int8_matmul(codes, w_codes, scale, w_scale, bias, activation, out_dtype=out_dtype, a_offset=offset)
    return out, codes, scale, offset, w_codes, w_scale


class Int8LinearFunction(torch.autograd.Function):
    """Forward in int8; backward straight-through, from the codes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The output, and the codes and scales that made it."""
        out, codes, scale, offset, w_codes, w_scale = _forward(*inputs[:-1])
        _, weight, _, weight_scale, input_scale, *_ = inputs
        # No output of a Function may be one of its inputs: what was given comes back as a tensor of size 0.
        if input_scale is not None:
            scale = None
        if weight_scale is not None:
            w_codes, w_scale = weight.new_empty(0), weight_scale.new_empty(0)
        nothing = out.new_empty(0)
        codes, scale, offset = (nothing.clone() if t is None else t for t in (codes, scale, offset))
        return out, codes, scale, offset, w_codes, w_scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, weight_scale, input_scale, smooth_scale, *how = inputs
        activation, out_dtype, weight_only, int8_grad_input = how
        _, codes, scale, offset, w_codes, w_scale = output
        ctx.mark_non_differentiable(codes, scale, offset, w_codes, w_scale)
        ctx.set_materialize_grads(False)
        if weight_scale is not None:
            w_codes, w_scale = weight, weight_scale
        # Each only where a gradient reads it: the weight's reads the input, the input's the weight, and an activation
        # both.
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        needs_input = wants_weight or activation is not None or (wants_x and input_scale is not None)
        needs_weight = wants_x or activation is not None
        ctx.save_for_backward(
            (x if weight_only else codes) if needs_input else None,
            (scale if input_scale is None else input_scale) if needs_input and not weight_only else None,
            offset if needs_input and input_scale is None and not weight_only else None,
            w_codes if needs_weight else None,
            w_scale if needs_weight else None,
            bias if activation is not None else None,
            smooth_scale if wants_x else None,
        )
        ctx.overrides = dispatch.overrides()
        ctx.options = _Options(activation, out_dtype, weight_only, int8_grad_input, input_scale is not None)
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 10
        if grad is None:
            return nothing
        arguments = (grad, ctx.options, ctx.needs_input_grad[:3], ctx.dtypes, *ctx.saved_tensors)
        if torch.compiler.is_compiling():  # traced where the forward was, with the same requests
            found = _gradients(*arguments)
        else:
            # What was asked for in the forward is asked for here too: on a GPU, backward runs in another thread.
            with dispatch.use_overrides(ctx.overrides):
                found = _gradients(*arguments)
        return *(g if n else None for g, n in zip(found, ctx.needs_input_grad, strict=False)), *nothing[3:]


class _Options(NamedTuple):
    activation: str | None
    out_dtype: torch.dtype
    weight_only: bool
    int8_grad_input: bool
    static: bool


def _backward(
    grad: Tensor,
    options: _Options,
    needed: tuple[bool, bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    codes: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    smooth_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; size 0 for what isn't needed. With weight_only the codes are x itself."""
    wants_x, wants_weight, wants_bias = needed
    x_dtype, weight_dtype, bias_dtype = dtypes
    compute = grad.dtype
    if options.activation is not None:
        if options.weight_only:
            wide = codes.to(options.out_dtype).float()
            pre = int8_weight_only_matmul(wide, w_codes, w_scale, bias)
        else:
            assert scale is not None
            pre = int8_matmul(codes, w_codes, scale, w_scale, bias, a_offset=offset)
        grad = activations.ACTIVATIONS[options.activation].gradient(grad.float(), pre).to(compute)
    dx, dweight, dbias = (grad.new_empty(0) for _ in range(3))
    # Products of what the codes stand for: fp16 holds neither sums of codes nor small gradients times scales.
    if wants_x:
        if options.int8_grad_input:
            dx = _int8_grad_input(grad, w_codes, w_scale)
        else:
            dx = grad @ dequantize(w_codes, w_scale).to(compute)
        if options.static:
            dx = dx.masked_fill(codes.abs() == INT8_MAX, 0.0)
        if smooth_scale is not None:
            dx = dx.float() * smooth_scale
        dx = dx.to(x_dtype)
    by_row = rows(grad)
    if wants_weight:
        x = codes if scale is None else dequantize(codes, scale)
        if offset is not None:
            x = x + offset.unsqueeze(-1)
        dweight = (by_row.mT @ rows(x).to(compute)).to(weight_dtype)
    if wants_bias:
        dbias = by_row.sum(0, dtype=torch.float32).to(bias_dtype)
    return dx, dweight, dbias


_gradients = differentiable_once(
    _backward, "int8_linear", "pyaccel.reference.int8_linear, which is made of PyTorch's ops"
)


def _int8_grad_input(grad: Tensor, w_codes: Tensor, w_scale: Tensor) -> Tensor:
    """``grad @ weight`` in int8: the sum is over output channels, so the weight needs a scale for each input one."""
    back, back_scale = quantize_per_channel(dequantize(w_codes, w_scale).mT)
    codes, scale = quantize_per_token(grad)
    return int8_matmul(codes, back, scale, back_scale, out_dtype=grad.dtype)
