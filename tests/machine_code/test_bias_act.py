"""Machine code of the bias_gelu family: every launch configuration that ships, for real GPUs.

What is compiled: in bf16, which is what users run, erf GELU (which takes most registers) with every configuration for
every architecture, and the other activations with the configurations of feed-forward layers for sm_90; in fp32 and in
autocast's mix, erf GELU for sm_90: register demand depends on the dtypes. fp16 is
left out: it is bf16 with another conversion instruction.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyaccel.inspect.spec import KernelSpec
from pyaccel.inspect.specs import bias_act as bias_gelu_specs
from pyaccel.inspect.specs.registry import specs
from pyaccel.kernels.bias_act import kernels as bias_gelu
from pyaccel.kernels.common import limits
from pyaccel.ops.bias_act.api import ACTIVATIONS
from tests.machine_code import ROW_ARCHS, ROW_FP32_ARCHS
from tests.machine_code.budgets import (
    Check,
    Compiled,
    as_spec,
    compile_specs,
    no_matrix_instructions,
    no_spills_and_no_stack,
    occupancy,
    parametrize,
    persistent_grid_is_resident,
    shared_memory_fits,
    violations,
    wide_accesses,
)

MATRIX = {"bf16": ROW_ARCHS, "fp32": ROW_FP32_ARCHS, "bf16 + fp32": ("sm_90",)}
FEED_FORWARD = 3072
# Matrices that are read.
INPUTS = {"forward": 1, "backward": 2, "int8": 1}


def kind(spec: KernelSpec) -> str:
    return spec.name.split(", ")[0]


def wanted(spec: KernelSpec, arch: str) -> bool:
    if spec.name.endswith(", gelu"):
        return True
    of_layers = bias_gelu_specs.HEURISTICS[kind(spec)](FEED_FORWARD).label
    return arch == "sm_90" and spec.config == of_layers


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """Every kernel of the matrix with its machine code."""
    tasks = [
        (spec, arch)
        for spec in specs("bias_gelu")
        for arch in MATRIX.get(spec.dtype, ())
        if wanted(spec, arch)
    ]
    return compile_specs(tasks)


def test_every_configuration_and_activation_is_there(compiled: Compiled) -> None:
    shipped = {
        (name, heuristic(n).label)
        for name, heuristic in bias_gelu_specs.HEURISTICS.items()
        for n in range(1, limits.MAX_ROW + 1)
    }
    for dtype, archs in MATRIX.items():
        for arch in archs:
            of_gelu = {
                (kind(spec), spec.config)
                for spec, code in compiled
                if (code.dtype, code.arch) == (dtype, arch) and spec.name.endswith(", gelu")
            }
            assert of_gelu == shipped
    names = {spec.name for spec, _ in compiled}
    assert names == {f"{name}, {activation}" for name in INPUTS for activation in ACTIVATIONS}


def least_occupancy(spec: KernelSpec) -> float:
    """3/8 of the most, 1/4 for int8 rows above 8192."""
    return 0.25 if spec.constexprs["BLOCK_N"] > 8192 else 0.375


@parametrize(
    no_spills_and_no_stack,
    shared_memory_fits,
    persistent_grid_is_resident,
    no_matrix_instructions,
    occupancy(least_occupancy),
    wide_accesses(lambda spec: (INPUTS[kind(spec)], 1)),
)
def test_machine_code(compiled: Compiled, check: Check) -> None:
    assert violations(compiled, check) == []


# What is compiled above must be what the launchers launch: the same kernels, types, constants and warps.

TORCH_DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "bf16 + fp32": (torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("dtype", MATRIX)
@pytest.mark.parametrize("n_cols", [256, 4096])
def test_the_specs_are_what_the_launchers_launch(n_cols: int, dtype: str, launches: list[Any]) -> None:
    x_dtype, bias_dtype = TORCH_DTYPES[dtype]
    x = torch.empty(bias_gelu_specs.N_ROWS, n_cols, dtype=x_dtype)
    bias = torch.empty(n_cols, dtype=bias_dtype)
    codes, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
    configs = {name: heuristic(n_cols) for name, heuristic in bias_gelu_specs.HEURISTICS.items()}
    bias_gelu.forward(x, x, bias, "gelu", configs["forward"])
    bias_gelu.backward(x, torch.empty(3, n_cols), x, x, bias, "gelu", 3, configs["backward"])
    bias_gelu.quantize(codes, scale, x, bias, "gelu", configs["int8"])

    shipped = {(spec.name, spec.config): spec for spec in specs("bias_gelu") if spec.dtype == dtype}
    assert len(launches) == len(configs)
    for (name, row_config), launch in zip(configs.items(), launches, strict=True):
        like = shipped[(f"{name}, gelu", row_config.label)]
        assert as_spec(*launch, like) == like
