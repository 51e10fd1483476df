"""What was measured on which machine, from ``kernels/tuned/*.json``: data for dispatch and for ``explain``.

``int8_linear.json``: microseconds of a linear layer with bias and GELU, in int8 by each backend and in floating point,
by ``python -m benchmarks.int8_table``. Times of one run on one machine: their ratios are what counts.
"""

from __future__ import annotations

import functools
import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "kernels" / "tuned"
# Farther from every size that was measured (by the product of the three ratios), nothing is said.
FARTHEST = 16.0


@dataclass(frozen=True)
class Int8Timing:
    """One size of a layer in int8 and in floating point.

    Attributes:
        rows, n_in, n_out: the size that was measured.
        backends: int8 backend -> microseconds.
        floating: microseconds of ``F.linear`` and its activation in the input's dtype.
    """

    rows: int
    n_in: int
    n_out: int
    backends: dict[str, float]
    floating: float

    @property
    def fastest(self) -> str:
        """The int8 backend with the least time."""
        return min(self.backends, key=self.backends.__getitem__)

    @property
    def speedup(self) -> float:
        """How many times as fast as the floating layer int8 is by its fastest backend; below 1 it is slower."""
        return self.floating / self.backends[self.fastest]

    def __str__(self) -> str:
        return (
            f"measured at {self.rows} x {self.n_in} to {self.n_out}: {self.speedup:.2f} times as fast as the "
            "floating layer"
        )


@functools.cache
def machine(device: torch.device) -> str:
    """The kind of machine that a measurement is good for: a GPU's name, or a CPU's instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    vnni = "+VNNI" if device.type == "cpu" and torch.cpu._is_vnni_supported() else ""
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}{vnni}"


def int8_timings(device: torch.device, dtype: torch.dtype) -> list[Int8Timing]:
    """Every size that was measured on this kind of machine with inputs of ``dtype``; empty if none was."""
    return list(_tables().get((machine(device), dtype), ()))


@functools.lru_cache(maxsize=4096)
def int8_timing(
    device: torch.device, dtype: torch.dtype, rows: int, n_in: int, n_out: int
) -> Int8Timing | None:
    """The nearest size that was measured, by the logarithms of its three numbers; None if there is none near."""
    if not rows or not n_in or not n_out:
        return None

    def distance(timing: Int8Timing) -> float:
        pairs = ((timing.rows, rows), (timing.n_in, n_in), (timing.n_out, n_out))
        return sum(abs(math.log(a / b)) for a, b in pairs)

    timings = int8_timings(device, dtype)
    nearest = min(timings, key=distance, default=None)
    return nearest if nearest is not None and distance(nearest) <= math.log(FARTHEST) else None


@functools.cache
def _tables() -> dict[tuple[str, torch.dtype], tuple[Int8Timing, ...]]:
    tables = {}
    for table in read_int8_tables():
        timings = []
        for row in table["rows"]:
            rows, n_in, n_out = row["size"]
            timings.append(Int8Timing(rows, n_in, n_out, row["int8"], row["floating"]))
        tables[table["machine"], getattr(torch, table["dtype"])] = tuple(timings)
    return tables


def read_int8_tables(file: Path = FOLDER / "int8_linear.json") -> list[dict[str, Any]]:
    """The file's tables: ``machine``, ``dtype``, provenance, and ``rows`` of ``size``, ``int8`` and ``floating``."""
    tables: list[dict[str, Any]] = (
        json.loads(file.read_text(encoding="utf-8"))["tables"] if file.exists() else []
    )
    return tables
