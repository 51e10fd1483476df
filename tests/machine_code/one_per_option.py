"""``python -m tests.machine_code.one_per_option``: compile each kernel of every op once with each of its options.

For sm_90, in bf16, with the smallest head dimension and the first configuration: a version of Triton that can't
translate one of them can't translate the others. Down to Triton's own representation for GPUs: what a version of Triton
doesn't know of the language ends there. One spec of each kernel function goes all the way to machine code; so do all
under PYACCEL_EVERY_ARCH=1. Prints a JSON object: Triton's version, and op -> spec -> error (empty where it compiles).
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from pyaccel.inspect.compile import CompilationError, _compile, _results
from pyaccel.inspect.spec import KernelSpec
from pyaccel.inspect.specs.registry import BUILDERS, specs
from tests.machine_code import EVERY

ARCH = "sm_90"


def head_dim(spec: KernelSpec) -> int:
    found = re.search(r"head dim (\d+)", spec.name)
    return int(found[1]) if found else 0


def one_per_option(op: str) -> list[KernelSpec]:
    """The specs to compile: one of each kernel function with each name, whatever its size."""
    chosen: dict[tuple[str, str], KernelSpec] = {}
    for spec in sorted(specs(op), key=head_dim):
        if spec.dtype in ("bf16", "int8") and (spec.archs is None or ARCH in spec.archs):
            option = re.sub(r"(up to|head dim) \d+", "", spec.name)
            chosen.setdefault((spec.fn, option), spec)
    return list(chosen.values())


class Translated(Exception):
    """Raised where LLVM would begin: what is left of the way to machine code is not for this spec."""


def error_of(task: tuple[KernelSpec, str]) -> str:
    try:
        _compile(*task)
    except CompilationError as error:
        return str(error)
    return ""


def error_of_translation(task: tuple[KernelSpec, str]) -> str:
    """As :func:`error_of`, but only down to Triton's representation for GPUs."""
    from triton.backends.nvidia.compiler import CUDABackend

    def stop(*args: Any, **options: Any) -> None:
        raise Translated

    whole, CUDABackend.make_llir = CUDABackend.make_llir, stop
    try:
        _compile(*task)
    except CompilationError as error:
        return "" if isinstance(error.__cause__, Translated) else str(error)
    finally:
        CUDABackend.make_llir = whole
    return ""  # it is in Triton's cache


def error_of_one(task: tuple[KernelSpec, str], whole: frozenset[str]) -> str:
    """Of the specs in `whole` of all of the compiler, of others of the translation alone."""
    return (error_of if str(task[0]) in whole else error_of_translation)(task)


def main() -> None:
    import triton

    chosen = {op: one_per_option(op) for op in BUILDERS}
    everything = [spec for of_op in chosen.values() for spec in of_op]
    first = {spec.fn: str(spec) for spec in reversed(everything)}  # of each kernel function
    whole = frozenset(map(str, everything) if EVERY else first.values())
    error_of_each = functools.partial(error_of_one, whole=whole)
    errors = iter(list(_results(error_of_each, [(spec, ARCH) for spec in everything], None)))
    by_op = {op: {str(spec): next(errors) for spec in of_op} for op, of_op in chosen.items()}
    print(json.dumps({"triton": triton.__version__, "errors": by_op}))


if __name__ == "__main__":
    main()
