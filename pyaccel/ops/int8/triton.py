"""The Triton backend of quantization and of int8 products: registered ops, and the functions that call them.

Arguments are checked by :mod:`pyaccel.ops.int8.quantize`, :mod:`pyaccel.ops.int8.matmul` and
:mod:`pyaccel.ops.int8.weight_only`, which call these. Nothing here has a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import triton_support, tuning
from pyaccel.kernels.common.limits import MAX_QUANTIZED_ROW, MAX_ROW
from pyaccel.ops.common import custom_op, rows


def rows_reasons(x: Tensor, factor: Tensor | None = None) -> list[str]:
    """Why the kernels can't quantize these rows here; empty if they can."""
    reasons = triton_support.unsupported_reasons(x, factor)
    if not 1 <= x.shape[-1] <= MAX_ROW:
        reasons.append(f"the kernels take rows of 1 to {MAX_ROW} elements, not {x.shape[-1]}")
    return reasons


def tensor_reasons(x: Tensor, factor: Tensor | None = None) -> list[str]:
    """Why the kernels can't quantize x by a given scale here; empty if they can."""
    reasons = triton_support.unsupported_reasons(x, factor)
    if x.dim() == 0 or x.shape[-1] == 0:
        reasons.append("there are no rows")
    return reasons


def matmul_reasons(
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    quantize_output: bool,
) -> list[str]:
    """Why the kernels can't serve this product here; empty if they can."""
    reasons = triton_support.unsupported_reasons(a_scale, b_scale, bias, residual)
    n_out, n_in = b.shape
    if not n_out or not n_in:
        reasons.append("a dimension of the weight is 0")
    if quantize_output and n_out > MAX_QUANTIZED_ROW:
        reasons.append(
            f"rows of more than {MAX_QUANTIZED_ROW} elements don't fit in registers to be quantized"
        )
    return reasons


