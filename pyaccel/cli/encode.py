"""``pyaccel encode``: a file of texts in, a file of embeddings out, however many there are."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pyaccel import checkpoints, machine
from pyaccel.cli.console import LARGEST, check_writable, progress_output
from pyaccel.encode.identity import WINDOW, Identity, Shard, fingerprint, stamps
from pyaccel.encode.job import Job
from pyaccel.encode.texts import Texts, pyarrow
from pyaccel.errors import UserInputError
from pyaccel.machine import resolve_device, resolve_dtype

FORMATS = (".npy", ".parquet")


def encode(
    texts: Annotated[
        Path,
        typer.Argument(help="Texts: lines, or a column of a .jsonl, .json, .csv, .tsv or .parquet file."),
    ],
    model: Annotated[str, typer.Option(help="A Hugging Face or sentence-transformers folder, or hub id.")],
    out: Annotated[Path, typer.Option(help="The file to write: .npy, or .parquet (row, embedding).")],
    column: Annotated[str, typer.Option(help="Which column or field holds the text.")] = "text",
    pooling: Annotated[
        str | None, typer.Option(help="mean or cls. Default: the folder's own, or mean.")
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(help="Divide embeddings by their length. Default: as the folder says, or not."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=3, max=LARGEST, help="Cut texts off at so many tokens. Default: the folder's own."),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=LARGEST, help="Tokens to run at a time. Default: 4096, on a GPU 32768."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16: what the model computes in.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.")] = "auto",
    int8: Annotated[bool, typer.Option(help="Run the linear layers in int8 (dynamic scales).")] = False,
    keep_text: Annotated[bool, typer.Option(help="Write the texts too, into a .parquet file.")] = False,
    window: Annotated[
        int,
        typer.Option(
            min=1, max=LARGEST, help="Texts a part: sorted by length together, and lost at most by a kill."
        ),
    ] = WINDOW,
    overwrite: Annotated[bool, typer.Option(help="Start over, whatever is there.")] = False,
) -> None:
    """Embed every text of a file: streamed, in length-sorted batches, without computing any padding.

    Text i is line or row i, empty ones too; lines end with \\n or \\r\\n alone. Killed at any moment and started again
    with the same arguments, it resumes and writes the same file; OUT.job.json records from what. Under torchrun or
    `accelerate launch` several processes or cards share the work. Exits with 2 for bad input, also where the texts
    change meanwhile.
    """
    if keep_text and out.suffix.lower() != ".parquet":
        raise UserInputError("--keep-text needs a .parquet file for --out")
    if pooling not in (None, "mean", "cls"):
        raise UserInputError(f"unknown pooling {pooling!r}: use mean or cls")
    if out.suffix.lower() == ".parquet":
        pyarrow("pyarrow.parquet")
    _check_output(out, texts)
    console = progress_output()
    shard = Shard.from_environment()
    place = resolve_device(device)
    if device == "auto" and place.type == "cuda":
        place = resolve_device(f"cuda:{shard.local_rank}")
    computed_in = resolve_dtype(dtype, place)
    folder = checkpoints.find(model)
    source = Texts(texts, column, window)
    if not source.count:
        raise UserInputError(f"{texts} is empty: there is nothing to encode")
    before = stamps(folder)
    encoder = _load(
        str(folder), int8, device=place, dtype=computed_in, pooling=pooling, normalize=normalize,
        max_length=max_length, batch_tokens=batch_tokens,
    )  # fmt: skip
    source.check()
    if stamps(folder) != before:
        raise UserInputError(
            f"{folder} was changed while the model was loaded: start again when it is complete"
        )
    identity = _identity(source, folder, encoder, int8, keep_text)
    job = Job(out, source.count, identity, shard, overwrite=overwrite)
    if job.finished_before:
        console.print(
            f"{out}: {source.count} embeddings, finished before from the same texts, model and settings: there is "
            "nothing to do",
            soft_wrap=True,
        )
        return
    start = time.perf_counter()
    columns = (TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("encoding", total=job.texts_todo())
        for index, part in job.todo(iter(source)):
            found = encoder.encode(part, done=lambda n: progress.advance(task, n))
            source.check()
            job.save(index, found.numpy())
        seconds = time.perf_counter() - start
        source.check()
        job.finish(iter(source) if keep_text else None)
    _say(console, encoder, source.count, seconds, out, shard)


def _check_output(out: Path, source: Path | None = None) -> None:
    """Raises UserInputError for an output that can't be written, before a model is loaded."""
    if out.suffix.lower() not in FORMATS:
        raise UserInputError(f"{out}: the output is a {' or '.join(FORMATS)} file")
    if source is not None and out.exists() and source.exists() and out.samefile(source):
        raise UserInputError(f"{out} is the file that the texts are in: give another one with --out")
    if out.is_dir() or not out.exists():  # one that is there is replaced, or found to be this job's
        check_writable(out, "--out")


def _load(model: str, int8: bool, **options: Any) -> Any:
    from pyaccel import quantization
    from pyaccel.encode.encoder import TextEncoder

    try:
        encoder = TextEncoder.from_pretrained(model, **options)
        if int8:  # for good: accelerate(int8=...) would keep the floating layers too
            quantization.quantize(encoder.model, "dynamic", progress=False)
    except ValueError as error:
        raise UserInputError(str(error)) from error
    return encoder


def _identity(source: Texts, folder: Path, encoder: Any, int8: bool, keep_text: bool) -> Identity:
    """The texts, the model's files, and all that decides about the last bits of a sum."""
    import tokenizers

    import pyaccel

    weights = next(encoder.model.parameters())
    settings = {
        "pooling": encoder.pooling,
        "normalize": encoder.normalize,
        "max_length": encoder.max_length,
        "batch_tokens": encoder.batch_tokens,
        "dtype": str(weights.dtype),
        "device": machine.name(weights.device),  # of a CPU with its instructions and threads
        "int8": int8,
        "keep_text": keep_text,
        "pyaccel": pyaccel.__version__,
        **machine.versions(),
        "tokenizers": tokenizers.__version__,
        "measurements": _measurements(),
    }
    return Identity(source.digest, source.column, fingerprint(folder), settings, source.window)


def _measurements() -> str | None:
    """Of what ``pyaccel tune`` has measured here, which decides between implementations: a checksum; None without."""
    from pyaccel import tuning

    try:
        folder = tuning.user_folder()
        return fingerprint(folder) if any(folder.glob("*.json")) else None
    except (OSError, RuntimeError):  # no home: nothing is read from there
        return None


def _say(console: Console, encoder: Any, count: int, seconds: float, out: Path, shard: Shard) -> None:
    speed = f"{encoder.texts / seconds:.1f} texts and {encoder.tokens / seconds:.0f} tokens a second"
    done_before = (
        "" if encoder.texts == count else f" (of {count}; the others were done already, or elsewhere)"
    )
    console.print(f"{encoder.texts} texts{done_before}, {speed}", soft_wrap=True)
    if encoder.truncated:
        console.print(f"{encoder.truncated} were cut off at {encoder.max_length} tokens", soft_wrap=True)
    report = encoder.report
    if report is not None and (not report.swapped or report.refused["padded"] or report.refused["packed"]):
        console.print(str(report), soft_wrap=True)
    if not shard.rank:
        console.print(f"{out}: {count} embeddings", soft_wrap=True)
