"""Machine code of the bert_embeddings family: every launch configuration that ships, for real GPUs.

What is compiled: in bf16, which is what users run, every configuration with all
options for every architecture, and in fp32, where a row takes most registers, for sm_90. fp16 is left out: it
is bf16 with another conversion instruction. The column sums of backward are those of residual_layernorm.
"""

from __future__ import annotations

from collections import Counter

import pytest

from pyaccel.inspect.spec import KernelSpec
from pyaccel.inspect.specs.registry import specs
from pyaccel.kernels.common import configs, limits
from pyaccel.kernels.embeddings import config
from tests.machine_code import ROW_ARCHS, ROW_FP32_ARCHS
from tests.machine_code.budgets import (
    Check,
    Compiled,
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

MATRIX = {"bf16": ROW_ARCHS, "fp32": ROW_FP32_ARCHS}
# Tensors of rows that a kernel reads and writes: a table's rows, gradients, partial sums.
ROWS = {
    "forward": (3, 1),
    "backward": (4, 1),
    "table gradient, chunks": (1, 2),
    "table gradient, borders": (1, 0),
}


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """Every kernel of the matrix with its machine code."""
    return compile_specs(
        (spec, arch) for spec in specs("bert_embeddings") for arch in MATRIX.get(spec.dtype, ())
    )


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


def least_occupancy(spec: KernelSpec) -> float:
    """Half of the most in BERT's rows, a quarter in the longest."""
    return 0.5 if spec.name == "forward" and spec.constexprs["BLOCK_N"] <= 1024 else 0.25


@parametrize(
    no_spills_and_no_stack,
    shared_memory_fits,
    rows_stay_in_registers,
    persistent_grid_is_resident,
    no_matrix_instructions,
    occupancy(least_occupancy),
    wide_accesses(lambda spec: ROWS[spec.name]),
)
def test_machine_code(compiled: Compiled, check: Check) -> None:
    assert violations(compiled, check) == []
