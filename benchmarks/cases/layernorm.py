"""Dropout + residual + LayerNorm, forward and backward, at the sizes of MiniLM, BERT-base and BERT-large."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import ops, reference
from pyaccel.benchmarks.case import Case, Variant, no_liger
from pyaccel.benchmarks.cases.common import Outputs, Problem, normal, variants

EPS = 1e-12


def problem(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    """x, residual ``[rows, cols]``; weight, bias, x_bias ``[cols]``; the gradient ``[rows, cols]``."""
    rows, cols = sizes
    draw = normal(torch.float32, device)
    tensors = (draw(rows, cols) + 1, draw(rows, cols) * 2, draw(cols) + 0.5, draw(cols), draw(cols))
    return Problem(tuple(t.to(dtype) for t in tensors), "forward+backward", draw(rows, cols).to(dtype))


def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
    return F.layer_norm(x + x_bias + residual, (x.shape[-1],), weight, bias, EPS)


def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
    return ops.residual_layernorm(x, residual, weight, bias, eps=EPS, x_bias=x_bias)


def exact(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
    return reference.residual_layernorm(x, residual, weight, bias, eps=EPS, x_bias=x_bias).output


def bytes_moved(p: Problem) -> int:
    """Forward reads x and residual and writes output and sum; backward reads dy and sum and writes dx."""
    x = p.leaves[0]
    return 7 * x.numel() * x.element_size()


def prepare_liger(p: Problem) -> Callable[[], Outputs]:
    """Its LayerNorm; it has none with a residual, whose sum PyTorch makes."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def liger(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
        out: Tensor = LigerLayerNormFunction.apply(x + x_bias + residual, weight, bias, EPS)
        return out

    return lambda: p.by(liger)


CASE = Case(
    name="residual_layernorm",
    group="ops",
    sizes={f"{rows}x{cols}": (rows, cols) for cols in (384, 768, 1024) for rows in (128, 2048, 16384)},
    smoke={"9x64": (9, 64)},
    quick="^2048x(384|768)$",
    problem=problem,
    truth=lambda p: p.exactly_by(exact),
    naive=lambda p: p.by(plain),
    bytes_moved=bytes_moved,
    variants=(
        *variants("residual_layernorm", lambda p: ours, lambda p: plain),
        Variant("Liger-Kernel", prepare_liger, lambda p: no_liger(p.device)),
    ),
)
CASES = (CASE,)
