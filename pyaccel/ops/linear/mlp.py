"""A BERT layer from attention's output on: LayerNorm and the feed-forward network, as one autograd Function.

From LayerNorm's input on it saves two things a token, the sum that is normalized and the pre-activation. The normalized
hidden states and the activation, five hidden sizes a token, are made again in the backward, by two kernels at the speed
of memory. Source of the method: recomputation, arXiv:1604.06174.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch
from pyaccel.ops.bias_act.triton import forward_op as activation_forward
from pyaccel.ops.common import apply, autocast_dtype, differentiable_once, runs_directly
from pyaccel.ops.dropout import dropout_key
from pyaccel.ops.layernorm.api import choose_backend
from pyaccel.ops.layernorm.api import residual_layernorm as layernorm_function
from pyaccel.ops.layernorm.checks import not_supported_reasons, output_dtype
from pyaccel.ops.layernorm.triton import backward_once as layernorm_backward
from pyaccel.ops.layernorm.triton import forward_op as layernorm_forward
from pyaccel.ops.linear import api as linear
from pyaccel.ops.linear.triton import backward_once as activation_backward
from pyaccel.ops.linear.triton import forward_op as linear_activation_forward

_OTHERS = "pyaccel.use_backend('torch')"
activation_again = differentiable_once(activation_forward, "layernorm_mlp", _OTHERS)
layernorm_again = differentiable_once(layernorm_forward, "layernorm_mlp", _OTHERS)


class _Options(NamedTuple):
    """What is no tensor; ``fused_product``: bias and activation in the first product's epilogue."""

    activation: str
    eps: float
    dropout_p: float
    hidden_dtype: torch.dtype
    fused_product: bool


class FeedForwardFunction(torch.autograd.Function):
    """Saves the sum before LayerNorm with its statistics, the pre-activation, the parameters and the dropout key."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor,
        ln_weight: Tensor | None,
        ln_bias: Tensor | None,
        x_bias: Tensor | None,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        key: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, ...]:
        """Hidden states ``[rows, hidden]`` and output ``[rows, out_features]``; then what the backward wants."""
        activation, eps, dropout_p, hidden_dtype, fused_product = options
        layernorm: Any = layernorm_forward
        again: Any = activation_forward
        if runs_directly(x, residual, ln_weight, ln_bias, x_bias, weight1, bias1, weight2):  # asked for both
            layernorm, again = layernorm.function, again.function
        hidden, total, _, _, mean, rstd = layernorm(
            x, residual, ln_weight, ln_bias, x_bias, key, eps, dropout_p, hidden_dtype,
            False, True, True, False, True,
        )  # fmt: skip
        operand = hidden.to(weight1.dtype)
        if fused_product:
            inner, pre = linear_activation_forward(operand, weight1, bias1, activation, True)
        else:
            pre = F.linear(operand, weight1, bias1)
            inner = again(pre, None, activation)
        return hidden, F.linear(inner, weight2), total, pre, mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, ln_weight, ln_bias, x_bias, weight1, bias1, weight2, key, options = inputs
        _, _, total, pre, mean, rstd = output
        # Sum and pre-activation stay differentiable, although nobody has gradients for them: what backward makes of
        # them then is too, and a double backward finds the ops that refuse it.
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, pre, mean, rstd, ln_weight, ln_bias, weight1, weight2, key)
        ctx.options = options
        ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, ln_weight, ln_bias, x_bias)]
        ctx.bias1_dtype = None if bias1 is None else bias1.dtype

    @staticmethod
    def backward(ctx: Any, dhidden: Tensor | None, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        total, pre, mean, rstd, ln_weight, ln_bias, weight1, weight2, key = ctx.saved_tensors
        activation, eps, dropout_p, hidden_dtype, _ = ctx.options
        needed = ctx.needs_input_grad[:8]
        want_dweight1, want_dbias1, want_dweight2 = needed[5:]
        want_layernorm = True in needed[:5]
        dweight1 = dbias1 = dweight2 = None
        if dout is not None:
            if want_dweight2:
                dweight2 = dout.mT @ activation_again(pre, None, activation)
            if want_layernorm or want_dweight1 or want_dbias1:
                bias1_dtype = ctx.bias1_dtype if want_dbias1 else None
                dpre, dbias1 = activation_backward(dout @ weight2, pre, activation, True, bias1_dtype)
            if want_dweight1:
                # Of the rounded sum, and so what plain LayerNorm gives, whose input is that sum.
                hidden, *_ = layernorm_again(
                    total, None, ln_weight, ln_bias, None, None, eps, 0.0, hidden_dtype,
                    False, True, False, False, False,
                )  # fmt: skip
                dweight1 = dpre.mT @ hidden.to(weight1.dtype)
            if want_layernorm:
                dhidden = _add_product(dhidden, dpre, weight1)
        found: Any = [None] * 5
        if want_layernorm and dhidden is not None:
            dtypes = [d if n else None for d, n in zip(ctx.dtypes, needed[:5], strict=True)]
            found = layernorm_backward(dhidden, None, total, mean, rstd, ln_weight, key, dropout_p, *dtypes)
        gradients = (*found, dweight1, dbias1, dweight2)
        return *[g if n else None for g, n in zip(gradients, needed, strict=True)], None, None


def _add_product(total: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    """``total + x @ weight``, in the product's epilogue where the dtypes agree."""
    if total is None:
        return x @ weight
    if total.dtype == x.dtype:
        return torch.addmm(total, x, weight)
    return total + x @ weight


