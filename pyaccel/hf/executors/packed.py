"""All layers on packed hidden states: padding is dropped before the first and put back after the last.

In between the layers are called as modules, so that gradient checkpointing and FSDP2 act on them, with packed hidden
states and, in the mask's place, a :class:`PackedCall`.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyaccel import dispatch
from pyaccel.hf.eligibility import Call, drops
from pyaccel.hf.executors.eager import EagerLayers
from pyaccel.hf.executors.padded import run_layer
from pyaccel.hf.families import Family, stock
from pyaccel.packing import PackedLayout, layout, layout_from_cu_seqlens, pack, unpack

_TRAINING = attrgetter("training")


class PackedCall(NamedTuple):
    """What an encoder hands its layers in the mask's place.

    Attributes:
        tokens: where the sequences lie.
        run: the layer's math, from packed hidden states to packed hidden states, chosen for all layers together; None:
            by the public ops, each of which chooses for itself.
    """

    tokens: PackedLayout
    run: Callable[[Tensor], Tensor] | None = None


class Dropouts:
    """The dropouts of layers: whether any acts is asked in microseconds where all modules are in evaluation."""

    def __init__(self, family: Family, layers: list[Any]) -> None:
        self._family = family
        self._layers = layers
        # Attention asks its own module whether to drop, not the dropout's, as transformers has it.
        kinds = (nn.Dropout, stock(family).attention)
        self._modules = [
            module for layer in layers for module in layer.modules() if isinstance(module, kinds)
        ]

    def act(self) -> bool:
        return any(map(_TRAINING, self._modules)) and any(map(drops, map(self._family.view, self._layers)))


class Packed:
    """See the module.

    Args:
        layers: in the order in which they run.
        keeps_padding: why this encoder must not drop its padding, whatever the call; None if it may.
        eager: the layers without the public ops' checks, where all of them can be run so.
    """

    name = "packed"

    def __init__(
        self, family: Family, layers: list[Any], keeps_padding: str | None, eager: EagerLayers | None = None
    ) -> None:
        self.family = family
        self.layers = len(layers)
        self._modules = layers
        self._keeps_padding = keeps_padding
        self._eager = eager

    def why_not(self, call: Call) -> str | None:
        return self._keeps_padding or call.keeps_padding

    def run(self, module: Any, call: Call) -> Tensor:
        hidden, tokens = call.hidden, call.tokens or tokens_of(call)
        if self.family.enter is not None:
            hidden = self.family.enter(module, hidden)
        if call.is_packed or tokens.is_padded_batch:
            # A copy: a view that was made under no_grad can't be changed in place where gradients are recorded.
            return self.run_layers(hidden.flatten(0, 1), tokens).reshape(hidden.shape).clone()
        return unpack(self.run_layers(pack(hidden, tokens), tokens), tokens)

    def run_layers(self, hidden: Tensor, tokens: PackedLayout) -> Tensor:
        """``[total_tokens, hidden_size]`` after all layers."""
        eager = self._eager
        if eager is not None and eager.why_not(hidden, tokens) is None:
            calls = [PackedCall(tokens, run) for run in eager.bound(hidden, tokens)]
        else:
            dispatch.tell("layout", tokens)
            calls = [PackedCall(tokens)] * self.layers
        for layer, call in zip(self._modules, calls, strict=True):
            # By its own forward where it is not a layer that was swapped: that knows no packed hidden states.
            hidden = (
                layer(hidden, call)
                if "_pyaccel" in layer.__dict__
                else run_layer(self.family, layer, hidden, tokens)
            )
        return hidden


def tokens_of(call: Call) -> PackedLayout:
    """Where the call's tokens are; asked once a call."""
    tokens = call.tokens
    if tokens is None:
        hidden, mask = call.hidden, call.mask
        if call.is_packed:
            tokens = layout_from_cu_seqlens(
                call.kwargs["cu_seq_lens_q"], int(call.kwargs["max_length_q"]), hidden.shape[1]
            )
        else:
            if mask is None:
                mask = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
            # Position 0 is kept where it is padding too: poolers and heads read it whatever it is.
            tokens = layout(mask, sort_by_length=True, keep_first=True)
        call.tokens = tokens
    return tokens


def run_packed(family: Family, layer: Any, hidden: Tensor, call: PackedCall) -> Tensor:
    """A layer that an encoder called."""
    return run_layer(family, layer, hidden, call.tokens) if call.run is None else call.run(hidden)
