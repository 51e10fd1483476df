"""What a whole BERT costs, stock beside accelerated: launches, FLOPs, bytes moved, bytes saved for backward.

Both are transformers' own model on meta tensors, the accelerated one after :func:`pyaccel.accelerate`; every operator
they call is written down (:mod:`pyaccel.cost.recorder`). The stock model computes padding, the accelerated one doesn't.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyaccel import checkpoints, dispatch, triton_support
from pyaccel.cost.as_cuda import AsOnCuda
from pyaccel.cost.recorder import Cost, Step, measure
from pyaccel.cost.roofline import DeviceSpec
from pyaccel.errors import NotSupportedError
from pyaccel.packing import PackedLayout, pack, unpack

# transformers' names of the sizes in config.json: layers, hidden, heads, intermediate.
NAMED = {
    "minilm": (6, 384, 12, 1536),
    "bert-base": (12, 768, 12, 3072),
    "bert-large": (24, 1024, 16, 4096),
}
# Share of the longest that the mean of a lognormal distribution of lengths is, and its spread: SQuAD's contexts with
# their questions, mean 177 of 384 tokens; sentences, mean 25 of 128.
MIXES = {"full": (1.0, 0.0), "squad": (177 / 384, 0.4), "sentences": (25 / 128, 0.6)}


def length_mix(mix: str, batch: int, seq: int) -> list[int]:
    """Lengths of a batch, always the same: all ``seq`` long, or the quantiles of a mix in an order of no meaning.

    Raises ValueError for an unknown mix.
    """
    if mix not in MIXES:
        raise ValueError(f"unknown lengths {mix!r}: expected one of {', '.join(MIXES)}")
    share, spread = MIXES[mix]
    quantiles = (NormalDist().inv_cdf((i + 0.5) / batch) for i in range(batch))
    # A lognormal's mean is exp(spread^2 / 2) times its median.
    median = seq * share * math.exp(-(spread**2) / 2)
    lengths = [min(seq, max(1, round(median * math.exp(spread * q)))) for q in quantiles]
    random.Random(0).shuffle(lengths)
    return lengths


def bert_config(model: str) -> Any:
    """transformers' config of a named size, or of a BERT's folder or hub id.

    Raises:
        pyaccel.checkpoints.CheckpointError: a ValueError: it can't be loaded, or is another model's.
    """
    if model in NAMED:
        from transformers import BertConfig

        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        sizes: dict[str, Any] = dict(zip(names, NAMED[model], strict=True))
        return BertConfig(**sizes)
    return checkpoints.load_config(checkpoints.find(model), "bert")


@dataclass(frozen=True)
class Segment:
    """Embeddings, one layer, the pooler, or packing: the cost of its forward and, in training, backward."""

    name: str
    cost: Cost

    def as_dict(self) -> dict[str, Any]:
        """The four figures, for JSON."""
        return {"name": self.name, **figures([self])}


def figures(parts: Sequence[Segment]) -> dict[str, int]:
    """Launches, FLOPs (in 16 bits; int8 counts half), bytes moved and bytes saved for backward, of all together."""
    steps = [step for part in parts for step in part.cost.steps]
    return {
        "launches": sum(step.launches for step in steps),
        "flops": sum(step.flops for step in steps),
        "bytes_moved": sum(step.activation_bytes + step.parameter_bytes for step in steps),
        "bytes_saved": sum(part.cost.saved_bytes for part in parts),
    }


def by_op(parts: Sequence[Segment]) -> dict[str, dict[str, int]]:
    """The same for each operator."""
    steps: dict[str, list[Step]] = {}
    for part in parts:
        for step in part.cost.steps:
            steps.setdefault(step.op, []).append(step)
    return {
        op: {
            "launches": sum(step.launches for step in same),
            "flops": sum(step.flops for step in same),
            "bytes_moved": sum(step.activation_bytes + step.parameter_bytes for step in same),
        }
        for op, same in sorted(steps.items())
    }


def least_seconds(parts: Sequence[Segment], card: DeviceSpec) -> float:
    """The roofline's time, without launches and their gaps."""
    return sum(part.cost.seconds(card) for part in parts)


