"""Machine code of the residual_layernorm family: every launch configuration that ships, for real GPUs.

What is compiled:

* in bf16, which is what users run, and in fp32, every configuration with all options for sm_90: register demand depends
  on the dtypes;
* the configurations of BERT base's rows and of the longest ones in bf16 for gfx942, in autocast's mix for sm_90, and
  lean (as in inference) in bf16 for sm_90.

PYACCEL_EVERY_ARCH=1 takes every configuration for each of these, and every architecture. fp16 is left out: it is bf16
with another conversion instruction.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyaccel.inspect.compile import MachineCode
from pyaccel.inspect.gpus import GPU_SPECS
from pyaccel.inspect.spec import KernelSpec
from pyaccel.inspect.specs.registry import specs
from pyaccel.kernels.common import configs, limits
from pyaccel.kernels.common import reduce as column_sum
from pyaccel.kernels.layernorm import backward as residual_layernorm_backward
from pyaccel.kernels.layernorm import config
from pyaccel.kernels.layernorm import forward as residual_layernorm
from tests.machine_code import EVERY, ROW_ARCHS, ROW_FP32_ARCHS
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
    rows_stay_in_registers,
    shared_memory_fits,
    violations,
    wide_accesses,
)

MATRIX = {
    "bf16": ROW_ARCHS + (("gfx950",) if EVERY else ()),
    "fp32": ROW_FP32_ARCHS,
    "bf16 + fp32": ("sm_90",),
}
LEAN = ("bf16", "sm_90")
COMPLETE = {("bf16", "sm_90"), ("fp32", "sm_90")}
ROWS = range(1, limits.MAX_ROW + 1)
SOME_ROWS = ROWS if EVERY else (768, limits.MAX_QUANTIZED_ROW, limits.MAX_ROW)
ROW_INPUTS = {
    "forward": {"x_ptr", "residual_ptr"},
    "backward": {"dy_ptr", "dsum_ptr", "sum_ptr"},
}
ROW_OUTPUTS = {
    "forward": {"out_ptr", "sum_ptr"},
    "backward": {"dx_ptr", "dresidual_ptr"},
}


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """Every kernel of the matrix with its machine code."""
    tasks = [
        (spec, arch)
        for spec in specs("residual_layernorm")
        for arch in MATRIX.get(spec.dtype, ())
        if not lean(spec) or (spec.dtype, arch) == LEAN
        if spec.config in labels(spec.name, spec.dtype, arch)
    ]
    return compile_specs(tasks)


def lean(spec: KernelSpec) -> bool:
    """Whether it is a kernel without its options, of which there is one with all of them too."""
    return spec.name in ("forward", "backward")


def labels(name: str, dtype: str, arch: str) -> set[str]:
    """The configurations to compile of a kernel."""
    if name == "column sum":
        return {configs.column_sum().label}
    complete = (dtype, arch) in COMPLETE and name not in ("forward", "backward")
    rows = ROWS if complete else SOME_ROWS
    if name.startswith("backward"):
        return {config.residual_layernorm_backward(n).label for n in rows}
    longest = limits.MAX_QUANTIZED_ROW if name.endswith("int8") else limits.MAX_ROW
    return {config.residual_layernorm_forward(n).label for n in rows if n <= longest}


def test_every_kernel_dtype_and_architecture_is_there(compiled: Compiled) -> None:
    names = ["forward, dropout", "forward, int8", "backward, dropout", "column sum"]
    expected = {
        (dtype, arch, name): labels(name, dtype, arch)
        for dtype, archs in MATRIX.items()
        for arch in archs
        for name in (*names, *(["forward", "backward"] if (dtype, arch) == LEAN else []))
    }
    there: dict[tuple[str, str, str], set[str]] = {}
    for spec, code in compiled:
        there.setdefault((code.dtype, code.arch, spec.name), set()).add(spec.config)
    assert there == expected
    assert not EVERY or {code.arch for _, code in compiled} == set(GPU_SPECS)


def registers(_: KernelSpec, code: MachineCode) -> str:
    # 255 is the most that an instruction can name; at the limit a kernel is about to spill.
    return f"{code.registers} registers" * (code.registers > 232)


def least_occupancy(spec: KernelSpec) -> float:
    """Forward 3/8 of the most, 1/4 for rows above 8192, 2048 with codes."""
    longest = 2048 if spec.name.endswith("int8") else 8192
    least = 0.25 if spec.constexprs["BLOCK_N"] > longest else 0.375
    return least if spec.name.startswith("forward") else 0.0


def accesses(spec: KernelSpec) -> tuple[int, int]:
    kind = spec.name.split(",")[0]
    if kind == "column sum":
        return 1, 0
    return len(ROW_INPUTS[kind] & spec.signature.keys()), len(ROW_OUTPUTS[kind] & spec.signature.keys())


@parametrize(
    no_spills_and_no_stack,
    registers,
    shared_memory_fits,
    rows_stay_in_registers,
    persistent_grid_is_resident,
    no_matrix_instructions,
    occupancy(least_occupancy),
    wide_accesses(accesses),
)
def test_machine_code(compiled: Compiled, check: Check) -> None:
    assert violations(compiled, check) == []


# What is compiled above must be what the launchers launch: the same kernels, types, constants and warps.


TORCH_DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "bf16 + fp32": (torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("variant", ["", ", dropout", ", int8"])
@pytest.mark.parametrize("dtype", MATRIX)
@pytest.mark.parametrize("n_cols", [64, 1024, 4096, 16384])
def test_the_specs_are_what_the_launchers_launch(
    launches: list[Any], n_cols: int, dtype: str, variant: str
) -> None:
    if variant == ", int8":
        n_cols = min(n_cols, limits.MAX_QUANTIZED_ROW)
    full, int8 = variant == ", dropout", variant == ", int8"
    branch, stream = TORCH_DTYPES[dtype]
    n_rows = 5
    x = torch.empty(n_rows, n_cols, dtype=branch)
    residual = torch.empty(n_rows, n_cols, dtype=stream)
    vector = torch.empty(n_cols, dtype=stream)
    statistics = torch.empty(n_rows)
    key = torch.zeros(2, dtype=torch.int64) if full else None
    dropout_p = 0.1 if full else 0.0
    forward_config = config.residual_layernorm_forward(n_cols)
    backward_config = config.residual_layernorm_backward(n_cols)
    partial = torch.empty(3, n_cols)
    residual_layernorm.forward(
        torch.empty_like(residual),
        torch.empty_like(residual) if full else None,
        torch.empty_like(residual, dtype=torch.int8) if int8 else None,
        statistics if int8 else None,
        statistics if full else None,
        statistics if full else None,
        x,
        residual,
        vector,
        vector,
        vector if variant else None,
        key,
        1e-12,
        dropout_p,
        False,
        forward_config,
    )
    residual_layernorm_backward.backward(
        torch.empty_like(x),
        torch.empty_like(residual) if full else None,
        partial,
        partial,
        partial if full else None,
        residual,
        residual if full else None,
        residual,
        statistics,
        statistics,
        vector,
        key,
        dropout_p,
        3,
        backward_config,
    )
    column_sum.column_sum((vector,) * 3, (partial,) * 3, configs.column_sum())

    suffix = ", dropout" if full else ""
    labels = [
        ("forward" + variant, forward_config.label),
        ("backward" + suffix, backward_config.label),
        ("column sum", configs.column_sum().label),
    ]
    shipped = {(s.name, s.config): s for s in specs("residual_layernorm") if s.dtype == dtype}
    assert len(launches) == len(labels)
    for launch, label in zip(launches, labels, strict=True):
        assert as_spec(*launch, shipped[label]) == shipped[label]
