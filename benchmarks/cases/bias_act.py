"""Bias + erf GELU at the feed-forward widths of MiniLM, BERT-base and BERT-large: training, inference, int8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch, ops, reference
from pyaccel.benchmarks.registry import Case, Variant, no_triton
from pyaccel.reference.int8 import dequantize

MODES = ("forward", "forward+backward", "int8")
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """x and its gradient ``[rows, cols]``, bias ``[cols]``; a mode of :data:`MODES`."""

    x: Tensor
    bias: Tensor
    grad: Tensor
    mode: str


def problem(sizes: tuple[int, int, str], dtype: torch.dtype, device: torch.device) -> Problem:
    rows, cols, mode = sizes
    generator = torch.Generator(device).manual_seed(0)
    x, grad = torch.randn(2, rows, cols, generator=generator, device=device).to(dtype).unbind()
    bias = torch.randn(cols, generator=generator, device=device).to(dtype)
    wanted = mode == "forward+backward"
    return Problem(x.detach().requires_grad_(wanted), bias.requires_grad_(wanted), grad, mode)


def by(function: Callable[..., Any], p: Problem) -> Outputs:
    """What the mode asks of a function of x and bias: its output, or that and the gradients, or codes and scales."""
    out = function(p.x, p.bias)
    if p.mode == "forward+backward":
        return (out, *torch.autograd.grad(out, (p.x, p.bias), p.grad))
    return out if isinstance(out, tuple) else (out,)


def plain(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def plain_int8(x: Tensor, bias: Tensor) -> Outputs:
    return reference.quantize_per_token(F.gelu(x.float() + bias.float()))


def stock(p: Problem) -> Callable[[Tensor, Tensor], Any]:
    return plain_int8 if p.mode == "int8" else plain


def values(p: Problem, given: Outputs) -> Outputs:
    """What codes and scales stand for: int8 is judged by the error that any int8 makes."""
    return (dequantize(*given),) if p.mode == "int8" else given


def truth(p: Problem) -> Outputs:
    x, bias = (t.detach().double().requires_grad_(t.requires_grad) for t in (p.x, p.bias))
    return by(reference.bias_gelu, Problem(x, bias, p.grad.double(), p.mode))


def bytes_moved(p: Problem) -> int:
    """Forward reads x and writes the output; backward reads dy and x and writes dx. A code has one byte."""
    size = p.x.element_size()
    each = {"forward": 2 * size, "forward+backward": 5 * size, "int8": size + 1}[p.mode]
    return each * p.x.numel()


def prepare_ours(backend: str) -> Callable[[Problem], Callable[[], Outputs]]:
    def prepare(p: Problem) -> Callable[[], Outputs]:
        def ours(x: Tensor, bias: Tensor) -> Any:
            with dispatch.use_backend(backend, ops=["bias_gelu"]):
                return ops.bias_gelu(x, bias, quantize_output=p.mode == "int8")

        return lambda: by(ours, p)

    return prepare


def prepare_compiled(p: Problem) -> Callable[[], Outputs]:
    compiled = torch.compile(stock(p), dynamic=False)
    return lambda: by(compiled, p)


CASE = Case(
    name="bias_gelu",
    group="ops",
    sizes={
        f"{rows}x{cols} {mode}": (rows, cols, mode)
        for mode in MODES
        for cols in (1536, 3072, 4096)
        for rows in (128, 2048, 16384)
    },
    smoke={f"9x64 {mode}": (9, 64, mode) for mode in ("forward+backward", "int8")},
    quick="^2048x1536 ",
    problem=problem,
    truth=truth,
    naive=lambda p: values(p, by(stock(p), p)),
    bytes_moved=bytes_moved,
    variants=(
        Variant("pyaccel triton", prepare_ours("triton"), lambda p: no_triton(p.grad.device), values),
        Variant("pyaccel torch", prepare_ours("torch"), outputs=values),
        Variant("eager", lambda p: lambda: by(stock(p), p), outputs=values),
        Variant("torch.compile", prepare_compiled, outputs=values),
    ),
)
CASES = (CASE,)
