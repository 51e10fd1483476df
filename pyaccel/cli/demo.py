"""``pyaccel demo``: a real BERT checkpoint on real text, stock beside accelerated, answers checked."""

from __future__ import annotations

import copy
import json
import math
import shutil
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pyaccel import checkpoints
from pyaccel.cli.console import LARGEST, check_writable, output, progress_output
from pyaccel.encode.texts import read_passages, real_passages
from pyaccel.errors import UserInputError
from pyaccel.machine import resolve_device, resolve_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pyaccel.dispatch import Choice
    from pyaccel.hf.report import Report
    from pyaccel.verify.policy import Verdict

# Both models on the same few batches, in fp64 and in the plain dtype too: enough to judge, and seconds not minutes.
JUDGED_BATCHES = 4
# Of sentence embeddings in int8 and in fp32.
INT8_MEAN_COSINE, INT8_MIN_COSINE = 0.998, 0.99

Batch = dict[str, "Tensor"]


@dataclass
class Errors:
    """How far the accelerated answers are from the stock fp32 ones, over real tokens and sentences."""

    max_abs: float = 0.0
    sum_squares: float = 0.0
    count: int = 0
    min_cosine: float = 1.0
    sum_cosine: float = 0.0
    sentences: int = 0
    finite: bool = True

    @property
    def rms(self) -> float:
        return math.sqrt(self.sum_squares / max(self.count, 1))

    @property
    def mean_cosine(self) -> float:
        return self.sum_cosine / max(self.sentences, 1)

    def add(self, expected: Tensor, got: Tensor, mask: Tensor) -> None:
        """Token states ``[batch, seq, hidden]`` of both, and the mask ``[batch, seq]`` of real tokens."""
        import torch

        from pyaccel.encode.batching import mean_pool

        expected, got = expected.double(), got.double()
        error = (got - expected)[mask]
        self.finite &= bool(got.isfinite().all())
        self.max_abs = max(self.max_abs, error.abs().max().item())
        self.sum_squares += error.square().sum().item()
        self.count += error.numel()
        cosine = torch.cosine_similarity(mean_pool(expected, mask), mean_pool(got, mask))
        self.min_cosine = min(self.min_cosine, cosine.min().item())
        self.sum_cosine += cosine.sum().item()
        self.sentences += len(cosine)


@dataclass
class Result:
    """Everything that the demo measured; of each model, the seconds of each batch."""

    passages: int
    batch_size: int
    dtype: str
    device: str
    stock: list[float]
    accelerated: list[float]
    padding_removed: float
    truncated: int
    errors: Errors
    verdict: Verdict
    choices: Counter[Choice]
    report: Report
    compiled: list[float] | None = None  # torch.compile of the stock model in the accelerated one's dtype
    versions: dict[str, str] = field(default_factory=dict)
    int8: str | None = None  # what quantization did, in words

    @property
    def right(self) -> bool:
        """Floating point by the policy. int8 is another function: it is judged by its sentence embeddings."""
        if self.int8 is not None:
            alike = self.errors.mean_cosine >= INT8_MEAN_COSINE and self.errors.min_cosine >= INT8_MIN_COSINE
            return self.errors.finite and alike
        return self.errors.finite and self.verdict.passed

    def as_dict(self) -> dict[str, Any]:
        """The ``--json`` file."""
        from pyaccel import dispatch

        def speed(seconds: list[float]) -> dict[str, float]:
            total = sum(seconds)
            return {
                "sentences_per_second": self.passages / total,
                "ms_per_batch": 1e3 * total / len(seconds),
            }

        stock, accelerated = speed(self.stock), speed(self.accelerated)
        return {
            "speedup": accelerated["sentences_per_second"] / stock["sentences_per_second"],
            "stock": stock,
            "accelerated": accelerated,
            **({} if self.compiled is None else {"compiled": speed(self.compiled)}),
            "padding_removed": self.padding_removed,
            "max_abs_error": self.errors.max_abs,
            "rms_error": self.errors.rms,
            "min_cosine": self.errors.min_cosine,
            "mean_cosine": self.errors.mean_cosine,
            "int8": self.int8,
            "within_policy": self.right,
            "policy": {
                "max_error": self.verdict.max_error,
                "max_allowed": self.verdict.max_allowed,
                "rms_error": self.verdict.rms_error,
                "rms_allowed": self.verdict.rms_allowed,
            },
            "backends": {
                op: {"backend": choice.backend, "reason": choice.reason}
                for op, choice in dispatch.summary(self.choices).items()
            },
            "report": self.report.as_dict(),
            "passages": self.passages,
            "truncated": self.truncated,
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "device": self.device,
            "versions": self.versions,
        }


