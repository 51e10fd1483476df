"""int8 matrix product with scales, bias, activation and residual in its epilogue: the public function."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch, triton_support, tuning
from pyaccel.ops import common
from pyaccel.ops.common import rows, without_autocast
from pyaccel.ops.int8 import cpu as on_cpu
from pyaccel.ops.int8 import triton as on_gpu
from pyaccel.ops.linear.api import ACTIVATIONS
from pyaccel.reference import activation as activate
from pyaccel.reference.int8 import int8_matmul as reference_int8_matmul
from pyaccel.reference.int8 import quantize_per_token

OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The longest sum that int32 holds whatever the codes: 2**31 / 128**2, less 1.
MAX_IN_FEATURES = 2**17 - 1


@overload
def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = ...,
    activation: str | None = ...,
    residual: Tensor | None = ...,
    out_dtype: torch.dtype = ...,
    quantize_output: Literal[False] = ...,
    *,
    a_offset: Tensor | None = ...,
) -> Tensor: ...
@overload
def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = ...,
    activation: str | None = ...,
    residual: Tensor | None = ...,
    out_dtype: torch.dtype = ...,
    *,
    quantize_output: Literal[True],
    a_offset: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    quantize_output: bool = False,
    *,
    a_offset: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``activation((a @ b^T) * a_scale * b_scale + bias) + residual``: a quantized Linear, for inference.

    With ``a_offset``, ``a * a_scale + a_offset`` takes the place of ``a * a_scale``.

    Args:
        a: int8 ``[..., in_features]``, from :func:`pyaccel.ops.quantize_per_token` or
            ``quantize_per_tensor``.
        b: int8 ``[out_features, in_features]``, from :func:`pyaccel.ops.quantize_per_channel`.
        a_scale: fp32, of a's leading shape (per token) or a scalar (per tensor).
        b_scale: fp32 ``[out_features]`` (per channel) or a scalar.
        bias: ``[out_features]``, any floating dtype.
        activation: None, ``"gelu"`` (erf, BERT's), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.
        residual: ``[..., out_features]``, any floating dtype; added after the activation.
        out_dtype: fp32, bf16 or fp16.
        quantize_output: return int8 codes ``[..., out_features]`` and fp32 scales of the leading shape in
            place of floats: quantized per token from the fp32 result, so ``out_dtype`` plays no part.
        a_offset: fp32, of a's leading shape, from :func:`pyaccel.ops.quantize_per_token_with_offset`, or None. It
            multiplies the sums of b's rows, which are exact in fp32 up to 132104 input features.

    Returns:
        ``[..., out_features]`` in ``out_dtype``, or (codes, scales). Accumulation is exact, in int32; all
        that follows is in fp32, under autocast too, and rounded once. There is no gradient.

    Raises:
        ValueError: naming every argument that makes no sense.
        pyaccel.errors.NotSupportedError: the backend asked for can't serve this call.

    Triton does all of it in one launch; in two, with the sums between them, where few rows make it split the inner
    dimension, and where the output is quantized again, for which a program must see a whole row. The torch backend
    multiplies with ``torch._int_mm``: any shape on CPUs, in blocks of rows that stay in the cache; padded with zeros to
    what cuBLAS takes (more than 16 rows, other sizes multiples of 8) on CUDA.
    """
    dispatch.invalid(
        "int8_matmul",
        not_supported_reasons(a, b, a_scale, b_scale, bias, activation, residual, out_dtype, a_offset),
    )
    torch_reasons = (
        [] if a.device.type in ("cpu", "cuda", "meta") else [f"torch._int_mm has no {a.device.type} kernel"]
    )
    triton_reasons = on_gpu.matmul_reasons(
        b, a_scale, b_scale, bias, residual, quantize_output=quantize_output
    )
    measured: tuple[str | None, str] = (None, "")
    if not triton_support.interpreting():  # no table holds for the interpreter
        size = (math.prod(a.shape[:-1]), a.shape[-1], b.shape[0])
        measured = tuning.preferred("int8_matmul", a.device, out_dtype, size, ("triton", "torch"))
    choice = dispatch.choose(
        "int8_matmul",
        {"triton": triton_reasons, "torch": torch_reasons, "reference": []},
        *measured,
    )
    if choice.backend == "triton":
        return on_gpu.int8_matmul(
            a, b, a_scale, b_scale, bias, activation, residual, out_dtype, quantize_output, a_offset
        )
    with without_autocast(a.device):  # where the CPU's product is of fp32, autocast would round its sums
        if choice.backend == "reference":
            return reference_int8_matmul(
                a, b, a_scale, b_scale, bias, activation, residual, out_dtype, quantize_output,
                a_offset=a_offset, upcast=False,
            )  # fmt: skip
        if common.on_host(a) and common.on_host(b):
            return on_cpu.int8_matmul(
                a, b, a_scale, b_scale, bias, activation, residual, out_dtype, quantize_output, a_offset
            )
        # In place: one fp32 buffer from the accumulator to the cast.
        out = _accumulate(rows(a), b).view(*a.shape[:-1], b.shape[0]).float()
        out.mul_(a_scale.unsqueeze(-1) if a_scale.dim() else a_scale)
        if a_offset is not None:
            out.add_(a_offset.unsqueeze(-1) * b.sum(1, dtype=torch.int32).float())
        out.mul_(b_scale)
        if bias is not None:
            out.add_(bias)
        out = activate(out, activation)
        if residual is not None:
            out.add_(residual)
        return quantize_per_token(out) if quantize_output else out.to(out_dtype)


