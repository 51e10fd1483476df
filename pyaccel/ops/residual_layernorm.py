"""Bias + dropout + residual + LayerNorm: the registered ops, their autograd Function and the public function.

Everything that stands between two matrix products of a post-norm (or pre-norm) Transformer layer, as one kernel
forward and one backward. Source: LayerNorm, arXiv:1607.06450; placements, arXiv:2002.04745.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch, reference
from pyaccel.ops._dropout import dropout_key, dropout_reasons

OP = "residual_layernorm"


# --- registered ops -------------------------------------------------------------------------------------------
# Functional, of fixed arity and without aliases: what isn't wanted comes back as a tensor of size 0.


@torch.library.custom_op("pyaccel::residual_layernorm_forward", mutates_args=())
def forward_op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    dropout_key: Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype,
    want_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output ``[rows, cols]``, sum ``[rows, cols]`` or size 0, mean and rstd ``[rows]`` fp32."""
    from pyaccel.kernels import config, residual_layernorm

    out, total, mean, rstd = _forward_outputs(x, residual, out_dtype, want_sum)
    residual_layernorm.forward(
        out,
        total if want_sum else None,
        mean,
        rstd,
        x,
        residual,
        weight,
        bias,
        x_bias,
        dropout_key,
        eps,
        dropout_p,
        config.residual_layernorm_forward(x.shape[1]),
    )
    return out, total, mean, rstd


def _forward_outputs(
    x: Tensor, residual: Tensor | None, out_dtype: torch.dtype, want_sum: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_rows, n_cols = x.shape
    return (
        x.new_empty(n_rows, n_cols, dtype=out_dtype),
        x.new_empty(n_rows if want_sum else 0, n_cols, dtype=_sum_dtype(x, residual)),
        x.new_empty(n_rows, dtype=torch.float32),
        x.new_empty(n_rows, dtype=torch.float32),
    )


@forward_op.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    dropout_key: Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype,
    want_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward_outputs(x, residual, out_dtype, want_sum)


@torch.library.custom_op("pyaccel::residual_layernorm_backward", mutates_args=())
def backward_op(
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dropout_key: Tensor | None,
    dropout_p: float,
    dx_dtype: torch.dtype | None,
    dresidual_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    dx_bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual ``[rows, cols]``, weight, bias, x_bias ``[cols]``; size 0 where the dtype is None."""
    from pyaccel.kernels import column_sum, config, residual_layernorm_backward
    from pyaccel.kernels.device import device_info

    dtypes = (dx_dtype, dresidual_dtype, dweight_dtype, dbias_dtype, dx_bias_dtype)
    grads = _backward_outputs(total, *dtypes)
    n_rows, n_cols = total.shape
    row_config = config.residual_layernorm_backward(n_cols)
    n_programs = config.persistent_programs(row_config, n_rows, device_info(total.device).num_sms)
    dx, dresidual, dweight, dbias, dx_bias = (
        grad if dtype is not None else None for grad, dtype in zip(grads, dtypes, strict=True)
    )
    dweight_partial, dbias_partial, dx_bias_partial = (
        None if grad is None else grad.new_empty(n_programs, n_cols, dtype=torch.float32)
        for grad in (dweight, dbias, dx_bias)
    )
    residual_layernorm_backward.backward(
        dx,
        dresidual,
        dweight_partial,
        dbias_partial,
        dx_bias_partial,
        dy,
        dsum,
        total,
        mean,
        rstd,
        weight,
        dropout_key,
        dropout_p,
        n_programs,
        row_config,
    )
    column_sum.column_sum(
        (dweight, dbias, dx_bias), (dweight_partial, dbias_partial, dx_bias_partial), config.column_sum()
    )
    return grads


def _backward_outputs(
    total: Tensor,
    dx_dtype: torch.dtype | None,
    dresidual_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    dx_bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_rows, n_cols = total.shape

    def matrix(dtype: torch.dtype | None) -> Tensor:
        return total.new_empty(0 if dtype is None else n_rows, n_cols, dtype=dtype)

    def vector(dtype: torch.dtype | None) -> Tensor:
        return total.new_empty(0 if dtype is None else n_cols, dtype=dtype)

    return (
        matrix(dx_dtype),
        matrix(dresidual_dtype),
        vector(dweight_dtype),
        vector(dbias_dtype),
        vector(dx_bias_dtype),
    )


@backward_op.register_fake
def _(
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dropout_key: Tensor | None,
    dropout_p: float,
    dx_dtype: torch.dtype | None,
    dresidual_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    dx_bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _backward_outputs(total, dx_dtype, dresidual_dtype, dweight_dtype, dbias_dtype, dx_bias_dtype)


# --- autograd -------------------------------------------------------------------------------------------------


class ResidualLayerNormFunction(torch.autograd.Function):
    """Saves the sum in its own dtype, mean and rstd in fp32, weight and dropout key: the mask is drawn again."""

    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        x_bias: Tensor | None,
        key: Tensor | None,
        eps: float,
        dropout_p: float,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output, sum, mean and rstd; the last two carry no gradient."""
        return forward_op(x, residual, weight, bias, x_bias, key, eps, dropout_p, out_dtype, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, weight, bias, x_bias, key, _, dropout_p, _ = inputs
        _, total, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, mean, rstd, weight, key)
        ctx.dropout_p = dropout_p
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, residual, weight, bias, x_bias))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dsum = grads[:2]
        total, mean, rstd, weight, key = ctx.saved_tensors
        if dy is None:
            dy = total.new_zeros(()).expand_as(total)
        needed = ctx.needs_input_grad[:5]
        dx, dresidual, *column = (d if n else None for d, n in zip(ctx.dtypes, needed, strict=True))
        # Without dropout the two gradients are one and the same, and one write of it is enough.
        same = key is None and dx is not None and dx == dresidual
        out = backward_op(
            dy, dsum, total, mean, rstd, weight, key, ctx.dropout_p, dx, None if same else dresidual, *column
        )
        wanted = [g if n else None for g, n in zip(out, needed, strict=True)]
        if same:
            wanted[1] = wanted[0]
        return *wanted, None, None, None, None


