"""Machine code of the masked-language-model loss: every launch configuration that ships, for real GPUs.

What is compiled: in bf16, which is what users run, loss and gradient with every configuration for every architecture,
and the other two variants for sm_90; in fp32 loss and gradient for sm_90. fp16 is left out: it is bf16 with
another conversion instruction.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyaccel.inspect.compile import tasks
from pyaccel.inspect.spec import KernelSpec
from pyaccel.inspect.specs import mlm_loss as family
from pyaccel.inspect.specs.registry import specs
from pyaccel.kernels.mlm_loss import config, cross_entropy
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
    shared_memory_fits,
    violations,
    wide_accesses,
)

MATRIX = {"bf16": ROW_ARCHS, "fp32": ROW_FP32_ARCHS}
TRAINING = "loss and gradient"


def wanted(spec: KernelSpec, arch: str) -> bool:
    if arch not in MATRIX.get(spec.dtype, ()):
        return False
    return spec.name == TRAINING or (spec.dtype, arch) == ("bf16", "sm_90")


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """Every kernel of the matrix with its machine code."""
    archs = sorted({arch for archs in MATRIX.values() for arch in archs})
    chosen = [
        (spec, arch) for spec, arch in tasks(specs("masked_lm_cross_entropy"), archs) if wanted(spec, arch)
    ]
    return compile_specs(chosen)


def test_every_configuration_is_there(compiled: Compiled) -> None:
    shipped = {config.cross_entropy(n).label for n in range(1, 40_000)}
    for dtype, archs in MATRIX.items():
        for arch in archs:
            there = {
                spec.config
                for spec, code in compiled
                if (code.dtype, code.arch, spec.name) == (dtype, arch, TRAINING)
            }
            assert there == shipped
    assert {spec.name for spec, _ in compiled} == set(family.VARIANTS)


def accesses(spec: KernelSpec) -> tuple[int, int]:
    """Logits are read once for the loss; for the gradient they are read again and written."""
    want_grad = bool(spec.constexprs["WANT_GRAD"])
    return 1 + want_grad, int(want_grad)


@parametrize(
    no_spills_and_no_stack,
    shared_memory_fits,
    no_matrix_instructions,
    occupancy(lambda spec: 0.375),
    wide_accesses(accesses),
)
def test_machine_code(compiled: Compiled, check: Check) -> None:
    assert violations(compiled, check) == []


# What is compiled above must be what the launcher launches: the same kernel, types, constants and warps.


@pytest.mark.parametrize(("label", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize("vocab", family.VOCABULARIES)
def test_the_specs_are_what_the_launcher_launches(
    vocab: int, label: str, dtype: torch.dtype, launches: list[Any]
) -> None:
    width, row_config = config.cross_entropy_width(vocab), config.cross_entropy(vocab)
    logits, bias = torch.empty(3, width, dtype=dtype), torch.empty(width, dtype=dtype)
    loss, labels = torch.empty(3), torch.empty(3, dtype=torch.int64)
    for want_grad, scaled in family.VARIANTS.values():
        cross_entropy.rows(loss, logits, bias, labels, loss if scaled else None, vocab, want_grad, row_config)
    shipped = {
        spec.name: spec
        for spec in specs("masked_lm_cross_entropy")
        if (spec.dtype, spec.config) == (label, row_config.label)
    }
    for name, launch in zip(family.VARIANTS, launches, strict=True):
        assert as_spec(*launch, shipped[name]) == shipped[name]
