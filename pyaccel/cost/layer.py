"""What a BERT layer costs, without a clock or a GPU: launches, bytes moved, bytes saved for backward, FLOPs.

The layers run on meta tensors, which have shapes and no data, and every operator they call is written down: ours and
those of transformers' layer in eager mode with SDPA, as a GPU would be asked for them (F.dropout and SDPA call other
operators there than on a CPU; here they call the GPU's). Views cost nothing, an operator reads its inputs and writes
its outputs once, and parameters (and what is made of parameters alone) are counted apart from activations.

The bound of Williams et al. (roofline; doi:10.1145/1498765.1498785) gives the least time for a card: for each operator
the greater of bytes over bandwidth and FLOPs over the rate of its matrix units. No card reaches it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyaccel import dispatch, ops, triton_support
from pyaccel.cost.as_cuda import AsOnCuda
from pyaccel.cost.recorder import Cost, measure
from pyaccel.models.bert import BertConfig, BertLayer
from pyaccel.nn import Int8Linear
from pyaccel.nn.encoder_layer import encoder_layer

STOCK, OURS, FUSED = "transformers, SDPA", "pyaccel", "pyaccel, fused product"
INT8 = "pyaccel, int8"
MODES = ("evaluation", "training")


@dataclass(frozen=True)
class LayerSize:
    """A layer and its input: batch and sequence without padding, hidden sizes, 16-bit or other floating dtype."""

    batch: int = 16
    seq: int = 128
    hidden: int = 768
    heads: int = 12
    intermediate: int = 3072
    dtype: torch.dtype = torch.bfloat16
    dropout_p: float = 0.1  # in training

    def __post_init__(self) -> None:
        if min(self.batch, self.seq, self.hidden, self.heads, self.intermediate) < 1:
            raise ValueError(f"every size must be at least 1, got {self}")
        if self.hidden % self.heads:
            raise ValueError(f"hidden size {self.hidden} is not a multiple of {self.heads} heads")


# --- layers -------------------------------------------------------------------------------------------------------


def _our_layer(size: LayerSize) -> tuple[torch.nn.Module, Callable[[Tensor], Tensor]]:
    config = BertConfig(
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        intermediate_size=size.intermediate,
        hidden_dropout_prob=size.dropout_p,
        attention_probs_dropout_prob=size.dropout_p,
    )
    layer = BertLayer(config)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout_p = size.dropout_p if layer.training else 0.0
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        context = ops.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
        return context.transpose(1, 2).flatten(-2)

    return layer, lambda hidden: encoder_layer(layer, hidden, attend)


def _int8_layer(size: LayerSize, *, training: bool) -> tuple[torch.nn.Module, Callable[[Tensor], Tensor]]:
    """Deployed, with int8 weights; in training, with weights that each forward quantizes."""
    layer, run = _our_layer(size)
    for name, module in list(layer.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parent, _, last = name.rpartition(".")
            int8 = Int8Linear.from_linear(module.to(size.dtype))
            setattr(layer.get_submodule(parent), last, int8 if training else int8.freeze())
    return layer, run


def _stock_layer(size: LayerSize) -> tuple[torch.nn.Module, Callable[[Tensor], Tensor]]:
    from transformers.models.bert import modeling_bert

    config = modeling_bert.BertConfig(
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        intermediate_size=size.intermediate,
        hidden_dropout_prob=size.dropout_p,
        attention_probs_dropout_prob=size.dropout_p,
    )
    config._attn_implementation = "sdpa"
    layer = modeling_bert.BertLayer(config)

    def run(hidden: Tensor) -> Tensor:
        with AsOnCuda():
            out: Tensor | tuple[Tensor, ...] = layer(hidden)
        return out[0] if isinstance(out, tuple) else out

    return layer, run


def layer_costs(size: LayerSize) -> dict[str, dict[str, Cost]]:
    """One BERT layer: by who computes it (:data:`STOCK`, :data:`OURS`, :data:`FUSED`, :data:`INT8`), then by mode.

    :data:`FUSED` takes the bias and GELU into the product, which isn't what dispatch chooses until it is measured.
    :data:`INT8` is dynamic, for 16-bit and fp32 activations.

    Raises:
        RuntimeError: triton isn't installed, and without it there are no kernels to count.
    """
    if not triton_support.has_triton():
        raise RuntimeError("triton isn't installed: pip install triton (Linux only; no GPU is needed)")
    costs: dict[str, dict[str, Cost]] = {}
    for name in (STOCK, OURS, FUSED, INT8):
        backend = "triton" if name == FUSED else "torch"
        with dispatch.use_backend("auto"), dispatch.use_backend(backend, ops=["linear_activation"]):
            costs[name] = {mode: _layer_cost(name, size, training=mode == "training") for mode in MODES}
    return costs


def _layer_cost(name: str, size: LayerSize, *, training: bool) -> Cost:
    with torch.device("meta"):
        if name == STOCK:
            layer, run = _stock_layer(size)
        elif name == INT8:
            layer, run = _int8_layer(size, training=training)
        else:
            layer, run = _our_layer(size)
        layer.to(size.dtype)
        hidden = torch.empty(size.batch, size.seq, size.hidden, dtype=size.dtype)
    return measure(layer, run, hidden, training=training)
