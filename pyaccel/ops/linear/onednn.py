"""Linear layers of a CPU: PyTorch's private oneDNN products where they serve and were measured to be faster."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import activations, reference, tuning
from pyaccel.ops.common import runs_now

NAMES = ("onednn", "eager")
ACTIVATIONS: dict[str | None, tuple[str, str]] = {
    None: ("none", ""),
    **{name: each.onednn for name, each in activations.ACTIVATIONS.items() if each.onednn is not None},
}


@functools.cache
def supported_dtypes() -> frozenset[torch.dtype]:
    """Dtypes that this CPU's oneDNN multiplies at full speed, with the fused ops this torch offers."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return frozenset()
    dtypes = {torch.float32}
    if ops._is_mkldnn_bf16_supported():
        dtypes.add(torch.bfloat16)
    return frozenset(dtypes)


def not_supported_reasons(*tensors: Tensor | None) -> list[str]:
    """Why oneDNN's fused linear can't serve this call; empty if it can."""
    if torch.compiler.is_compiling():
        return ["the graph is traced"]
    if not runs_now(*tensors):
        return ["the call is traced or transformed, or a tensor is of a subclass"]
    given = [t for t in tensors if t is not None]
    x = given[0]
    if not x.is_cpu:
        return ["not on the CPU"]
    reasons = []
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        reasons.append("gradients are recorded")
    dtypes = {t.dtype for t in given}
    if len(dtypes) > 1 or not dtypes <= supported_dtypes():
        names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
        reasons.append(f"oneDNN is not used for {', '.join(names)} here")
    if torch.is_autocast_enabled("cpu"):
        reasons.append("autocast is on")
    if x.numel() == 0:
        reasons.append("x is empty")
    return reasons


@functools.cache
def can_prepack() -> bool:
    """Whether this torch can reorder a weight for oneDNN's fused linear."""
    return bool(supported_dtypes()) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


@torch.inference_mode(False)
def prepacked(weight: Tensor) -> Tensor:
    """A copy of ``weight`` in the order in which oneDNN multiplies, opaque but to :func:`by_onednn`."""
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return reordered


def by_onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(x @ weight.T + bias) + residual`` in one primitive; :func:`reasons` says where it can't be.

    The only caller of oneDNN's private products, which read memory by its address: operands of other strides or of
    another dtype than x's are copied first, and a weight that isn't row-major is multiplied by :func:`by_torch`.
    Activation and residual exclude each other.
    """
    if not weight.is_mkldnn and not (weight.dtype is x.dtype and weight.is_contiguous()):
        out = by_torch(x, weight, bias, activation)
        return out if residual is None else out + residual
    dtype = x.dtype
    x = _dense(x, dtype)
    if bias is not None:
        bias = _dense(bias, dtype)
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, _dense(residual, dtype), weight, bias, "add")
    attribute, algorithm = ACTIVATIONS[activation]
    out = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, attribute, [], algorithm)
    return out.relu_() if activation == "relu" else out


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, or a contiguous copy of it in that dtype."""
    return x if x.dtype is dtype and x.is_contiguous() else x.to(dtype).contiguous()


def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """The same in two steps."""
    return reference.activation(F.linear(x, weight, bias), activation)


def fused(activation: str | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """:func:`by_onednn` of x, weight and bias without its questions.

    All three must be contiguous, of one dtype of :func:`supported_dtypes` and on the CPU; a weight may be
    :func:`prepacked`. ``activation`` is None, "gelu" or "gelu_tanh".
    """
    attribute, algorithm = ACTIVATIONS[activation]
    return functools.partial(
        torch.ops.mkldnn._linear_pointwise.default, attr=attribute, scalars=[], algorithm=algorithm
    )


def fused_residual() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """``x @ weight.T + bias + residual`` of x, residual, weight and bias: see :func:`fused`."""
    return functools.partial(torch.ops.mkldnn._linear_pointwise.binary, attr="add")


def measured_each(rows: int, weights: Sequence[Tensor]) -> list[str | None]:
    """:func:`measured` of so many rows and each of these weights, which are of one dtype and on the CPU."""
    sizes = [(rows, weight.shape[1], weight.shape[0]) for weight in weights]
    return tuning.preferred_each("linear_activation", weights[0].device, weights[0].dtype, sizes, NAMES)


def evaluate_with_residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias + residual`` in the faster way."""
    if measured(x, weight)[0] == "eager":
        return F.linear(x, weight, bias) + residual
    return by_onednn(x, weight, bias, residual=residual)


def measured(x: Tensor, weight: Tensor) -> tuple[str | None, str]:
    """The way that was fastest near this size on this machine, and the row that says so; see :mod:`pyaccel.tuning`."""
    names = ("triton", "torch") if on_gpu(x) else NAMES
    size = (math.prod(x.shape[:-1]), weight.shape[1], weight.shape[0])
    return tuning.preferred("linear_activation", x.device, x.dtype, size, names)


def on_gpu(x: Tensor) -> bool:
    return not x.is_cpu
