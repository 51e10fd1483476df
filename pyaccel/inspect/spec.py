"""What is compiled: every kernel with every launch configuration that ships, and a real call's arguments.

A family adds one builder to :mod:`pyaccel.inspect.specs.registry`. Importing this needs no triton.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from pyaccel.kernels.common.limits import MAX_ROW

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942", "gfx950")

Config = TypeVar("Config")
Name = str | tuple[str, int]  # of an argument, or of an element of one that is a tuple


@dataclass(frozen=True)
class KernelSpec:
    """One kernel with one launch configuration and one set of argument types.

    Attributes:
        op: the op of :mod:`pyaccel.ops` that it serves.
        name: the kernel, and which of its optional inputs it has.
        fn: where the kernel is, ``"module:function"``.
        signature: Triton's type of each run-time argument, such as ``"*bf16"`` or ``"i32"``; of a tuple, a tuple.
        constexprs: the values of all other arguments; ``(name, i)`` is an element of a tuple.
        divisible: the arguments known to be divisible by 16 (pointers: aligned to 16 bytes).
        num_warps, num_stages: launch options; None for Triton's default.
        programs_per_sm: programs that a persistent grid has for each SM; 0 for other grids.
        dtype: a label for the argument types.
        config: a label for the launch configuration.
        archs: the architectures that have this configuration; None for all.
        fp_fusion: whether products may be fused with the sums that follow, as Triton does where it isn't told.
    """

    op: str
    name: str
    fn: str
    signature: Mapping[str, str | tuple[str, ...]]
    constexprs: Mapping[Name, Any]
    divisible: frozenset[Name]
    num_warps: int | None
    num_stages: int | None
    dtype: str
    config: str
    programs_per_sm: int = 0
    archs: frozenset[str] | None = None
    fp_fusion: bool = True

    def __str__(self) -> str:
        return f"{self.op} {self.name} [{self.config}] {self.dtype}"


def kernel_spec(
    op: str,
    name: str,
    fn: str,
    arguments: Mapping[str, Any],
    *,
    dtype: str,
    config: str,
    num_warps: int | None = None,
    num_stages: int | None = None,
    programs_per_sm: int = 0,
    do_not_specialize: Collection[str] = (),
    archs: frozenset[str] | None = None,
    fp_fusion: bool = True,
) -> KernelSpec:
    """A :class:`KernelSpec` with the arguments specialized as Triton's JIT does it on a launch.

    An argument is as a launch has it: a tensor (or ``"*bf16"`` for a pointer to bfloat16), a number, None or a tuple of
    integers. None, the integer 1 and arguments with upper-case names become constants, integers divisible by 16 and
    all pointers are marked as such, and the arguments in ``do_not_specialize`` keep their type alone.
    """
    signature: dict[str, str | tuple[str, ...]] = {}
    constants: dict[Name, Any] = {}
    divisible: set[Name] = set()

    def integer(name: Name, value: int) -> str:
        if value == 1 and name not in do_not_specialize:
            constants[name] = 1
            return "constexpr"
        if value % 16 == 0 and name not in do_not_specialize:
            divisible.add(name)
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for arg, value in arguments.items():
        if arg.isupper() or value is None:
            constants[arg] = value
        elif isinstance(value, (str, torch.Tensor)):
            signature[arg] = value if isinstance(value, str) else POINTERS[value.dtype]
            divisible.add(arg)
        elif isinstance(value, float):
            signature[arg] = "fp32"
        elif isinstance(value, tuple):
            signature[arg] = tuple(integer((arg, i), v) for i, v in enumerate(value))
        else:
            kind = integer(arg, value)
            if kind != "constexpr":
                signature[arg] = kind
    return KernelSpec(
        op=op,
        name=name,
        fn=fn,
        signature=signature,
        constexprs=constants,
        divisible=frozenset(divisible),
        num_warps=num_warps,
        num_stages=num_stages,
        dtype=dtype,
        config=config,
        programs_per_sm=programs_per_sm,
        archs=archs,
        fp_fusion=fp_fusion,
    )


def launched(config: Any) -> dict[str, Any]:
    """What :func:`kernel_spec` is told of a launch configuration."""
    return {
        "config": config.label,
        "num_warps": config.num_warps,
        "num_stages": getattr(config, "num_stages", None),
        "programs_per_sm": getattr(config, "programs_per_sm", 0),
    }


def archs_by_config(of_arch: Callable[[str], Iterable[Config]]) -> dict[Config, frozenset[str]]:
    """Each configuration with the architectures that have it."""
    archs: dict[Config, set[str]] = {}
    for arch in ARCHS:
        for config in of_arch(arch):
            archs.setdefault(config, set()).add(arch)
    return {config: frozenset(of_config) for config, of_config in archs.items()}


def rows_by_config(heuristic: Callable[[int], Config]) -> dict[Config, int]:
    """Each configuration with the longest row that has it: a power of two, whose rows are aligned."""
    return {heuristic(n_cols): n_cols for n_cols in range(1, MAX_ROW + 1)}
