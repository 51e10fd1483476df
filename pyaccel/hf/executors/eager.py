"""The layers on a CPU where gradients are recorded, by the stock PyTorch ops that the public ops choose there.

The same numbers as :func:`pyaccel.nn.encoder_layer.encoder_layer` gives, whose ops check and choose at every call; here
that is done once for all layers. The layers are still called as modules: see :mod:`pyaccel.hf.executors.packed`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyaccel import dispatch, reference
from pyaccel.activations import activation_name
from pyaccel.hf.families import Family, attention_of
from pyaccel.nn.encoder_layer import heads_of, is_plain, plain_modules
from pyaccel.ops.attention.varlen import Groups, attend_by_group, groups_of
from pyaccel.ops.common import runs_now
from pyaccel.ops.dropout import dropout_reasons
from pyaccel.ops.layernorm.eager import torch_backend as residual_layernorm
from pyaccel.packing import PackedLayout

_REQUIRES_GRAD = attrgetter("requires_grad")
_OPS = ("linear_activation", "residual_layernorm", "varlen_attention")


class EagerLayers:
    """All layers of an encoder; made by :meth:`of`."""

    def __init__(self, views: list[Any], attentions: list[nn.Module]) -> None:
        self._views = views
        # Attention asks its own module whether to drop, and a view of it may be older than its mode.
        self._attentions = attentions
        self._parameters = [p for view in views for x in plain_modules(view) for p in (x.weight, x.bias)]

    @classmethod
    def of(cls, family: Family, layers: list[Any]) -> EagerLayers | None:
        """None where a layer's modules aren't plain, of one dtype and on the CPU, or its activation isn't known."""
        views = [family.view(layer) for layer in layers]
        for view in views:
            if view.chunk_size_feed_forward or activation_name(view.intermediate.intermediate_act_fn) is None:
                return None
            if (
                not is_plain(view)
                or min(view.attention.output.LayerNorm.eps, view.output.LayerNorm.eps) < 0.0
            ):
                return None
        if len(set(map(heads_of, views))) > 1:
            return None
        made = cls(views, [attention_of(family, layer) for layer in layers])
        if len({(p.dtype, p.device) for p in made._parameters}) > 1 or not made._parameters[0].is_cpu:
            return None
        return made

    def why_not(self, hidden: Tensor, tokens: PackedLayout) -> str | None:
        if not torch.is_grad_enabled() or not (
            hidden.requires_grad or any(map(_REQUIRES_GRAD, self._parameters))
        ):
            return "no gradients are recorded"
        if torch.is_autocast_enabled("cpu"):
            return "autocast"
        if not dispatch.is_default(_OPS) or not runs_now(hidden):
            return "a backend was asked for, choices are recorded, or a mode is active"
        if not hidden.is_cpu or hidden.dtype is not self._parameters[0].dtype:
            return "hidden states of another device or dtype than the weights'"
        return "the first position of a row is padding" if tokens.key_indices is not None else None

    def bound(self, hidden: Tensor, tokens: PackedLayout) -> list[Callable[[Tensor], Tensor]]:
        """Each layer's math, from packed hidden states to packed hidden states, for batches of these lengths."""
        heads = heads_of(self._views[0])
        like, chosen = hidden.view(-1, *heads), {}
        calls: list[Callable[[Tensor], Tensor]] = []
        for view, attention in zip(self._views, self._attentions, strict=True):
            dropout_p = view.attention.self.dropout.p if attention.training else 0.0
            if dropout_p not in chosen:
                dispatch.invalid("varlen_attention", dropout_reasons(dropout_p))
                lengths = tokens.lengths
                chosen[dropout_p] = groups_of(like, lengths, lengths, training=True, dropout_p=dropout_p)
            calls.append(partial(_layer, view, heads, chosen[dropout_p]))
        return calls


def _layer(view: Any, heads: tuple[int, int], groups: Groups, hidden: Tensor) -> Tensor:
    attention, inner = view.attention.self, view.intermediate.dense
    q, k, v = (
        F.linear(hidden, x.weight, x.bias).view(-1, *heads)
        for x in (attention.query, attention.key, attention.value)
    )
    context = attend_by_group(q, k, v, groups).flatten(1)
    hidden = _end(view.attention.output, context, hidden)
    activated = F.linear(hidden, inner.weight, inner.bias)
    activated = reference.activation(activated, activation_name(view.intermediate.intermediate_act_fn))
    return _end(view.output, activated, hidden)


def _end(module: Any, x: Tensor, residual: Tensor) -> Tensor:
    dense, norm, dropout = module.dense, module.LayerNorm, module.dropout
    dropout_p = dropout.p if dropout.training else 0.0
    out, _ = residual_layernorm(
        F.linear(x, dense.weight),
        residual,
        norm.weight,
        norm.bias,
        norm.eps,
        dropout_p,
        dense.bias,
        False,
        x.dtype,
    )
    return out
