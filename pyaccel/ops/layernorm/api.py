"""Bias + dropout + residual + LayerNorm or RMSNorm: the registered ops, their autograd Function and the function.

Everything that stands between two matrix products of a post-norm (or pre-norm) Transformer layer, as one kernel
forward and one backward. Source: LayerNorm, arXiv:1607.06450; RMSNorm, arXiv:1910.07467; placements, arXiv:2002.04745.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch, reference, tuned
from pyaccel.ops._autocast import autocast_dtype
from pyaccel.ops._gradients import differentiable_once, own_gradient
from pyaccel.ops._modes import runs_now
from pyaccel.ops.dropout import dropout_key, dropout_reasons, keep_mask_on_host
from pyaccel.reference.residual_layernorm import add_bias, normalise

OP = "residual_layernorm"
MAX_ROW = 16384
MAX_CODES_ROW = 8192  # a longer row and its codes don't fit in registers together


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
    rms_norm: bool,
    want_out: bool,
    want_sum: bool,
    want_codes: bool,
    want_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output and sum ``[rows, cols]``, int8 codes of the output and their scales ``[rows]`` fp32, mean (not of RMSNorm)
    and rstd ``[rows]`` fp32, for the backward."""
    from pyaccel.kernels import config, residual_layernorm

    outputs = _forward_outputs(
        x, residual, out_dtype, rms_norm, want_out, want_sum, want_codes, want_statistics
    )
    out, total, codes, codes_scale, mean, rstd = outputs
    call = partial(
        residual_layernorm.forward,
        out if want_out else None,
        total if want_sum else None,
        codes if want_codes else None,
        codes_scale if want_codes else None,
        mean if want_statistics and not rms_norm else None,
        rstd if want_statistics else None,
        x,
        residual,
        weight,
        bias,
        x_bias,
        dropout_key,
        eps,
        dropout_p,
        rms_norm,
    )
    default = config.residual_layernorm_forward(x.shape[1])
    tuned.run("residual_layernorm_forward", x, (x.shape[1],), default, call, exactly=True)
    return outputs


