"""``python -m benchmarks``: measure, print, append to a CSV with its provenance."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import re
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.method import Row, measure
from benchmarks.registry import CASES, Case, cases


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1 where an answer was wrong or a variant of ours raised; 2 for bad arguments."""
    parser = argparse.ArgumentParser("benchmarks", description=__doc__)
    parser.add_argument("case", nargs="*", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run and is it right")
    parser.add_argument("--sizes", default="", metavar="REGEX", help="only sizes whose label has a match")
    parser.add_argument(
        "--variants", default="", metavar="REGEX", help="only variants whose name has a match"
    )
    parser.add_argument(
        "--list", action="store_true", help="print the labels of sizes and variants, and stop"
    )
    parser.add_argument("--out", type=Path, help="a CSV to append the rows to, each size as it is done")
    given = parser.parse_args(arguments)
    dtype, device = getattr(torch, given.dtype), torch.device(given.device)
    try:
        wanted = [
            chosen(case, case.sweep(device, quick=given.quick), given.sizes, given.variants)
            for case in cases(given.case or None)
        ]
    except (ValueError, re.error) as error:
        parser.error(str(error))
    if given.list:
        for case in wanted:
            print(f"{case.name}\n  sizes:    {'; '.join(case.sizes)}")
            print(f"  variants: {'; '.join(variant.name for variant in case.variants)}")
        return 0
    progress = Console(stderr=True)
    rows = []
    for case in wanted:
        for row in track(
            measure(case, dtype, device, quick=given.quick, rounds=given.rounds),
            description=case.name,
            total=len(case.variants) * len(case.sizes),
            console=progress,
            transient=True,
        ):
            rows.append(row)
            if given.out is not None:  # at once: a long sweep may be cut short
                append([row], given.out)
    if not rows:
        parser.error("no size or no variant is left by --sizes and --variants: see --list")
    show(rows)
    return int(any(bad(row) for row in rows))


def chosen(case: Case, sweep: dict[str, object], sizes: str, variants: str) -> Case:
    """The case with that sweep alone, and of it what the expressions match."""
    sweep = {label: size for label, size in sweep.items() if re.search(sizes, label)}
    kept = tuple(variant for variant in case.variants if re.search(variants, variant.name))
    return dataclasses.replace(case, sizes=sweep, quick=sweep, cpu_sizes=None, variants=kept)


def bad(row: Row) -> bool:
    """A wrong answer, whoever gave it, or an error of ours: what must not pass in silence."""
    return row.note.startswith("wrong") or (
        row.note.startswith("error") and row.variant.startswith("pyaccel")
    )


def append(rows: list[Row], file: Path) -> None:
    """Add rows to the tall CSV, with a header where it is new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0].as_dict()))
        if new:
            writer.writeheader()
        writer.writerows(row.as_dict() for row in rows)


def show(rows: list[Row]) -> None:
    """A table: times, quartiles, what was reached and of what; below it, why a time is missing."""
    table = Table(title=f"{rows[0].device}, torch {rows[0].torch}, {rows[0].dtype}", title_justify="left")
    for heading in ("case", "size", "variant"):
        table.add_column(heading)
    for heading in (
        "us", "quartiles", "host us", "GB/s", "of copy's", "TFLOP/s", "of matmul's", "of floor", "max error", "peak MB"
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    before = None
    for row in rows:
        if (row.case, row.size) != before:
            table.add_section()
        before = (row.case, row.size)
        if row.microseconds is None:
            table.add_row(row.case, row.size, row.variant, row.note.split(":")[0])
            continue
        table.add_row(
            row.case,
            row.size,
            row.variant,
            _number(row.microseconds, ".0f"),
            "" if row.low is None or row.high is None else f"{row.low:.0f} to {row.high:.0f}",
            _number(row.host_microseconds, ".0f"),
            _number(row.gigabytes_per_second, ".1f"),
            _number(row.copy_gigabytes_per_second, ".1f"),
            _number(row.teraflops_per_second, ".3g"),
            _number(row.matmul_teraflops_per_second, ".3g"),
            f"{_number(row.of_floor, '.0%')} {row.floor_of}",
            _number(row.max_error, ".1e"),
            _number(row.peak_megabytes, ".0f"),
        )
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table)
    sizes_by_note: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.note:
            sizes_by_note.setdefault((row.case, row.variant, row.note), []).append(row.size)
    for (case, variant, note), sizes in sizes_by_note.items():
        console.print(
            f"{case}, {variant}: {note} ({'; '.join(sizes)})", markup=False, highlight=False, soft_wrap=True
        )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
