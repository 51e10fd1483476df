"""The folders that Hugging Face models are saved in: found, read and checked, with errors that say what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def find_folder(path_or_hub_id: str | Path) -> Path:
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    missing = f"{path_or_hub_id}: no such folder"
    is_id = isinstance(path_or_hub_id, str) and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path_or_hub_id)
    if not is_id or path.exists():
        raise FileNotFoundError(f"{missing}; pass a folder with config.json and model.safetensors")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(f"{missing}; install huggingface_hub to fetch it from the hub") from error
    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub client's errors have no common base
        raise FileNotFoundError(f"{missing}, and it could not be fetched from the hub: {error}") from error


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent}: not a Hugging Face model folder, {file.name} is missing")
    return file


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(_existing(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.parent}: {file.name} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file.parent}: {file.name} is not a JSON object")
    return values


def has_safetensors(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def pickled_weights(folder: Path) -> list[str]:
    """Names of files that hold weights as pickles, which run code when they are read: they never are."""
    endings = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
    names = (file.name for file in folder.iterdir() if file.suffix in endings)
    return sorted(name for name in names if name not in ("training_args.bin", "optimizer.pt", "scheduler.pt"))


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return _read_tensors(folder / "model.safetensors")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{folder}: {index.name} has no weight_map of file names; fetch it again")
    shards = sorted(set(names.values()))
    return {name: tensor for shard in shards for name, tensor in _read_tensors(folder / shard).items()}


def _read_tensors(file: Path) -> dict[str, Tensor]:
    pickled = [] if file.is_file() else pickled_weights(file.parent)
    if pickled:
        raise ValueError(
            f"{file.parent}: {file.name} is missing, and pickled weights ({pickled[0]}) are not read, because they can "
            "run code: load them with transformers, if you trust them, and save_pretrained a new folder"
        )
    try:
        return load_file(_existing(file))
    except SafetensorError as error:
        raise ValueError(f"{file.parent}: {file.name} cannot be read ({error}); fetch it again") from error


def check_weights(weights: dict[str, Tensor], expected: dict[str, Tensor], folder: Path) -> None:
    shapes = {n: (tuple(weights[n].shape), tuple(t.shape)) for n, t in expected.items() if n in weights}
    reasons = {
        "missing": [n for n in expected if n not in weights],
        "unexpected": [n for n in weights if n not in expected],
        "of another shape": [f"{n}: {a}, expected {b}" for n, (a, b) in shapes.items() if a != b],
    }
    found = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in reasons.items() if names]
    if found:
        raise ValueError(f"{folder}: the weights do not fit config.json: {'; '.join(found)}")
