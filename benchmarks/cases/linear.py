"""The first product of a feed-forward layer with bias and erf GELU, of MiniLM, BERT-base and BERT-large."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import ops
from pyaccel.benchmarks.case import Case
from pyaccel.benchmarks.cases.common import MODES, Problem, normal, variants

LAYERS = ((384, 1536), (768, 3072), (1024, 4096))


def problem(sizes: tuple[int, int, int, str], dtype: torch.dtype, device: torch.device) -> Problem:
    """x ``[rows, in]``, weight ``[out, in]``, bias ``[out]``; the output's gradient."""
    rows, n_in, n_out, mode = sizes
    draw = normal(dtype, device)
    leaves = (draw(rows, n_in), draw(n_out, n_in, scale=n_in**-0.5), draw(n_out))
    return Problem(leaves, mode, draw(rows, n_out))


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.linear_activation(x, weight, bias, "gelu")


def bytes_moved(p: Problem) -> int:
    """Forward reads x and weight and writes the output, in training the pre-activation too; backward reads that, the
    gradient, x and weight, and writes the gradients of x and weight."""
    x, weight, _ = p.leaves
    matrices, outputs = x.numel() + weight.numel(), len(x) * len(weight)
    of_mode = 3 * matrices + 4 * outputs if p.backward else matrices + outputs
    return x.element_size() * of_mode


def flops(p: Problem) -> int:
    """One product forward, two backward; the activation runs beside them."""
    return 2 * p.leaves[0].numel() * len(p.leaves[1]) * (3 if p.backward else 1)


def sizes(layers: tuple[tuple[int, int], ...], rows: tuple[int, ...]) -> dict[str, tuple[int, int, int, str]]:
    return {
        f"{n}x{n_in} to {n_out} {mode}": (n, n_in, n_out, mode)
        for mode in MODES
        for n_in, n_out in layers
        for n in rows
    }


CASE = Case(
    name="linear_activation",
    group="ops",
    sizes=sizes(LAYERS, (128, 2048, 16384)),
    cpu_sizes=sizes(LAYERS[:1], (128, 2048)),
    smoke=sizes(((24, 40),), (9,)),
    quick="^2048x384 ",
    problem=problem,
    truth=lambda p: p.exactly_by(plain),
    naive=lambda p: p.by(plain),
    bytes_moved=bytes_moved,
    flops=flops,
    # pyaccel's torch backend: on a GPU F.linear and a pass of bias_gelu, on a CPU oneDNN's fused product in evaluation.
    variants=variants("linear_activation", lambda p: ours, lambda p: plain),
)
CASES = (CASE,)
