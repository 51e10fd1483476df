"""``pyaccel inspect``: the machine code of every kernel that ships, on any machine."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pyaccel.verify.kernel_specs import KernelSpec, specs
from pyaccel.verify.machine_code import PARTS, CompilationError, MachineCode, compile_tasks, tasks

JSON_FIELDS = (
    "op",
    "name",
    "config",
    "arch",
    "dtype",
    "registers",
    "spill_bytes",
    "stack_bytes",
    "shared_bytes",
    "occupancy",
    "wgmma",
    "mma",
    "load_bits",
    "store_bits",
    "instructions",
)


def inspect(
    op: Annotated[
        list[str] | None, typer.Option(help="An op, such as residual_layernorm; repeatable. Default: all.")
    ] = None,
    arch: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(PARTS)}; repeatable. Default: sm_90.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="A dtype label, such as bf16; repeatable. Default: all.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Compiler processes. Default: one a core.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """Compile the shipped kernels for GPUs, here or not, and show registers, spills, occupancy and more.

    Needs triton and no GPU. Exits with 1 where a kernel doesn't compile, with 2 for bad options or no triton.
    """
    try:
        if importlib.util.find_spec("triton") is None:
            raise ValueError("triton isn't installed: pip install triton (Linux only; no GPU is needed)")
        wanted = specs() if op is None else [spec for name in op for spec in specs(name)]
        if dtype is not None:
            wanted = _select_dtypes(wanted, dtype)
        todo = tasks(wanted, arch or ["sm_90"])
        results = compile_tasks(todo, workers)
    except ValueError as error:
        typer.echo(f"pyaccel inspect: {error}", err=True)
        raise typer.Exit(2) from None
    try:
        codes = _with_progress(results, len(todo))
    except CompilationError as error:
        typer.echo(f"pyaccel inspect: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(
            json.dumps([{name: getattr(code, name) for name in JSON_FIELDS} for code in codes], indent=1)
        )
    else:
        console = Console()
        if not console.is_terminal:
            console.width = 140  # a pipe has no width to fit
        for name in dict.fromkeys(code.op for code in codes):
            console.print(_table(name, [code for code in codes if code.op == name]))


def _select_dtypes(wanted: list[KernelSpec], dtypes: list[str]) -> list[KernelSpec]:
    known = list(dict.fromkeys(spec.dtype for spec in wanted))
    unknown = sorted(set(dtypes) - set(known))
    if unknown:
        raise ValueError(f"unknown dtype {', '.join(unknown)}: expected one of {', '.join(known)}")
    return [spec for spec in wanted if spec.dtype in dtypes]


def _with_progress(results: Iterator[MachineCode], total: int) -> list[MachineCode]:
    codes = []
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # On stderr, so that the JSON on stdout can be piped.
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("compiling", total=total)
        for code in results:
            codes.append(code)
            progress.advance(task)
    return codes


def _table(op: str, codes: list[MachineCode]) -> Table:
    table = Table(title=op, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("kernel", "configuration"):
        table.add_column(heading, overflow="fold")
    for heading in ("dtype", "arch"):
        table.add_column(heading, no_wrap=True)
    for heading in ("regs", "spill", "shared", "occupancy", "wgmma", "mma", "load/store"):
        table.add_column(heading, justify="right", no_wrap=True)
    for code in codes:
        table.add_row(
            code.name,
            code.config,
            code.dtype,
            code.arch,
            str(code.registers),
            f"[red]{code.spill_bytes}[/red]" if code.spill_bytes else "0",
            str(code.shared_bytes),
            f"{code.occupancy:.0%}",
            str(code.wgmma),
            str(code.mma),
            f"{code.load_bits}/{code.store_bits}",
        )
    table.caption = (
        "regs: 32-bit registers a thread; spill, shared: bytes; occupancy: resident warps; "
        "wgmma, mma: matrix instructions; load/store: widest access to global memory, bits"
    )
    return table
