"""The layers on a GPU by the Triton kernels, in evaluation and in training, without asking every op again.

The layers, whose hooks are known to be harmless, are not called as modules: gradient checkpointing, which acts on such
calls, is left to :mod:`pyaccel.hf.executors.packed`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyaccel.hf.eligibility import Call
from pyaccel.hf.executors.packed import Packed, tokens_of
from pyaccel.hf.families import Family, attention_of
from pyaccel.nn.triton_layer import TritonLayer, serves
from pyaccel.packing import PackedLayout


class Triton(Packed):
    """See the module; :meth:`of` makes it of layers under BERT's names."""

    name = "triton"

    def __init__(
        self, family: Family, layers: list[Any], keeps_padding: str | None, made: list[TritonLayer]
    ) -> None:
        super().__init__(family, layers, keeps_padding)
        self._made = made

    @classmethod
    def of(cls, family: Family, layers: list[Any], keeps_padding: str | None) -> Triton | None:
        """None where a layer can't be run so: see :meth:`pyaccel.nn.triton_layer.TritonLayer.of`."""
        made = []
        for layer in layers:
            view = family.view(layer)
            one = None if view.chunk_size_feed_forward else TritonLayer.of(view, attention_of(family, layer))
            if one is None:
                return None
            made.append(one)
        return cls(family, layers, keeps_padding, made)

    def why_not(self, call: Call) -> str | None:
        if reason := self._keeps_padding or call.keeps_padding:
            return reason
        for layer in self._modules:
            if layer.training and getattr(layer, "gradient_checkpointing", False):
                return "gradient checkpointing"
        if not serves(self._made, call.hidden, tokens_of(call)):
            return "Triton does not serve every op of this call, or it is traced, intercepted or recorded"
        return None

    def run_layers(self, hidden: Tensor, tokens: PackedLayout) -> Tensor:
        for layer in self._made:
            hidden = layer(hidden, tokens)
        return hidden
