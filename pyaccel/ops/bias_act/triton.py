"""The Triton backend of bias_gelu: its registered ops and their autograd Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyaccel.ops.common import custom_op, differentiable_once, kernels

OP = "bias_gelu"


def _forward_outputs(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("pyaccel::bias_gelu_forward", _forward_outputs)
def forward_op(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Output ``[rows, cols]`` in x's dtype."""
    out = x.new_empty(*x.shape)
    config = kernels("bias_act.config").bias_gelu_forward(x.shape[1])
    kernels("bias_act.kernels").forward(out, x, bias, activation, config)
    return out


def _quantize_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


@custom_op("pyaccel::bias_gelu_quantize", _quantize_outputs)
def quantize_op(x: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """int8 codes ``[rows, cols]`` and fp32 scales ``[rows]`` of the fp32 result."""
    codes, scale = _quantize_outputs(x)
    config = kernels("bias_act.config").bias_gelu_quantize(x.shape[1])
    kernels("bias_act.kernels").quantize(codes, scale, x, bias, activation, config)
    return codes, scale


def _backward_outputs(
    x: Tensor, bias: Tensor | None, want_dx: bool, want_dbias: bool
) -> tuple[Tensor | None, Tensor | None]:
    dtype = x.dtype if bias is None else bias.dtype
    return (
        x.new_empty(x.shape) if want_dx else None,
        x.new_empty(x.shape[1], dtype=dtype) if want_dbias else None,
    )


@custom_op("pyaccel::bias_gelu_backward", _backward_outputs)
def backward_op(
    dy: Tensor, x: Tensor, bias: Tensor | None, activation: str, want_dx: bool, want_dbias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x ``[rows, cols]`` and bias ``[cols]`` in their dtypes, of those that are wanted."""
    grads = _backward_outputs(x, bias, want_dx, want_dbias)
    launch_backward(*grads, dy, x, bias, activation)
    return grads


def launch_backward(
    dx: Tensor | None, dbias: Tensor | None, dy: Tensor, x: Tensor, bias: Tensor | None, activation: str
) -> None:
    """Write the gradients that aren't None, of x ``[rows, cols]`` and of a bias ``[cols]``."""
    configs = kernels("common.configs")
    n_rows, n_cols = x.shape
    config = kernels("bias_act.config").bias_gelu_backward(n_cols)
    num_sms = kernels("common.device").device_info(x.device).num_sms
    n_programs = configs.programs_per_column(config, n_rows, n_cols, num_sms)
    partial = None if dbias is None else x.new_empty(n_programs, n_cols, dtype=torch.float32)
    kernels("bias_act.kernels").backward(dx, partial, dy, x, bias, activation, n_programs, config)
    if dbias is not None:
        sums = (dbias, None, None), (partial, None, None)
        kernels("common.reduce").column_sum(*sums, configs.column_sum())


backward_once = differentiable_once(backward_op, OP, f"pyaccel.use_backend('torch', ops=['{OP}'])")


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
