"""``pyaccel encode``: a file of texts in, a file of embeddings out, however many there are."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pyaccel.cli.encode_job import WINDOW, Identity, Job, Share, fingerprint, read_texts
from pyaccel.cli.errors import BadInputError
from pyaccel.cli.inputs import loading, quiet_transformers, resolve_device, resolve_dtype


def encode(
    texts: Annotated[
        Path, typer.Argument(help="Texts: lines, or a column of a .jsonl, .csv, .tsv or .parquet file.")
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
        int | None, typer.Option(min=3, help="Cut texts off at so many tokens. Default: the folder's own.")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to run at a time. Default: 4096, on a GPU 32768.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16: what the model computes in.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.")] = "auto",
    int8: Annotated[bool, typer.Option(help="Run the linear layers in int8 (dynamic scales).")] = False,
    keep_text: Annotated[bool, typer.Option(help="Write the texts too, into a .parquet file.")] = False,
    window: Annotated[
        int, typer.Option(min=1, help="Texts a part: sorted by length together, and lost at most by a kill.")
    ] = WINDOW,
    overwrite: Annotated[bool, typer.Option(help="Start anew, whatever is there.")] = False,
) -> None:
    """Embed every text of a file: streamed, in length-sorted batches, without computing any padding.

    Killed at any moment and started again with the same arguments, it goes on where it was and writes the same file.
    Under torchrun or `accelerate launch` several processes or cards share the work. Exits with 2 for bad input.
    """
    if keep_text and out.suffix != ".parquet":
        raise BadInputError("--keep-text needs a .parquet file for --out")
    if pooling not in (None, "mean", "cls"):
        raise BadInputError(f"unknown pooling {pooling!r}: use mean or cls")
    console = Console(stderr=True)
    count = sum(1 for _ in read_texts(texts, column))
    if not count:
        raise BadInputError(f"{texts} is empty: there is nothing to encode")
    share = Share.from_environment()
    place = resolve_device(device)
    if device == "auto" and place.type == "cuda":
        place = resolve_device(f"cuda:{share.local_rank}")
    encoder = _load(
        model, int8, device=place, dtype=resolve_dtype(dtype, place), pooling=pooling, normalize=normalize,
        max_length=max_length, batch_tokens=batch_tokens,
    )  # fmt: skip
    job = Job(out, count, _identity(texts, column, model, encoder, int8, window), share, overwrite=overwrite)
    start = time.perf_counter()
    with Progress(
        TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as progress:
        task = progress.add_task("encoding", total=job.texts_todo())
        for index, part in job.todo(read_texts(texts, column)):
            found = encoder.encode(part, done=lambda n: progress.advance(task, n))
            job.save(index, found.numpy())
        seconds = time.perf_counter() - start
        job.finish(read_texts(texts, column) if keep_text else None)
    _say(console, encoder, count, seconds, out, share)


def _load(model: str, int8: bool, **options: Any) -> Any:
    quiet_transformers()
    from pyaccel import quantization
    from pyaccel.hf.encode import TextEncoder

    with loading(model):
        encoder = TextEncoder.from_pretrained(model, **options)
        if int8:  # for good: accelerate(int8=...) would keep the floating layers too
            quantization.quantize(encoder.model, "dynamic", progress=False)
    return encoder


def _identity(texts: Path, column: str, model: str, encoder: Any, int8: bool, window: int) -> Identity:
    import torch

    import pyaccel

    weights = next(encoder.model.parameters())
    settings = {
        "pooling": encoder.pooling,
        "normalize": encoder.normalize,
        "max_length": encoder.max_length,
        "batch_tokens": encoder.batch_tokens,
        "dtype": str(weights.dtype),
        "device": weights.device.type,
        "int8": int8,
        "pyaccel": pyaccel.__version__,
        "torch": torch.__version__,
    }
    folder = Path(model).expanduser()
    name = fingerprint(folder) if folder.is_dir() else model
    return Identity(fingerprint(texts), column, name, settings, window)


def _say(console: Console, encoder: Any, count: int, seconds: float, out: Path, share: Share) -> None:
    speed = f"{encoder.texts / seconds:.1f} texts and {encoder.tokens / seconds:.0f} tokens a second"
    done_before = (
        "" if encoder.texts == count else f" (of {count}; the others were done already, or elsewhere)"
    )
    console.print(f"{encoder.texts} texts{done_before}, {speed}", highlight=False)
    if encoder.truncated:
        console.print(f"{encoder.truncated} were cut off at {encoder.max_length} tokens", highlight=False)
    report = encoder.report
    if report is not None and (not report.swapped or report.fallbacks or report.not_packed):
        console.print(str(report), highlight=False)
    if not share.rank:
        console.print(f"{out}: {count} embeddings", highlight=False)
