"""``python -m benchmarks``: measure, print, append to a CSV with its provenance."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.method import Row, measure
from benchmarks.registry import CASES, cases


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1 where a variant's answer was wrong; 2 for bad arguments."""
    parser = argparse.ArgumentParser("benchmarks", description=__doc__)
    parser.add_argument("case", nargs="*", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run and is it right")
    parser.add_argument("--out", type=Path, help="a CSV to append the rows to")
    given = parser.parse_args(arguments)
    try:
        wanted = cases(given.case or None)
    except ValueError as error:
        parser.error(str(error))
    dtype, device = getattr(torch, given.dtype), torch.device(given.device)
    progress = Console(stderr=True)
    rows = [
        row
        for case in wanted
        for row in track(
            measure(case, dtype, device, quick=given.quick, rounds=given.rounds),
            description=case.name,
            total=len(case.variants) * len(case.quick if given.quick else case.sizes),
            console=progress,
            transient=True,
        )
    ]
    show(rows)
    if given.out is not None:
        append(rows, given.out)
    return int(any(row.note.startswith("wrong") for row in rows))


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
    """A table: times, quartiles, share of what a copy of the same bytes reaches."""
    table = Table(title=f"{rows[0].device}, torch {rows[0].torch}, {rows[0].dtype}", title_justify="left")
    for heading in ("case", "size", "variant", "us", "quartiles", "GB/s", "of copy", "max error"):
        table.add_column(heading, justify="left" if heading in ("case", "size", "variant") else "right")
    for row in rows:
        if row.microseconds is None:
            table.add_row(row.case, row.size, row.variant, row.note)
            continue
        spread = "" if row.low is None or row.high is None else f"{row.low:.0f} to {row.high:.0f}"
        table.add_row(
            row.case,
            row.size,
            row.variant,
            f"{row.microseconds:.0f}",
            spread,
            f"{row.gigabytes_per_second:.1f}",
            f"{row.of_floor:.0%}",
            f"{row.max_error:.1e}",
        )
    console = Console()
    if not console.is_terminal:
        console.width = 140
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