def _forward_outputs(
    x: Tensor,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    rms_norm: bool,
    want_out: bool,
    want_sum: bool,
    want_codes: bool,
    want_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_rows, n_cols = x.shape
    return (
        x.new_empty(n_rows if want_out else 0, n_cols, dtype=out_dtype),
        x.new_empty(n_rows if want_sum else 0, n_cols, dtype=_sum_dtype(x, residual)),
        x.new_empty(n_rows if want_codes else 0, n_cols, dtype=torch.int8),
        x.new_empty(n_rows if want_codes else 0, dtype=torch.float32),
        x.new_empty(n_rows if want_statistics and not rms_norm else 0, dtype=torch.float32),
        x.new_empty(n_rows if want_statistics else 0, dtype=torch.float32),
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
    rms_norm: bool,
    want_out: bool,
    want_sum: bool,
    want_codes: bool,
    want_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _forward_outputs(x, residual, out_dtype, rms_norm, want_out, want_sum, want_codes, want_statistics)


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
    """Gradients of x, residual ``[rows, cols]``, weight, bias, x_bias ``[cols]``; size 0 where the dtype is None.

    RMSNorm has a mean of size 0.
    """
    from pyaccel.kernels import column_sum, config, residual_layernorm_backward
    from pyaccel.kernels.device import device_info

    dtypes = (dx_dtype, dresidual_dtype, dweight_dtype, dbias_dtype, dx_bias_dtype)
    grads = _backward_outputs(total, *dtypes)
    n_rows, n_cols = total.shape
    dx, dresidual, dweight, dbias, dx_bias = (
        grad if dtype is not None else None for grad, dtype in zip(grads, dtypes, strict=True)
    )

    def call(row_config: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        n_programs = config.persistent_programs(row_config, n_rows, device_info(total.device).num_sms)
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
            mean if mean.numel() else None,
            rstd,
            weight,
            dropout_key,
            dropout_p,
            n_programs,
            row_config,
        )
        return dweight_partial, dbias_partial, dx_bias_partial

    default = config.residual_layernorm_backward(n_cols)
    partials = tuned.run("residual_layernorm_backward", total, (n_cols,), default, call, exactly=True)
    column_sum.column_sum((dweight, dbias, dx_bias), partials, config.column_sum())
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


backward_once = differentiable_once(backward_op, OP, f"pyaccel.use_backend('torch', ops=['{OP}'])")


# --- autograd -------------------------------------------------------------------------------------------------


class ResidualLayerNormFunction(torch.autograd.Function):
    """Saves the sum in its own dtype, mean and rstd in fp32, weight and dropout key: the mask is drawn again."""

    generate_vmap_rule = True

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
        rms_norm: bool,
        want_codes: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What :func:`forward_op` gives; only output and sum carry gradients."""
        return forward_op(
            x,
            residual,
            weight,
            bias,
            x_bias,
            key,
            eps,
            dropout_p,
            out_dtype,
            rms_norm,
            True,
            True,
            want_codes,
            True,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, weight, bias, x_bias, key, _, dropout_p, *_ = inputs
        _, total, *others = output
        ctx.mark_non_differentiable(*others)
        mean, rstd = others[-2:]
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
        # Two writes even where both gradients are equal: whoever accumulates into one must not change the other.
        out = backward_once(dy, dsum, total, mean, rstd, weight, key, ctx.dropout_p, dx, dresidual, *column)
        return *(g if n else None for g, n in zip(out, needed, strict=True)), *(None,) * 6


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
    rms_norm: bool = ...,
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
    rms_norm: bool = ...,
    return_output: bool = ...,
    return_sum: bool = ...,
    quantize_output: bool = ...,
) -> Any: ...
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
    rms_norm: bool = False,
    return_output: bool = True,
    return_sum: bool = False,
    quantize_output: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """``LayerNorm(dropout(x + x_bias) + residual) * weight + bias`` over the last dimension, in one pass.

    Args:
        x: ``[..., hidden]``, floating; any strides (leading dimensions that can't be viewed as one are copied).
        residual: of x's shape, in x's dtype or another, or None.
        weight, bias: ``[hidden]``, the affine parameters in any floating dtype, or None.
        eps: added to the variance; BERT's 1e-12 by default (not torch's 1e-5).
        dropout_p: probability of dropping an element of ``x + x_bias``; it counts only in training.
        training: whether dropout is active.
        x_bias: ``[hidden]``, the bias of the Linear that made x, if that Linear left it out.
        rms_norm: divide by the root mean square, without taking off the mean: RMSNorm.
        return_sum: also return ``dropout(x + x_bias) + residual``: the residual stream of a pre-norm layer.
        quantize_output: also return int8 codes of the output and their scales, one a row, as
            :func:`quantize_per_token` gives them for the output in fp32: the next int8 matmul's input, in one pass.
        return_output: False leaves out the floating output, where its codes or the sum are all that is used.

    Returns:
        what is asked for, in the order output, sum, codes, scales; a tensor if that is one, else a tuple. Output
        ``[..., hidden]``, sum the same, codes the same in int8, scales ``[...]`` fp32. The sum has the promoted dtype
        of x and residual, the output that of the sum; under autocast the output is float32, as ``F.layer_norm``'s is.
        Statistics are computed in fp32, of the sum in its dtype. Codes carry no gradient.

    Triton serves float32, float16 and bfloat16 and rows of up to 16384, with int8 codes up to 8192. The Triton and
    reference backends draw the same dropout mask (:func:`pyaccel.reference.philox.keep_mask`); the torch backend
    uses ``F.dropout``, and on a CPU in eager mode a mask of its own, in a third of the time, for ``dropout_p`` rounded
    to a multiple of 2^-15.

    Raises:
        ValueError: naming every argument that makes no sense.
        pyaccel.dispatch.NotSupportedError: the backend asked for can't serve this call.
    """
    reasons = not_supported_reasons(x, residual, weight, bias, eps=eps, dropout_p=dropout_p, x_bias=x_bias)
    if not (return_output or return_sum or quantize_output):
        reasons.append("nothing is to be returned: ask for the output, the sum or the codes")
    dispatch.invalid(OP, reasons)
    dropout_p = dropout_p if training else 0.0
    out_dtype = output_dtype(x, residual)
    choice = choose_backend(quantize_output, x, residual, weight, bias, x_bias)
    wanted = (return_output, return_sum, quantize_output, quantize_output)
    if choice.backend == "triton":
        results = _triton_backend(
            x, residual, weight, bias, eps, dropout_p, x_bias, rms_norm, out_dtype, wanted
        )
    else:
        run = _torch_backend if choice.backend == "torch" else _reference_backend
        # Codes are of the output in fp32, before it is rounded to its dtype.
        dtype = torch.promote_types(out_dtype, torch.float32) if quantize_output else out_dtype
        out, total = run(x, residual, weight, bias, eps, dropout_p, x_bias, rms_norm, dtype)
        if return_sum and total is x:  # nothing was added: the sum is a tensor of its own all the same
            total = x.clone()
        codes = reference.quantize_per_token(out.detach()) if quantize_output else (out, out)
        results = (out.to(out_dtype), total, *codes)
    given = tuple(t for t, want in zip(results, wanted, strict=True) if want)
    return given[0] if len(given) == 1 else given


def _triton_backend(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    x_bias: Tensor | None,
    rms_norm: bool,
    out_dtype: torch.dtype,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    want_out, want_sum, want_codes, _ = wanted
    key = dropout_key(x.device) if dropout_p > 0.0 else None
    hidden = x.shape[-1]
    rows = (x.reshape(-1, hidden), None if residual is None else residual.reshape(-1, hidden))
    vectors = tuple(None if t is None else t.contiguous() for t in (weight, bias, x_bias))
    given = [t for t in (*rows, *vectors) if t is not None]
    arguments = (*rows, *vectors, key, eps, dropout_p, out_dtype, rms_norm)
    if torch.is_grad_enabled() and (want_out or want_sum) and any(t.requires_grad for t in given):
        out, total, codes, scales, *_ = ResidualLayerNormFunction.apply(*arguments, want_codes)
    else:
        with torch.no_grad():  # codes alone have no gradient, whatever the inputs want
            out, total, codes, scales, *_ = forward_op(*arguments, want_out, want_sum, want_codes, False)
    results = zip((out, total, codes), wanted, strict=False)
    return *(t.view(x.shape) if want else t for t, want in results), (
        scales.view(x.shape[:-1]) if want_codes else scales
    )


def output_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """The output's: the sum's, and float32 under autocast, as ``F.layer_norm``'s is."""
    return _sum_dtype(x, residual) if autocast_dtype(x.device) is None else torch.float32


def _sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def choose_backend(quantize_output: bool, x: Tensor, *others: Tensor | None) -> dispatch.Choice:
    triton = dispatch.triton_reasons(x, *others)
    if x.shape[-1] > MAX_ROW:
        triton.append(f"the kernels take rows of up to {MAX_ROW}, not {x.shape[-1]}")
    if quantize_output and x.shape[-1] > MAX_CODES_ROW:
        triton.append(f"the kernel makes int8 codes of rows of up to {MAX_CODES_ROW}, not {x.shape[-1]}")
    if x.device.type == "cpu":
        return dispatch.choose(OP, {"triton": triton, "torch": [], "reference": []}, "torch", "on the CPU")
    size = (math.prod(x.shape[:-1]), x.shape[-1])
    measured = tuned.preferred(OP, x.device, x.dtype, size, ("triton", "torch"))
    return dispatch.choose(OP, {"triton": triton, "torch": [], "reference": []}, *measured)


def _drops_on_host(x: Tensor, residual: Tensor) -> bool:
    """Whether dropout and sum can be one pass, by a mask that takes less time than PyTorch's."""
    return x.dtype == residual.dtype and dispatch.on_host(x) and runs_now(x, residual)


def _torch_backend(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    x_bias: Tensor | None,
    rms_norm: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    total = x if x_bias is None else add_bias(x, x_bias)
    if residual is not None and 0.0 < dropout_p < 1.0 and _drops_on_host(total, residual):
        keep = keep_mask_on_host(total.shape, dropout_p).to(total.dtype)
        total = torch.addcmul(residual, total, keep, value=1.0 / (1.0 - dropout_p))
    else:
        if dropout_p > 0.0:
            total = F.dropout(total, dropout_p)
        if residual is not None:
            total = total + own_gradient(residual, total)
    return normalise(total, weight, bias, eps=eps, rms_norm=rms_norm, out_dtype=out_dtype), total


def _reference_backend(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    x_bias: Tensor | None,
    rms_norm: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    result = reference.residual_layernorm(
        x,
        None if residual is None else own_gradient(residual, x),
        weight,
        bias,
        eps=eps,
        dropout_p=dropout_p,
        x_bias=x_bias,
        dropout_key=dropout_key(x.device) if dropout_p > 0.0 else None,
        rms_norm=rms_norm,
        upcast=False,
        out_dtype=out_dtype,
    )
    return result.output, result.sum
