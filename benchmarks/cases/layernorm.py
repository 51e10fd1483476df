"""Dropout + residual + LayerNorm, forward and backward, at the sizes of MiniLM, BERT-base and BERT-large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch, ops, reference
from pyaccel.benchmarks.registry import Case, Variant, no_liger, no_triton

EPS = 1e-12


@dataclass(frozen=True)
class Problem:
    """x, residual ``[rows, cols]``; weight, bias, x_bias ``[cols]``; the gradient ``[rows, cols]``."""

    tensors: tuple[Tensor, ...]
    grad: Tensor


def problem(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    rows, cols = sizes
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    tensors = (normal(rows, cols) + 1, normal(rows, cols) * 2, normal(cols) + 0.5, normal(cols), normal(cols))
    return Problem(tuple(t.to(dtype).requires_grad_() for t in tensors), normal(rows, cols).to(dtype))


def with_gradients(
    function: Callable[..., Tensor], p: Problem, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    tensors = p.tensors if dtype is None else tuple(t.detach().to(dtype).requires_grad_() for t in p.tensors)
    out = function(*tensors)
    return (out, *torch.autograd.grad(out, tensors, p.grad.to(out.dtype)))


def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
    return F.layer_norm(x + x_bias + residual, (x.shape[-1],), weight, bias, EPS)


def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
    return ops.residual_layernorm(x, residual, weight, bias, eps=EPS, x_bias=x_bias)


def truth(p: Problem) -> tuple[Tensor, ...]:
    def exact(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
        return reference.residual_layernorm(x, residual, weight, bias, eps=EPS, x_bias=x_bias).output

    return with_gradients(exact, p, torch.float64)


def bytes_moved(p: Problem) -> int:
    """Forward reads x and residual and writes output and sum; backward reads dy and sum and writes dx."""
    x = p.tensors[0]
    return 7 * x.numel() * x.element_size()


def prepare_ours(backend: str) -> Callable[[Problem], Callable[[], tuple[Tensor, ...]]]:
    def prepare(p: Problem) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with dispatch.use_backend(backend, ops=["residual_layernorm"]):
                return with_gradients(ours, p)

        return call

    return prepare


def prepare_compiled(p: Problem) -> Callable[[], tuple[Tensor, ...]]:
    compiled = torch.compile(plain, dynamic=False)
    return lambda: with_gradients(compiled, p)


def prepare_liger(p: Problem) -> Callable[[], tuple[Tensor, ...]]:
    """Its LayerNorm; it has none with a residual, whose sum PyTorch makes."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def liger(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
        return LigerLayerNormFunction.apply(x + x_bias + residual, weight, bias, EPS)

    return lambda: with_gradients(liger, p)


CASE = Case(
    name="residual_layernorm",
    group="ops",
    sizes={f"{rows}x{cols}": (rows, cols) for cols in (384, 768, 1024) for rows in (128, 2048, 16384)},
    smoke={"9x64": (9, 64)},
    quick="^2048x(384|768)$",
    problem=problem,
    truth=truth,
    naive=lambda p: with_gradients(plain, p),
    bytes_moved=bytes_moved,
    variants=(
        Variant("pyaccel triton", prepare_ours("triton"), lambda p: no_triton(p.grad.device)),
        Variant("pyaccel torch", prepare_ours("torch")),
        Variant("eager", lambda p: lambda: with_gradients(plain, p)),
        Variant("torch.compile", prepare_compiled),
        Variant("Liger-Kernel", prepare_liger, lambda p: no_liger(p.grad.device)),
    ),
)
CASES = (CASE,)
