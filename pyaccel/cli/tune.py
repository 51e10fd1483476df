"""``pyaccel tune``: measure on this machine what dispatch chooses from, and write the tables that it reads."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pyaccel.cli.console import LARGEST, check_folder_writable, output, progress_output
from pyaccel.errors import UserInputError
from pyaccel.machine import resolve_device, resolve_dtypes


def tune(
    what: Annotated[
        list[str] | None, typer.Argument(help="Ops, or launch_KERNEL; all that have a choice by default.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp32, bf16 or fp16; may be repeated. fp32 and bf16 by default.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:0; auto takes a GPU if there is one.")
    ] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="A folder; by default the user's, or $PYACCEL_TUNED, which dispatch reads."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=LARGEST, help="Timing rounds (interleaved).")] = 20,
    quick: Annotated[bool, typer.Option("--quick", help="Two sizes of each: a try.")] = False,
) -> None:
    """Measure each way to serve an op at the sizes of real models, and let dispatch choose by it from now on.

    On a GPU also the launch configurations of kernels, beside their neighbors. Answers are checked before anything is
    timed. The tables hold for this kind of machine, come before those that ship with pyaccel, and are read by every
    process that starts; pyaccel.explain(model) shows the row that decided. Delete the folder to go back. A few minutes
    on a CPU. Exits with 1 where a way is wrong, with 2 for bad options.
    """
    from pyaccel import tuning
    from pyaccel.benchmarks.tune import WrongAnswerError, tunables

    where = resolve_device(device)
    dtypes = resolve_dtypes(dtype, where)
    try:
        wanted = tunables(where, what or None, quick=quick)
    except ValueError as error:
        raise UserInputError(str(error)) from error
    try:
        own = tuning.user_folder()
    except RuntimeError as error:
        if out is None:
            raise UserInputError(f"{error}, or pass --out") from error
        own = tuning.FOLDER
    folder = out or own
    check_folder_writable(folder, "--out")
    console = output()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for one in wanted:
        tables = []
        with Progress(*columns, console=progress_output(), transient=True) as progress:
            for name, each in list(dtypes.items())[: 1 if one.once else None]:
                task = progress.add_task(f"{one.name}, {name}", total=None)
                try:
                    tables.append(one.table(each, where, rounds, partial(_advance, progress, task)))
                except WrongAnswerError as error:
                    typer.echo(f"pyaccel tune: {error}; nothing was written for it", err=True)
                    raise typer.Exit(1) from error
        console.print(_table(one.name, tables))
        try:
            tuning.write(folder / f"{one.name}.json", tables)  # before the next: a long run may be cut short
        except OSError as error:
            raise UserInputError(f"{folder}: {error}") from error
    console.print(f"written to {folder}", soft_wrap=True)
    if folder.resolve() not in (own.resolve(), tuning.FOLDER.resolve()):
        console.print(f"dispatch reads them with PYACCEL_TUNED={folder}", soft_wrap=True)


def _advance(progress: Progress, task: TaskID, row: object) -> None:
    progress.advance(task)


def _table(op: str, tables: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{op}, us", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    implementations = list(dict.fromkeys(way for one in tables for row in one["rows"] for way in row["us"]))
    for heading in ("dtype", "size"):
        table.add_column(heading)
    for way in implementations:
        table.add_column(way, justify="right")
    for one in tables:
        for row in one["rows"]:
            best = min(row["us"].values())
            cells = [row["us"].get(way) for way in implementations]
            table.add_row(
                one["dtype"], " x ".join(map(str, row["size"])),
                *("" if us is None else Text(f"{us:.4g}", "bold" if us == best else "") for us in cells),
            )  # fmt: skip
    return table