def demo(
    model: Annotated[
        str | None,
        typer.Option(help="A Hugging Face BERT: its folder, or a hub id. Default: all-MiniLM-L6-v2."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A text file, one passage a line. Default: 256 real English paragraphs."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the accelerated model: fp32, bf16 or fp16.")] = "fp32",
    int8: Annotated[
        bool,
        typer.Option(help="Quantize the accelerated model's encoder: dynamic int8, a scale for each token."),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, max=LARGEST, help="Passages a batch.")] = 16,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")
    ] = "auto",
    rounds: Annotated[
        int, typer.Option(min=1, max=LARGEST, help="Timed rounds over all batches; medians count.")
    ] = 3,
    against_compile: Annotated[
        bool, typer.Option(help="Time torch.compile of the stock model too; compiling takes a minute.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file too.")
    ] = None,
) -> None:
    """Encode real text with a stock Hugging Face BERT (fp32, SDPA) and the accelerated one, in turn, and compare.

    Exits with 1 where the accelerated answers are outside the numerics policy, with 2 for bad input.
    """
    console = output()
    check_writable(json_file, "--json")
    target = resolve_device(device)
    wanted = resolve_dtype(dtype, target)
    passages = None if text is None else read_passages(text)
    if against_compile and target.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise UserInputError(
            "torch.compile needs a C++ compiler on a CPU: install g++, or leave --against-compile out"
        )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars = progress_output()
    with Progress(*columns, console=bars, transient=True, disable=not bars.is_terminal) as progress:
        result = run(model, passages, wanted, batch_size, target, rounds, against_compile, progress, int8)
    show(result, console)
    if json_file is not None:
        json_file.write_text(json.dumps(result.as_dict(), indent=2) + "\n", encoding="utf-8")
    if not result.right:
        raise typer.Exit(1)


def run(
    model: str | None,
    passages: list[str] | None,
    dtype: torch.dtype,
    batch_size: int,
    device: torch.device,
    rounds: int,
    against_compile: bool,
    progress: Progress,
    int8: bool = False,
) -> Result:
    """Load, encode, time in turn, compare, judge."""
    import torch

    import pyaccel
    from pyaccel import dispatch, machine
    from pyaccel.timing import time_in_turn
    from pyaccel.verify.policy import judge

    loading = progress.add_task("loading the model", total=None)
    stock, tokenizer, _ = checkpoints.load(
        model, expected="bert", device=device, dtype=torch.float32, attn_implementation="sdpa"
    )
    progress.remove_task(loading)
    limit = min(stock.config.max_position_embeddings, 512)

    def count_tokens(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]

    if passages is None:
        passages = real_passages(count_tokens, high=min(256, limit))
    truncated = sum(n > limit for n in count_tokens(passages))

    def batch_of(texts: list[str]) -> Batch:
        cut = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return {name: tensor.to(device) for name, tensor in cut.items()}

    batches = [batch_of(passages[i : i + batch_size]) for i in range(0, len(passages), batch_size)]
    masks = [batch["attention_mask"].bool() for batch in batches]

    naive = stock if dtype == torch.float32 else copy.deepcopy(stock).to(dtype)
    accelerated = copy.deepcopy(naive)
    report = pyaccel.accelerate(accelerated)
    quantization = pyaccel.quantization.quantize(accelerated) if int8 else None

    def forward(of: Any) -> Callable[[Batch], Tensor]:
        return lambda batch: of(**batch).last_hidden_state

    with torch.inference_mode():
        errors, choices = Errors(), Counter[dispatch.Choice]()
        comparing = progress.add_task("comparing answers", total=len(batches))
        for batch, mask in zip(batches, masks, strict=True):  # warms both models up as well
            with dispatch.record() as recorded:
                states = forward(accelerated)(batch)
            choices.update(recorded)
            errors.add(forward(stock)(batch), states, mask)
            progress.advance(comparing)
        contenders = [forward(stock), forward(accelerated)]
        if against_compile:
            contenders.append(forward(torch.compile(copy.deepcopy(naive), dynamic=True)))
            compiling = progress.add_task("compiling the stock model", total=len(batches))
            for batch in batches:
                contenders[-1](batch)
                progress.advance(compiling)
        timing = progress.add_task("timing", total=1 + rounds)
        taken, failed = time_in_turn(
            {
                (side, index): partial(contender, batch)
                for side, contender in enumerate(contenders)
                for index, batch in enumerate(batches)
            },
            rounds,
            device,
            done=lambda: progress.advance(timing),
        )
        for error in failed.values():
            raise error
        seconds = [
            [statistics.median(t.seconds for t in taken[side, index]) for index in range(len(batches))]
            for side in range(len(contenders))
        ]
        judged = progress.add_task("judging by the fp64 truth", total=min(JUDGED_BATCHES, len(batches)))
        truth_model = copy.deepcopy(stock).double()
        judged_states: list[tuple[Tensor, ...]] = []
        for batch, mask in zip(batches[:JUDGED_BATCHES], masks, strict=False):
            judged_states.append(tuple(forward(m)(batch)[mask] for m in (accelerated, truth_model, naive)))
            progress.advance(judged)
        verdict = judge(*(torch.cat(parts) for parts in zip(*judged_states, strict=True)))

    slots = sum(mask.numel() for mask in masks)
    return Result(
        passages=len(passages),
        batch_size=batch_size,
        dtype=str(dtype).removeprefix("torch."),
        device=machine.name(device),
        stock=seconds[0],
        accelerated=seconds[1],
        compiled=seconds[2] if against_compile else None,
        padding_removed=1 - sum(int(mask.sum()) for mask in masks) / slots,
        truncated=truncated,
        errors=errors,
        verdict=verdict,
        choices=choices,
        report=report,
        versions={"pyaccel": pyaccel.__version__, **machine.versions()},
        int8=None if quantization is None else str(quantization),
    )