def weight_only_reasons(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    """Why the kernel can't serve this product of 16-bit activations here; empty if it can."""
    reasons = triton_support.unsupported_reasons(x, bias)
    if x.dtype == torch.float32:
        reasons.append("the weight-only kernel takes 16-bit activations, not float32")
    if 0 in weight.shape:
        reasons.append("a dimension of the weight is 0")
    return reasons


# --- registered ops -------------------------------------------------------------------------------------------
# Functional, of fixed arity and without aliases: what isn't wanted comes back as a tensor of size 0.


def _rows_outputs(x: Tensor, with_offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    n_rows = x.shape[0]
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        x.new_empty(n_rows, dtype=torch.float32),
        x.new_empty(n_rows if with_offset else 0, dtype=torch.float32),
    )


@custom_op("pyaccel::quantize_rows", _rows_outputs)
def quantize_rows_op(x: Tensor, factor: Tensor | None, with_offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes ``[rows, cols]``, fp32 scales and offsets ``[rows]`` of ``x [rows, cols] * factor [cols]``."""
    from pyaccel.kernels.int8 import config, quantize

    codes, scale, offset = _rows_outputs(x, with_offset)
    quantize.rows(codes, scale, offset if with_offset else None, x, factor, config.quantize(x.shape[1]))
    return codes, scale, offset


def _quantize_tensor_outputs(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


@custom_op("pyaccel::quantize_tensor", _quantize_tensor_outputs)
def quantize_tensor_op(x: Tensor, factor: Tensor | None, scale: Tensor) -> Tensor:
    """int8 codes ``[rows, cols]`` of ``x [rows, cols] * factor [cols]`` by an fp32 scalar."""
    from pyaccel.kernels.int8 import config, quantize

    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    quantize.tensor(codes, x, factor, scale, config.quantize_by_given_scale(x.shape[1]))
    return codes


def matmul_flops(a: Tensor, b: Tensor) -> int:
    """Of the product of codes ``[M, K]`` and ``[N, K]``, half of 16-bit ones: matrix units do twice as many in int8."""
    return a.numel() * b.shape[0]


def _matmul_outputs(a: Tensor, b: Tensor, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    n_rows = a.shape[0]
    return (
        a.new_empty(n_rows, b.shape[0], dtype=out_dtype or torch.int8),
        a.new_empty(n_rows if out_dtype is None else 0, dtype=torch.float32),
    )


@custom_op("pyaccel::int8_matmul", _matmul_outputs)
def matmul_op(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_offset: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """``[rows, out]`` in ``out_dtype`` and nothing, or int8 codes and their fp32 scales ``[rows]`` where that is None.

    Shapes: a ``[rows, in]``, b ``[out, in]``, a_scale ``[rows]`` or a scalar, b_scale ``[out]`` or a scalar, a_offset
    ``[rows]``, bias ``[out]``, residual ``[rows, out]``.
    """
    from pyaccel.kernels.common.device import device_info
    from pyaccel.kernels.int8 import config, quantize
    from pyaccel.kernels.int8 import epilogue as int8_epilogue
    from pyaccel.kernels.int8 import matmul as int8_matmul

    out, out_scale = _matmul_outputs(a, b, out_dtype)
    a, b = _aligned(a), _aligned(b)
    b_sum = None
    if a_offset is not None:
        b_sum = b.new_empty(b.shape[0], dtype=torch.int32)
        quantize.row_sum(b_sum, b, config.int8_row_sum())
    epilogue = int8_epilogue.Epilogue(
        a_scale.contiguous(),
        b_scale.contiguous(),
        _contiguous(a_offset),
        b_sum,
        _contiguous(bias),
        residual,
        activation,
    )
    arch = device_info(a.device).arch
    sizes = (a.shape[0], b.shape[0], a.shape[1])

    def multiply(launch: Any) -> None:
        n_splits = config.splits(*sizes, arch, launch)
        if out_dtype is not None and n_splits == 1:
            int8_matmul.matmul(out, a, b, epilogue, launch)
            return
        sums = a.new_empty(n_splits, *sizes[:2], dtype=torch.int32)
        int8_matmul.matmul(sums, a, b, None, launch)
        finish = config.int8_finish(b.shape[0], quantize=out_dtype is None)
        int8_epilogue.finish(out, out_scale if out_dtype is None else None, sums, epilogue, finish)

    default = config.int8_matmul(*sizes[:2], arch)
    tuning.run("int8_matmul", a, sizes, default, multiply, exactly=False)
    return out, out_scale


def _weight_only_outputs(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@custom_op("pyaccel::int8_weight_only_matmul", _weight_only_outputs)
def weight_only_op(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """``[rows, out]`` in x's dtype of x ``[rows, in]``, int8 weight ``[out, in]``, weight_scale and bias ``[out]``."""
    from pyaccel.kernels.common.device import device_info
    from pyaccel.kernels.int8 import config
    from pyaccel.kernels.int8 import weight_only as int8_weight_only

    out = x.new_empty(x.shape[0], weight.shape[0])
    launch = config.weight_only(x.shape[0], device_info(x.device).arch)
    int8_weight_only.weight_only(
        out,
        _aligned(x),
        _aligned(weight),
        weight_scale.contiguous(),
        _contiguous(bias),
        activation,
        launch,
    )
    return out


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy with zeros at the end of each row, that the products can read 16 bytes at a time.

    A BERT's sizes are multiples of 16, and its codes and weights contiguous: the copy is for everything else.
    """
    from pyaccel.kernels.int8.matmul import aligned

    if aligned(x):
        return x
    padded = F.pad(x, (0, -x.shape[1] % 16))
    return padded if aligned(padded) else padded.contiguous().clone()


# --- what the public functions call -----------------------------------------------------------------------------


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`pyaccel.ops.quantize_per_token`."""
    codes, scale, _ = quantize_rows_op(rows(x), None, False)
    return codes.view(x.shape), scale.view(x.shape[:-1])


def quantize_per_token_with_offset(x: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`pyaccel.ops.quantize_per_token_with_offset`."""
    codes, scale, offset = quantize_rows_op(rows(x), _contiguous(factor), True)
    return codes.view(x.shape), scale.view(x.shape[:-1]), offset.view(x.shape[:-1])


def quantize_per_tensor(x: Tensor, scale: Tensor, factor: Tensor | None) -> Tensor:
    """Codes as of :func:`pyaccel.ops.quantize_per_tensor`, whose scale is given."""
    return quantize_tensor_op(rows(x), _contiguous(factor), scale).view(x.shape)


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    quantize_output: bool,
    a_offset: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`pyaccel.ops.int8_matmul`."""
    leading, n_out = a.shape[:-1], b.shape[0]
    out, scale = matmul_op(
        rows(a),
        b,
        a_scale.reshape(-1) if a_scale.dim() else a_scale,
        b_scale,
        None if a_offset is None else a_offset.reshape(-1),
        bias,
        None if residual is None else rows(residual),
        activation,
        None if quantize_output else out_dtype,
    )
    out = out.view(*leading, n_out)
    return (out, scale.view(leading)) if quantize_output else out


def int8_weight_only_matmul(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """As :func:`pyaccel.ops.int8_weight_only_matmul`."""
    out = weight_only_op(rows(x), weight, weight_scale, bias, activation)
    return out.view(*x.shape[:-1], weight.shape[0])


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
