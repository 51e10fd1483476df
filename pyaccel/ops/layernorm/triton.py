"""The Triton backend of residual_layernorm: its registered ops, their autograd Function, and what calls them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyaccel import tuned
from pyaccel.ops.common import custom_op, differentiable_once
from pyaccel.ops.dropout import dropout_key
from pyaccel.ops.layernorm.checks import (
    OP,
    sum_dtype,
)


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
        x.new_empty(n_rows if want_sum else 0, n_cols, dtype=sum_dtype(x, residual)),
        x.new_empty(n_rows if want_codes else 0, n_cols, dtype=torch.int8),
        x.new_empty(n_rows if want_codes else 0, dtype=torch.float32),
        x.new_empty(n_rows if want_statistics and not rms_norm else 0, dtype=torch.float32),
        x.new_empty(n_rows if want_statistics else 0, dtype=torch.float32),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output and sum ``[rows, cols]``, int8 codes of the output and their scales ``[rows]`` fp32, mean (not of RMSNorm)
    and rstd ``[rows]`` fp32, for the backward."""
    from pyaccel.kernels.layernorm import config
    from pyaccel.kernels.layernorm import forward as residual_layernorm

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


@custom_op("pyaccel::residual_layernorm_backward", _backward_outputs)
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
    from pyaccel.kernels.common import configs
    from pyaccel.kernels.common import reduce as column_sum
    from pyaccel.kernels.common.device import device_info
    from pyaccel.kernels.layernorm import backward as residual_layernorm_backward
    from pyaccel.kernels.layernorm import config

    dtypes = (dx_dtype, dresidual_dtype, dweight_dtype, dbias_dtype, dx_bias_dtype)
    grads = _backward_outputs(total, *dtypes)
    n_rows, n_cols = total.shape
    dx, dresidual, dweight, dbias, dx_bias = (
        grad if dtype is not None else None for grad, dtype in zip(grads, dtypes, strict=True)
    )

    def call(row_config: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        n_programs = configs.persistent_programs(row_config, n_rows, device_info(total.device).num_sms)
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
    column_sum.column_sum((dweight, dbias, dx_bias), partials, configs.column_sum())
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
        out, total, codes, scales, *_ = ResidualLayerNormFunction.apply(*arguments, want_codes)
    else:
        with torch.no_grad():  # codes alone have no gradient, whatever the inputs want
            out, total, codes, scales, *_ = forward_op(*arguments, want_out, want_sum, want_codes, False)
    results = zip((out, total, codes), wanted, strict=False)
    return *(t.view(x.shape) if want else t for t, want in results), (
        scales.view(x.shape[:-1]) if want_codes else scales
    )
