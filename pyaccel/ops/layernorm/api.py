"""Bias + dropout + residual + LayerNorm or RMSNorm.

Everything that stands between two matrix products of a post-norm (or pre-norm) Transformer layer, as one kernel
forward and one backward. Source: LayerNorm, arXiv:1607.06450; RMSNorm, arXiv:1910.07467; placements, arXiv:2002.04745.
"""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor

from pyaccel import dispatch, reference, triton_support, tuning
from pyaccel.kernels.common.limits import MAX_QUANTIZED_ROW, MAX_ROW
from pyaccel.ops.layernorm.checks import OP, not_supported_reasons, output_dtype
from pyaccel.ops.layernorm.eager import reference_backend, torch_backend
from pyaccel.ops.layernorm.triton import triton_backend


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
        pyaccel.errors.NotSupportedError: the backend asked for can't serve this call.
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
        results = triton_backend(
            x, residual, weight, bias, eps, dropout_p, x_bias, rms_norm, out_dtype, wanted
        )
    else:
        run = torch_backend if choice.backend == "torch" else reference_backend
        # Codes are of the output in fp32, before it is rounded to its dtype.
        dtype = torch.promote_types(out_dtype, torch.float32) if quantize_output else out_dtype
        out, total = run(x, residual, weight, bias, eps, dropout_p, x_bias, rms_norm, dtype)
        if return_sum and total is x:  # nothing was added: the sum is a tensor of its own all the same
            total = x.clone()
        codes = reference.quantize_per_token(out.detach()) if quantize_output else (out, out)
        results = (out.to(out_dtype), total, *codes)
    given = tuple(t for t, want in zip(results, wanted, strict=True) if want)
    return given[0] if len(given) == 1 else given


def choose_backend(quantize_output: bool, x: Tensor, *others: Tensor | None) -> dispatch.Choice:
    triton = triton_support.unsupported_reasons(x, *others)
    if x.shape[-1] > MAX_ROW:
        triton.append(f"the kernels take rows of up to {MAX_ROW}, not {x.shape[-1]}")
    if quantize_output and x.shape[-1] > MAX_QUANTIZED_ROW:
        triton.append(f"the kernel makes int8 codes of rows of up to {MAX_QUANTIZED_ROW}, not {x.shape[-1]}")
    if x.device.type == "cpu":
        return dispatch.choose(OP, {"triton": triton, "torch": [], "reference": []}, "torch", "on the CPU")
    size = (math.prod(x.shape[:-1]), x.shape[-1])
    measured = tuning.preferred(OP, x.device, x.dtype, size, ("triton", "torch"))
    return dispatch.choose(OP, {"triton": triton, "torch": [], "reference": []}, *measured)
