"""A BERT layer by the Triton kernels, with all that is the same in every call asked once.

A kernel launch takes some 10 us of the host's time, and an op of :mod:`pyaccel.ops` ten times that: it checks its
arguments, chooses a backend and looks up parameters. :class:`TritonLayer` runs what those ops run in the end, with the
numbers, gradients and dropout masks of :func:`pyaccel.nn.encoder_layer.encoder_layer`. Whether it may is asked once for
all layers of a forward pass, by :func:`serves`.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from pyaccel.activations import activation_name
from pyaccel.nn.encoder_layer import encoder_layer, is_plain, plain_modules
from pyaccel.ops.attention.params import CuSeqlens
from pyaccel.ops.common import apply
from pyaccel.ops.layer_choice import triton_serves
from pyaccel.ops.layer_function import LayerCall, LayerFunction, attend, forward
from pyaccel.packing import PackedLayout

_REQUIRES_GRAD, _DTYPE, _DEVICE = map(attrgetter, ("requires_grad", "dtype", "device"))


class TritonLayer:
    """One layer, for packed hidden states; made by :meth:`of`.

    It reads every parameter from its module at each call, and dropout rates and modes too.

    Attributes:
        sizes: size between the two products of the feed-forward network, heads, dimension of a head.
    """

    def __init__(self, layer: Any, attention_module: nn.Module, activation: str) -> None:
        heads, first, second = layer.attention.self, layer.attention.output, layer.output
        inner = layer.intermediate.dense
        self._layer = layer
        self._attention_module = attention_module
        self._activation = activation
        self._parameters = [module._parameters for module in plain_modules(layer)]
        self._norms = (first.LayerNorm, second.LayerNorm)
        self._dropouts = (heads.dropout, first.dropout, second.dropout)
        self._heads = (heads.num_attention_heads, heads.attention_head_size)
        self.sizes = (inner.out_features, *self._heads)

    @classmethod
    def of(cls, layer: Any, attention_module: nn.Module) -> TritonLayer | None:
        """Of a layer with BERT's names (see :mod:`pyaccel.nn.encoder_layer`); None if it is of another kind.

        Its products must be plain nn.Linear with bias, its norms plain LayerNorm, its activation one that is fused.

        Args:
            attention_module: whose ``training`` says whether attention drops.
        """
        name = activation_name(layer.intermediate.intermediate_act_fn)
        return cls(layer, attention_module, name) if name is not None and is_plain(layer) else None

    def is_ready(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether all parameters are of that dtype, on that device, and laid out as the kernels read them."""
        tensors = self._tensors()
        return (
            {*map(_DTYPE, tensors)} == {dtype}
            and {*map(_DEVICE, tensors)} == {device}
            and all(map(Tensor.is_contiguous, [vector for vector in tensors if vector.ndim == 1]))
        )

    def _tensors(self) -> tuple[Tensor, ...]:
        """Weight and bias of each product and norm, in the order of their use."""
        return tuple([each[name] for each in self._parameters for name in ("weight", "bias")])

    def __call__(self, hidden: Tensor, tokens: PackedLayout) -> Tensor:
        """Packed hidden states ``[total_tokens, hidden_size]``, where :func:`serves` is true."""
        parameters = self._tensors()
        weights, first, second = self._dropouts
        call = LayerCall(
            CuSeqlens(tokens.cu_seqlens, tokens.cu_seqlens_k, tokens.max_seqlen, tokens.max_seqlen_k),
            tokens.key_indices,
            self._heads,
            self._activation,
            (self._norms[0].eps, self._norms[1].eps),
            (
                weights.p if self._attention_module.training else 0.0,
                first.p if first.training else 0.0,
                second.p if second.training else 0.0,
            ),
        )
        if torch.is_grad_enabled():
            if hidden.requires_grad or any(map(_REQUIRES_GRAD, parameters[:6])):
                recorded: Tensor = apply(LayerFunction, hidden, call, *parameters)
                return recorded
            if any(map(_REQUIRES_GRAD, parameters)):
                # Only what comes after attention learns: no call of its own is worth that.
                context, _ = attend(hidden, parameters, call, records=False)
                return encoder_layer(self._layer, hidden, lambda q, k, v: context)
        return forward(hidden, parameters, call, records=False)[0]


def serves(layers: Sequence[TritonLayer], hidden: Tensor, tokens: PackedLayout) -> bool:
    """Whether these layers give what :func:`pyaccel.nn.encoder_layer.encoder_layer` gives for this call.

    False on a CPU, and wherever anything is out of the ordinary: autocast, a graph that is traced, a mode that
    intercepts operators, a backend that was asked for, choices that are recorded, one measured to be faster.
    """
    return (
        tokens.cu_seqlens.is_contiguous()
        and tokens.cu_seqlens_k.is_contiguous()
        and all(
            triton_serves(hidden, len(tokens.indices), tokens.max_seqlen, *sizes)
            for sizes in {layer.sizes for layer in layers}
        )
        and all(layer.is_ready(hidden.dtype, hidden.device) for layer in layers)
    )
