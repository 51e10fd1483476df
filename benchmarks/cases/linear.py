"""The first product of a feed-forward layer with bias and erf GELU, of MiniLM, BERT-base and BERT-large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch, ops
from pyaccel.benchmarks.registry import Case, Variant, no_triton

MODES = ("forward", "forward+backward")
LAYERS = ((384, 1536), (768, 3072), (1024, 4096))
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """x ``[rows, in]``, weight ``[out, in]``, bias ``[out]``, the output's gradient; a mode of :data:`MODES`."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    grad: Tensor
    mode: str


def problem(sizes: tuple[int, int, int, str], dtype: torch.dtype, device: torch.device) -> Problem:
    rows, n_in, n_out, mode = sizes
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    wanted = mode == "forward+backward"
    leaves = (draw(rows, n_in), draw(n_out, n_in, scale=n_in**-0.5), draw(n_out))
    x, weight, bias = (t.requires_grad_(wanted) for t in leaves)
    return Problem(x, weight, bias, draw(rows, n_out), mode)


def by(function: Callable[..., Tensor], p: Problem) -> Outputs:
    """What the mode asks of a function of x, weight and bias: its output, or that and the three gradients."""
    leaves = (p.x, p.weight, p.bias)
    out = function(*leaves)
    return (out, *torch.autograd.grad(out, leaves, p.grad)) if p.mode == "forward+backward" else (out,)


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def truth(p: Problem) -> Outputs:
    x, weight, bias = (t.detach().double().requires_grad_(t.requires_grad) for t in (p.x, p.weight, p.bias))
    return by(plain, Problem(x, weight, bias, p.grad.double(), p.mode))


def bytes_moved(p: Problem) -> int:
    """Forward reads x and weight and writes the output, in training the pre-activation too; backward reads that, the
    gradient, x and weight, and writes the gradients of x and weight."""
    matrices, outputs = p.x.numel() + p.weight.numel(), p.grad.numel()
    of_mode = 3 * matrices + 4 * outputs if p.mode == "forward+backward" else matrices + outputs
    return p.x.element_size() * of_mode


def flops(p: Problem) -> int:
    """One product forward, two backward; the activation runs beside them."""
    return 2 * p.x.numel() * p.weight.shape[0] * (3 if p.mode == "forward+backward" else 1)


def prepare_ours(backend: str) -> Callable[[Problem], Callable[[], Outputs]]:
    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with dispatch.use_backend(backend, ops=["linear_activation"]):
            return ops.linear_activation(x, weight, bias, "gelu")

    return lambda p: lambda: by(ours, p)


def prepare_compiled(p: Problem) -> Callable[[], Outputs]:
    compiled = torch.compile(plain, dynamic=False)
    return lambda: by(compiled, p)


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
    truth=truth,
    naive=lambda p: by(plain, p),
    bytes_moved=bytes_moved,
    flops=flops,
    variants=(
        Variant("pyaccel triton", prepare_ours("triton"), lambda p: no_triton(p.grad.device)),
        # On a GPU F.linear and one pass of bias_gelu; on a CPU oneDNN's fused product in evaluation.
        Variant("pyaccel torch", prepare_ours("torch")),
        Variant("eager", lambda p: lambda: by(plain, p)),
        Variant("torch.compile", prepare_compiled),
    ),
)
CASES = (CASE,)
