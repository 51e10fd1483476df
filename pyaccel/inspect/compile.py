"""Compile kernels for cards that aren't there, and read what matters out of the machine code.

Triton compiles for any target on any machine: ptxas, cuobjdump and the AMD assembler come with its wheel. So
what a launch costs in registers, spills, shared memory and occupancy, and whether it uses tensor cores and
wide memory accesses, can be checked where there is no GPU. How fast it runs can't.

    for code in compile_all(specs("residual_layernorm"), ["sm_90"]):
        print(code.name, code.config, code.registers, code.occupancy)
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pyaccel.inspect.assembly import parse_amdgcn, parse_sass
from pyaccel.inspect.gpus import GpuSpec, _check_arch
from pyaccel.inspect.spec import KernelSpec, Name

_Result = TypeVar("_Result")


class CompilationError(RuntimeError):
    """A kernel doesn't compile for a target; the message names both and has the compiler's own words."""


@dataclass(frozen=True)
class MachineCode:
    """What one :class:`KernelSpec` became for one architecture.

    Attributes:
        op, name, config, dtype: those of the spec.
        arch: a key of :data:`GPU_SPECS`.
        num_warps: warps a block.
        registers: 32-bit registers a thread (on AMD vector registers a lane, AccVGPRs included).
        spill_bytes: bytes a thread stores outside registers for want of registers.
        stack_bytes: bytes of a thread's stack, spills included.
        shared_bytes: shared memory (LDS) a block.
        occupancy: warps resident on an SM as a part of the most it holds, 0 to 1.
        wgmma: Hopper's warp-group matrix instructions (HGMMA, IGMMA, QGMMA) in the code.
        mma: all other matrix instructions (HMMA, IMMA, tcgen05; MFMA on AMD).
        tma: instructions of Hopper's copy engine (UTMALDG, UTMASTG).
        load_bits, store_bits: the widest access to global memory by one thread; 0 if there is none.
        instructions: length of the code in instructions.
        loop_instructions: of the inner loop: of those with none inside, the one with the most matrix instructions, or
            the longest; 0 where there is none.
        loads, stores: how many instructions access global memory, by their width in bits.
    """

    op: str
    name: str
    config: str
    dtype: str
    arch: str
    num_warps: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    occupancy: float
    wgmma: int
    mma: int
    tma: int
    instructions: int
    loop_instructions: int = 0
    loads: Mapping[int, int] = field(default_factory=dict)
    stores: Mapping[int, int] = field(default_factory=dict)

    @property
    def load_bits(self) -> int:
        return max(self.loads, default=0)

    @property
    def store_bits(self) -> int:
        return max(self.stores, default=0)

    def __str__(self) -> str:
        return f"{self.op} {self.name} [{self.config}] {self.dtype} on {self.arch}"


def compile_spec(spec: KernelSpec, arch: str) -> MachineCode:
    """Compile one kernel for one architecture, in this process.

    Kernels must have been imported without TRITON_INTERPRET, which turns them into Python functions for good;
    :func:`compile_all` sees to that.

    Raises:
        ValueError: an unknown architecture.
        CompilationError: the kernel can't be compiled.
        ImportError: triton isn't installed.
    """
    part = _check_arch(arch)
    compiled = _compile(spec, arch)
    if part.backend == "cuda":
        assembly = parse_sass(_disassemble(compiled.asm["cubin"]))
        # The static part is the system's own, counted by GpuSpec.shared_reserved.
        shared_bytes = compiled.metadata.shared
    else:
        assembly = parse_amdgcn(compiled.asm["amdgcn"])
        shared_bytes = max(compiled.metadata.shared, assembly.static_shared_bytes)
    num_warps = compiled.metadata.num_warps
    return MachineCode(
        op=spec.op,
        name=spec.name,
        config=spec.config,
        dtype=spec.dtype,
        arch=arch,
        num_warps=num_warps,
        registers=assembly.registers,
        spill_bytes=assembly.spill_bytes,
        stack_bytes=assembly.stack_bytes,
        shared_bytes=shared_bytes,
        occupancy=part.occupancy(assembly.registers, shared_bytes, num_warps),
        wgmma=assembly.wgmma,
        mma=assembly.mma,
        tma=assembly.tma,
        instructions=assembly.instructions,
        loop_instructions=assembly.loop_instructions,
        loads=dict(assembly.loads),
        stores=dict(assembly.stores),
    )


LISTINGS = ("sass", "ptx")


def listing(spec: KernelSpec, arch: str, kind: str) -> str:
    """The text of one compiled kernel: ``"sass"`` (on AMD its assembly), or NVIDIA's ``"ptx"``.

    Raises as :func:`compile_spec` does, and ValueError for PTX of an AMD part.
    """
    if kind == "ptx" and _check_arch(arch).backend != "cuda":
        raise ValueError(f"{arch} has no PTX: ask for its assembly (sass)")
    compiled = _compile(spec, arch)
    if kind == "ptx":
        return str(compiled.asm["ptx"])
    cubin = compiled.asm.get("cubin")
    return str(compiled.asm["amdgcn"]) if cubin is None else _disassemble(cubin)


def _compile(spec: KernelSpec, arch: str) -> Any:
    part = _check_arch(arch)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module_name, function_name = spec.fn.split(":")
    fn = getattr(importlib.import_module(module_name), function_name)
    if not isinstance(fn, triton.JITFunction):
        raise CompilationError(
            f"{spec.fn} was imported with TRITON_INTERPRET set and can't be compiled in this process: use "
            "compile_all, which compiles in processes of its own, or unset TRITON_INTERPRET"
        )
    given = {*spec.signature, *(name for name in spec.constexprs if isinstance(name, str))}
    if given != set(fn.arg_names):
        raise CompilationError(
            f"the spec of {spec} doesn't fit {spec.fn}: "
            f"missing {sorted(set(fn.arg_names) - given)}, unknown {sorted(given - set(fn.arg_names))}"
        )
    constants = {_path(name, fn.arg_names): value for name, value in spec.constexprs.items()}
    source = ASTSource(fn, _signature(spec, fn.arg_names), constants, _attributes(spec, part, fn.arg_names))
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": spec.fp_fusion}
    try:
        compiled = triton.compile(
            source,
            target=GPUTarget(part.backend, part.target, part.warp_size),
            options={name: value for name, value in options.items() if value is not None},
        )
    except Exception as error:
        raise CompilationError(
            f"{spec} doesn't compile for {arch}: {type(error).__name__}: {error}"
        ) from error
    return compiled


def _signature(spec: KernelSpec, arg_names: list[str]) -> dict[str, str | tuple[str, ...]]:
    return {name: spec.signature.get(name, "constexpr") for name in arg_names}


def _path(name: Name, arg_names: list[str]) -> tuple[int, ...]:
    """Where Triton finds an argument, or an element of one that is a tuple."""
    return (arg_names.index(name),) if isinstance(name, str) else (arg_names.index(name[0]), name[1])


def _attributes(
    spec: KernelSpec, part: GpuSpec, arg_names: list[str]
) -> dict[tuple[int, ...], list[list[Any]]]:
    """Triton's hints for each argument, as its JIT gives them on a launch."""
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for name in spec.divisible:
        hints: list[list[Any]] = [["tt.divisibility", 16]]
        if part.backend == "hip" and isinstance(name, str) and str(spec.signature[name]).startswith("*"):
            hints.append(["tt.pointer_range", 32])  # tensors under 2 GiB, for buffer instructions
        attributes[_path(name, arg_names)] = hints
    return attributes


