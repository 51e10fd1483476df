"""Linear layers with what follows them: bias and activation, or bias, residual and LayerNorm.

On a CPU the matrix product runs in oneDNN, which takes bias, erf GELU and residual into its epilogue and, on
plain row-major weights, is 2.0 to 2.4 times as fast as ``F.linear`` in fp32 and 1.0 to 1.2 times in bf16 (384
hidden, 128 to 2048 tokens, two cores with AVX-512). A weight reordered beforehand gains another 2 to 20 % there, and
20 to 57 % at 25 tokens, but it is a copy that goes stale when the weight changes: none is kept unless it was asked
for (:func:`prepacked`, for ``accelerate(model, prepack=True)``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import activations, dispatch, triton_support
from pyaccel.ops.bias_act.api import bias_gelu
from pyaccel.ops.common import autocast_dtype
from pyaccel.ops.layernorm.api import residual_layernorm
from pyaccel.ops.layernorm.checks import not_supported_reasons as layernorm_reasons
from pyaccel.ops.linear import onednn
from pyaccel.ops.linear import triton as triton_backend

ACTIVATIONS = (None, *activations.ACTIVATIONS)


def _linear_reasons(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    reasons = []
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[-1]:
        reasons.append(
            f"x must be [..., in_features] and weight [out_features, in_features], "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    elif bias is not None and bias.shape != weight.shape[:1]:
        reasons.append(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    if x.device != weight.device or (bias is not None and bias.device != weight.device):
        devices = {t.device for t in (x, weight, bias) if t is not None}
        reasons.append(f"the tensors are on {', '.join(sorted(map(str, devices)))}: move them to one device")
    return reasons


def _dtype_reasons(x: Tensor, weight: Tensor) -> list[str]:
    if x.dtype != weight.dtype and autocast_dtype(x.device) is None:
        return [f"x is {x.dtype} and weight {weight.dtype}: cast one of them, or use torch.autocast"]
    return []


def not_supported_reasons(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> list[str]:
    """Every reason why these arguments of :func:`linear_activation` make no sense; empty if they do."""
    reasons = _linear_reasons(x, weight, bias) + _dtype_reasons(x, weight)
    if activation not in ACTIVATIONS:
        reasons.append(f"unknown activation {activation!r}: expected one of {ACTIVATIONS}")
    return reasons


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """``activation(x @ weight.T + bias)``.

    Args:
        x: ``[..., in_features]``, floating, of any strides.
        weight: ``[out_features, in_features]``, in x's dtype (any under autocast), of any strides.
        bias: ``[out_features]``, in x's dtype or another floating one, or None.
        activation: None, ``"gelu"`` (erf, BERT's; arXiv:1606.08415), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.

    Returns:
        ``[..., out_features]`` in x's dtype, or in autocast's.

    Triton serves float32, float16 and bfloat16, with bias and activation in the product's epilogue: it sums in fp32,
    rounds once, and in training writes the pre-activation too, at which backward takes the derivative, saving nothing
    else beside x and weight. It isn't chosen by itself until a measurement of this machine says so
    (:mod:`pyaccel.tuning`). The torch backend is oneDNN's fused product on a CPU in evaluation; on a GPU ``F.linear``
    and one pass of :func:`bias_gelu`, where Triton serves that; ``F.linear`` and the activation elsewhere.

    Raises:
        ValueError: naming every argument that makes no sense.
        pyaccel.errors.NotSupportedError: the backend asked for can't serve this call.
    """
    dispatch.invalid("linear_activation", not_supported_reasons(x, weight, bias, activation))
    by = choose_way(x, weight, bias, activation)
    if by == "triton":
        return triton_backend.linear_activation(x, weight, bias, activation)
    if by == "onednn":
        return onednn.by_onednn(x, weight, bias, activation)
    if by == "bias_gelu":
        return bias_gelu(F.linear(x, weight), bias, activation or "")
    if bias is not None and bias.dtype != x.dtype and autocast_dtype(x.device) is None:
        bias = bias.to(x.dtype)
    return onednn.by_torch(x, weight, bias, activation)


def choose_way(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> str:
    """How :func:`linear_activation` serves a call: "triton"; of the torch backend "onednn", "bias_gelu" (after
    F.linear, by its kernel) or "eager", which is the reference's way too."""
    declined = onednn.not_supported_reasons(x, weight, bias)
    if activation not in onednn.ACTIVATIONS:
        declined.append(f"oneDNN has no fused {activation}")
    measured, row = onednn.measured(x, weight)
    if measured == "eager" and not declined:
        declined.append(row)
    by_bias_gelu = activation is not None and _bias_gelu_serves(x, weight, bias)
    why = row if measured in dispatch.BACKENDS else _why_torch(x, declined, by_bias_gelu=by_bias_gelu)
    choice = dispatch.choose(
        "linear_activation",
        {"triton": triton_support.unsupported_reasons(x, weight, bias), "torch": [], "reference": []},
        "triton" if measured == "triton" else "torch",
        f"{why} ({row})" if measured == "onednn" and not declined else why,
    )
    if choice.backend != "torch":
        return "triton" if choice.backend == "triton" else "eager"
    if not declined:
        return "onednn"
    return "bias_gelu" if by_bias_gelu else "eager"


def _why_torch(x: Tensor, declined: list[str], *, by_bias_gelu: bool) -> str:
    if not declined:
        return "oneDNN, bias and activation fused"
    if not onednn.on_gpu(x) or torch.compiler.is_compiling():
        return "F.linear, then the activation: " + "; ".join(declined)
    then = "bias and activation in one pass" if by_bias_gelu else "the activation"
    return f"F.linear, then {then}: the fused product is not measured on this card yet"


def _bias_gelu_serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether on this GPU Triton makes bias and activation one pass, forward and backward."""
    return (
        onednn.on_gpu(x)
        and weight.shape[0] > 0
        and dispatch.requested("bias_gelu") in ("auto", "triton")
        and not triton_support.unsupported_reasons(x, weight, bias)
    )


def linear_residual_layernorm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """``LayerNorm(dropout(x @ weight.T + bias) + residual)``: either half of a BERT layer's end.

    The matrix product leaves its bias to :func:`residual_layernorm`, whose arguments and dtypes apply; on a CPU
    in evaluation, oneDNN adds bias and residual in the product's epilogue instead.

    Args:
        x: ``[..., in_features]``; weight ``[hidden, in_features]``; bias ``[hidden]`` or None.
        residual: ``[..., hidden]``; ln_weight, ln_bias ``[hidden]`` or None.

    Returns:
        ``[..., hidden]``.

    Raises:
        ValueError: naming every argument that makes no sense.
    """
    reasons = _linear_reasons(x, weight, bias)
    if not reasons and residual.shape != (*x.shape[:-1], weight.shape[0]):
        reasons.append(
            f"residual must be {(*x.shape[:-1], weight.shape[0])}, the product's shape, got {tuple(residual.shape)}"
        )
    if not reasons:  # residual stands for the product, which has its shape
        reasons = _dtype_reasons(x, weight) + layernorm_reasons(
            residual, None, ln_weight, ln_bias, eps=eps, dropout_p=dropout_p, x_bias=bias
        )
    dispatch.invalid("linear_residual_layernorm", reasons)
    dropout_p = dropout_p if training else 0.0
    fused = (
        dropout_p == 0.0
        and dispatch.requested("residual_layernorm") in ("auto", "torch")
        and not onednn.not_supported_reasons(x, weight, bias, residual, ln_weight, ln_bias)
    )
    if fused:
        by, row = onednn.measured(x, weight)
        how = f"the product in F.linear, {row}" if by == "eager" else "oneDNN adds bias and residual"
        dispatch.choose("residual_layernorm", {"torch": []}, "torch", f"on the CPU; {how}")
        total = onednn.evaluate_with_residual(x, residual, weight, bias)
        return F.layer_norm(total, (total.shape[-1],), ln_weight, ln_bias, eps)
    return residual_layernorm(
        F.linear(x, weight),
        residual,
        ln_weight,
        ln_bias,
        eps=eps,
        dropout_p=dropout_p,
        training=training,
        x_bias=bias,
    )
