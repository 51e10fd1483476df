"""``python -m pyaccel.benchmarks.readme``: the README's tables, from ``benchmarks/results/*.csv``.

Between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->`` the README holds what this program makes; a test
makes it again and compares. What is not in the CSV is not in the README.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pyaccel.benchmarks.case import OURS
from pyaccel.benchmarks.figures import FILE
from pyaccel.benchmarks.method import ROOT, Row
from pyaccel.benchmarks.table import Cell, cells, read
from pyaccel.tuning import FOLDER as TUNED
from pyaccel.tuning_tables import read as read_tables

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
STOCK, COMPILED = ("stock, SDPA",), ("torch.compile", "torch.compile, frozen", "torch.compile, max-autotune")
RIVALS = {
    "SDPA": STOCK,
    "compile": COMPILED,
    "ONNX Runtime": ("ONNX Runtime",),
    "OpenVINO": ("OpenVINO",),
}
PREPACKED = "pyaccel, prepacked"


def tables(rows: Sequence[Row], figures: dict[str, Any]) -> dict[str, str]:
    """Name -> Markdown."""
    parts = {name: figures[name]["figures"] for name in figures}
    return {
        "models": models(rows),
        "prepacked": prepacked(rows),
        "training": training(rows),
        "machine": machine(rows),
        "int8-speed": int8_speed(),
        "demo": demo(parts["demo"]),
        "encode": encode(parts["encode"]),
        "int8": int8(parts["int8"]),
        "cost": cost(parts["cost"]),
    }


def models(rows: Sequence[Row]) -> str:
    """Inference: for each model and batch, and each dtype, our time and how many times as long the others take."""
    return _table([row for row in rows if row.case == "bert"], RIVALS)


def prepacked(rows: Sequence[Row]) -> str:
    """The same with weights in oneDNN's order, where that was measured; what is done by default is a baseline of it."""
    measured = [cell for cell in cells(row for row in rows if row.case == "bert") if cell.row(PREPACKED)]
    names = {PREPACKED: OURS, OURS: "default"}
    renamed = [
        dataclasses.replace(row, variant=names.get(row.variant, row.variant))
        for cell in measured
        for row in cell.rows
    ]
    return _table(renamed, {"by default": ("default",), **RIVALS})


def training(rows: Sequence[Row]) -> str:
    """The same of a training step."""
    baselines = {"SDPA": STOCK, "eager": ("stock, eager",), "compile": COMPILED}
    return _table([row for row in rows if row.case == "bert_training"], baselines)


def machine(rows: Sequence[Row]) -> str:
    """Where and of what these figures are."""
    told = {
        (row.device, row.torch, row.python): sorted(
            {(other.commit, other.date) for other in rows if other.device == row.device}
        )
        for row in rows
    }
    return "\n".join(
        f"{device}, torch {torch}, Python {python}; commits {', '.join(dict.fromkeys(c for c, _ in when))}, "
        f"{when[0][1]}."
        for (device, torch, python), when in told.items()
    )


def demo(figures: dict[str, Any]) -> str:
    """`pyaccel demo`: how many times as fast as the stock model in fp32, and how near."""
    lines = [
        "| dtype | accelerated | `torch.compile` of the stock model | largest error of a token state | "
        "smallest cosine of the embeddings |",
        "|---|---|---|---|---|",
    ]
    for name, one in figures.items():
        compiled = "not timed" if one["compile"] is None else f"{one['compile']:.1f} times"
        error, cosine = f"{one['max_abs_error']:.2g}", f"{one['min_cosine']:.5f}"
        lines.append(f"| {name} | {one['speedup']:.1f} times | {compiled} | {error} | {cosine} |")
    return "\n".join(lines)


def encode(figures: dict[str, Any]) -> str:
    """`pyaccel encode` beside sentence-transformers' own."""
    theirs = figures["sentence-transformers"]
    lines = ["| | seconds | times as fast | smallest cosine to its embeddings |", "|---|---:|---:|---:|"]
    given = "missing: not installed" if theirs is None else f"{theirs:.0f}"
    lines.append(f"| sentence-transformers' `encode`, fp32, without its start | {given} | | |")
    for dtype in ("fp32", "bf16"):
        compared = ["", ""]
        if theirs is not None:
            compared = [f"{theirs / figures[dtype]:.2f}", f"{figures[f'{dtype}_min_cosine']:.6f}"]
        lines.append(
            f"| `pyaccel encode --dtype {dtype}`, with its start | {figures[dtype]:.0f} | {' | '.join(compared)} |"
        )
    return f"{figures['passages']:,} passages:\n\n" + "\n".join(lines)


