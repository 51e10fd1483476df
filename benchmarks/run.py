"""What `pyaccel bench` runs: chosen cases, dtypes and baselines, one after the other, into a CSV as they come."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pyaccel.benchmarks.case import OURS, Case
from pyaccel.benchmarks.method import Row, measure
from pyaccel.benchmarks.registry import cases
from pyaccel.benchmarks.table import append

# Rounds, and seconds after which a size has no further one.
EFFORT = {"full": (20, 45.0), "quick": (10, 4.0), "smoke": (2, math.inf)}


@dataclass(frozen=True)
class Job:
    """A case as it is to be measured: with these sizes and variants alone."""

    case: Case
    dtype: torch.dtype
    sizes: dict[str, object]

    @property
    def count(self) -> int:
        """Rows that it gives."""
        return len(self.sizes) * len(self.case.variants)


def plan(
    what: Sequence[str] | None,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    *,
    sweep: str = "full",
    sizes: str = "",
    against: str = "",
) -> list[Job]:
    """What is to be measured.

    Args:
        what: groups or cases; all by default.
        sweep: "full", "quick" or "smoke".
        sizes: a regular expression for labels of sizes.
        against: one for names of baselines; ours are measured anyway.

    Raises:
        ValueError: an unknown name, an expression that is none, or nothing is left.
    """
    try:
        wanted, baselines = re.compile(sizes), re.compile(against)
    except re.error as error:
        raise ValueError(f"{error.pattern!r} is not a regular expression: {error}") from None
    jobs = []
    for case in cases(what):
        kept = tuple(v for v in case.variants if v.name.startswith(OURS) or baselines.search(v.name))
        labels = {label: size for label, size in case.sweep(device, sweep).items() if wanted.search(label)}
        if labels:
            jobs += [Job(dataclasses.replace(case, variants=kept), dtype, labels) for dtype in dtypes]
    if not jobs:
        raise ValueError("no size is left: --list shows their labels")
    return jobs


def run(
    jobs: Sequence[Job],
    device: torch.device,
    *,
    sweep: str = "full",
    rounds: int | None = None,
    file: Path | None = None,
    done: Callable[[Row], None] = lambda row: None,
) -> Iterator[Row]:
    """Measure; each row goes to ``file`` at once, since a long sweep may be cut short."""
    default_rounds, seconds = EFFORT[sweep]
    for job in jobs:
        for row in measure(
            job.case, job.dtype, device,
            rounds=rounds or default_rounds, seconds=seconds, smoke=sweep == "smoke", sizes=job.sizes,
        ):  # fmt: skip
            if file is not None:
                append([row], file)
            done(row)
            yield row
