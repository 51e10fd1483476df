"""The Triton backend of residual_layernorm: its registered ops, their autograd Function, and what calls them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyaccel import tuning
from pyaccel.ops.common import apply, custom_op, differentiable_once, empty, kernels
from pyaccel.ops.dropout import dropout_key
from pyaccel.ops.layernorm.checks import OP, sum_dtype


def _forward_outputs(
    x: Tensor,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    rms_norm: bool,
    want_out: bool,
    want_sum: bool,
    want_codes: bool,
    want_statistics: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    n_rows, shape = x.shape[0], x.shape
    return (
        empty(x, out_dtype, *shape) if want_out else None,
        empty(x, sum_dtype(x, residual), *shape) if want_sum else None,
        x.new_empty(shape, dtype=torch.int8) if want_codes else None,
        x.new_empty(n_rows, dtype=torch.float32) if want_codes else None,
        x.new_empty(n_rows, dtype=torch.float32) if want_statistics and not rms_norm else None,
        x.new_empty(n_rows, dtype=torch.float32) if want_statistics else None,
    )


@custom_op("pyaccel::residual_layernorm_forward", _forward_outputs)
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
) -> tuple[Tensor | None, ...]:
    """Output and sum ``[rows, cols]``, int8 codes of the output and their scales ``[rows]`` fp32, mean (not of RMSNorm)
    and rstd ``[rows]`` fp32, for the backward."""
    outputs = _forward_outputs(
        x, residual, out_dtype, rms_norm, want_out, want_sum, want_codes, want_statistics
    )
    call = partial(
        kernels("layernorm.forward").forward,
        *outputs,
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
    default = kernels("layernorm.config").residual_layernorm_forward(x.shape[1])
    tuning.run("residual_layernorm_forward", x, (x.shape[1],), default, call, exactly=True)
    return outputs


def _backward_outputs(
    total: Tensor,
    dx_dtype: torch.dtype | None,
    dresidual_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    dx_bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    shape = total.shape
    return (
        None if dx_dtype is None else empty(total, dx_dtype, *shape),
        None if dresidual_dtype is None else empty(total, dresidual_dtype, *shape),
        None if dweight_dtype is None else empty(total, dweight_dtype, shape[1]),
        None if dbias_dtype is None else empty(total, dbias_dtype, shape[1]),
        None if dx_bias_dtype is None else empty(total, dx_bias_dtype, shape[1]),
    )


@custom_op("pyaccel::residual_layernorm_backward", _backward_outputs)
def backward_op(
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dropout_key: Tensor | None,
    dropout_p: float,
    dx_dtype: torch.dtype | None,
    dresidual_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    dx_bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, residual ``[rows, cols]``, weight, bias, x_bias ``[cols]``, of those that have a dtype.

    RMSNorm has no mean, or one of size 0.
    """
    configs = kernels("common.configs")
    grads = _backward_outputs(total, dx_dtype, dresidual_dtype, dweight_dtype, dbias_dtype, dx_bias_dtype)
    columns = grads[2:]
    n_rows, n_cols = total.shape

    def call(row_config: Any) -> tuple[Tensor | None, ...]:
        num_sms = kernels("common.device").device_info(total.device).num_sms
        n_programs = configs.persistent_programs(row_config, n_rows, num_sms)
        # In one allocation: a small one takes the host as long as a launch.
        sums = total.new_empty((3, n_programs, n_cols), dtype=torch.float32).unbind()
        partials = tuple([None if grad is None else s for grad, s in zip(columns, sums, strict=True)])
        kernels("layernorm.backward").backward(
            *grads[:2],
            *partials,
            dy,
            dsum,
            total,
            mean if mean is not None and mean.numel() else None,
            rstd,
            weight,
            dropout_key,
            dropout_p,
            n_programs,
            row_config,
        )
        return partials

    default = kernels("layernorm.config").residual_layernorm_backward(n_cols)
    partials = tuning.run("residual_layernorm_backward", total, (n_cols,), default, call, exactly=True)
    kernels("common.reduce").column_sum(columns, partials, configs.column_sum())
    return grads


backward_once = differentiable_once(backward_op, OP, f"pyaccel.use_backend('torch', ops=['{OP}'])")


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
    ) -> tuple[Tensor | None, ...]:
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
        ctx.mark_non_differentiable(*[t for t in others if t is not None])
        mean, rstd = others[-2:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, mean, rstd, weight, key)
        ctx.dropout_p = dropout_p
        ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, weight, bias, x_bias)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dsum = grads[:2]
        total, mean, rstd, weight, key = ctx.saved_tensors
        if dy is None:
            dy = total.new_zeros(()).expand_as(total)
        needed = ctx.needs_input_grad[:5]
        dtypes = [d if n else None for d, n in zip(ctx.dtypes, needed, strict=True)]
        # Two writes even where both gradients are equal: whoever accumulates into one must not change the other.
        out = backward_once(dy, dsum, total, mean, rstd, weight, key, ctx.dropout_p, *dtypes)
        return *[g if n else None for g, n in zip(out, needed, strict=True)], *(None,) * 6


def triton_backend(
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
        out, total, codes, scales, *_ = apply(ResidualLayerNormFunction, *arguments, want_codes)
    else:
        with torch.no_grad():  # codes alone have no gradient, whatever the inputs want
            out, total, codes, scales, *_ = forward_op(*arguments, want_out, want_sum, want_codes, False)
    results = zip((out, total, codes), wanted, strict=False)
    return *(t.view(x.shape) if want else t for t, want in results), (
        scales.view(x.shape[:-1]) if want_codes else scales
    )
