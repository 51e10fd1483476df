"""``pyaccel quantize``: a Hugging Face folder in, its int8 folder out, and what that costs."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import track
from safetensors import SafetensorError

from pyaccel import checkpoints
from pyaccel.cli.console import LARGEST, check_folder_writable, output, progress_output
from pyaccel.encode.texts import read_passages, real_passages
from pyaccel.errors import UserInputError

if TYPE_CHECKING:
    from torch import Tensor

MAX_LENGTH = 256
BATCH_SIZE = 16
# Held back from calibration, to see what int8 costs on text that it hasn't seen.
EVERY = 4
# Weights and their config are written anew; everything else of a folder (tokenizer, pooling ...) is copied.
NOT_COPIED = (
    "config.json",
    "*.safetensors",
    "*.index.json",
    "*.bin",
    "*.pt",
    "*.h5",
    "*.msgpack",
    "*.ot",
    "onnx",
    "openvino",
)


def quantize(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face encoder's folder, with or without a head.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it mustn't exist yet.")],
    method: Annotated[
        str, typer.Option(help="dynamic (a scale for each token), static (one, calibrated) or weight_only.")
    ] = "dynamic",
    smooth: Annotated[
        bool, typer.Option(help="SmoothQuant: more accurate; calibrates on the text. Not for weight_only.")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(help="A text file, one passage a line. Default: 256 real English paragraphs."),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="A layer to leave floating, by name or pattern ('*.output.dense'); repeatable."),
    ] = None,
    leave: Annotated[
        int | None,
        typer.Option(min=1, max=LARGEST, help="Leave this many layers floating, the costliest by SQNR."),
    ] = None,
    leave_mb: Annotated[
        float | None,
        typer.Option(min=0.0, max=1e9, help="Leave the costliest floating, at most so many MB more."),
    ] = None,
    sensitivity: Annotated[bool, typer.Option(help="Show the SQNR of each layer in int8.")] = False,
) -> None:
    """Quantize an encoder to int8 and save it, with what that does to its states on real text.

    The folder loads with transformers after `pyaccel.hf.register()`, and BERT encoders with
    pyaccel.models.bert. Exits with 2 for bad input.
    """
    if out.exists() or out.is_symlink():
        raise UserInputError(f"{out} exists already: give a new folder with --out")
    if folder.resolve() in out.resolve().parents:
        raise UserInputError(
            f"{out} is inside {folder}, which is copied into it: give a folder outside with --out"
        )
    check_folder_writable(out, "--out")
    if leave is not None and leave_mb is not None:
        raise UserInputError("give either --leave or --leave-mb")
    console = output()
    model, tokenizer = _load(folder)

    from pyaccel.encode.encoder import max_tokens

    max_length = min(MAX_LENGTH, tokenizer.model_max_length, max_tokens(model))

    def encode(texts: list[str]) -> dict[str, Tensor]:
        return dict(
            tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        )

    def lengths(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]

    passages = real_passages(lengths) if text is None else read_passages(text)
    batches = [encode(passages[i : i + BATCH_SIZE]) for i in range(0, len(passages), BATCH_SIZE)]
    held_back = batches[::EVERY]
    seen = [batch for i, batch in enumerate(batches) if i % EVERY] or held_back

    import pyaccel
    from pyaccel import quantization

    stock = copy.deepcopy(model)
    pyaccel.accelerate(model, strict=False)
    try:
        left = list(skip or ())
        if sensitivity or leave is not None or leave_mb is not None:
            found = quantization.sensitivity(model, seen)
            if sensitivity:
                console.print(str(found), soft_wrap=True)
            if leave is not None:
                left += found.leave(count=leave)
            if leave_mb is not None:
                left += found.leave(max_bytes=int(leave_mb * 1e6))
        needs_data = smooth or method == "static"
        report = quantization.quantize(
            model,
            method,  # type: ignore[arg-type]
            smooth=smooth,
            calibration=seen if needs_data else None,
            skip=left,
        )
    except ValueError as error:
        raise UserInputError(str(error)) from error
    console.print(str(report), soft_wrap=True)
    cosines = _cosines(stock, model, held_back)
    unseen = f"{len(cosines)} passages" + (" that calibration hasn't seen" if seen is not held_back else "")
    console.print(
        f"cosine of mean-pooled states to the floating model's, over {unseen}: "
        f"mean {cosines.mean():.5f}, smallest {cosines.min():.5f}",
        soft_wrap=True,
    )
    if not bool(cosines.isfinite().all()):
        raise UserInputError("the int8 model's states aren't finite; nothing is written")
    _save(model, folder, out)
    sizes = (sum(f.stat().st_size for f in place.glob("*.safetensors")) / 1e6 for place in (folder, out))
    before, after = sizes
    was = f", from {before:.1f} MB" if before else ""
    console.print(f"{out}: {after:.1f} MB of weights{was}", soft_wrap=True)


def _load(folder: Path) -> tuple[Any, Any]:
    """The model of the class that saved it, in evaluation, and its tokenizer."""
    if not folder.is_dir():  # a hub id has no files to copy
        raise UserInputError(f"there is no folder {folder}: give the folder of a Hugging Face encoder")
    config = checkpoints.load_config(checkpoints.find(folder))
    if getattr(config, "quantization_config", None) is not None:
        raise UserInputError(f"{folder} is quantized already: give the floating-point model's folder")
    model, tokenizer, _ = checkpoints.load(folder, head=True)
    return model, tokenizer


def _save(model: Any, folder: Path, out: Path) -> None:
    """The whole folder or none of it."""
    beside = out.with_name(f"{out.name}.{os.getpid()}")
    patterns = shutil.ignore_patterns(*NOT_COPIED)
    around = (beside.resolve(), *beside.resolve().parents)

    def left_out(place: str, names: list[str]) -> set[str]:  # a link may lead to where the copy is made
        linked = {
            name for name in names if Path(place, name).is_dir() and Path(place, name).resolve() in around
        }
        return {*patterns(place, names), *linked}

    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, beside, ignore=left_out)
        model.save_pretrained(beside)
        beside.rename(out)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, shutil.Error):
            raise UserInputError(f"--out {out} could not be written: {error.args[0][0][2]}") from error
        if isinstance(error, OSError | SafetensorError):
            raise UserInputError(f"--out {out} could not be written: {error}") from error
        raise


def _cosines(stock: Any, model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """Of each passage's mean-pooled last hidden states, fp64."""
    import torch

    from pyaccel.encode.batching import mean_pool

    def pooled(of: Any, batch: dict[str, Tensor]) -> Tensor:
        return mean_pool(of.base_model(**batch)[0].double(), batch["attention_mask"])

    found = []
    with torch.inference_mode():
        for batch in track(batches, "comparing", console=progress_output(), transient=True):
            found.append(torch.cosine_similarity(pooled(stock, batch), pooled(model, batch)))
    return torch.cat(found)
