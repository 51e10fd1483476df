"""``pyaccel bench``: ops, layers, models and training steps beside their baselines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pyaccel.cli.console import (
    LARGEST,
    check_folder_writable,
    check_writable,
    output,
    progress_output,
)
from pyaccel.errors import UserInputError, file_error
from pyaccel.machine import resolve_device, resolve_dtypes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pyaccel.benchmarks.method import Row
    from pyaccel.benchmarks.run import Job


def bench(
    what: Annotated[
        list[str] | None,
        typer.Argument(help="ops, layers, models, train, or names of cases; all by default."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="fp32, bf16 or fp16; may be repeated. fp32 and bf16 or, with --quick, fp32 alone."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few sizes and rounds: minutes.")] = False,
    device: Annotated[
        str,
        typer.Option(help="cpu, cuda or cuda:0; auto takes a GPU if there is one."),
    ] = "auto",
    sizes: Annotated[str, typer.Option(metavar="REGEX", help="Only sizes whose label matches.")] = "",
    against: Annotated[str, typer.Option(metavar="REGEX", help="Only baselines whose name matches.")] = "",
    rounds: Annotated[
        int | None,
        typer.Option(min=1, max=LARGEST, help="20, or 10 with --quick."),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="A folder: results.csv is appended to, report.html and plots are written.",
        ),
    ] = Path("bench"),
    listed: Annotated[
        bool,
        typer.Option("--list", help="Print cases, sizes and variants, and stop."),
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="BEFORE AFTER",
            help="Two results.csv side by side, without measuring.",
        ),
    ] = None,
    fail_if_slower: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            min=0.0,
            help="Exit with 1 where ours is less than this times as fast as the fastest baseline or, with --compare, "
            "than before, less what the baselines changed by.",
        ),
    ] = None,
) -> None:
    """Time pyaccel beside its baselines on this machine: answers are checked first, and contenders take turns.

    Leaves a table (results.csv), plots and a page to read (report.html). A baseline that isn't installed is shown as
    missing: pip install 'pyaccel-bert[baselines]' brings them. Exits with 0; with 1 where an answer of ours was wrong
    or --fail-if-slower says so; with 2 for bad options.
    """
    console = output()
    if compare is not None:
        raise typer.Exit(_compare(*compare, fail_if_slower, console))
    jobs, where = _plan(what, dtype, device, quick=quick, sizes=sizes, against=against)
    if listed:
        for job in {job.case.name: job for job in jobs}.values():
            typer.echo(f"{job.case.name} ({job.case.group}): {job.case.about}")
            typer.echo(f"  sizes:    {'; '.join(job.sizes)}")
            typer.echo(f"  variants: {'; '.join(variant.name for variant in job.case.variants)}")
        return
    raise typer.Exit(_measure(jobs, where, quick, rounds, out, fail_if_slower, console))


def _plan(
    what: list[str] | None,
    dtype: list[str] | None,
    device: str,
    *,
    quick: bool,
    sizes: str,
    against: str,
) -> tuple[list[Job], torch.device]:
    from pyaccel.benchmarks import run

    where = resolve_device(device)
    dtypes = list(resolve_dtypes(dtype or (["fp32"] if quick else None), where).values())
    try:
        sweep = "quick" if quick else "full"
        return run.plan(what or None, dtypes, where, sweep=sweep, sizes=sizes, against=against), where
    except (ValueError, ImportError) as error:
        raise UserInputError(str(error)) from error


def _measure(
    jobs: Sequence[Job],
    device: torch.device,
    quick: bool,
    rounds: int | None,
    out: Path,
    fail_if_slower: float | None,
    console: Console,
) -> int:
    from pyaccel.benchmarks import report, run, table

    try:
        report.matplotlib_figure()  # before an hour of measuring, not after it
    except ImportError as error:
        raise UserInputError(str(error)) from error
    check_folder_writable(out, "--out")
    if out.is_dir():
        check_writable(out / "results.csv", "--out")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[Row] = []
    with Progress(*columns, console=progress_output(), transient=True) as progress:
        task = progress.add_task("", total=sum(job.count for job in jobs))

        def advance(row: Row) -> None:
            progress.update(task, advance=1, description=f"{row.case}, {row.size}, {row.dtype}")

        lost: OSError | None = None
        try:
            for row in run.run(
                jobs, device, sweep="quick" if quick else "full", rounds=rounds, file=out / "results.csv",
                done=advance,
            ):  # fmt: skip
                rows.append(row)
        except OSError as error:
            lost = error
    table.show(rows, console)
    try:
        if lost is not None:
            raise lost
        page = report.write(rows, out)
    except OSError as error:
        raise UserInputError(f"--out {out} could not be written: {file_error(error)}") from error
    console.print(f"{page} has this with plots.", soft_wrap=True)
    found = [f"{row.case}, {row.size}, {row.variant}: {row.note}" for row in rows if table.bad(row)]
    if fail_if_slower is not None:
        found += table.slower(rows, fail_if_slower)
    return _failed(found)


def _compare(before: Path, after: Path, fail_if_slower: float | None, console: Console) -> int:
    from pyaccel.benchmarks import table

    try:
        found = table.changes(table.read(before), table.read(after))
    except ValueError as error:
        raise UserInputError(str(error)) from error
    if not found:
        raise UserInputError(f"{before} and {after} have no size and variant of ours in common")
    table.show_changes(found, console)
    least = 0.0 if fail_if_slower is None else fail_if_slower
    return _failed([f"{one.what}: {one.own:.2f} times as fast as before" for one in found if one.own < least])


def _failed(reasons: list[str]) -> int:
    for reason in reasons:
        typer.echo(f"pyaccel bench: {reason}", err=True)
    return int(bool(reasons))