def int8(figures: dict[str, Any]) -> str:
    """What int8 costs in accuracy."""
    lines = ["| | mean | smallest |", "|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {name} | {one['mean']:.4f} | {one['min']:.4f} |" for name, one in figures.items())]
    )


def int8_speed() -> str:
    """When int8 pays, by the tables that ship."""
    lines = ["| layer | rows | times as fast as fp32 | as bf16 |", "|---|---:|---:|---:|"]
    found: dict[tuple[int, ...], dict[str, float]] = {}
    for table in read_tables(TUNED / "int8_matmul.json"):
        for row in table["rows"]:
            times = [us for name, us in row["us"].items() if name != "floating"]
            found.setdefault(tuple(row["size"]), {})[table["dtype"]] = row["us"]["floating"] / min(times)
    for (rows, n_in, n_out), by_dtype in sorted(found.items(), key=lambda item: (item[0][1:], item[0][0])):
        speeds = [f"{by_dtype[dtype]:.2f}" if dtype in by_dtype else "not measured" for dtype in DTYPES]
        lines.append(f"| {n_in} to {n_out} | {rows} | {' | '.join(speeds)} |")
    return "\n".join(lines)


def cost(figures: dict[str, Any]) -> str:
    """`pyaccel cost`, BERT-base, 32 x 512 in bf16."""
    lines = [
        "| BERT-base, 32 x 512, bf16 | launches | FLOPs | bytes moved | saved for backward |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, one in figures.items():
        (stock, ours) = one["launches"]
        shares = [
            f"{b / a:.0%}" if a else "" for a, b in (one[f] for f in ("flops", "bytes_moved", "bytes_saved"))
        ]
        lines.append(f"| {name} | {ours} for {stock} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _table(rows: Sequence[Row], baselines: dict[str, tuple[str, ...]]) -> str:
    by_size: dict[str, dict[str, Cell]] = {}
    for cell in cells(rows):
        by_size.setdefault(cell.first.size, {})[cell.first.dtype] = cell
    dtypes = [dtype for dtype in DTYPES if any(dtype in found for found in by_size.values())]
    # A baseline that never ran in a dtype keeps its column: missing is shown.
    head = ["batch", *(f"{DTYPES[dtype]} {name}" for dtype in dtypes for name in ("ms", *baselines))]
    lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
    for size, found in by_size.items():
        line = [size]
        for dtype in dtypes:
            one = found.get(dtype)
            line.append(
                _milliseconds(one.ours.ms) if one is not None and one.ours is not None else "not measured"
            )
            line += [_relative(one, names) for names in baselines.values()]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def _milliseconds(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _relative(cell: Cell | None, names: tuple[str, ...]) -> str:
    """How many times as long as ours the fastest of these takes; else what became of them."""
    if cell is None:
        return "not measured"
    speedup = cell.speedup(*names)
    if speedup is not None:
        return f"{speedup:.2f}"
    return next(
        (row.note.split(":")[0] for row in cell.rows if row.variant in names and row.note), "not measured"
    )


def with_tables(text: str, made: dict[str, str]) -> str:
    """The README's text with each marked part made anew.

    Raises:
        ValueError: a part of a name that nothing is made for.
    """

    def part(match: re.Match[str]) -> str:
        if match[2] not in made:
            raise ValueError(f"README.md wants figures {match[2]!r}: expected one of {', '.join(made)}")
        return f"{match[1]}{made[match[2]]}\n{match[3]}"

    return MARKED.sub(part, text)


def main(arguments: list[str] | None = None, *, write: Callable[[str], object] = README.write_text) -> int:
    """Exit code 0; 2 where there are no results."""
    argparse.ArgumentParser("pyaccel.benchmarks.readme", description=__doc__).parse_args(arguments)
    rows = [row for file in sorted(RESULTS.glob("*.csv")) for row in read(file)]
    if not rows or not FILE.exists():
        print(f"there are no results in {RESULTS}: `make figures` measures them", file=sys.stderr)
        return 2
    figures = json.loads(FILE.read_text(encoding="utf-8"))
    write(with_tables(README.read_text(encoding="utf-8"), tables(rows, figures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
