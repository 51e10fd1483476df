"""``pyaccel inspect``: the machine code of every kernel that ships, on any machine."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pyaccel.cli.console import output, progress_output
from pyaccel.errors import UserInputError
from pyaccel.inspect.compile import CompilationError, MachineCode, compile_tasks, listings, tasks
from pyaccel.inspect.gpus import GPU_SPECS
from pyaccel.inspect.spec import KernelSpec
from pyaccel.inspect.specs.registry import specs

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
    "loop_instructions",
)
# What tells a kernel's code from another's, and what --diff compares.
KEY_FIELDS = ("op", "name", "config", "dtype", "arch")
DIFF_FIELDS = tuple(name for name in JSON_FIELDS if name not in KEY_FIELDS)


def inspect(
    op: Annotated[
        list[str] | None, typer.Option(help="An op, such as residual_layernorm; repeatable. Default: all.")
    ] = None,
    arch: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(GPU_SPECS)}; repeatable. Default: sm_90.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="A dtype label, such as bf16; repeatable. Default: all.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Compiler processes. Default: one a core.")
    ] = None,
    name: Annotated[
        str, typer.Option(metavar="REGEX", help="Only kernels whose name and configuration have a match.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
    sass: Annotated[bool, typer.Option("--sass", help="Print the machine code (AMD: its assembly).")] = False,
    ptx: Annotated[bool, typer.Option("--ptx", help="Print NVIDIA's PTX.")] = False,
    diff: Annotated[
        str | None, typer.Option(metavar="REV", help="Compare with a git revision of this checkout.")
    ] = None,
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
        if sum((as_json and diff is None, sass, ptx, diff is not None)) > 1:
            raise ValueError("give one of --json, --sass, --ptx and --diff")
        wanted = [spec for spec in wanted if re.search(name, f"{spec.name} [{spec.config}]")]
        if not wanted:
            raise ValueError(f"no kernel is left by --name {name}")
        todo = tasks(wanted, arch or ["sm_90"])
        commit = None if diff is None else _commit(diff)  # before minutes of compiling
        if sass or ptx:
            _print_listings(todo, "sass" if sass else "ptx", workers)
            return
        codes = _with_progress(compile_tasks(todo, workers), len(todo))
    except (ValueError, re.error) as error:
        typer.echo(f"pyaccel inspect: {error}", err=True)
        raise typer.Exit(2) from None
    except CompilationError as error:
        typer.echo(f"pyaccel inspect: {error}", err=True)
        raise typer.Exit(1) from None
    rows = [{field: getattr(code, field) for field in JSON_FIELDS} for code in codes]
    if diff is not None and commit is not None:
        _show_difference(_rows_of_revision(commit, op, arch, dtype, name, workers), rows, diff, as_json)
    elif as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        console = output()
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
    with Progress(*columns, console=progress_output(), transient=True) as progress:
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
    for heading in ("regs", "spill", "shared", "occupancy", "wgmma", "mma", "loop", "load/store"):
        table.add_column(heading, justify="right", no_wrap=True)
    for code in codes:
        table.add_row(
            code.name,
            code.config,
            code.dtype,
            code.arch,
            str(code.registers),
            Text(str(code.spill_bytes), "red") if code.spill_bytes else "0",
            str(code.shared_bytes),
            f"{code.occupancy:.0%}",
            str(code.wgmma),
            str(code.mma),
            str(code.loop_instructions),
            f"{code.load_bits}/{code.store_bits}",
        )
    table.caption = (
        "regs: 32-bit registers a thread; spill, shared: bytes; occupancy: resident warps; "
        "wgmma, mma: matrix instructions; loop: instructions of the inner loop; "
        "load/store: widest access to global memory, bits"
    )
    return table


def _print_listings(todo: list[tuple[KernelSpec, str]], kind: str, workers: int | None) -> None:
    for (spec, arch), text in zip(todo, listings(todo, kind, workers), strict=True):
        typer.echo(f"// {spec} on {arch}\n{text.rstrip()}\n")


def _commit(revision: str) -> str:
    """The commit that a revision of this checkout names; an option of git's is none."""
    return _git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}").strip()


def _git(*arguments: str) -> str:
    """What git prints in the checkout that pyaccel is imported from."""
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        raise UserInputError("--diff needs git") from None
    except subprocess.CalledProcessError as error:
        raise UserInputError(
            f"--diff: {error.stderr.strip()} (git {' '.join(arguments)}): give a revision of the checkout that "
            f"pyaccel is imported from, {root}"
        ) from None
    return done.stdout


def _rows_of_revision(
    revision: str,
    op: list[str] | None,
    arch: list[str] | None,
    dtype: list[str] | None,
    name: str,
    workers: int | None,
) -> list[dict[str, Any]]:
    """What `inspect --json` gives in a copy of that revision, compiled by this environment."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "tree.tar")
        _git("archive", "--output", str(archive), revision, "kernels", "pyaccel")
        with tarfile.open(archive) as tree:
            tree.extractall(folder, filter="data")
        options = [
            f"--{key}={value}"
            for key, values in (("op", op), ("arch", arch), ("dtype", dtype))
            for value in values or ()
        ]
        # Not --name, which an older revision may not know.
        options += [] if workers is None else [f"--workers={workers}"]
        done = subprocess.run(
            [sys.executable, "-m", "pyaccel", "inspect", "--json", *options],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": folder},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise UserInputError(
            f"--diff {revision}: pyaccel inspect of that revision failed, with exit code {done.returncode}"
        )
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return [row for row in rows if re.search(name, f"{row['name']} [{row['config']}]")]


def _show_difference(
    before: list[dict[str, Any]], after: list[dict[str, Any]], revision: str, as_json: bool
) -> None:
    old, new = ({tuple(row[key] for key in KEY_FIELDS): row for row in rows} for rows in (before, after))
    found = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        # A revision may not know a field yet.
        changed = {
            field: [None if a is None else a.get(field), None if b is None else b[field]]
            for field in DIFF_FIELDS
            if a is None or b is None or (field in a and a[field] != b[field])
        }
        if changed:
            what = "new" if a is None else "gone" if b is None else "changed"
            found.append({**dict(zip(KEY_FIELDS, key, strict=True)), "what": what, "fields": changed})
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for one in found:
        where = f"{one['op']} {one['name']} [{one['config']}] {one['dtype']} on {one['arch']}"
        fields = ", ".join(f"{field} {a} -> {b}" for field, (a, b) in one["fields"].items())
        typer.echo(f"{one['what']}: {where}" + (f": {fields}" if one["what"] == "changed" else ""))
    same = sum(key in old and key in new for key in new) - sum(one["what"] == "changed" for one in found)
    typer.echo(f"{len(found)} differ from {revision}, {same} are the same")
