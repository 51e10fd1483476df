"""How it is measured: answers first, then rounds in which the contenders take turns, beside a copy's speed."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.registry import Case
from pyaccel.verify.policy import judge

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """One measurement, a line of the tall CSV.

    ``microseconds`` is a median over rounds, and ``low`` and ``high`` its quartiles; ``of_floor`` is the time that a
    copy of the case's bytes would take at the speed measured in this run, over the time it took.
    """

    case: str
    size: str
    dtype: str
    variant: str
    note: str
    microseconds: float | None
    low: float | None
    high: float | None
    gigabytes_per_second: float | None
    of_floor: float | None
    max_error: float | None
    device: str
    torch: str
    triton: str
    python: str
    commit: str
    date: str

    def as_dict(self) -> dict[str, object]:
        """Column -> value."""
        return asdict(self)


def measure(
    case: Case, dtype: torch.dtype, device: torch.device, *, quick: bool, rounds: int
) -> Iterator[Row]:
    """Measure each variant of ``case`` at each size; a wrong answer is a row without a time."""
    where = provenance(device)
    for label, sizes in (case.quick if quick else case.sizes).items():
        problem = case.problem(sizes, dtype, device)
        truth, naive = case.truth(problem), case.naive(problem)
        moved = case.bytes_moved(problem)
        contenders: dict[str, Callable[[], object]] = {"copy": _copy(moved, device)}
        notes: dict[str, tuple[str, float | None]] = {}
        for variant in case.variants:
            reason = variant.missing(device)
            if reason is not None:
                notes[variant.name] = (f"missing: {reason}", None)
                continue
            call = variant.prepare(problem)
            verdicts = [judge(o, t, n) for o, t, n in zip(call(), truth, naive, strict=True)]
            error = max(v.max_error for v in verdicts)
            if all(v.right for v in verdicts):
                notes[variant.name] = ("", error)
                contenders[variant.name] = call
            else:
                notes[variant.name] = ("wrong: outside the numerics policy, not timed", error)
        seconds = time_in_turn(contenders, rounds, device)
        floor = statistics.median(seconds["copy"])
        for name, (note, error) in notes.items():
            taken = seconds.get(name)
            median = statistics.median(taken) if taken else None
            low, _, high = (
                statistics.quantiles(taken, n=4) if taken and len(taken) > 1 else (None, None, None)
            )
            yield Row(
                case=case.name,
                size=label,
                dtype=str(dtype).removeprefix("torch."),
                variant=name,
                note=note,
                microseconds=None if median is None else median * 1e6,
                low=None if low is None else low * 1e6,
                high=None if high is None else high * 1e6,
                gigabytes_per_second=None if median is None else moved / median / 1e9,
                of_floor=None if median is None else floor / median,
                max_error=error,
                **where,
            )


def time_in_turn(
    contenders: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each contender in each round; they take turns, so that a slow moment of the machine hits all."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(rounds):
        for name, call in contenders.items():
            taken[name].append(_seconds(call, device))
    return taken


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    # Inputs of a round must come from memory: the cache is overwritten before each call.
    torch.empty(256 * 2**20, dtype=torch.int8, device=device).zero_()
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    call()
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event) / 1e3


def _copy(moved: int, device: torch.device) -> Callable[[], Tensor]:
    source, target = torch.empty(2, max(moved // 2, 1), dtype=torch.int8, device=device).unbind()
    return lambda: target.copy_(source)


def provenance(device: torch.device) -> dict[str, str]:
    """Where and of what a figure is: card or CPU, versions, commit, date."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
