"""Machine code of the bias_gelu family: every launch configuration that ships, for real GPUs.

What is compiled: in bf16, which is what users run, erf GELU (which takes most registers) with every configuration for
every architecture, and the other activations with the configurations of feed-forward layers for sm_90; in fp32 and in
autocast's mix, erf GELU for sm_90: register demand depends on the dtypes. fp16 is
left out: it is bf16 with another conversion instruction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyaccel.inspect.compile import MachineCode, compile_tasks
from pyaccel.inspect.gpus import PARTS
from pyaccel.inspect.spec import KernelSpec, kernel_spec
from pyaccel.inspect.specs import bias_act as bias_gelu_specs
from pyaccel.inspect.specs.registry import specs
from pyaccel.kernels.bias_act import kernels as bias_gelu
from pyaccel.kernels.common import limits
from pyaccel.ops.bias_act.api import ACTIVATIONS
from tests.machine_code import ROW_ARCHS, ROW_FP32_ARCHS

MATRIX = {"bf16": ROW_ARCHS, "fp32": ROW_FP32_ARCHS, "bf16 + fp32": ("sm_90",)}
FEED_FORWARD = 3072
# Matrices that are read.
INPUTS = {"forward": 1, "backward": 2, "int8": 1}

Compiled = list[tuple[KernelSpec, MachineCode]]


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
    return [(spec, code) for (spec, _), code in zip(tasks, compile_tasks(tasks), strict=True)]


def violations(compiled: Compiled, broken: Callable[[KernelSpec, MachineCode], Any]) -> list[str]:
    """The kernels for which `broken` returns what is wrong with them."""
    found = ((code, broken(spec, code)) for spec, code in compiled)
    return [f"{code}: {problem}" for code, problem in found if problem]


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


def test_no_spills_and_no_stack(compiled: Compiled) -> None:
    def broken(_: KernelSpec, code: MachineCode) -> str:
        spilled = code.spill_bytes > 0 or code.stack_bytes > 0
        return f"spills {code.spill_bytes} B, stack {code.stack_bytes} B" * spilled

    assert violations(compiled, broken) == []


def test_shared_memory_fits(compiled: Compiled) -> None:
    def broken(_: KernelSpec, code: MachineCode) -> str:
        return f"{code.shared_bytes} B" * (code.shared_bytes > PARTS[code.arch].shared_per_block)

    assert violations(compiled, broken) == []


def test_persistent_grids_are_resident_at_once(compiled: Compiled) -> None:
    """A persistent grid of more programs than the device holds runs in waves, the last one mostly empty."""

    def broken(spec: KernelSpec, code: MachineCode) -> str:
        resident = round(code.occupancy * PARTS[code.arch].warps_per_sm / code.num_warps)
        too_many = resident < max(spec.programs_per_sm, 1)
        return f"{resident} programs fit an SM, {spec.programs_per_sm} are launched" * too_many

    assert violations(compiled, broken) == []


def test_occupancy(compiled: Compiled) -> None:
    """Memory-bound kernels hide latency with warps: 3/8 of the most, 1/4 for int8 rows above 8192."""

    def broken(spec: KernelSpec, code: MachineCode) -> str:
        least = 0.25 if spec.constexprs["BLOCK_N"] > 8192 else 0.375
        return f"occupancy {code.occupancy:.0%}" * (code.occupancy < least)

    assert violations(compiled, broken) == []


def test_matrices_move_512_bytes_a_warp(compiled: Compiled) -> None:
    """Every matrix is read and written with accesses of 512 bytes a warp, int8 codes too.

    That is 128 bits for each of 32 lanes, the widest there is; half of it does for each of AMD's 64.
    """

    def broken(spec: KernelSpec, code: MachineCode) -> str:
        wide = 512 * 8 // PARTS[code.arch].warp_size
        loads = sum(n for bits, n in code.loads.items() if bits >= wide)
        stores = sum(n for bits, n in code.stores.items() if bits >= wide)
        return f"loads {code.loads}, stores {code.stores}" * (loads < INPUTS[kind(spec)] or stores < 1)

    assert violations(compiled, broken) == []


def test_no_matrix_instructions(compiled: Compiled) -> None:
    assert violations(compiled, lambda _, code: code.wgmma + code.mma) == []


# What is compiled above must be what the launchers launch: the same kernels, types, constants and warps.

POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8"}
TORCH_DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "bf16 + fp32": (torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("dtype", MATRIX)
@pytest.mark.parametrize("n_cols", [256, 4096])
def test_the_specs_are_what_the_launchers_launch(
    n_cols: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False))
        named.update({key: value for key, value in kwargs.items() if key in self.arg_names})
        launches.append((self, named, {k: v for k, v in kwargs.items() if k not in self.arg_names}))

    monkeypatch.setattr(type(bias_gelu.forward_kernel), "run", run)
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
    for (name, row_config), (kernel, named, options) in zip(configs.items(), launches, strict=True):
        like = shipped[(f"{name}, gelu", row_config.label)]
        values = {k: POINTERS[v.dtype] if isinstance(v, torch.Tensor) else v for k, v in named.items()}
        constexprs = {key: values.pop(key) for key in list(values) if key.isupper()}
        launched = kernel_spec(
            like.op,
            like.name,
            f"{kernel.fn.__module__}:{kernel.__name__}",
            values,
            constexprs,
            dtype=dtype,
            config=like.config,
            programs_per_sm=row_config.programs_per_sm,
            **options,
        )
        assert launched == like
