"""The Triton backend of bias_gelu: its registered ops and their autograd Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyaccel.ops.common import custom_op, differentiable_once

OP = "bias_gelu"


def _forward_outputs(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("pyaccel::bias_gelu_forward", _forward_outputs)
def forward_op(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Output ``[rows, cols]`` in x's dtype."""
    from pyaccel.kernels.bias_act import config
    from pyaccel.kernels.bias_act import kernels as bias_gelu

    out = x.new_empty(x.shape)
    bias_gelu.forward(out, x, bias, activation, config.bias_gelu_forward(x.shape[1]))
    return out


def _quantize_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


@custom_op("pyaccel::bias_gelu_quantize", _quantize_outputs)
def quantize_op(x: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """int8 codes ``[rows, cols]`` and fp32 scales ``[rows]`` of the fp32 result."""
    from pyaccel.kernels.bias_act import config
    from pyaccel.kernels.bias_act import kernels as bias_gelu

    codes, scale = _quantize_outputs(x)
    bias_gelu.quantize(codes, scale, x, bias, activation, config.bias_gelu_quantize(x.shape[1]))
    return codes, scale


def _backward_outputs(
    x: Tensor, bias: Tensor | None, want_dx: bool, want_dbias: bool
) -> tuple[Tensor, Tensor]:
    n_rows, n_cols = x.shape
    dtype = x.dtype if bias is None else bias.dtype
    return (
        x.new_empty(n_rows if want_dx else 0, n_cols),
        x.new_empty(n_cols if want_dbias else 0, dtype=dtype),
    )


@custom_op("pyaccel::bias_gelu_backward", _backward_outputs)
def backward_op(
    dy: Tensor, x: Tensor, bias: Tensor | None, activation: str, want_dx: bool, want_dbias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x ``[rows, cols]`` and bias ``[cols]`` in their dtypes; size 0 where it isn't wanted."""
    from pyaccel.kernels.bias_act import config
    from pyaccel.kernels.bias_act import kernels as bias_gelu
    from pyaccel.kernels.common import configs
    from pyaccel.kernels.common import reduce as column_sum
    from pyaccel.kernels.common.device import device_info

    dx, dbias = _backward_outputs(x, bias, want_dx, want_dbias)
    n_rows, n_cols = x.shape
    row_config = config.bias_gelu_backward(n_cols)
    num_sms = device_info(x.device).num_sms
    n_programs = configs.programs_per_column(row_config, n_rows, n_cols, num_sms)
    partial = x.new_empty(n_programs, n_cols, dtype=torch.float32) if want_dbias else None
    bias_gelu.backward(dx if want_dx else None, partial, dy, x, bias, activation, n_programs, row_config)
    if want_dbias:
        column_sum.column_sum((dbias, None, None), (partial, None, None), configs.column_sum())
    return dx, dbias


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
