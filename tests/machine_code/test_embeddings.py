"""Machine code of the bert_embeddings family: every launch configuration that ships, for real GPUs.

What is compiled: in bf16, which is what users run, every configuration with all
options for every architecture, and in fp32, where a row takes most registers, for sm_90. fp16 is left out: it
is bf16 with another conversion instruction. The column sums of backward are those of residual_layernorm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from pyaccel.inspect.compile import MachineCode, compile_tasks
from pyaccel.inspect.gpus import PARTS
from pyaccel.inspect.spec import KernelSpec
from pyaccel.inspect.specs.registry import specs
from pyaccel.kernels.common import configs, limits
from pyaccel.kernels.embeddings import config
from tests.machine_code import ROW_ARCHS, ROW_FP32_ARCHS

MATRIX = {"bf16": ROW_ARCHS, "fp32": ROW_FP32_ARCHS}
# Tensors of rows that a kernel reads and writes: a table's rows, gradients, partial sums.
ROWS = {
    "forward": (3, 1),
    "backward": (4, 1),
    "table gradient, chunks": (1, 2),
    "table gradient, borders": (1, 0),
}

Compiled = list[tuple[KernelSpec, MachineCode]]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """Every kernel of the matrix with its machine code."""
    tasks = [(spec, arch) for spec in specs("bert_embeddings") for arch in MATRIX.get(spec.dtype, ())]
    return [(spec, code) for (spec, _), code in zip(tasks, compile_tasks(tasks), strict=True)]


def violations(compiled: Compiled, broken: Callable[[KernelSpec, MachineCode], Any]) -> list[str]:
    """The kernels for which `broken` returns what is wrong with them."""
    found = ((code, broken(spec, code)) for spec, code in compiled)
    return [f"{code}: {problem}" for code, problem in found if problem]


def test_every_configuration_and_architecture_is_there(compiled: Compiled) -> None:
    rows = [
        heuristic(n)
        for heuristic in (config.bert_embeddings_forward, config.bert_embeddings_backward)
        for n in range(1, limits.MAX_ROW + 1)
    ]
    # The segment sums' configurations differ in their chunks alone, which are cut at run time.
    sums = [configs.segment_sum(n) for n in (1, 65536, 65537, 2**24)]
    assert len({(c.block_n, c.num_warps, c.border_p, c.border_n, c.border_warps) for c in sums}) == 1
    assert all(c.chunk % 16 == 0 for c in sums)
    expected = {(dtype, arch): len(set(rows)) + 2 for dtype, archs in MATRIX.items() for arch in archs}
    assert Counter((spec.dtype, code.arch) for spec, code in compiled) == expected


def test_no_spills_and_no_stack(compiled: Compiled) -> None:
    def broken(_: KernelSpec, code: MachineCode) -> str:
        spilled = code.spill_bytes > 0 or code.stack_bytes > 0
        return f"spills {code.spill_bytes} B, stack {code.stack_bytes} B" * spilled

    assert violations(compiled, broken) == []


def test_shared_memory_fits(compiled: Compiled) -> None:
    assert all(PARTS[code.arch].shared_per_block >= 32 * 1024 for _, code in compiled)
    # Sums that cross warps and little else: rows themselves stay in registers.
    assert violations(compiled, lambda _, code: code.shared_bytes > 32 * 1024 and code.shared_bytes) == []


def test_persistent_grids_are_resident_at_once(compiled: Compiled) -> None:
    """A persistent grid of more programs than the device holds runs in waves, the last one mostly empty."""

    def broken(spec: KernelSpec, code: MachineCode) -> str:
        resident = round(code.occupancy * PARTS[code.arch].warps_per_sm / code.num_warps)
        too_many = resident < max(spec.programs_per_sm, 1)
        return f"{resident} programs fit an SM, {spec.programs_per_sm} are launched" * too_many

    assert violations(compiled, broken) == []


def test_occupancy(compiled: Compiled) -> None:
    """What hides the latency of a lookup is warps: half of the most in BERT's rows, a quarter in the longest."""

    def broken(spec: KernelSpec, code: MachineCode) -> str:
        least = 0.5 if spec.name == "forward" and spec.constexprs["BLOCK_N"] <= 1024 else 0.25
        return f"occupancy {code.occupancy:.0%}" * (code.occupancy < least)

    assert violations(compiled, broken) == []


def test_rows_move_512_bytes_a_warp(compiled: Compiled) -> None:
    """Every tensor of rows is read and written with accesses of 512 bytes a warp, where its rows are aligned.

    That is 128 bits for each of 32 lanes, the widest there is; half of it does for each of AMD's 64.
    """

    def broken(spec: KernelSpec, code: MachineCode) -> str:
        wide = 512 * 8 // PARTS[code.arch].warp_size
        loads, stores = ROWS[spec.name]
        wide_loads = sum(n for bits, n in code.loads.items() if bits >= wide)
        wide_stores = sum(n for bits, n in code.stores.items() if bits >= wide)
        return f"loads {code.loads}, stores {code.stores}" * (wide_loads < loads or wide_stores < stores)

    assert violations(compiled, broken) == []


def test_no_matrix_instructions_and_no_atomics(compiled: Compiled) -> None:
    assert violations(compiled, lambda _, code: code.wgmma + code.mma) == []