def _disassemble(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompilationError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def _start_worker() -> None:
    # Before this process imports triton: the test suite runs with TRITON_INTERPRET=1 in the environment.
    os.environ.pop("TRITON_INTERPRET", None)


def _compile_task(task: tuple[KernelSpec, str]) -> MachineCode:
    return compile_spec(*task)


def _listing_task(task: tuple[KernelSpec, str], kind: str) -> str:
    return listing(*task, kind)


def compile_all(
    specs: Iterable[KernelSpec], archs: Iterable[str], workers: int | None = None
) -> Iterator[MachineCode]:
    """Compile every spec for every architecture, in processes of its own; yields results in that order.

    Args:
        specs: what to compile.
        archs: keys of :data:`GPU_SPECS`.
        workers: processes; by default as many as this process may use cores.

    Triton's cache (TRITON_CACHE_DIR) is used, so that a second run takes seconds.

    Raises:
        ValueError: an unknown architecture.
        CompilationError: a kernel can't be compiled; what hasn't begun by then is dropped.
        ImportError: triton isn't installed.
    """
    return compile_tasks(tasks(specs, archs), workers)


def tasks(specs: Iterable[KernelSpec], archs: Iterable[str]) -> list[tuple[KernelSpec, str]]:
    """Every spec with every architecture that has its configuration."""
    archs = list(archs)
    for arch in archs:
        _check_arch(arch)
    return [(spec, arch) for spec in specs for arch in archs if spec.archs is None or arch in spec.archs]


def compile_tasks(
    tasks: Sequence[tuple[KernelSpec, str]], workers: int | None = None
) -> Iterator[MachineCode]:
    """:func:`compile_all` for a list of (spec, arch) of one's own."""
    return _results(_compile_task, tasks, workers)


def listings(tasks: Sequence[tuple[KernelSpec, str]], kind: str, workers: int | None = None) -> Iterator[str]:
    """:func:`listing` of each task, in processes of their own."""
    if kind not in LISTINGS:
        raise ValueError(f"unknown listing {kind!r}: expected one of {', '.join(LISTINGS)}")
    return _results(functools.partial(_listing_task, kind=kind), tasks, workers)


def _results(
    function: Callable[[tuple[KernelSpec, str]], _Result],
    tasks: Sequence[tuple[KernelSpec, str]],
    workers: int | None,
) -> Iterator[_Result]:
    for _, arch in tasks:
        _check_arch(arch)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return _in_processes(function, tasks, max(1, min(workers, len(tasks))))


def _in_processes(
    function: Callable[[tuple[KernelSpec, str]], _Result],
    tasks: Sequence[tuple[KernelSpec, str]],
    workers: int,
) -> Iterator[_Result]:
    # Spawned, not forked: a fork would inherit modules, and with them kernels, that are already imported.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield from pool.map(function, tasks)
    finally:
        pool.shutdown(cancel_futures=True)
