"""A whole Hugging Face BERT: stock, compiled and accelerated, in inference and in a training step.

A training step is forward and backward of a loss over the pooled output, without dropout, so that gradients can be
compared; its outputs are all of them. Batches are full, or of mixed lengths as sentences come: a quarter full at most
rows, one as long as the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pyaccel
from benchmarks.registry import Case, Variant

Outputs = tuple[Tensor, ...]


class Size(NamedTuple):
    """A model's layers and hidden size (heads of 32 or 64), and the batch."""

    layers: int
    hidden: int
    batch: int
    seq: int
    mixed: bool = False
    training: bool = False


@dataclass(frozen=True)
class Problem:
    """A stock model and a batch ``[batch, seq]``; ``training``: with gradients."""

    model: Any
    batch: dict[str, Tensor]
    training: bool


def problem(size: Size, dtype: torch.dtype, device: torch.device) -> Problem:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=1000,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.hidden // (64 if size.hidden >= 768 else 32)),
        intermediate_size=4 * size.hidden,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertModel(config).to(device, dtype).train(size.training)
    lengths = torch.full((size.batch,), size.seq)
    if size.mixed:
        lengths = (size.seq * (0.05 + 0.9 * torch.rand(size.batch) ** 2)).long().clamp(min=1)
        lengths[0] = size.seq
    batch = {
        "input_ids": torch.randint(1, 1000, (size.batch, size.seq)),
        "attention_mask": (torch.arange(size.seq) < lengths.unsqueeze(1)).long(),
    }
    return Problem(model, {name: x.to(device) for name, x in batch.items()}, size.training)


def call(model: Any, p: Problem) -> Outputs:
    """The states of real tokens; in training every gradient, over the largest element that it has."""
    if not p.training:
        with torch.no_grad():
            return (model(**p.batch).last_hidden_state,)
    parameters = [x for x in model.parameters() if x.requires_grad]
    pooled = model(**p.batch).pooler_output
    weights = torch.linspace(-1, 1, pooled.shape[1], device=pooled.device, dtype=pooled.dtype)
    return torch.autograd.grad((pooled * weights).sum(), parameters)


def compared(p: Problem, given: Outputs) -> Outputs:
    """Padding is nobody's; gradients are judged together, but for keys' biases', which are rounding alone."""
    if not p.training:
        return (given[0][p.batch["attention_mask"].bool()],)
    names = [name for name, x in p.model.named_parameters() if x.requires_grad]
    return (torch.cat([g.flatten() for name, g in zip(names, given, strict=True) if "key.bias" not in name]),)


def truth(p: Problem) -> Outputs:
    return compared(p, call(copy.deepcopy(p.model).double(), p))


def naive(p: Problem) -> Outputs:
    return compared(p, call(p.model, p))


def prepare(p: Problem, change: Callable[[Any], Any]) -> Callable[[], Outputs]:
    model = change(copy.deepcopy(p.model))
    return lambda: call(model, p)


def accelerated(**options: Any) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        pyaccel.accelerate(model, **options)
        return model

    return change


def n_tokens(p: Problem) -> int:
    return int(p.batch["attention_mask"].sum())


def bytes_moved(p: Problem) -> int:
    """Each weight of a layer read once, and its gradient written; hidden states of the first and of the last layer."""
    weights = sum(x.numel() * x.element_size() for x in p.model.encoder.parameters())
    states = 2 * n_tokens(p) * p.model.config.hidden_size * next(p.model.parameters()).element_size()
    return weights * (2 if p.training else 1) + states


def flops(p: Problem) -> int:
    """The products of real tokens, those of attention among them."""
    lengths = p.batch["attention_mask"].sum(1)
    attention = 4 * int((lengths**2).sum()) * p.model.config.hidden_size * p.model.config.num_hidden_layers
    products = 2 * n_tokens(p) * sum(x.numel() for x in p.model.encoder.parameters() if x.dim() == 2)
    return (products + attention) * (3 if p.training else 1)


def sizes(layers: int, hidden: int) -> dict[str, Size]:
    name = f"{layers}x{hidden}"
    return {
        f"{name}, 1x128": Size(layers, hidden, 1, 128),
        f"{name}, 8x128": Size(layers, hidden, 8, 128),
        f"{name}, 16x256 mixed": Size(layers, hidden, 16, 256, mixed=True),
        f"{name}, 8x512": Size(layers, hidden, 8, 512),
        f"{name}, 16x128 training": Size(layers, hidden, 16, 128, training=True),
        f"{name}, 16x128 mixed training": Size(layers, hidden, 16, 128, mixed=True, training=True),
    }


CASE = Case(
    name="encoder",
    sizes={**sizes(6, 384), **sizes(12, 768)},
    cpu_sizes=sizes(6, 384),
    quick={"1x32, 3x7 mixed": Size(1, 32, 3, 7, mixed=True)},
    problem=problem,
    truth=truth,
    naive=naive,
    bytes_moved=bytes_moved,
    flops=flops,
    variants=(
        Variant("pyaccel", lambda p: prepare(p, accelerated()), outputs=compared),
        Variant("pyaccel, padded", lambda p: prepare(p, accelerated(packing=False)), outputs=compared),
        Variant("stock", lambda p: prepare(p, lambda model: model), outputs=compared),
        Variant(
            "torch.compile",
            lambda p: prepare(p, lambda model: torch.compile(model, dynamic=False)),
            outputs=compared,
        ),
    ),
)
