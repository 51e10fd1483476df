"""A deployed int8 layer (the weight is codes, x is quantized as it comes) with bias and erf GELU, in inference.

The truth is the floating layer in fp64 and the yardstick plain int8 in PyTorch: a contender may be as wrong as int8
is, by the policy, and no more. Rows go from a single token, where the weight's bytes take the time, to full batches.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyaccel import dispatch, ops, reference
from pyaccel.benchmarks.case import Case, Variant, no_triton
from pyaccel.benchmarks.cases.common import Outputs, normal
from pyaccel.ops.int8.weight_only import MANY_ROWS

LAYERS = ((384, 1536), (768, 3072), (1024, 4096))
# torch._int_mm on a GPU wants more rows than these.
INT_MM_ROWS = 17


@dataclass(frozen=True)
class Problem:
    """x ``[rows, in]``, weight ``[out, in]``, bias ``[out]``; the weight's codes and scales."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    codes: Tensor
    scale: Tensor


def problem(sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Problem:
    rows, n_in, n_out = sizes
    draw = normal(dtype, device)
    x, weight, bias = draw(rows, n_in), draw(n_out, n_in, scale=n_in**-0.5), draw(n_out)
    codes, scale = reference.quantize_per_channel(weight)
    return Problem(x, weight, bias, codes, scale)


def truth(p: Problem) -> Outputs:
    return (F.gelu(F.linear(p.x.double(), p.weight.double(), p.bias.double())),)


def naive(p: Problem) -> Outputs:
    """int8 as the literature has it: each token around zero, by its largest value."""
    codes, scale = reference.quantize_per_token(p.x)
    out = reference.int8_matmul(
        codes, p.codes, scale, p.scale, p.bias, activation="gelu", out_dtype=p.x.dtype, upcast=False
    )
    assert isinstance(out, Tensor)  # with scales it would be a pair
    return (out,)


def prepare_ours(backend: str, *, weight_only: bool = False) -> Callable[[Problem], Callable[[], Outputs]]:
    def prepare(p: Problem) -> Callable[[], Outputs]:
        @torch.no_grad()
        def call() -> Outputs:
            with dispatch.use_backend(backend):
                return (
                    ops.int8_linear(
                        p.x, p.codes, p.bias, "gelu", weight_scale=p.scale, weight_only=weight_only
                    ),
                )

        return call

    return prepare


def no_weight_only(p: Problem) -> str | None:
    if p.x.dtype == torch.float32:
        return "the kernel takes 16-bit inputs"
    return f"for up to {MANY_ROWS} rows" if len(p.x) > MANY_ROWS else no_triton(p.x.device)


def by_int_mm(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Outputs:
    """What one writes in PyTorch."""
    x_scale = x.abs().amax(-1, keepdim=True).float() / 127
    x_codes = (x / x_scale).round().to(torch.int8)
    out = torch._int_mm(x_codes, codes.T).float() * x_scale * scale + bias
    return (F.gelu(out).to(x.dtype),)


def prepare_int_mm(p: Problem, *, compiled: bool = False) -> Callable[[], Outputs]:
    function = torch.compile(by_int_mm, dynamic=False) if compiled else by_int_mm
    return torch.no_grad()(lambda: function(p.x, p.codes, p.scale, p.bias))


def no_int_mm(p: Problem) -> str | None:
    few = p.x.is_cuda and len(p.x) < INT_MM_ROWS
    return f"torch._int_mm takes {INT_MM_ROWS} rows or more on a GPU" if few else None


def prepare_linear(p: Problem, *, compiled: bool = False) -> Callable[[], Outputs]:
    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
        return (F.gelu(F.linear(x, weight, bias)),)

    function = torch.compile(plain, dynamic=False) if compiled else plain
    return torch.no_grad()(lambda: function(p.x, p.weight, p.bias))


def prepare_torchao(p: Problem) -> Callable[[], Outputs]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    linear = nn.Linear(p.x.shape[1], len(p.bias))
    model = nn.Sequential(linear, nn.GELU()).to(p.x.device, p.x.dtype)
    with torch.no_grad():
        linear.weight.copy_(p.weight)
        linear.bias.copy_(p.bias)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(model, dynamic=False)
    return torch.no_grad()(lambda: (compiled(p.x),))


def no_torchao(_: Problem) -> str | None:
    return None if importlib.util.find_spec("torchao") else "torchao is not installed"


def sizes(layers: tuple[tuple[int, int], ...], rows: tuple[int, ...]) -> dict[str, tuple[int, int, int]]:
    return {f"{n}x{n_in} to {n_out}": (n, n_in, n_out) for n_in, n_out in layers for n in rows}


CASE = Case(
    name="int8_linear",
    group="ops",
    sizes=sizes(LAYERS, (1, 16, 128, 2048, 16384)),
    cpu_sizes=sizes(LAYERS[:2], (1, 16, 128, 2048)),
    smoke=sizes(((24, 40),), (19,)),
    quick="^(128|2048)x384 ",
    problem=problem,
    truth=truth,
    naive=naive,
    # x is read and the output written in its dtype, the weight read in int8.
    bytes_moved=lambda p: (
        p.x.element_size() * (p.x.numel() + len(p.x) * len(p.bias)) + p.codes.numel() + 8 * len(p.bias)
    ),
    flops=lambda p: 2 * p.x.numel() * len(p.bias),
    variants=(
        Variant("pyaccel triton", prepare_ours("triton"), lambda p: no_triton(p.x.device)),
        Variant("pyaccel torch", prepare_ours("torch")),
        Variant("pyaccel triton, weight only", prepare_ours("triton", weight_only=True), no_weight_only),
        Variant("pyaccel torch, weight only", prepare_ours("torch", weight_only=True)),
        Variant("floating", prepare_linear),
        Variant("floating, torch.compile", lambda p: prepare_linear(p, compiled=True)),
        Variant("torch._int_mm", prepare_int_mm, no_int_mm),
        Variant("torch._int_mm, torch.compile", lambda p: prepare_int_mm(p, compiled=True), no_int_mm),
        Variant("torchao, torch.compile", prepare_torchao, no_torchao),
    ),
)
CASES = (CASE,)