def _accumulate(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b^T`` in int32, exact: ``[rows, in_features]`` and ``[out_features, in_features]``."""
    n_rows, out_features = a.shape[0], b.shape[0]
    if a.is_meta:
        return a.new_empty(n_rows, out_features, dtype=torch.int32)
    if a.is_cpu:
        return on_cpu.product(b)(a)
    if a.is_cuda:
        a, b = _pad_for_cublas(a, b)
    return torch._int_mm(a, b.t())[:n_rows, :out_features]


def _pad_for_cublas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros added until there are more than 16 rows and the other sizes are multiples of 8, and not 0."""
    more_rows = max(0, 17 - a.shape[0])
    more_in, more_out = (-size % 8 if size else 8 for size in (a.shape[1], b.shape[0]))
    if more_rows or more_in:
        a = F.pad(a, (0, more_in, 0, more_rows))
    if more_in or more_out:
        b = F.pad(b, (0, more_in, 0, more_out))
    return a, b


def not_supported_reasons(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    a_offset: Tensor | None = None,
) -> list[str]:
    """Every reason why these arguments make no sense, on any backend; empty if they do."""
    reasons = []
    for name, codes in (("a", a), ("b", b)):
        if codes.dtype != torch.int8:
            reasons.append(f"{name} must be int8, got {codes.dtype}: quantize it first")
    if a.dim() == 0 or b.dim() != 2 or a.shape[-1] != b.shape[-1]:
        got = f"{tuple(a.shape)} and {tuple(b.shape)}"
        return [*reasons, f"a must be [..., in_features] and b [out_features, in_features], got {got}"]
    if a.shape[-1] > MAX_IN_FEATURES:
        reasons.append(f"in_features is {a.shape[-1]}: above {MAX_IN_FEATURES} the int32 sum could overflow")
    leading, out_features = tuple(a.shape[:-1]), b.shape[0]
    for name, scale, shape, what in (
        ("a_scale", a_scale, leading, "a's leading shape"),
        ("b_scale", b_scale, (out_features,), "[out_features]"),
    ):
        if scale.dtype != torch.float32 or tuple(scale.shape) not in ((), shape):
            got = f"{scale.dtype} {tuple(scale.shape)}"
            reasons.append(f"{name} must be float32, of {what} {shape} or a scalar, got {got}")
    if a_offset is not None and (a_offset.dtype != torch.float32 or tuple(a_offset.shape) != leading):
        got = f"{a_offset.dtype} {tuple(a_offset.shape)}"
        reasons.append(f"a_offset must be float32, of a's leading shape {leading}, got {got}")
    for name, term, shape in (
        ("bias", bias, (out_features,)),
        ("residual", residual, (*leading, out_features)),
    ):
        if term is not None and (not term.is_floating_point() or tuple(term.shape) != shape):
            reasons.append(f"{name} must be floating point {shape}, got {term.dtype} {tuple(term.shape)}")
    if activation not in ACTIVATIONS:
        reasons.append(f"unknown activation {activation!r}: expected one of {ACTIVATIONS}")
    if out_dtype not in OUT_DTYPES:
        reasons.append(f"out_dtype must be float32, bfloat16 or float16, got {out_dtype}")
    tensors = {
        "b": b,
        "a_scale": a_scale,
        "b_scale": b_scale,
        "bias": bias,
        "residual": residual,
        "a_offset": a_offset,
    }
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != a.device:
            reasons.append(f"{name} is on {tensor.device} and a on {a.device}: move one of them")
    differentiable = [name for name, t in tensors.items() if t is not None and t.requires_grad]
    if torch.is_grad_enabled() and differentiable:
        reasons.append(
            f"a gradient is wanted of {', '.join(differentiable)}, and this op has none: "
            "detach() it, or call under torch.no_grad()"
        )
    return reasons
