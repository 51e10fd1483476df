"""What compiled kernels may take and must do: each check says what is wrong with one, and families combine them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from pyaccel.inspect.compile import MachineCode, compile_tasks
from pyaccel.inspect.gpus import GPU_SPECS
from pyaccel.inspect.spec import KernelSpec, kernel_spec

Compiled = list[tuple[KernelSpec, MachineCode]]
Check = Callable[[KernelSpec, MachineCode], str]


def compile_specs(chosen: Iterable[tuple[KernelSpec, str]]) -> Compiled:
    """Specs for architectures with their machine code."""
    chosen = list(chosen)
    return [(spec, code) for (spec, _), code in zip(chosen, compile_tasks(chosen), strict=True)]


def violations(compiled: Compiled, check: Check) -> list[str]:
    """What is wrong, with the kernels it is wrong of."""
    found = ((code, check(spec, code)) for spec, code in compiled)
    return [f"{code}: {problem}" for code, problem in found if problem]


def parametrize(*checks: Check) -> pytest.MarkDecorator:
    """A test with each of these as ``check``."""
    return pytest.mark.parametrize("check", checks, ids=lambda check: check.__name__)


def no_spills_and_no_stack(_: KernelSpec, code: MachineCode) -> str:
    spilled = code.spill_bytes > 0 or code.stack_bytes > 0
    return f"spills {code.spill_bytes} B, stack {code.stack_bytes} B" * spilled


def shared_memory_fits(_: KernelSpec, code: MachineCode) -> str:
    return f"{code.shared_bytes} B" * (code.shared_bytes > GPU_SPECS[code.arch].shared_per_block)


def rows_stay_in_registers(_: KernelSpec, code: MachineCode) -> str:
    """Of shared memory sums that cross warps take some, and little else does."""
    return f"{code.shared_bytes} B" * (code.shared_bytes > 32 * 1024)


def persistent_grid_is_resident(spec: KernelSpec, code: MachineCode) -> str:
    """A persistent grid of more programs than the device holds runs in waves, the last one mostly empty."""
    resident = round(code.occupancy * GPU_SPECS[code.arch].warps_per_sm / code.num_warps)
    too_many = resident < max(spec.programs_per_sm, 1)
    return f"{resident} programs fit an SM, {spec.programs_per_sm} are launched" * too_many


def no_matrix_instructions(_: KernelSpec, code: MachineCode) -> str:
    return f"{code.wgmma} wgmma, {code.mma} other" * (code.wgmma + code.mma > 0)


def products_are_matrix_instructions(spec: KernelSpec, code: MachineCode) -> str:
    """In 16 bits and int8: fp32 has none but TF32's, to which it must not be rounded."""
    wrong = (code.wgmma + code.mma > 0) == (spec.dtype == "fp32")
    return f"{code.wgmma} wgmma, {code.mma} other" * wrong


def hopper_multiplies_with_wgmma_alone(spec: KernelSpec, code: MachineCode) -> str:
    if code.arch != "sm_90" or spec.dtype == "fp32":
        return ""
    return f"{code.wgmma} wgmma, {code.mma} other" * (code.wgmma == 0 or code.mma > 0)


def occupancy(least: Callable[[KernelSpec], float]) -> Check:
    """What hides the latency of memory is warps: at least this share of the most that an SM holds."""

    def occupancy_is_enough(spec: KernelSpec, code: MachineCode) -> str:
        return f"occupancy {code.occupancy:.0%}" * (code.occupancy < least(spec))

    return occupancy_is_enough


def wide_bits(code: MachineCode) -> int:
    """Bits a lane where a warp moves 512 bytes: 128, the widest there is, for 32 lanes; half of it for AMD's 64."""
    return 512 * 8 // GPU_SPECS[code.arch].warp_size


def wide_bytes_loaded(code: MachineCode) -> int:
    """Bytes that a program loads with such accesses, each counted once."""
    bits = sum(bits * n for bits, n in code.loads.items() if bits >= wide_bits(code))
    return bits // 8 * GPU_SPECS[code.arch].warp_size * code.num_warps


def wide_accesses(least: Callable[[KernelSpec], tuple[int, int]]) -> Check:
    """So many loads and stores at least move 512 bytes a warp: one of each tensor whose rows are aligned."""

    def moves_512_bytes_a_warp(spec: KernelSpec, code: MachineCode) -> str:
        loads, stores = (
            sum(n for bits, n in of.items() if bits >= wide_bits(code)) for of in (code.loads, code.stores)
        )
        least_loads, least_stores = least(spec)
        return f"loads {code.loads}, stores {code.stores}" * (loads < least_loads or stores < least_stores)

    return moves_512_bytes_a_warp


def as_spec(kernel: Any, arguments: dict[str, Any], like: KernelSpec) -> KernelSpec:
    """The spec of a launch that the fixture ``launches`` recorded, with the labels of another one."""
    given = dict(arguments)
    options = {key: given.pop(key) for key in ("num_warps", "num_stages") if key in given}
    return kernel_spec(
        like.op,
        like.name,
        f"{kernel.fn.__module__}:{kernel.__name__}",
        dtype=like.dtype,
        config=like.config,
        programs_per_sm=like.programs_per_sm,
        do_not_specialize=["threshold"],
        archs=like.archs,
        fp_fusion=given.pop("enable_fp_fusion", True),
        arguments=given,
        **options,
    )
