"""Rows of measurements: a tall CSV, what they say about who is faster, and two of them side by side."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyaccel.benchmarks.case import OURS
from pyaccel.benchmarks.method import Row


def is_ours(row: Row) -> bool:
    """Whether the variant is one of pyaccel's."""
    return row.variant.startswith(OURS)


def bad(row: Row) -> bool:
    """A wrong answer of ours, or an error: what must not pass in silence. A baseline's is shown, and that is all."""
    return is_ours(row) and row.note.startswith(("wrong", "error"))


# ---- the file ----


def append(rows: Sequence[Row], file: Path) -> None:
    """Add rows to the tall CSV, with a header where it is new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerows(row.as_dict() for row in rows)


def read(file: Path) -> list[Row]:
    """The rows of such a CSV; of rows of the same thing the last one, in the place of the first.

    Raises:
        ValueError: it is no such file, or not there.
    """
    kinds = get_type_hints(Row)
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            missing = kinds.keys() - set(reader.fieldnames or ())
            if missing:
                raise ValueError(
                    f"{file} is no table of benchmarks: it has no column {', '.join(sorted(missing))}"
                )
            rows = [
                Row(**{name: _value(line[name], kind) for name, kind in kinds.items()}) for line in reader
            ]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} could not be read: {error}") from None
    return list({(row.device, row.dtype, row.case, row.size, row.variant): row for row in rows}.values())


def _value(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if kind is int:
        return int(text)
    return float(text) if text else None


# ---- what they say ----


@dataclass(frozen=True)
class Cell:
    """All that was measured of one case at one size."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        """Any of them: they agree about where and what."""
        return self.rows[0]

    @property
    def ours(self) -> Row | None:
        """What a user gets: "pyaccel" itself or, of an op's backends, the fastest."""
        timed = [row for row in self.rows if is_ours(row) and row.timed]
        return next((row for row in timed if row.variant == OURS), min(timed, key=_ms, default=None))

    @property
    def baselines(self) -> list[Row]:
        """Everybody else who gave a right answer, the fastest first."""
        return sorted((row for row in self.rows if not is_ours(row) and row.timed), key=_ms)

    def row(self, variant: str) -> Row | None:
        """That of a variant, if it was timed."""
        return next((row for row in self.rows if row.variant == variant and row.timed), None)

    def relative(self, variant: str) -> str:
        """How many times as long as ours it takes; its time where ours has none; empty where it has none."""
        row, ours = self.row(variant), self.ours
        if row is None:
            return ""
        return f"{row.ms:.3g} ms" if ours is None else f"{row.ms / ours.ms:.2f}"

    def is_fastest(self, variant: str) -> bool:
        """Whether nobody takes less."""
        row = self.row(variant)
        return row is not None and row.ms == min(other.ms for other in self.rows if other.timed)

    def speedup(self, *names: str) -> float | None:
        """How many times as fast as the fastest baseline ours is, or as the fastest of these."""
        baselines = [row for row in self.baselines if not names or row.variant in names]
        return baselines[0].ms / self.ours.ms if baselines and self.ours is not None else None


def _ms(row: Row) -> float:
    return row.ms


def cells(rows: Iterable[Row]) -> list[Cell]:
    """One for each device, dtype, case and size, in their order."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row.case, row.dtype, row.device, row.size), []).append(row)
    return [Cell(tuple(same)) for same in found.values()]


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Cell]]:
    """(case, dtype, device) -> its sizes."""
    found: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells(rows):
        found.setdefault((cell.first.case, cell.first.dtype, cell.first.device), []).append(cell)
    return found


def timed_variants(cells: Iterable[Cell]) -> list[str]:
    """The names of the variants that have a time anywhere, in their order."""
    return list(dict.fromkeys(row.variant for cell in cells for row in cell.rows if row.timed))


def notes(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[str]]:
    """(case, variant, note) -> sizes: why a time is missing."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.note:
            sizes = found.setdefault((row.case, row.variant, row.note), [])
            if row.size not in sizes:
                sizes.append(row.size)
    return found


