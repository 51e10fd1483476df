"""``python -m benchmarks.int8_table``: when a layer is faster in int8, on this machine, into ``kernels/tuned/``.

Runs the case int8_linear and keeps what dispatch and ``explain`` ask for; tables of other machines stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from pyaccel.benchmarks.__main__ import bad
from pyaccel.benchmarks.int8_linear import CASE
from pyaccel.benchmarks.method import Row, measure
from pyaccel.tuned import FOLDER, machine, read_int8_tables

INT8 = {"pyaccel triton": "triton", "pyaccel torch": "torch"}
FLOATING = ("floating", "floating, torch.compile")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1 where an answer of ours was wrong."""
    parser = argparse.ArgumentParser("benchmarks.int8_table", description=__doc__)
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run")
    parser.add_argument("--file", type=Path, default=FOLDER / "int8_linear.json")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    tables = read_int8_tables(given.file)
    for name in given.dtype or ("float32", "bfloat16"):
        rows = list(
            track(
                measure(CASE, getattr(torch, name), device, quick=given.quick, rounds=given.rounds),
                description=name,
                total=len(CASE.variants) * len(CASE.sweep(device, quick=given.quick)),
                console=Console(stderr=True),
                transient=True,
            )
        )
        wrong = [row for row in rows if bad(row)]
        if wrong:
            print(f"{wrong[0].variant} at {wrong[0].size}: {wrong[0].note}", file=sys.stderr)
            return 1
        table = as_table(rows, machine(device), CASE.sweep(device, quick=given.quick))
        tables = [t for t in tables if (t["machine"], t["dtype"]) != (table["machine"], name)] + [table]
    given.file.parent.mkdir(parents=True, exist_ok=True)
    given.file.write_text(json.dumps({"tables": tables}, indent=1) + "\n", encoding="utf-8")
    return 0


def as_table(rows: Iterable[Row], kind: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The table of one dtype; the floating layer's time is the better of eager's and torch.compile's."""
    rows = list(rows)
    by_size: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.microseconds is not None:
            by_size[row.size][row.variant] = round(row.microseconds, 1)
    first = rows[0]
    return {
        "machine": kind,
        "dtype": first.dtype,
        "device": first.device,
        "torch": first.torch,
        "triton": first.triton,
        "commit": first.commit,
        "date": first.date,
        "rows": [
            {
                "size": list(sizes[label]),
                "int8": {INT8[name]: time for name, time in times.items() if name in INT8},
                "floating": min(times[name] for name in FLOATING if name in times),
            }
            for label, times in by_size.items()
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
