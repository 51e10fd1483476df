"""Reading and writing BERT models and heads in the folders of Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pyaccel.models import files
from pyaccel.nn.int8_files import make_int8, quantization_config


def read(path_or_hub_id: str | Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """A folder, the values of its `config.json` and its weights."""
    folder = files.find_folder(path_or_hub_id)
    return folder, files.read_json(folder / "config.json"), plain_names(files.read_safetensors(folder))


def load(
    folder: Path,
    values: dict[str, Any],
    saved: dict[str, Tensor],
    dtype: torch.dtype | None,
    kind: Any,
) -> Any:
    """The encoder in what `read` gave, as a `kind`: BertModel or a class derived from it."""
    if values.get("model_type", "bert") != "bert":
        raise ValueError(f"{folder}: a {values['model_type']!r} checkpoint, BertModel loads 'bert'")
    try:
        config = kind.config_class.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    weights = _bert_weights(saved, folder)

    with torch.device("meta"):
        model = kind(config, add_pooling_layer=any(name.startswith("pooler.") for name in weights))
    if "quantization_config" in values:
        try:
            make_int8(model, values["quantization_config"])
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
    files.check_weights(weights, model.state_dict(), folder)
    model.to(dtype or weights[_WORD_EMBEDDINGS].dtype)
    model.to_empty(device="cpu")
    model.load_state_dict(weights)
    return model.eval()


def write(model: Any, folder: str | Path, prefix: str = "") -> None:
    """Write `config.json` and `model.safetensors` of a BertModel, or of a head around one that it calls `prefix`."""
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    values = model.config.to_dict()
    values.pop("torch_dtype", None)  # the old name of dtype
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    dtype = str(weights[f"{prefix}{_WORD_EMBEDDINGS}"].dtype).removeprefix("torch.")
    values.update(model_type="bert", architectures=[type(model).__name__], dtype=dtype)
    values.pop("quantization_config", None)
    if quantization := quantization_config(model, prefix):
        values["quantization_config"] = quantization
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


_WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"


def plain_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Early checkpoints name LayerNorm's parameters as TensorFlow does."""
    return {n.replace(".gamma", ".weight").replace(".beta", ".bias"): t for n, t in weights.items()}


def _bert_weights(weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The encoder's weights under BertModel's names, whatever model the checkpoint was saved from."""
    prefixes = [name.removesuffix(_WORD_EMBEDDINGS) for name in weights if name.endswith(_WORD_EMBEDDINGS)]
    if len(prefixes) != 1:
        raise ValueError(
            f"{folder}: not one BERT, {len(prefixes)} tensors end in {_WORD_EMBEDDINGS!r} where 1 should"
        )
    named = {name[len(prefixes[0]) :]: t for name, t in weights.items() if name.startswith(prefixes[0])}
    named.pop("embeddings.position_ids", None)  # a buffer that early checkpoints hold
    return named
