"""``pyaccel quantize``: a Hugging Face folder in, its int8 folder out, and what that costs."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from pyaccel.cli.errors import BadInputError
from pyaccel.cli.inputs import loading, quiet_transformers, read_passages, real_passages

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
        int | None, typer.Option(min=1, help="Leave this many layers floating, the costliest by SQNR.")
    ] = None,
    leave_mb: Annotated[
        float | None, typer.Option(help="Leave the costliest floating, for at most so many megabytes more.")
    ] = None,
    sensitivity: Annotated[bool, typer.Option(help="Show the SQNR of each layer in int8.")] = False,
) -> None:
    """Quantise an encoder to int8 and save it, with what that does to its states on real text.

    The folder loads with transformers after `pyaccel.hf.register()`, and BERT encoders with
    pyaccel.models.bert. Exits with 2 for bad input.
    """
    if out.exists():
        raise BadInputError(f"{out} exists already: give a new folder with --out")
    if leave is not None and leave_mb is not None:
        raise BadInputError("give either --leave or --leave-mb")
    console = Console()
    model, tokenizer = _load(folder)
    if hasattr(model.config, "quantization_config"):
        raise BadInputError(f"{folder} is quantised already: give the floating-point model's folder")

    from pyaccel.hf.encode import max_tokens

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
                console.print(str(found), highlight=False)
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
        raise BadInputError(str(error)) from None
    console.print(str(report), highlight=False)
    cosines = _cosines(stock, model, held_back)
    unseen = f"{len(cosines)} passages" + (" that calibration hasn't seen" if seen is not held_back else "")
    console.print(
        f"cosine of mean-pooled states to the floating model's, over {unseen}: "
        f"mean {cosines.mean():.5f}, smallest {cosines.min():.5f}",
        highlight=False,
    )
    if not bool(cosines.isfinite().all()):
        raise BadInputError("the int8 model's states aren't finite; nothing is written")
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns(*NOT_COPIED))
    model.save_pretrained(out)
    sizes = (sum(f.stat().st_size for f in place.glob("*.safetensors")) / 1e6 for place in (folder, out))
    before, after = sizes
    was = f", from {before:.1f} MB" if before else ""
    console.print(f"{out}: {after:.1f} MB of weights{was}", highlight=False)


def _load(folder: Path) -> tuple[Any, Any]:
    """The model of the class that saved it, in evaluation, and its tokenizer."""
    if not (folder / "config.json").is_file():
        raise BadInputError(f"{folder} has no config.json: give the folder of a Hugging Face encoder")
    transformers = quiet_transformers()
    with loading(folder):
        config = transformers.AutoConfig.from_pretrained(folder)
        names = config.architectures or []
        kind = getattr(transformers, names[0], None) if names else None
        model = (kind or transformers.AutoModel).from_pretrained(folder)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def _cosines(stock: Any, model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """Of each passage's mean-pooled last hidden states, fp64."""
    import torch

    def pooled(of: Any, batch: dict[str, Tensor]) -> Tensor:
        states = of.base_model(**batch)[0].double()
        mask = batch["attention_mask"].unsqueeze(-1)
        return (states * mask).sum(1) / mask.sum(1)

    found = []
    with torch.inference_mode():
        for batch in track(batches, "comparing", console=Console(stderr=True), transient=True):
            found.append(torch.cosine_similarity(pooled(stock, batch), pooled(model, batch)))
    return torch.cat(found)
