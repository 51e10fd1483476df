"""The layers on a CPU in evaluation, by oneDNN's products with bias, GELU and residual in their epilogues.

A small batch's matrix products take some tens of microseconds each: no longer than it takes to look up a module's
parameters, to check arguments and to choose a backend. All of that is done once for all layers here, and the layers,
whose hooks are known to be harmless, are not called as modules.

No weight is copied, except where ``prepack`` asks for it: then copies are kept in oneDNN's order, those of query, key
and value as one, and are made again when a parameter is reallocated or modified in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch, reference
from pyaccel.activations import activation_name
from pyaccel.hf.eligibility import Call
from pyaccel.hf.executors.packed import Dropouts, Packed, tokens_of
from pyaccel.hf.families import Family
from pyaccel.hf.fingerprint import versions
from pyaccel.nn.encoder_layer import heads_of, is_plain, plain_modules
from pyaccel.ops.attention.varlen import attend_by_group, groups_of
from pyaccel.ops.linear import onednn
from pyaccel.packing import PackedLayout

_OPS = ("linear_activation", "residual_layernorm", "varlen_attention")


class LayerTensors(NamedTuple):
    """A layer's parameters in the order of their use: weight and bias of products, weight, bias and eps of norms."""

    query: tuple[Tensor, Tensor]
    key: tuple[Tensor, Tensor]
    value: tuple[Tensor, Tensor]
    first: tuple[Tensor, Tensor]
    first_norm: tuple[Tensor, Tensor, float]
    inner: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    second_norm: tuple[Tensor, Tensor, float]


# Of LayerTensors: the products, that of query standing for key's and value's.
_PRODUCTS = tuple(map(LayerTensors._fields.index, ("query", "first", "inner", "second")))


class Reordered(NamedTuple):
    """Copies of a layer's weights in the order in which oneDNN multiplies."""

    qkv: tuple[Tensor, Tensor]
    first: Tensor
    inner: Tensor
    second: Tensor


class OneDnn(Packed):
    """See the module; :meth:`of` makes it of layers under BERT's names."""

    name = "onednn"

    def __init__(
        self,
        family: Family,
        layers: list[Any],
        keeps_padding: str | None,
        tensors: list[LayerTensors],
        heads: tuple[int, int],
        activation: str,
    ) -> None:
        super().__init__(family, layers, keeps_padding)
        self._heads = heads
        self._dropouts = Dropouts(family, layers)
        self._layers = tensors
        self._parameters = [t for layer in self._layers for pair in layer for t in pair[:2]]
        self._hidden_size = (len(self._layers[0].first[0]),)
        self._activation = activation
        # oneDNN's ReLU is max(0, x), which makes 0 of NaN.
        self._relu = activation == "relu"
        self._linear, self._linear_residual = onednn.fused(None), onednn.fused_residual()
        self._fused = onednn.fused(None if self._relu else activation)

    @classmethod
    def of(cls, family: Family, layers: list[Any], keeps_padding: str | None) -> OneDnn | None:
        """None where a layer's products aren't nn.Linear with bias, of one size in all layers, of one
        dtype and on the CPU, or its norms aren't LayerNorm, or oneDNN has its activation not fused."""
        views = [family.view(layer) for layer in layers]
        names = {activation_name(view.intermediate.intermediate_act_fn) for view in views}
        if len(names) != 1 or any(view.chunk_size_feed_forward for view in views):
            return None
        activation = names.pop()
        if activation is None or activation not in onednn.ACTIVATIONS or not all(map(is_plain, views)):
            return None
        tensors = [_tensors(view) for view in views]
        parameters = [t for layer in tensors for pair in layer for t in pair[:2]]
        shapes = {tuple(t.shape for pair in layer for t in pair[:2]) for layer in tensors}
        if len(shapes) > 1 or len(set(map(heads_of, views))) > 1 or not all(p.is_cpu for p in parameters):
            return None
        if len({p.dtype for p in parameters}) > 1 or parameters[0].dtype not in onednn.supported_dtypes():
            return None
        return cls(family, layers, keeps_padding, tensors, heads_of(views[0]), activation)

    def why_not(self, call: Call) -> str | None:
        hidden = call.hidden
        if torch.is_grad_enabled():
            return "gradients may be recorded: call under torch.inference_mode() or torch.no_grad()"
        if torch.is_autocast_enabled("cpu"):
            return "autocast"
        if torch._C._len_torch_dispatch_stack():
            return "a dispatch mode is active"  # which may count operators, and knows nothing of oneDNN's
        if not dispatch.is_default(_OPS):
            return "a backend was asked for, or choices are recorded"
        if type(hidden) is not Tensor or not hidden.is_cpu or hidden.dtype is not self._parameters[0].dtype:
            return "hidden states of another device or dtype than the weights'"
        if self._dropouts.act():
            return "dropout"
        if not all(map(Tensor.is_contiguous, self._parameters)):
            return "a parameter is not contiguous"
        if reason := self._keeps_padding or call.keeps_padding:
            return reason
        tokens = tokens_of(call)
        if tokens.key_indices is not None:
            return "the first position of a row is padding"
        return None if len(tokens.indices) else "an empty batch"

    def run_layers(self, hidden: Tensor, tokens: PackedLayout) -> Tensor:
        hidden = hidden.contiguous()
        weights = [self._layers[0][place][0] for place in _PRODUCTS]
        qkv, first, inner, second = onednn.measured_each(len(hidden), weights)
        groups = groups_of(hidden.view(-1, *self._heads), tokens.lengths, tokens.lengths)
        project = F.linear if qkv == "eager" else self._linear
        add_first = _linear_residual if first == "eager" else self._linear_residual
        activate = F.linear if inner == "eager" else self._fused
        add_second = _linear_residual if second == "eager" else self._linear_residual
        shape = (-1, *self._heads)
        for layer in self._layers:
            q = project(hidden, *layer.query).view(shape)
            k = project(hidden, *layer.key).view(shape)
            v = project(hidden, *layer.value).view(shape)
            context = attend_by_group(q, k, v, groups).flatten(1).contiguous()
            total = add_first(context, hidden, *layer.first)
            hidden = torch.layer_norm(total, self._hidden_size, *layer.first_norm)
            activated = activate(hidden, *layer.inner)
            if self._relu:
                activated = activated.relu_()
            elif activate is F.linear:
                activated = reference.activation(activated, self._activation)
            total = add_second(activated, hidden, *layer.second)
            hidden = torch.layer_norm(total, self._hidden_size, *layer.second_norm)
        return hidden