def model_costs(
    config: Any,
    lengths: Sequence[int],
    dtype: torch.dtype,
    *,
    training: bool = False,
    backend: str = "auto",
) -> dict[str, list[Segment]]:
    """``"stock"`` (eager mode, SDPA) and ``"accelerated"``: the parts of a BERT in the order in which they run.

    Args:
        config: transformers' BertConfig.
        lengths: of each row; the longest is the length that the stock model pads to.
        training: forward with dropout, and backward.
        backend: of the accelerated model's ops. "torch" switches the kernels off.

    Raises:
        pyaccel.errors.NotSupportedError: triton is not installed, and the kernels can't be counted.
        ValueError: no row, or a backend that can't be counted for these lengths.
    """
    from transformers import BertModel

    from pyaccel.hf import accelerate

    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths must be one or more positive numbers, got {list(lengths)}")
    if backend in ("auto", "triton") and not triton_support.has_triton():
        raise NotSupportedError("triton isn't installed: pip install triton (Linux only; no GPU is needed)")
    if backend != "auto" and backend not in dispatch.BACKENDS:
        raise ValueError(
            f"unknown backend {backend!r}: expected auto or one of {', '.join(dispatch.BACKENDS)}"
        )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        stock, model = (cast(nn.Module, BertModel(config)).to(dtype) for _ in range(2))
    # Backends are asked for below: the dry run of `accelerate` has no data here.
    accelerate(model)
    padded = min(lengths) < max(lengths)
    if padded and backend == "reference":
        raise ValueError(
            "the reference's attention depends on the lengths' values: count it with full lengths"
        )
    with AsOnCuda():
        costs = {"stock": _stock(stock, lengths, training=training)}
        asked = nullcontext() if backend == "auto" else dispatch.use_backend(backend)
        with asked:
            costs["accelerated"] = _accelerated(model, lengths, training=training)
    return costs


def _stock(model: Any, lengths: Sequence[int], *, training: bool) -> list[Segment]:
    batch, seq = len(lengths), max(lengths)
    mask = None
    if min(lengths) < seq:  # transformers makes it once for all layers
        mask = torch.empty(batch, 1, 1, seq, dtype=torch.bool, device="meta").expand(batch, 1, seq, seq)
    run = _Run(training, None)
    hidden = run.embeddings(model, batch, seq)
    for i, layer in enumerate(model.encoder.layer):
        run(f"layer {i}", layer, _stock_layer(layer, mask), hidden)
    run("pooler", model.pooler, model.pooler, hidden)
    return run.parts


def _accelerated(model: Any, lengths: Sequence[int], *, training: bool) -> list[Segment]:
    batch, seq, total = len(lengths), max(lengths), sum(lengths)
    run = _Run(training, lengths)
    hidden = run.embeddings(model, batch, seq)
    tokens = None
    inside = hidden
    if total < batch * seq:
        indices = torch.empty(total, dtype=torch.int64, device="meta")
        offsets = torch.empty(batch + 1, dtype=torch.int32, device="meta")
        tokens = PackedLayout(indices, offsets, seq, batch, seq, None, offsets, seq)
        run("packing", nn.Module(), lambda x: pack(x, tokens), hidden)
        inside = torch.empty(total, hidden.shape[-1], dtype=hidden.dtype, device="meta")
    for i, layer in enumerate(model.encoder.layer):
        run(f"layer {i}", layer, _layer(layer, tokens), inside)
    if tokens is not None:
        run("unpacking", nn.Module(), lambda x: unpack(x, tokens), inside)
    run("pooler", model.pooler, model.pooler, hidden)
    return run.parts


def _layer(layer: Any, tokens: PackedLayout | None) -> Callable[[Tensor], Tensor]:
    from pyaccel.hf.executors.padded import run_layer
    from pyaccel.hf.families import family_of

    family = family_of(layer)
    assert family is not None
    # What the layer's own forward calls when its guard lets a call through; the guard refuses meta parameters.
    return lambda hidden: run_layer(family, layer, hidden, tokens)


class _Run:
    """Runs parts one by one and keeps their costs."""

    def __init__(self, training: bool, lengths: Sequence[int] | None) -> None:
        self.training, self.lengths = training, lengths
        self.parts: list[Segment] = []

    def __call__(
        self, name: str, module: nn.Module, call: Callable[[Tensor], Tensor], hidden: Tensor
    ) -> None:
        cost = measure(module, call, hidden, training=self.training, lengths=self.lengths)
        self.parts.append(Segment(name, cost))

    def embeddings(self, model: Any, batch: int, seq: int) -> Tensor:
        ids = torch.empty(batch, seq, dtype=torch.int64, device="meta")
        types = torch.empty(batch, seq, dtype=torch.int64, device="meta")
        hidden: Tensor = model.embeddings.word_embeddings.weight.new_empty(
            batch, seq, model.config.hidden_size
        )
        self("embeddings", model.embeddings, lambda _: model.embeddings(ids, types), hidden)
        return hidden


def _stock_layer(layer: Any, mask: Tensor | None) -> Callable[[Tensor], Tensor]:
    def call(hidden: Tensor) -> Tensor:
        out: Tensor | tuple[Tensor, ...] = layer(hidden, mask)
        return out[0] if isinstance(out, tuple) else out

    return call
