"""Machine code of quantization and of the int8 products: every launch configuration that ships, for real GPUs.

What is compiled: products in bf16 with all terms and erf GELU by every configuration for every architecture; for sm_90
in fp32, of inner dimensions that no block divides, of no epilogue (split products) and by the other activations with
its largest configurations, with and without the copy engine. Rows that are finished or quantized: with all terms in
fp32, which takes most registers, for sm_90, and of the longest rows for gfx942; lean, and in bf16, for sm_90.
PYACCEL_EVERY_ARCH=1 takes every configuration for each of these, and products without a residual. fp16 is left out: it
is bf16 with another conversion instruction.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyaccel.inspect.compile import MachineCode, tasks
from pyaccel.inspect.spec import KernelSpec
from pyaccel.inspect.specs import int8 as int8_specs
from pyaccel.inspect.specs.registry import specs
from pyaccel.kernels.common import limits
from pyaccel.kernels.common.device import generation
from pyaccel.kernels.int8 import config, quantize
from pyaccel.kernels.int8 import epilogue as int8_epilogue
from pyaccel.kernels.int8 import matmul as int8_matmul
from pyaccel.kernels.int8 import weight_only as int8_weight_only
from pyaccel.kernels.int8.epilogue import Epilogue
from pyaccel.ops.linear.api import ACTIVATIONS
from tests.machine_code import ARCHS, DISTINCT_ARCHS, EVERY, ROW_ARCHS
from tests.machine_code.budgets import (
    Check,
    Compiled,
    as_spec,
    compile_specs,
    no_spills_and_no_stack,
    parametrize,
    shared_memory_fits,
    violations,
    wide_bits,
    wide_bytes_loaded,
)

LARGEST = config.CONFIGS["hopper"][0].label
BOTH_LARGEST = {LARGEST, config.TMA_CONFIGS["hopper"][0].label}
LONGEST = {
    config.quantize(limits.MAX_ROW).label,
    config.int8_finish(limits.MAX_QUANTIZED_ROW, quantize=True).label,
}


def wanted(spec: KernelSpec, arch: str) -> bool:
    if spec.dtype == "fp16":
        return False
    if spec.op == "quantize" or spec.name.startswith("finish"):
        full = spec.name in ("rows, offset and factor", "finish", "finish, int8")
        if arch == "sm_90":
            # Full ones in fp32 take most registers; lean ones are compiled in the dtype that users run.
            return EVERY or full == (spec.dtype == "fp32") or spec.name in ("tensor", "row sum", "finish")
        longest = EVERY or spec.name == "finish" or spec.config in LONGEST
        return full and longest and spec.dtype == "fp32" and arch in ROW_ARCHS
    if spec.name in ("everything, gelu", "weight only") and spec.dtype == "bf16":
        return arch in DISTINCT_ARCHS
    activation = spec.name.rsplit(", ", 1)[-1]
    if activation in ACTIVATIONS and activation != "gelu":
        largest = spec.config == LARGEST
        return (
            arch == "sm_90" and largest and spec.name.startswith("everything") and "uneven" not in spec.name
        )
    if not EVERY and (
        spec.name.startswith("dynamic")
        or not (spec.config in BOTH_LARGEST or spec.name.startswith("weight only"))
    ):
        return False
    return arch == "sm_90" and (spec.dtype != "fp32" or spec.name == "everything, gelu")


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """Every kernel of the matrix with its machine code."""
    everything = [*specs("quantize"), *specs("int8_matmul")]
    chosen = [(spec, arch) for spec, arch in tasks(everything, ARCHS) if wanted(spec, arch)]
    return compile_specs(chosen)


def products(compiled: Compiled) -> Compiled:
    return [(s, c) for s, c in compiled if s.op == "int8_matmul" and not s.name.startswith("finish")]


def test_every_configuration_is_there(compiled: Compiled) -> None:
    for arch in DISTINCT_ARCHS:
        chip = generation(arch)
        shipped = {c.label for c in (*config.CONFIGS[chip], *config.TMA_CONFIGS.get(chip, ()))}
        for name in ("everything, gelu", "sums") if arch == "sm_90" else ("everything, gelu",):
            there = {s.config for s, c in compiled if (c.arch, s.name) == (arch, name) and s.dtype != "fp32"}
            assert there == (shipped if EVERY or name != "sums" else BOTH_LARGEST)
    names = {spec.name for spec, _ in compiled}
    assert {f"everything, {a}" for a in ACTIVATIONS if a is not None} <= names
    assert {"rows", "rows, offset and factor", "tensor", "row sum", "finish", "finish, int8"} <= names
    widths = {config.quantize(n).label for n in range(1, limits.MAX_ROW + 1)}
    assert {s.config for s, _ in compiled if s.name == "rows"} == widths


def right_matrix_instructions(spec: KernelSpec, code: MachineCode) -> str:
    """Hopper's are wgmma; but of 16 rows a warp group has no use, and there the smaller instructions serve."""
    if code.arch == "sm_90" and spec.constexprs["BLOCK_M"] > 16:
        wrong = code.wgmma == 0 or code.mma > 0
    else:
        wrong = code.mma == 0 or code.wgmma > 0
    return f"{code.wgmma} wgmma, {code.mma} other" * wrong


def copy_engine_loads_where_it_is_asked_to(spec: KernelSpec, code: MachineCode) -> str:
    return "TMA" * ((code.tma > 0) != bool(spec.constexprs.get("TMA", False)))


