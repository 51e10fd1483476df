"""``pyaccel verify``: on this model and this machine, is the fast path right, and where first is it not?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from pyaccel import checkpoints
from pyaccel.cli.console import LARGEST, check_writable, output, progress_output
from pyaccel.encode.texts import read_passages, real_passages
from pyaccel.errors import UserInputError, file_error
from pyaccel.machine import resolve_device
from pyaccel.verify.report import Check, VerifyReport, read_budget


def verify(
    model: Annotated[
        str | None, typer.Argument(help="A Hugging Face folder, or hub id. Default: the demo's checkpoint.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp32, bf16 or fp16; repeatable. Default: fp32 and bf16.")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="triton, torch or reference; repeatable. Default: all that can serve the model here."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Passages to run, one a line. Default: Python's language reference.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=LARGEST, help="Passages in the batch.")] = 8,
    max_length: Annotated[
        int, typer.Option(min=3, max=LARGEST, help="Cut passages off at so many tokens.")
    ] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ... or auto.")] = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also under torch.compile(fullgraph=True).")
    ] = True,
    ops: Annotated[bool, typer.Option("--ops/--no-ops", help="Also every op by itself.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every check to this file.")] = None,
    junit_file: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML to this file.")] = None,
    budget: Annotated[
        Path | None, typer.Option(help="A file that --json wrote: also fail on any error above those in it.")
    ] = None,
) -> None:
    """Compare an accelerated copy of a model with the stock one, op by op and layer by layer, forward and backward.

    Errors are judged against an fp64 truth by what plain PyTorch errs in the same dtype. Needs no GPU and no triton.
    Exits with 0 where all checks passed, 1 where one failed, 2 where something could not be run.
    """
    from pyaccel.errors import NotSupportedError
    from pyaccel.verify import model as lane

    try:
        recorded = None if budget is None else read_budget(budget)
    except ValueError as error:
        raise UserInputError(f"--budget: {error}") from None
    check_writable(json_file, "--json")
    check_writable(junit_file, "--junit")
    stock, batch = load(model, text, batch_size, max_length, resolve_device(device))
    console, progress_console = output(), progress_output()
    columns = (
        SpinnerColumn("line"),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=progress_console, transient=True) as progress:
        task = progress.add_task("loading", total=None)

        def on_check(check: Check) -> None:
            how = " ".join(part for part in (check.dtype, check.backend, check.mode, check.kind) if part)
            progress.update(task, description=f"{how}: {check.where}"[:70], advance=1)

        try:
            report = lane.verify(
                stock,
                batch,
                dtypes=dtype or ["fp32", "bf16"],
                backends=backend,
                compiled=compiled,
                ops=ops,
                on_check=on_check,
            )
        except (ValueError, NotSupportedError) as error:
            raise UserInputError(str(error)) from error
    console.print(_table(report))
    over = [] if recorded is None else report.over_budget(recorded)
    for line in _lines(report, over, recorded):
        console.print(line, soft_wrap=True)
    failed = []
    for option, file, write in (
        ("--json", json_file, report.write_json),
        ("--junit", junit_file, report.write_junit),
    ):
        try:
            if file is not None:
                write(file)
        except OSError as error:  # the other one may still be written
            failed.append(f"{option} {file} could not be written: {file_error(error)}")
    if failed:
        raise UserInputError("; ".join(failed))
    raise typer.Exit(report.exit_code or int(bool(over)))


def load(
    source: str | None, text: Path | None, batch_size: int, max_length: int, device: Any
) -> tuple[Any, dict[str, Any]]:
    """The stock model with the head its folder names, and a batch of real text with labels where the head has some."""
    import torch

    model, tokenizer, _ = checkpoints.load(source, head=True, device=device, dtype=torch.float32)

    def count_tokens(passages: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(passages, verbose=False)["input_ids"]]

    passages = real_passages(count_tokens, batch_size) if text is None else read_passages(text)[:batch_size]
    batch = dict(
        tokenizer(passages, padding=True, truncation=True, max_length=max_length, return_tensors="pt").to(
            device
        )
    )
    return model, {**batch, **example_labels(model, batch)}


def example_labels(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Labels of the kind that a model's head takes; their values are made up."""
    import torch

    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    place = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    row = torch.arange(len(ids), device=ids.device)
    head = type(model).__name__.rpartition("For")[2]
    count = model.config.num_labels
    if head in ("MaskedLM", "CausalLM"):
        return {"labels": ids.masked_fill((place % 7 != 3) | ~mask, -100)}
    if head == "PreTraining" and model.config.model_type == "bert":
        return {"labels": ids.masked_fill((place % 7 != 3) | ~mask, -100), "next_sentence_label": row % 2}
    if head == "SequenceClassification":
        return {"labels": row % count if count > 1 else row * 0.5}
    if head == "TokenClassification":
        return {"labels": (place % count).masked_fill(~mask, -100)}
    if head == "QuestionAnswering":
        last = mask.sum(1) - 1
        return {"start_positions": last // 3, "end_positions": last // 2}
    if head == "NextSentencePrediction":
        return {"labels": row % 2}
    return {}


def _table(report: VerifyReport) -> Table:
    table = Table(
        title=f"{report.model}, on {', '.join(f'{k} {v}' for k, v in report.machine.items())}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in ("dtype", "backend", "mode", "what"):
        table.add_column(heading)
    for heading in ("checks", "failed", "not run", "worst, of allowed"):
        table.add_column(heading, justify="right")
    table.add_column("where it is worst", overflow="fold")
    before = None
    for (dtype, backend, mode, kind), checks in report.groups():
        if before not in (None, (dtype, backend)):
            table.add_section()
        before = (dtype, backend)
        wrong = sum(check.status == "failed" for check in checks)
        lost = sum(check.status == "error" for check in checks)
        worst = max(checks, key=lambda check: check.share)
        style = "red" if wrong or lost else None
        table.add_row(
            dtype,
            backend,
            mode,
            kind,
            str(len(checks)),
            str(wrong),
            str(lost),
            f"{worst.share:.0%}" if worst.allowed else "",
            worst.where if worst.allowed else "",
            style=style,
        )
    table.caption = (
        "layer: every part of every layer; gradient: every parameter; dropout: means and spread over 32 runs, of one "
        "dropout at a time; bits: two runs. Allowed: 3 times the error of plain PyTorch from the fp64 truth, and a few "
        "units in the last place."
    )
    return table


def _lines(report: VerifyReport, over: list[Check], budget: dict[str, float] | None) -> list[str]:
    lines = [f"note: {note}" for note in report.notes]
    shown = 10
    for title, checks in (("failed", report.failed), ("not run", report.errors)):
        lines += [f"{title}: {check}" for check in checks[:shown]]
        if len(checks) > shown:
            lines.append(f"{title}: and {len(checks) - shown} more: --json FILE has them all")
    if budget is not None:
        lines += [
            f"above budget: {check}: {check.error:.3g}, recorded {budget[check.key]:.3g}" for check in over
        ]
    if report.failed:
        lines += [
            f"FAILED, first {check.kind}: {check.where}" + (f", computed by {check.op}" if check.op else "")
            for check in report.firsts
        ]
    elif report.errors:
        lines.append("COULD NOT RUN everything: what did run passed")
    elif over:
        lines.append(f"passed, but {len(over)} errors are above the budget")
    else:
        lines.append(f"passed: {len(report.checks)} checks")
    return lines