def show(result: Result, console: Console) -> None:
    """Print the tables."""
    figures = result.as_dict()
    table = Table(
        title=f"{result.passages} passages, batches of {result.batch_size}, {result.device}",
        title_justify="left",
    )
    for heading in ("model", "dtype", "sentences/s", "ms a batch", "speed"):
        table.add_column(heading, justify="left" if heading in ("model", "dtype") else "right")
    rows = [
        ("stock Hugging Face, SDPA", "float32", "stock"),
        ("accelerated" if result.int8 is None else "accelerated, int8", result.dtype, "accelerated"),
    ]
    if result.compiled is not None:
        rows.insert(1, ("torch.compile of the stock model", result.dtype, "compiled"))
    for name, dtype, key in rows:
        per_second, ms = figures[key]["sentences_per_second"], figures[key]["ms_per_batch"]
        ratio = per_second / figures["stock"]["sentences_per_second"]
        table.add_row(name, dtype, f"{per_second:.1f}", f"{ms:.2f}", f"{ratio:.2f}x")
    console.print(table)
    if result.truncated:
        console.print(f"{result.truncated} passages were truncated to the model's length")
    console.print(f"padding removed: {result.padding_removed:.1%} of all positions")
    console.print(
        f"against stock fp32: max error {figures['max_abs_error']:.3g}, RMS {figures['rms_error']:.3g} of the token "
        f"states; smallest cosine of sentence embeddings {figures['min_cosine']:.6f}"
    )
    verdict = Text("within", "green") if result.right else Text("OUTSIDE", "red")
    if result.int8 is None:
        console.print(verdict + Text(f" the numerics policy, against an fp64 truth: {result.verdict}"))
    else:
        console.print(result.int8)
        cosines = (
            f"mean {result.errors.mean_cosine:.5f} (at least {INT8_MEAN_COSINE}), "
            f"smallest {result.errors.min_cosine:.5f} (at least {INT8_MIN_COSINE})"
        )
        console.print(
            verdict + Text(f" int8's bounds, cosine of sentence embeddings to stock fp32: {cosines}")
        )
    backends = Table(title="which backend served which op, and why", title_justify="left")
    for heading in ("op", "backend", "calls", "why"):
        backends.add_column(heading, justify="right" if heading == "calls" else "left")
    for choice, calls in result.choices.items():
        backends.add_row(choice.op, choice.backend, str(calls), choice.reason)
    console.print(backends)
    console.print(str(result.report))
