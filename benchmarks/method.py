"""How it is measured: answers first, then rounds in which the contenders take turns, beside what the machine can do.

The floor of a case is the time that its bytes take to be copied or, where that is longer, its operations to be done
by a large matrix product in the same dtype, both measured in the very rounds that time the contenders.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyaccel.benchmarks.case import Case, Variant
from pyaccel.machine import provenance
from pyaccel.timing import Taken, interval, time_in_turn
from pyaccel.verify.policy import judge

ROOT = Path(__file__).resolve().parents[1]
COPY, MATMUL = "copy", "matmul"  # contenders beside a case's variants
MESSAGE_CHARACTERS = 200  # of an error, in a row
# Of a GPU's memory. A variant that takes more makes the allocator give memory back and fetch it anew in each round,
# in the time of whoever comes next.
LARGEST_SHARE = 0.6


@dataclass(frozen=True)
class Row:
    """One measurement, a line of the tall CSV.

    ``microseconds`` is a median over rounds, and ``low`` and ``high`` are the ends of its 95 % confidence interval;
    ``host_microseconds`` is how long the call kept the host, where the device works on its own. ``of_floor`` is
    ``floor_microseconds`` over ``microseconds``, and ``floor_of`` says which of bytes and FLOPs bounds the case.
    ``peak_megabytes`` is the memory of a GPU that the call held at most, its outputs among it and its inputs not.
    """

    group: str
    case: str
    size: str
    dtype: str
    variant: str
    note: str
    rounds: int
    microseconds: float | None
    low: float | None
    high: float | None
    host_microseconds: float | None
    gigabytes_per_second: float | None
    teraflops_per_second: float | None
    copy_gigabytes_per_second: float
    matmul_teraflops_per_second: float | None
    floor_microseconds: float
    floor_of: str
    of_floor: float | None
    max_error: float | None
    peak_megabytes: float | None
    device: str
    torch: str
    triton: str
    python: str
    commit: str
    date: str

    @property
    def timed(self) -> bool:
        """Whether there is a time: not of what is missing, wrong or failed."""
        return self.microseconds is not None

    @property
    def ms(self) -> float:
        """Milliseconds of what was timed."""
        assert self.microseconds is not None, f"{self.variant} has no time: {self.note}"
        return self.microseconds / 1e3

    @property
    def spread(self) -> str:
        """The confidence interval in milliseconds, in words."""
        assert self.low is not None
        assert self.high is not None
        return f"{self.low / 1e3:.3g} to {self.high / 1e3:.3g}"

    def as_dict(self) -> dict[str, object]:
        """Column -> value."""
        return asdict(self)


def measure(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rounds: int,
    seconds: float = math.inf,
    smoke: bool = False,
    sizes: dict[str, Any] | None = None,
) -> Iterator[Row]:
    """Measure each variant of ``case`` at each size; a wrong answer or an error is a row without a time.

    Args:
        rounds: in which the contenders take turns, of each size.
        seconds: after which a size has no further round, once it has had :data:`LEAST_ROUNDS`.
        smoke: with little work: the case's smallest sizes, and a small product for the ceiling.
        sizes: label -> sizes, instead of the case's full sweep.
    """
    where = provenance(device)
    if sizes is None:
        sizes = case.sweep(device, "smoke" if smoke else "full")
    for label, size in sizes.items():
        # What torch.compile made of another size would make it give up: each size is compiled for itself.
        torch.compiler.reset()
        yield from _measure_size(case, label, size, dtype, device, where, rounds, seconds, smoke=smoke)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure_size(
    case: Case,
    label: str,
    sizes: Any,
    dtype: torch.dtype,
    device: torch.device,
    where: dict[str, str],
    rounds: int,
    seconds: float,
    *,
    smoke: bool,
) -> Iterator[Row]:
    problem = case.problem(sizes, dtype, device)
    truth, naive = case.truth(problem), case.naive(problem)
    moved, flops = case.bytes_moved(problem), case.flops(problem) if case.flops is not None else None
    contenders: dict[str, Callable[[], object]] = {COPY: _copy(moved, device)}
    n = _matmul_size(dtype, device, smoke=smoke)
    if flops is not None:
        contenders[MATMUL] = _matmul(n, dtype, device)
    notes: dict[str, str] = {}
    errors: dict[str, float] = {}
    peaks: dict[str, int] = {}
    for variant in case.variants:
        try:
            reason = variant.missing(problem)
            if reason is not None:
                notes[variant.name] = f"missing: {reason}"
                continue
            call = variant.prepare(problem)
            before = _memory(device)
            given = call()
            if before is not None:
                peaks[variant.name] = torch.cuda.max_memory_allocated(device) - before
            right, errors[variant.name] = check(variant, problem, given, truth, naive)
            del given
        except Exception as error:  # whatever a baseline raises is a finding, and the others go on
            notes[variant.name] = _message(error)
            continue
        if not right:
            notes[variant.name] = "wrong: outside the numerics policy, not timed"
        elif variant.name in peaks and peaks[variant.name] > LARGEST_SHARE * _capacity(device):
            notes[variant.name] = (
                "missing: it takes so much of the GPU's memory that it would slow the others"
            )
        else:
            contenders[variant.name] = call
    taken, failed = time_in_turn(contenders, rounds, device, seconds)
    for name in (COPY, MATMUL):
        if name in failed:  # without them there is no floor, and nothing can be said
            raise failed[name]
    notes |= {name: _message(error) for name, error in failed.items()}
    copy_speed = moved / _median(taken[COPY])
    floor, floor_of = moved / copy_speed, "bytes"
    matmul_speed = None
    if flops is not None:
        matmul_speed = 2 * n**3 / _median(taken[MATMUL])
        if flops / matmul_speed > floor:
            floor, floor_of = flops / matmul_speed, "flops"
    for variant in case.variants:
        name = variant.name
        timed = taken.get(name)
        median = low = high = host = None
        if timed:
            median = _median(timed)
            low, high = interval([t.seconds for t in timed])
            hosts = [t.host for t in timed if t.host is not None]
            host = statistics.median(hosts) if hosts else None
        yield Row(
            group=case.group,
            case=case.name,
            size=label,
            dtype=str(dtype).removeprefix("torch."),
            variant=name,
            note=notes.get(name, ""),
            rounds=len(timed or ()),
            microseconds=_scaled(median, 1e6),
            low=_scaled(low, 1e6),
            high=_scaled(high, 1e6),
            host_microseconds=_scaled(host, 1e6),
            gigabytes_per_second=None if median is None else moved / median / 1e9,
            teraflops_per_second=None if median is None or flops is None else flops / median / 1e12,
            copy_gigabytes_per_second=copy_speed / 1e9,
            matmul_teraflops_per_second=_scaled(matmul_speed, 1e-12),
            floor_microseconds=floor * 1e6,
            floor_of=floor_of,
            of_floor=None if median is None else floor / median,
            max_error=errors.get(name),
            peak_megabytes=_scaled(peaks.get(name), 1e-6),
            **where,
        )


def _memory(device: torch.device) -> int | None:
    """Bytes in use, on a GPU, from which its peak now counts."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _capacity(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def check(
    variant: Variant,
    problem: Any,
    given: tuple[Tensor, ...],
    truth: tuple[Tensor, ...],
    naive: tuple[Tensor, ...],
) -> tuple[bool, float]:
    """Whether the outputs are within the numerics policy, and the largest error of any."""
    outputs = variant.outputs(problem, given)
    verdicts = [judge(o, t, n) for o, t, n in zip(outputs, truth, naive, strict=True)]
    return all(v.passed for v in verdicts), max(v.max_error for v in verdicts)


def _message(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"error: {type(error).__name__}: {text[:MESSAGE_CHARACTERS]}"


def _median(taken: list[Taken]) -> float:
    return statistics.median(t.seconds for t in taken)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _copy(moved: int, device: torch.device) -> Callable[[], Tensor]:
    source, target = torch.empty(2, max(moved // 2, 1), dtype=torch.int8, device=device).unbind()
    return lambda: target.copy_(source)


def _matmul_size(dtype: torch.dtype, device: torch.device, *, smoke: bool) -> int:
    """Of a square product that reaches the machine's best speed within a few milliseconds (a CPU: some tens)."""
    if smoke:
        return 128
    if device.type == "cpu":
        return 1024
    return 8192 if dtype.itemsize == 2 else 4096


def _matmul(n: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    # Random numbers: of zeros a GPU, short of power, multiplies more in the same time.
    a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
    return lambda: a @ b.mT