class Prepacked(OneDnn):
    """:class:`OneDnn` on copies of the weights."""

    name = "onednn, prepacked"

    # The copies, what the parameters were, and their memory: kept in use, so that no other tensor can lie where they
    # did. As long as they lie there and torch has counted no change, the copies are theirs.
    _kept: tuple[list[Reordered], list[int], list[Tensor]] | None = None

    def why_not(self, call: Call) -> str | None:
        if any(map(Tensor.is_inference, self._parameters)):
            return "parameters are of inference mode, of which torch counts no changes"
        return super().why_not(call)

    def run_layers(self, hidden: Tensor, tokens: PackedLayout) -> Tensor:
        hidden = hidden.contiguous()
        groups = groups_of(hidden.view(-1, *self._heads), tokens.lengths, tokens.lengths)
        add = self._linear_residual
        for layer, copies in zip(self._layers, self._reordered(), strict=True):
            q, k, v = self._linear(hidden, *copies.qkv).view(-1, 3, *self._heads).unbind(1)
            context = attend_by_group(q, k, v, groups).flatten(1).contiguous()
            total = add(context, hidden, copies.first, layer.first[1])
            hidden = torch.layer_norm(total, self._hidden_size, *layer.first_norm)
            activated = self._fused(hidden, copies.inner, layer.inner[1])
            if self._relu:
                activated = activated.relu_()
            total = add(activated, hidden, copies.second, layer.second[1])
            hidden = torch.layer_norm(total, self._hidden_size, *layer.second_norm)
        return hidden

    def _reordered(self) -> list[Reordered]:
        present, kept = versions(self._parameters), self._kept
        if kept is not None and kept[1] == present:
            return kept[0]
        with torch.inference_mode(False), torch.no_grad():
            copies = [
                Reordered(
                    qkv=(
                        onednn.prepacked(torch.cat([pair[0] for pair in layer[:3]])),
                        torch.cat([pair[1] for pair in layer[:3]]),
                    ),
                    first=onednn.prepacked(layer.first[0]),
                    inner=onednn.prepacked(layer.inner[0]),
                    second=onednn.prepacked(layer.second[0]),
                )
                for layer in self._layers
            ]
            # In one step: another thread finds all of it or nothing.
            self._kept = copies, present, [p.detach() for p in self._parameters]
        return copies


def _tensors(view: Any) -> LayerTensors:
    query, key, value, first, first_norm, inner, second, second_norm = plain_modules(view)
    norms = [(norm.weight, norm.bias, norm.eps) for norm in (first_norm, second_norm)]
    q, k, v, one, two, three = ((x.weight, x.bias) for x in (query, key, value, first, inner, second))
    return LayerTensors(q, k, v, one, norms[0], two, three, norms[1])


def _linear_residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias) + residual