# --- the public function --------------------------------------------------------------------------------------


def not_supported_reasons(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    dropout_p: float,
    x_bias: Tensor | None,
) -> list[str]:
    """Every reason why these arguments make no sense, on any backend; empty if they do."""
    reasons = dropout_reasons(dropout_p)
    if not x.is_floating_point():
        reasons.append(f"x must be of a floating dtype, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        return [*reasons, f"x must be [..., hidden] with hidden at least 1, got {tuple(x.shape)}"]
    if residual is not None and residual.shape != x.shape:
        reasons.append(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    for name, vector in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if vector is not None and vector.shape != (x.shape[-1],):
            reasons.append(
                f"{name} must be [{x.shape[-1]}], the last dimension of x, got {tuple(vector.shape)}"
            )
    for name, tensor in (("residual", residual), ("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if tensor is not None and tensor.device != x.device:
            reasons.append(f"{name} is on {tensor.device} and x on {x.device}: move one of them")
    if not eps >= 0.0:
        reasons.append(f"eps must be at least 0, got {eps}")
    return reasons


@overload
def residual_layernorm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = ...,
    dropout_p: float = ...,
    training: bool = ...,
    x_bias: Tensor | None = ...,
    return_sum: Literal[False] = ...,
) -> Tensor: ...
@overload
def residual_layernorm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = ...,
    dropout_p: float = ...,
    training: bool = ...,
    x_bias: Tensor | None = ...,
    return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def residual_layernorm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = ...,
    dropout_p: float = ...,
    training: bool = ...,
    x_bias: Tensor | None = ...,
    return_sum: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def residual_layernorm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    training: bool = False,
    x_bias: Tensor | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``LayerNorm(dropout(x + x_bias) + residual) * weight + bias`` over the last dimension, in one pass.

    Args:
        x: ``[..., hidden]``, floating; any strides (leading dimensions that can't be viewed as one are copied).
        residual: of x's shape, in x's dtype or another, or None.
        weight, bias: ``[hidden]``, the affine parameters in any floating dtype, or None.
        eps: added to the variance; BERT's 1e-12 by default (not torch's 1e-5).
        dropout_p: probability of dropping an element of ``x + x_bias``; it counts only in training.
        training: whether dropout is active.
        x_bias: ``[hidden]``, the bias of the Linear that made x, if that Linear left it out.
        return_sum: also return ``dropout(x + x_bias) + residual``: the residual stream of a pre-norm layer.

    Returns:
        the output ``[..., hidden]``, or (output, sum). The sum has the promoted dtype of x and residual, the
        output that of the sum; under autocast the output is float32, as ``F.layer_norm``'s is. Statistics are
        computed in fp32 from the unrounded sum.

    Triton serves float32, float16 and bfloat16 and rows of up to 16384. The Triton and reference backends draw
    the same dropout mask (:func:`pyaccel.reference.philox.keep_mask`); the torch backend uses ``F.dropout``.

    Raises:
        ValueError: naming every argument that makes no sense.
        pyaccel.dispatch.NotSupportedError: the backend asked for can't serve this call.
    """
    dispatch.invalid(
        OP, not_supported_reasons(x, residual, weight, bias, eps=eps, dropout_p=dropout_p, x_bias=x_bias)
    )
    dropout_p = dropout_p if training else 0.0
    out_dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else _sum_dtype(x, residual)
    choice = _choose(x, residual, weight, bias, x_bias)
    if choice.backend == "torch":
        out, total = _torch_backend(x, residual, weight, bias, eps, dropout_p, x_bias, out_dtype)
        return (out, total) if return_sum else out
    key = dropout_key(x.device) if dropout_p > 0.0 else None
    if choice.backend == "reference":
        result = reference.residual_layernorm(
            x,
            residual,
            weight,
            bias,
            eps=eps,
            dropout_p=dropout_p,
            x_bias=x_bias,
            dropout_key=key,
            upcast=False,
            out_dtype=out_dtype,
        )
        return (result.output, result.sum) if return_sum else result.output
    hidden = x.shape[-1]
    rows = (x.reshape(-1, hidden), None if residual is None else residual.reshape(-1, hidden))
    vectors = tuple(None if t is None else t.contiguous() for t in (weight, bias, x_bias))
    given = [t for t in (*rows, *vectors) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        out, total, _, _ = ResidualLayerNormFunction.apply(*rows, *vectors, key, eps, dropout_p, out_dtype)
    else:
        out, total, _, _ = forward_op(*rows, *vectors, key, eps, dropout_p, out_dtype, return_sum)
    return (out.view(x.shape), total.view(x.shape)) if return_sum else out.view(x.shape)


def _sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _choose(x: Tensor, *others: Tensor | None) -> dispatch.Choice:
    triton = dispatch.triton_reasons(x, *others)
    if x.shape[-1] > 16384:
        triton.append(f"the kernels take rows of up to 16384, not {x.shape[-1]}")
    if x.device.type == "cpu":
        return dispatch.choose(OP, {"triton": triton, "torch": [], "reference": []}, "torch", "on the CPU")
    return dispatch.choose(OP, {"triton": triton, "torch": [], "reference": []})


def _torch_backend(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    x_bias: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    total = x if x_bias is None else x + x_bias.to(x.dtype)
    if dropout_p > 0.0:
        total = F.dropout(total, dropout_p)
    if residual is not None:
        total = total + residual
    # F.layer_norm wants one dtype; a 16-bit sum with fp32 parameters is normalised in fp32, as autocast does it.
    dtype = total.dtype
    for vector in (weight, bias):
        dtype = dtype if vector is None else torch.promote_types(dtype, vector.dtype)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    return F.layer_norm(total.to(dtype), (total.shape[-1],), weight, bias, eps).to(out_dtype), total
