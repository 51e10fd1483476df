"""The Triton backend of linear_activation: its registered ops, their autograd Function, and what calls them.

Arguments are checked by :mod:`pyaccel.ops.linear.api`, which calls this. The forward product is the kernel's; the two
of the backward pass are PyTorch's (cuBLAS), behind one pass that applies the activation's derivative and sums the bias
gradient.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyaccel import tuning
from pyaccel.ops.bias_act.triton import launch_backward
from pyaccel.ops.common import apply, autocast_dtype, custom_op, differentiable_once, empty

# --- registered ops -------------------------------------------------------------------------------------------
# Functional, of fixed arity and without aliases: what isn't wanted comes back as a tensor of size 0.


def forward_flops(x: Tensor, weight: Tensor) -> int:
    """Of the product of ``[..., in_features]`` and ``[out_features, in_features]``."""
    return 2 * x.numel() * weight.shape[0]


def _forward_outputs(x: Tensor, weight: Tensor, want_pre: bool) -> tuple[Tensor, Tensor]:
    n_out = weight.shape[0]
    return x.new_empty(x.shape[0], n_out), x.new_empty(x.shape[0] if want_pre else 0, n_out)


@custom_op("pyaccel::linear_activation_forward", _forward_outputs)
def forward_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, want_pre: bool
) -> tuple[Tensor, Tensor]:
    """Output and pre-activation, bias included, ``[rows, out]`` in x's dtype.

    Shapes: x ``[rows, in]``, weight ``[out, in]``, bias ``[out]``.
    """
    from pyaccel.kernels.common.device import device_info
    from pyaccel.kernels.linear import config as linear_activation_config
    from pyaccel.kernels.linear import kernels as linear_activation

    out, pre = _forward_outputs(x, weight, want_pre)
    (n_rows, n_out), n_in = out.shape, x.shape[1]
    config = linear_activation_config.linear_activation(
        n_rows, n_out, n_in, x.itemsize, device_info(x.device).arch
    )
    # PyTorch's own flag for products of fp32 on CUDA.
    allow_tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    call = partial(
        linear_activation.forward,
        out,
        pre if want_pre else None,
        x,
        weight,
        bias,
        activation,
        allow_tf32=allow_tf32,
    )
    tuning.run("linear_activation", x, (n_rows, n_out, n_in), config, call, exactly=False)
    return out, pre


def _backward_outputs(
    pre: Tensor, want_dpre: bool, bias_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    return (
        pre.new_empty(*pre.shape) if want_dpre else None,
        None if bias_dtype is None else empty(pre, bias_dtype, pre.shape[1]),
    )


@custom_op("pyaccel::linear_activation_backward", _backward_outputs)
def backward_op(
    dout: Tensor, pre: Tensor, activation: str, want_dpre: bool, bias_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the pre-activation ``[rows, out]`` in its dtype and of the bias ``[out]`` in ``bias_dtype``,
    of those that are wanted."""
    grads = _backward_outputs(pre, want_dpre, bias_dtype)
    if pre.shape[1]:
        launch_backward(*grads, dout, pre, None, activation)
    return grads


backward_once = differentiable_once(
    backward_op, "linear_activation", "pyaccel.use_backend('torch', ops=['linear_activation'])"
)


# --- autograd -------------------------------------------------------------------------------------------------


class LinearActivationFunction(torch.autograd.Function):
    """Saves x, weight and the rounded pre-activation, each only where a gradient needs it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
    ) -> tuple[Tensor, Tensor]:
        """Output and pre-activation. The latter is for backward alone."""
        return forward_op(x, weight, bias, activation, activation is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, activation = inputs
        want_dx, want_dweight = ctx.needs_input_grad[:2]
        # The pre-activation stays differentiable, although nobody has a gradient for it: what backward makes of it
        # then is too, and a double backward finds the op that refuses it.
        ctx.save_for_backward(
            x if want_dweight else None,
            weight if want_dx else None,
            None if activation is None else output[1],
        )
        ctx.set_materialize_grads(False)
        ctx.activation = activation
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return None, None, None, None
        x, weight, pre = ctx.saved_tensors
        want_dx, want_dweight, want_dbias = ctx.needs_input_grad[:3]
        bias_dtype = ctx.bias_dtype if want_dbias else None
        if pre is None:
            dpre = dout
            dbias = dout.sum(0, dtype=torch.float32).to(bias_dtype) if want_dbias else None
        else:
            dpre, dbias = backward_once(dout, pre, ctx.activation, want_dx or want_dweight, bias_dtype)
        return (
            dpre @ weight if want_dx else None,
            dpre.mT @ x if want_dweight else None,
            dbias if want_dbias else None,
            None,
        )


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """As :func:`pyaccel.ops.linear_activation`, by the kernel: ``[..., in]`` -> ``[..., out]``."""
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    bias = None if bias is None else bias.contiguous()
    needs_gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (rows, weight, bias)
    )
    if needs_gradient:
        out, _ = apply(LinearActivationFunction, rows, weight, bias, activation)
    else:
        out, _ = forward_op(rows, weight, bias, activation, False)
    return out.view(*x.shape[:-1], weight.shape[0])
