"""The feed-forward half of a BERT layer, with the LayerNorm before it: one autograd Function that saves little.

From LayerNorm's input on, a layer saves its sum, and the first product as it comes out of the matmul. The normalised
hidden states and the activation, five hidden sizes a token, are computed again in the backward: two kernels at the
speed of memory. Source of the method: recomputation, T. Chen et al., arXiv:1604.06174 (2016).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch
from pyaccel.ops import bias_gelu as bias_gelu_ops
from pyaccel.ops import linear, residual_layernorm
from pyaccel.ops._dropout import dropout_key

OP = "feed_forward"


class FeedForwardFunction(torch.autograd.Function):
    """Saves the sum before LayerNorm with its statistics, the first product, the parameters and the dropout key."""

    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor,
        ln_weight: Tensor,
        ln_bias: Tensor | None,
        x_bias: Tensor | None,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        key: Tensor | None,
        activation: str,
        eps: float,
        dropout_p: float,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        """Hidden states ``[rows, hidden]`` and output ``[rows, out_features]``, then what the backward wants."""
        hidden, total, _, _, mean, rstd = residual_layernorm.forward_op(
            x, residual, ln_weight, ln_bias, x_bias, key, eps, dropout_p, out_dtype,
            False, True, True, False, True,
        )  # fmt: skip
        inner = F.linear(hidden.to(weight1.dtype), weight1)
        out = F.linear(bias_gelu_ops.forward_op(inner, bias1, activation), weight2)
        return hidden, out, total, mean, rstd, inner

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, ln_weight, ln_bias, x_bias, weight1, bias1, weight2, key, *ctx.options = inputs
        hidden, _, *rest = output
        ctx.mark_non_differentiable(*rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rest, ln_weight, ln_bias, weight1, bias1, weight2, key)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, residual, ln_weight, ln_bias, x_bias))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dhidden, dout = grads[:2]
        total, mean, rstd, inner, ln_weight, ln_bias, weight1, bias1, weight2, key = ctx.saved_tensors
        activation, eps, dropout_p, out_dtype = ctx.options
        needed = ctx.needs_input_grad[:8]
        dweight1 = dbias1 = dweight2 = None
        if dout is not None:
            if needed[7]:
                dweight2 = dout.mT @ bias_gelu_ops.forward_op(inner, bias1, activation)
            dinner, dbias1 = bias_gelu_ops.backward_op(
                dout @ weight2, inner, bias1, activation, True, bias1 is not None and needed[6]
            )
            if needed[5]:
                # Of the rounded sum: as exact as the sum is, which is what a LayerNorm of its own would have saved.
                hidden, *_ = residual_layernorm.forward_op(
                    total, None, ln_weight, ln_bias, None, None, eps, 0.0, out_dtype,
                    False, True, False, False, False,
                )  # fmt: skip
                dweight1 = dinner.mT @ hidden.to(weight1.dtype)
            through = (dinner @ weight1).to(out_dtype)
            dhidden = through if dhidden is None else dhidden + through
        if dhidden is None:
            dhidden = total.new_zeros(()).expand_as(total)
        dx, dresidual, *column = (d if n else None for d, n in zip(ctx.dtypes, needed[:5], strict=True))
        same = key is None and dx is not None and dx == dresidual
        rows = residual_layernorm.backward_op(
            dhidden, None, total, mean, rstd, ln_weight, key, dropout_p,
            dx, None if same else dresidual, *column,
        )  # fmt: skip
        rows = (rows[0], rows[0] if same else rows[1], *rows[2:])
        found = (*rows, dweight1, dbias1, dweight2)
        return *(g if n else None for g, n in zip(found, needed, strict=True)), *(None,) * 5


def feed_forward(
    x: Tensor,
    residual: Tensor,
    ln_weight: Tensor,
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
    """``hidden = LayerNorm(dropout(x + x_bias) + residual)``, and ``activation(hidden @ weight1.T + bias1) @ weight2.T``.

    Both are what :func:`residual_layernorm`, :func:`linear_activation` and ``F.linear`` give one after the other; the
    second product leaves its bias to the next :func:`residual_layernorm` (``x_bias``). Where gradients are recorded and
    Triton serves the call, a token saves its sum and the first product alone, not the hidden states and activations.

    Args:
        x, residual: ``[..., hidden]``; ln_weight, ln_bias, x_bias ``[hidden]``, the latter two may be None.
        weight1: ``[inner, hidden]``; bias1 ``[inner]`` or None; weight2 ``[out_features, inner]``.
        activation: ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.
        eps, dropout_p, training: of the LayerNorm and the dropout before it.

    Returns:
        hidden ``[..., hidden]``, output ``[..., out_features]``.

    Raises:
        ValueError: naming every argument that makes no sense.
        pyaccel.dispatch.NotSupportedError: the backend asked for can't serve this call.
    """
    reasons = residual_layernorm.not_supported_reasons(
        x, residual, ln_weight, ln_bias, eps=eps, dropout_p=dropout_p, x_bias=x_bias
    )
    if activation not in bias_gelu_ops.ACTIVATIONS:
        reasons.append(f"unknown activation {activation!r}: expected one of {bias_gelu_ops.ACTIVATIONS}")
    for name, weight, features in (("weight1", weight1, x.shape[-1]), ("weight2", weight2, weight1.shape[0])):
        if weight.ndim != 2 or weight.shape[1] != features:
            reasons.append(f"{name} must be [out_features, {features}], got {tuple(weight.shape)}")
    if bias1 is not None and bias1.shape != weight1.shape[:1]:
        reasons.append(f"bias1 must be [{weight1.shape[0]}], got {tuple(bias1.shape)}")
    dispatch.invalid(OP, reasons)
    dropout_p = dropout_p if training else 0.0
    given = (x, residual, ln_weight, ln_bias, x_bias, weight1, bias1, weight2)
    if not _choose(given):
        hidden = residual_layernorm.residual_layernorm(
            x, residual, ln_weight, ln_bias, eps=eps, dropout_p=dropout_p, training=training, x_bias=x_bias
        )
        inner = linear.linear_activation(hidden, weight1, bias1, activation)
        return hidden, F.linear(inner, weight2)
    out_dtype = torch.promote_types(x.dtype, residual.dtype)
    if torch.is_autocast_enabled(x.device.type):
        out_dtype, dtype = torch.float32, torch.get_autocast_dtype(x.device.type)
        weight1, weight2 = weight1.to(dtype), weight2.to(dtype)
    key = dropout_key(x.device) if dropout_p > 0.0 else None
    with torch.autocast(x.device.type, enabled=False):
        hidden, out, *_ = FeedForwardFunction.apply(
            x.reshape(-1, x.shape[-1]), residual.reshape(-1, x.shape[-1]), ln_weight, ln_bias, x_bias,
            weight1, bias1, weight2, key, activation, eps, dropout_p, out_dtype,
        )  # fmt: skip
    return hidden.view(x.shape), out.view(*x.shape[:-1], weight2.shape[0])


def _choose(given: tuple[Tensor | None, ...]) -> bool:
    """Whether the Function serves a call; without gradients there is nothing to save, and the parts serve it."""
    tensors = [t for t in given if t is not None]
    triton = dispatch.triton_reasons(*tensors)
    if tensors[0].shape[-1] > residual_layernorm.MAX_ROW:
        triton.append(
            f"the kernels take rows of up to {residual_layernorm.MAX_ROW}, not {tensors[0].shape[-1]}"
        )
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        triton = []
        parts = True
    else:
        parts = False
    backends: dict[str, list[str]] = {"triton": triton, "torch": [], "reference": []}
    on_cpu = "torch" if tensors[0].is_cpu else None
    choice = dispatch.choose(OP, backends, on_cpu, "on the CPU: its parts, one after the other")
    return choice.backend == "triton" and not parts
