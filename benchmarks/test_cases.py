"""``pytest benchmarks/``: the cases under pytest-benchmark, for who works on one and wants its numbers and histories.

Sizes are those of ``pyaccel bench --quick``. ``-k "residual_layernorm and fp32"`` chooses; ``--benchmark-autosave`` and
``--benchmark-compare`` keep and compare. A comparison that counts is `pyaccel bench`: there contenders take turns.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from pyaccel.benchmarks.case import Case, Variant
from pyaccel.benchmarks.method import check
from pyaccel.benchmarks.registry import cases

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = {case.name: case for case in cases()}


@functools.lru_cache(maxsize=1)
def problem(name: str, label: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Inputs, truth and plain PyTorch's answer, made once for all variants."""
    torch.compiler.reset()
    case = CASES[name]
    made = case.problem(case.sweep(DEVICE, "quick")[label], dtype, DEVICE)
    return made, case.truth(made), case.naive(made)


def chosen() -> list[Any]:
    return [
        pytest.param(case, label, dtype, variant, id=f"{case.name}-{label}-{dtype}-{variant.name}")
        for case in CASES.values()
        for label in case.sweep(DEVICE, "quick")
        for dtype in DTYPES
        for variant in case.variants
    ]


@pytest.mark.parametrize(("case", "label", "dtype", "variant"), chosen())
def test_case(benchmark: Any, case: Case, label: str, dtype: str, variant: Variant) -> None:
    """Right by the numerics policy, then timed."""
    made, truth, naive = problem(case.name, label, DTYPES[dtype])
    reason = variant.missing(made)
    if reason is not None:
        pytest.skip(reason)
    call = variant.prepare(made)
    right, error = check(variant, made, call(), truth, naive)
    assert right, f"outside the numerics policy: error {error:.3g}"

    def synchronized() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.name}, {label}, {dtype}"
    benchmark(synchronized)
