"""``python -m tests.machine_code.one_per_option OP``: compile each kernel of an op once with each of its options.

For sm_90, in bf16, with the smallest head dimension and the first configuration: a version of Triton that can't
translate one of them can't translate the others. Prints a JSON object: Triton's version, and spec -> error (empty where
it compiles).
"""

from __future__ import annotations

import json
import re
import sys

from pyaccel.verify.kernel_specs import KernelSpec, specs
from pyaccel.verify.machine_code import CompilationError, _compile, _results

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


def error_of(task: tuple[KernelSpec, str]) -> str:
    try:
        _compile(*task)
    except CompilationError as error:
        return str(error)
    return ""


def main(op: str) -> None:
    import triton

    chosen = one_per_option(op)
    errors = _results(error_of, [(spec, ARCH) for spec in chosen], None)
    print(
        json.dumps({"triton": triton.__version__, "errors": dict(zip(map(str, chosen), errors, strict=True))})
    )


if __name__ == "__main__":
    main(sys.argv[1])