def tiles_move_512_bytes_a_warp(spec: KernelSpec, code: MachineCode) -> str:
    """Both operands are read with accesses of 512 bytes a warp. What the copy engine reads no thread does."""
    block_m, block_n, block_k = (spec.constexprs[f"BLOCK_{axis}"] for axis in "MNK")
    itemsize = 1 if spec.signature.get("a_ptr") else 2
    tiles = (block_m * itemsize + block_n) * block_k
    return f"loads {code.loads}" * (not code.tma and wide_bytes_loaded(code) < tiles)


def rows_are_read_and_written_wide(spec: KernelSpec, code: MachineCode) -> str:
    """256 bytes a warp and more, codes too; what is left for narrow accesses are scales and offsets."""
    if spec.op != "quantize" or spec.name == "row sum":
        return ""
    narrow = min(code.load_bits, code.store_bits) < wide_bits(code) // 2
    return f"loads {code.loads}, stores {code.stores}" * narrow


@parametrize(no_spills_and_no_stack, shared_memory_fits, rows_are_read_and_written_wide)
def test_machine_code(compiled: Compiled, check: Check) -> None:
    assert violations(compiled, check) == []


@parametrize(right_matrix_instructions, copy_engine_loads_where_it_is_asked_to, tiles_move_512_bytes_a_warp)
def test_machine_code_of_products(compiled: Compiled, check: Check) -> None:
    assert violations(products(compiled), check) == []


# What is compiled above must be what the launchers launch: the same kernels, types, constants and options.


def epilogue(dtype: torch.dtype, rows: int, n_out: int, activation: str) -> Epilogue:
    return Epilogue(
        torch.empty(rows),
        torch.empty(n_out),
        torch.empty(rows),
        torch.empty(n_out, dtype=torch.int32),
        torch.empty(n_out, dtype=dtype),
        torch.empty(rows, n_out, dtype=dtype),
        activation,
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_product_specs_are_what_is_launched(
    arch: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton.set_allocator", lambda _: None)
    shipped = {(s.name, s.config): s for s in specs("int8_matmul") if s.dtype in ("bf16", "int8")}
    rows, n_out, chip = int8_specs.N_ROWS, int8_specs.N_OUT, generation(arch)
    terms = epilogue(torch.bfloat16, rows, n_out, "gelu")
    for chosen in (*config.CONFIGS[chip], *config.TMA_CONFIGS.get(chip, ())):
        for name, n_in in (("everything, gelu", 768), ("everything, uneven, gelu", 784), ("sums", 768)):
            a, b = (torch.empty(n, n_in, dtype=torch.int8) for n in (rows, n_out))
            if name == "sums":
                int8_matmul.matmul(torch.empty(1, rows, n_out, dtype=torch.int32), a, b, None, chosen)
            else:
                int8_matmul.matmul(torch.empty(rows, n_out, dtype=torch.bfloat16), a, b, terms, chosen)
            like = shipped[name, chosen.label]
            assert as_spec(*launches.pop(), like) == like


def test_the_other_specs_are_what_is_launched(launches: list[Any]) -> None:
    every = [*specs("int8_matmul"), *specs("quantize")]
    shipped = {(s.name, s.config): s for s in every if s.dtype in ("bf16", "int8")}

    def check(name: str, label: str) -> None:
        like = shipped[name, label]
        assert as_spec(*launches.pop(), like) == like

    rows = int8_specs.N_ROWS
    for n_out in (*int8_specs.WIDTHS, int8_specs.N_OUT):
        again = n_out in int8_specs.WIDTHS
        chosen = config.int8_finish(n_out, quantize=again)
        out = torch.empty(rows, n_out, dtype=torch.int8 if again else torch.bfloat16)
        sums = torch.empty(1 if again else 3, rows, n_out, dtype=torch.int32)
        terms = epilogue(torch.bfloat16, rows, n_out, "gelu")
        int8_epilogue.finish(out, torch.empty(rows) if again else None, sums, terms, chosen)
        check("finish, int8" if again else "finish", chosen.label)
    for few in config.WEIGHT_ONLY_CONFIGS["cards"]:
        for name, n_in in (("weight only", 768), ("weight only, uneven", 784)):
            x, weight = torch.empty(7, n_in, dtype=torch.bfloat16), torch.empty(3072, n_in, dtype=torch.int8)
            bias, scale = torch.empty(3072, dtype=torch.bfloat16), torch.empty(3072)
            out = torch.empty(7, 3072, dtype=torch.bfloat16)
            int8_weight_only.weight_only(out, x, weight, scale, bias, "gelu", few)
            check(name, few.label)
    for n_cols in int8_specs.QUANTIZED_WIDTHS:
        x = torch.empty(rows, n_cols, dtype=torch.bfloat16)
        codes, scale, factor = torch.empty(x.shape, dtype=torch.int8), torch.empty(rows), torch.empty(n_cols)
        quantize.rows(codes, scale, None, x, None, config.quantize(n_cols))
        check("rows", config.quantize(n_cols).label)
        quantize.rows(codes, scale, scale, x, factor, config.quantize(n_cols))
        check("rows, offset and factor", config.quantize(n_cols).label)
    for n_cols in int8_specs.TILED_WIDTHS:
        x = torch.empty(rows, n_cols, dtype=torch.bfloat16)
        chosen = config.quantize_by_given_scale(n_cols)
        quantize.tensor(
            torch.empty(x.shape, dtype=torch.int8), x, torch.empty(n_cols), torch.empty(()), chosen
        )
        check("tensor", chosen.label)
    quantize.row_sum(
        torch.empty(3072, dtype=torch.int32),
        torch.empty(3072, 768, dtype=torch.int8),
        config.int8_row_sum(),
    )
    check("row sum", config.int8_row_sum().label)
