"""Machine code of the masked-language-model loss: every launch configuration that ships, for real GPUs.

What is compiled: in bf16, which is what users run, loss and gradient with every configuration for every architecture,
and the other two variants for sm_90; in fp32 loss and gradient for sm_90. fp16 is left out: it is bf16 with
another conversion instruction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyaccel.inspect.compile import MachineCode, compile_tasks, tasks
from pyaccel.inspect.gpus import PARTS
from pyaccel.inspect.spec import KernelSpec, kernel_spec
from pyaccel.inspect.specs import mlm_loss as family
from pyaccel.inspect.specs.registry import specs
from pyaccel.kernels.mlm_loss import config, cross_entropy
from tests.machine_code import ROW_ARCHS, ROW_FP32_ARCHS

MATRIX = {"bf16": ROW_ARCHS, "fp32": ROW_FP32_ARCHS}
TRAINING = "loss and gradient"

Compiled = list[tuple[KernelSpec, MachineCode]]


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
    return [(spec, code) for (spec, _), code in zip(chosen, compile_tasks(chosen), strict=True)]


def violations(compiled: Compiled, broken: Callable[[KernelSpec, MachineCode], Any]) -> list[str]:
    """The kernels for which `broken` returns what is wrong with them."""
    found = ((code, broken(spec, code)) for spec, code in compiled)
    return [f"{code}: {problem}" for code, problem in found if problem]


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


def test_no_spills_and_no_stack(compiled: Compiled) -> None:
    def broken(_: KernelSpec, code: MachineCode) -> str:
        spilled = code.spill_bytes > 0 or code.stack_bytes > 0
        return f"spills {code.spill_bytes} B, stack {code.stack_bytes} B" * spilled

    assert violations(compiled, broken) == []


def test_shared_memory_fits(compiled: Compiled) -> None:
    def broken(_: KernelSpec, code: MachineCode) -> str:
        return f"{code.shared_bytes} B" * (code.shared_bytes > PARTS[code.arch].shared_per_block)

    assert violations(compiled, broken) == []


def test_occupancy(compiled: Compiled) -> None:
    """A memory-bound kernel hides latency with warps."""

    def broken(_: KernelSpec, code: MachineCode) -> str:
        return f"occupancy {code.occupancy:.0%}" * (code.occupancy < 0.375)

    assert violations(compiled, broken) == []


def test_logits_move_512_bytes_a_warp(compiled: Compiled) -> None:
    """Read twice and written once with 128 bits for each of 32 lanes; half of it does for each of AMD's 64."""

    def broken(spec: KernelSpec, code: MachineCode) -> str:
        wide = 512 * 8 // PARTS[code.arch].warp_size
        loads = sum(n for bits, n in code.loads.items() if bits >= wide)
        stores = sum(n for bits, n in code.stores.items() if bits >= wide)
        want_grad = bool(spec.constexprs["WANT_GRAD"])
        few = loads < 1 + want_grad or stores < want_grad
        return f"loads {code.loads}, stores {code.stores}" * few

    assert violations(compiled, broken) == []


def test_no_matrix_instructions(compiled: Compiled) -> None:
    assert violations(compiled, lambda _, code: code.wgmma + code.mma) == []


# What is compiled above must be what the launcher launches: the same kernel, types, constants and warps.

POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


@pytest.mark.parametrize(("label", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize("vocab", family.VOCABULARIES)
def test_the_specs_are_what_the_launcher_launches(
    vocab: int, label: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False))
        named.update({key: value for key, value in kwargs.items() if key in self.arg_names})
        launches.append((self, named, {k: v for k, v in kwargs.items() if k not in self.arg_names}))

    monkeypatch.setattr(type(cross_entropy.rows_kernel), "run", run)
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
    for name, (kernel, named, options) in zip(family.VARIANTS, launches, strict=True):
        values = {k: POINTERS[v.dtype] if isinstance(v, torch.Tensor) else v for k, v in named.items()}
        constexprs = {key: values.pop(key) for key in list(values) if key.isupper()}
        launched = kernel_spec(
            shipped[name].op,
            name,
            f"{kernel.fn.__module__}:{kernel.__name__}",
            values,
            constexprs,
            dtype=label,
            config=row_config.label,
            **options,
        )
        assert launched == shipped[name]
