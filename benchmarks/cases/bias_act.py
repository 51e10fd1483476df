"""Bias + erf GELU at the feed-forward widths of MiniLM, BERT-base and BERT-large: training, inference, int8."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import ops, reference
from pyaccel.benchmarks.case import Case
from pyaccel.benchmarks.cases import common
from pyaccel.benchmarks.cases.common import Outputs, Problem, normal, variants
from pyaccel.reference.int8 import dequantize

MODES = (*common.MODES, "int8")


def problem(sizes: tuple[int, int, str], dtype: torch.dtype, device: torch.device) -> Problem:
    """x and its gradient ``[rows, cols]``, bias ``[cols]``."""
    rows, cols, mode = sizes
    draw = normal(dtype, device)
    x, grad = draw(2, rows, cols).unbind()
    return Problem((x.detach(), draw(cols)), mode, grad)


def plain(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def plain_int8(x: Tensor, bias: Tensor) -> Outputs:
    return reference.quantize_per_token(F.gelu(x.float() + bias.float()))


def stock(p: Problem) -> Callable[[Tensor, Tensor], Any]:
    return plain_int8 if p.mode == "int8" else plain


def ours(p: Problem) -> Callable[[Tensor, Tensor], Any]:
    return partial(ops.bias_gelu, quantize_output=p.mode == "int8")


def values(p: Problem, given: Outputs) -> Outputs:
    """What codes and scales stand for: int8 is judged by the error that any int8 makes."""
    return (dequantize(*given),) if p.mode == "int8" else given


def bytes_moved(p: Problem) -> int:
    """Forward reads x and writes the output; backward reads dy and x and writes dx. A code has one byte."""
    x = p.leaves[0]
    size = x.element_size()
    each = {"forward": 2 * size, "forward+backward": 5 * size, "int8": size + 1}[p.mode]
    return each * x.numel()


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
    truth=lambda p: p.exactly_by(reference.bias_gelu),
    naive=lambda p: values(p, p.by(stock(p))),
    bytes_moved=bytes_moved,
    variants=variants("bias_gelu", ours, stock, values),
)
CASES = (CASE,)