def layernorm_mlp(
    x: Tensor,
    residual: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    *,
    activation: str = "gelu",
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    training: bool = False,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``h = LayerNorm(dropout(x + x_bias) + residual)`` and ``activation(h @ weight1.T + bias1) @ weight2.T``.

    What :func:`residual_layernorm`, :func:`linear_activation` and ``F.linear`` give one after the other; the second
    product leaves its bias to the :func:`residual_layernorm` that follows (its ``x_bias``). Where gradients are
    recorded and Triton serves the parts, on a GPU or because it is asked to, this saves less for backward: a token's
    sum and pre-activation. Hidden states and activations are made again there.

    Args:
        x, residual: ``[..., hidden]``, as for :func:`residual_layernorm`.
        ln_weight, ln_bias, x_bias: ``[hidden]`` or None.
        weight1: ``[inner, hidden]``, in the dtype of h (any under autocast); bias1 ``[inner]`` or None.
        weight2: ``[out_features, inner]``, in the dtype of weight1.
        activation: ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.
        eps, dropout_p, training: of the LayerNorm and of the dropout before it.

    Returns:
        h ``[..., hidden]`` in the dtype that :func:`residual_layernorm` gives, and the output
        ``[..., out_features]`` in the dtype of weight1, or in autocast's.

    Raises:
        ValueError: naming every argument that makes no sense.
        pyaccel.errors.NotSupportedError: the backend asked for can't serve a part.
    """
    reasons = not_supported_reasons(
        x, residual, ln_weight, ln_bias, eps=eps, dropout_p=dropout_p, x_bias=x_bias
    )
    if not reasons:
        reasons = _product_reasons(x, residual, weight1, bias1, weight2, activation)
    dispatch.invalid("layernorm_mlp", reasons)
    dropout_p = dropout_p if training else 0.0
    given = (x, residual, ln_weight, ln_bias, x_bias, weight1, bias1, weight2)
    by = None
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if needs_gradient and weight1.shape[0] > 0 and choose_backend(False, *given[:5]).backend == "triton":
        by = linear.choose_way(x, weight1, bias1, activation)
    if by not in ("triton", "bias_gelu"):
        hidden = layernorm_function(
            x, residual, ln_weight, ln_bias, eps=eps, dropout_p=dropout_p, training=training, x_bias=x_bias
        )
        return hidden, F.linear(linear.linear_activation(hidden, weight1, bias1, activation), weight2)

    dtype = autocast_dtype(x.device)
    if dtype is not None:
        weight1, weight2 = weight1.to(dtype), weight2.to(dtype)
    if bias1 is not None:
        bias1 = bias1.to(weight1.dtype).contiguous()
    vectors = (None if t is None else t.contiguous() for t in (ln_weight, ln_bias, x_bias))
    hidden, out, *_ = apply(
        FeedForwardFunction,
        x.reshape(-1, x.shape[-1]), residual.reshape(-1, x.shape[-1]), *vectors, weight1, bias1, weight2,
        dropout_key(x.device) if dropout_p > 0.0 else None,
        _Options(activation, eps, dropout_p, output_dtype(x, residual), by == "triton"),
    )  # fmt: skip
    return hidden.view(x.shape), out.view(*x.shape[:-1], weight2.shape[0])


def _product_reasons(
    x: Tensor, residual: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, activation: str
) -> list[str]:
    """Why the two products of these arguments make no sense; empty if they do."""
    if activation is None:
        return ["activation must be named: without one the two products are one"]
    # The hidden states' shape and dtype, without their data.
    hidden = torch.empty((), dtype=output_dtype(x, residual), device=x.device).expand(x.shape)
    reasons = linear.not_supported_reasons(hidden, weight1, bias1, activation)
    if weight2.ndim != 2 or weight1.ndim != 2 or weight2.shape[1] != weight1.shape[0]:
        reasons.append(
            f"weight2 must be [out_features, inner] and weight1 [inner, hidden], got {tuple(weight2.shape)} and "
            f"{tuple(weight1.shape)}"
        )
    if weight2.device != x.device:
        reasons.append(f"weight2 is on {weight2.device} and x on {x.device}: move one of them")
    if weight2.dtype != weight1.dtype and autocast_dtype(x.device) is None:
        reasons.append(
            f"weight1 is {weight1.dtype} and weight2 {weight2.dtype}: cast one, or use torch.autocast"
        )
    return reasons
