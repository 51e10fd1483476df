"""One layer on padded or on packed hidden states, by the public ops: what serves where nothing faster does."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from pyaccel import ops
from pyaccel.hf.eligibility import Call
from pyaccel.hf.families import Family
from pyaccel.nn.encoder_layer import encoder_layer, packed_attention
from pyaccel.packing import PackedLayout


class Padded:
    """The layer that is called, on `[batch, seq, hidden_size]`."""

    name = "padded"
    layers = 1

    def __init__(self, family: Family) -> None:
        self.family = family

    def why_not(self, call: Call) -> str | None:
        return "input packed by the caller" if call.is_packed else None

    def run(self, module: Any, call: Call) -> Tensor:
        return run_layer(self.family, module, call.hidden, call.mask)


def run_layer(family: Family, layer: Any, hidden: Tensor, mask: Tensor | PackedLayout | None) -> Tensor:
    """The math of one layer, on packed or on padded hidden states."""
    view = family.view(layer)
    heads = view.attention.self
    dropout_p = heads.dropout.p if heads.training else 0.0
    chunk_size = view.chunk_size_feed_forward  # positions of all rows
    if isinstance(mask, PackedLayout):
        attend = partial(packed_attention, tokens=mask, dropout_p=dropout_p)
        return encoder_layer(view, hidden, attend, chunk_size=chunk_size * mask.batch_size)
    return encoder_layer(view, hidden, partial(_padded_attention, mask, dropout_p), chunk_size=chunk_size)


def _padded_attention(mask: Tensor | None, dropout_p: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[batch, seq, heads, head_dim]` -> `[batch, seq, hidden_size]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    context = ops.scaled_dot_product_attention(q, k, v, key_padding_mask=mask, dropout_p=dropout_p)
    return context.transpose(1, 2).flatten(-2)
