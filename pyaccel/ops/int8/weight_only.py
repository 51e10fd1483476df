"""Matrix product of floating activations and an int8 weight: the public function."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch
from pyaccel.ops.common import without_autocast
from pyaccel.ops.int8 import triton as on_gpu
from pyaccel.ops.linear.api import ACTIVATIONS
from pyaccel.reference import activation as activate
from pyaccel.reference.int8 import int8_weight_only_matmul as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows from which on a card is busy with products, not with the weight's bytes: PyTorch's own, of a weight that is made
# floating once a call, then costs little beside.
MANY_ROWS = 128


def int8_weight_only_matmul(
    x: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """``activation((x @ b^T) * b_scale + bias)``: a Linear whose weight alone is quantized, for inference.

    Args:
        x: ``[..., in_features]``, fp32, bf16 or fp16, of any strides.
        b: int8 ``[out_features, in_features]``, from :func:`pyaccel.ops.quantize_per_channel`.
        b_scale: fp32 ``[out_features]``.
        bias: ``[out_features]``, any floating dtype.
        activation: None, ``"gelu"`` (erf, BERT's), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.

    Returns:
        ``[..., out_features]`` in x's dtype. Products are of x's dtype, in which codes are exact, and summed in fp32;
        scales, bias and activation are applied in fp32, under autocast too. There is no gradient.

    Raises:
        ValueError: naming every argument that makes no sense.
        pyaccel.errors.NotSupportedError: the backend asked for can't serve this call.

    Triton reads the weight as it is, for 16-bit activations of up to 128 rows unless it is asked for by name: few rows
    are bound by the weight's bytes. The torch backend makes codes floating and calls ``F.linear``, which rounds the
    product to x's dtype, but for fp16, whose product is in fp32; on a CPU that is never faster than the floating layer,
    only smaller.
    """
    dispatch.invalid("int8_weight_only_matmul", not_supported_reasons(x, b, b_scale, bias, activation))
    triton_reasons = on_gpu.weight_only_reasons(x, b, bias)
    # A comparison would make an exported program one of few rows, or of many.
    many = not torch.compiler.is_exporting() and math.prod(x.shape[:-1]) > MANY_ROWS
    choice = dispatch.choose(
        "int8_weight_only_matmul",
        {"triton": triton_reasons, "torch": [], "reference": []},
        "torch" if many else None,
        f"more than {MANY_ROWS} rows: products take the time, not the weight's bytes",
    )
    if choice.backend == "triton":
        return on_gpu.int8_weight_only_matmul(x, b, b_scale, bias, activation)
    with without_autocast(x.device):
        if choice.backend == "reference":
            return reference(x, b, b_scale, bias, activation, upcast=False)
        out = _product(x, b)
    out = out * b_scale
    if bias is not None:
        out = out + bias.float()
    return activate(out, activation).to(x.dtype)


def _product(x: Tensor, b: Tensor) -> Tensor:
    """``x @ b^T`` in fp32: of fp16 operands the sums of codes, before their scale, may be too large for fp16."""
    if x.dtype != torch.float16:
        return F.linear(x, b.to(x.dtype)).float()
    if not x.is_cuda:
        return F.linear(x.float(), b.float())
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return torch.mm(rows, b.to(x.dtype).t(), out_dtype=torch.float32).view(*x.shape[:-1], b.shape[0])


def not_supported_reasons(
    x: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, activation: str | None
) -> list[str]:
    """Every reason why these arguments make no sense, on any backend; empty if they do."""
    reasons = []
    if x.dtype not in DTYPES:
        reasons.append(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    if b.dtype != torch.int8:
        reasons.append(f"b must be int8, got {b.dtype}: quantize it first")
    if x.dim() == 0 or b.dim() != 2 or x.shape[-1] != b.shape[-1]:
        got = f"{tuple(x.shape)} and {tuple(b.shape)}"
        return [*reasons, f"x must be [..., in_features] and b [out_features, in_features], got {got}"]
    shape = (b.shape[0],)
    if b_scale.dtype != torch.float32 or tuple(b_scale.shape) != shape:
        reasons.append(f"b_scale must be float32 {shape}, got {b_scale.dtype} {tuple(b_scale.shape)}")
    if bias is not None and (not bias.is_floating_point() or tuple(bias.shape) != shape):
        reasons.append(f"bias must be floating point {shape}, got {bias.dtype} {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        reasons.append(f"unknown activation {activation!r}: expected one of {ACTIVATIONS}")
    others = {"b": b, "b_scale": b_scale, "bias": bias}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            reasons.append(f"{name} is on {tensor.device} and x on {x.device}: move one of them")
    differentiable = [n for n, t in {"x": x, **others}.items() if t is not None and t.requires_grad]
    if torch.is_grad_enabled() and differentiable:
        reasons.append(
            f"a gradient is wanted of {', '.join(differentiable)}, and this op has none: "
            "use int8_linear, detach() it, or call under torch.no_grad()"
        )
    return reasons