def slower(rows: Iterable[Row], least: float) -> list[str]:
    """Where ours is less than ``least`` times as fast as the fastest baseline, or wasn't timed beside one: in words."""
    found = []
    for cell in cells(rows):
        what = f"{cell.first.case}, {cell.first.size}, {cell.first.dtype}"
        speedup = cell.speedup()
        if cell.ours is None and cell.baselines:
            found.append(f"{what}: no time of ours, {cell.baselines[0].variant} has one")
        elif speedup is not None and speedup < least:
            found.append(f"{what}: {speedup:.2f} times as fast as {cell.baselines[0].variant}")
    return found


@dataclass(frozen=True)
class Change:
    """One of our variants, in two tables.

    ``speedup`` is the time before over the time after; ``of_machine`` the same for everybody else at that size, which
    are the same code both times (1 where nobody else is in both): what the machine or its versions did.
    """

    what: str
    before: Row
    after: Row
    speedup: float
    of_machine: float

    @property
    def own(self) -> float:
        """What is left of the speedup for ours."""
        return self.speedup / self.of_machine


def changes(before: Iterable[Row], after: Iterable[Row]) -> list[Change]:
    """Each of our variants that both tables have at the same size and dtype."""
    known = {(row.case, row.size, row.dtype, row.variant): row for row in before if row.timed}
    found = []
    for cell in cells(after):
        pairs = [
            (known[key], row)
            for row in cell.rows
            if row.timed and (key := (row.case, row.size, row.dtype, row.variant)) in known
        ]
        others = [old.ms / new.ms for old, new in pairs if not is_ours(new)]
        of_machine = statistics.geometric_mean(others) if others else 1.0
        for old, new in pairs:
            if is_ours(new):
                what = f"{new.case}, {new.size}, {new.dtype}, {new.variant}"
                found.append(Change(what, old, new, old.ms / new.ms, of_machine))
    return found


# ---- in a terminal ----


def show(rows: Sequence[Row], console: Console) -> None:
    """For each case what ours takes, and how many times as long everybody else; below it why a time is missing."""
    for (case, dtype, device), of_case in by_case(rows).items():
        names = timed_variants(of_case)
        # Not the table's own title, which is cut to its width.
        title = f"{case}, {dtype}, {device}: times as long as ours"
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("size")
        for heading in [Text(name) for name in ("ours, ms", "95 %", "of floor", *names)]:
            table.add_column(heading, justify="right")
        for cell in of_case:
            ours = cell.ours
            own = ("", "", "")
            if ours is not None:
                own = (f"{ours.ms:.3g}", ours.spread, f"{ours.of_floor:.0%} {ours.floor_of}")
            others = (
                Text(cell.relative(name), "bold" if cell.is_fastest(name) else "")
                for name in names
            )  # fmt: skip
            table.add_row(Text(cell.first.size), *own, *others)
        console.print(table)
    for (case, variant, note), sizes in notes(rows).items():
        text = f"{case}, {variant}: {note} ({'; '.join(sizes)})"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(verdict(rows), markup=False, highlight=False, soft_wrap=True)


def verdict(rows: Sequence[Row]) -> str:
    """Won and lost against the fastest baseline of each size, in a sentence."""
    found = [(speedup, cell) for cell in cells(rows) if (speedup := cell.speedup()) is not None]
    if not found:
        return "Nothing of ours was timed beside a baseline."
    least, cell = min(found, key=lambda pair: pair[0])
    mean = math.exp(statistics.fmean(math.log(speedup) for speedup, _ in found))
    won = sum(speedup >= 1 for speedup, _ in found)
    where = f"{cell.baselines[0].variant}; {cell.first.case}, {cell.first.size}, {cell.first.dtype}"
    return (
        f"Fastest at {won} of {len(found)} sizes; {mean:.2f} times as fast as the fastest baseline of each "
        f"(geometric mean), at the least {least:.2f} times ({where})."
    )


def show_changes(found: Sequence[Change], console: Console) -> None:
    """Times before and after, and what is left for ours of the difference."""
    table = Table(title="before and after", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("what")
    for heading in ("before, ms", "after, ms", "speedup", "of the others", "own"):
        table.add_column(heading, justify="right")
    for change in found:
        table.add_row(
            Text(change.what), f"{change.before.ms:.3g}", f"{change.after.ms:.3g}",
            f"{change.speedup:.2f}", f"{change.of_machine:.2f}", f"{change.own:.2f}",
        )  # fmt: skip
    console.print(table)
