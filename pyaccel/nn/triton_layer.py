"""A BERT layer by the Triton kernels, with all that is the same in every call asked once.

A kernel launch takes some 10 us of the host's time, and an op of :mod:`pyaccel.ops` ten times that: it checks its
arguments, chooses a backend and looks up parameters. :class:`TritonLayer` runs what those ops run in the end, with the
numbers, gradients and dropout masks of :func:`pyaccel.nn.encoder_layer.encoder_layer`. Whether it may is asked once for
all layers of a forward pass, by :func:`serves`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyaccel.activations import activation_name
from pyaccel.nn.encoder_layer import encoder_layer, is_plain
from pyaccel.ops.attention.custom_ops import forward_op as attention
from pyaccel.ops.attention.triton import AttentionFunction
from pyaccel.ops.bias_act.triton import forward_op as bias_gelu
from pyaccel.ops.common import apply
from pyaccel.ops.dropout import dropout_key
from pyaccel.ops.layer_choice import triton_serves
from pyaccel.ops.layernorm.triton import ResidualLayerNormFunction
from pyaccel.ops.layernorm.triton import forward_op as layernorm
from pyaccel.ops.linear.mlp import FeedForwardFunction
from pyaccel.packing import PackedLayout

_PLAIN = (Tensor, nn.Parameter)


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
        self._linears = tuple(
            linear._parameters
            for linear in (heads.query, heads.key, heads.value, first.dense, inner, second.dense)
        )
        self._norms = tuple((norm, norm._parameters) for norm in (first.LayerNorm, second.LayerNorm))
        self._dropouts = (heads.dropout, first.dropout, second.dropout)
        self._heads = (heads.num_attention_heads, heads.attention_head_size)
        self._scale = 1.0 / math.sqrt(heads.attention_head_size)
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
        for parameters in (*self._linears, *[parameters for _, parameters in self._norms]):
            weight, bias = parameters["weight"], parameters["bias"]
            if (
                weight.dtype is not dtype
                or bias.dtype is not dtype
                or weight.device != device
                or bias.device != device
            ):
                return False
            if not bias.is_contiguous() or not (weight.ndim == 2 or weight.is_contiguous()):
                return False
        return True

    def __call__(self, hidden: Tensor, tokens: PackedLayout) -> Tensor:
        """Packed hidden states ``[total_tokens, hidden_size]``, where :func:`serves` is true."""
        first, inner, second = self._linears[3:]
        context = self._attend(hidden, tokens)
        records = torch.is_grad_enabled()
        if records and not context.requires_grad:
            affine = [parameters for _, parameters in self._norms]
            if any([p.requires_grad for each in (*self._linears[3:], *affine) for p in each.values()]):
                # Only what comes after attention learns: no call of its own is worth that.
                return encoder_layer(self._layer, hidden, lambda q, k, v: context)
            records = False
        dtype, device = hidden.dtype, hidden.device
        (norm1, affine1), (norm2, affine2) = self._norms
        p1, p2 = (dropout.p if dropout.training else 0.0 for dropout in self._dropouts[1:])
        x = F.linear(context, first["weight"])
        seed = dropout_key(device) if p1 > 0.0 else None
        normed = (x, hidden, affine1["weight"], affine1["bias"], first["bias"])
        if records:
            hidden, x, *_ = apply(
                FeedForwardFunction, *normed, inner["weight"], inner["bias"], second["weight"], seed,
                self._activation, norm1.eps, p1, dtype, False,
            )  # fmt: skip
        else:
            hidden = layernorm.function(
                *normed, seed, norm1.eps, p1, dtype, False, True, False, False, False
            )[0]
            x = bias_gelu.function(F.linear(hidden, inner["weight"]), inner["bias"], self._activation)
            x = F.linear(x, second["weight"])
        seed = dropout_key(device) if p2 > 0.0 else None
        normed = (x, hidden, affine2["weight"], affine2["bias"], second["bias"])
        if records:
            out = apply(ResidualLayerNormFunction, *normed, seed, norm2.eps, p2, dtype, False, False)
        else:
            out = layernorm.function(*normed, seed, norm2.eps, p2, dtype, False, True, False, False, False)
        result: Tensor = out[0]
        return result

    def _attend(self, hidden: Tensor, tokens: PackedLayout) -> Tensor:
        """``[total_tokens, hidden_size]`` of each sequence's attention to itself."""
        p = self._dropouts[0].p if self._attention_module.training else 0.0
        q, k, v = [F.linear(hidden, each["weight"], each["bias"]) for each in self._linears[:3]]
        if tokens.key_indices is not None:
            k, v = k.index_select(0, tokens.key_indices), v.index_select(0, tokens.key_indices)
        arguments = (
            *[x.view(1, -1, *self._heads).transpose(1, 2) for x in (q, k, v)],
            None, None, tokens.cu_seqlens, tokens.cu_seqlens_k, dropout_key(hidden.device) if p > 0.0 else None,
            tokens.max_seqlen, tokens.max_seqlen_k, self._scale, p, False, -1, -1,
        )  # fmt: skip
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            out = apply(AttentionFunction, *arguments)[0]
        else:
            out = attention.function(*arguments, False)[0]
        context: Tensor = out.transpose(1, 2).flatten(2)[0]
        return context


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
