"""A BERT layer on a CPU in evaluation, in a straight line.

A small batch's matrix products take some tens of microseconds each: no longer than it takes to look up a module's
parameters, to ask whether arguments make sense and who serves them. :class:`StraightLayer` has looked them up once, and
runs what :mod:`pyaccel.ops` would run there: oneDNN's products with bias, GELU and residual in their epilogues, and
attention by groups of equal lengths.

It holds parameters, and unless it is asked to no copies of their values: what is changed in place is used, and what is
put in another's place is for its owner to notice (:class:`pyaccel.hf.guard.Structure`). Moving or casting a module in
place is noticed here. With ``prepack`` it holds copies of the weights in oneDNN's order, those of query,
key and value as one, and rebuilds them when the memory of a parameter is another one or torch has counted a change
in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyaccel import dispatch
from pyaccel.activations import activation_name
from pyaccel.nn import ResidualLayerNorm
from pyaccel.ops.attention.varlen import varlen_by_group
from pyaccel.ops.linear import onednn
from pyaccel.packing import PackedLayout

_OPS = ("linear_activation", "residual_layernorm", "varlen_attention")
_PLAIN = (Tensor, nn.Parameter)


class Reordered(NamedTuple):
    """Copies of a layer's weights in the order in which oneDNN multiplies, and what they were made from.

    ``held`` keeps the memory of the parameters in use, so that no other tensor can lie where they did: as long as they
    lie there and torch has counted no change, the copies are theirs.
    """

    qkv: Tensor
    qkv_bias: Tensor
    first: Tensor
    inner: Tensor
    second: Tensor
    state: list[tuple[int, int]]
    held: list[Tensor]


@dataclass(eq=False)
class StraightLayer:
    """One layer's parameters in the order of their use; made by :meth:`of`.

    Attributes:
        attention: the module whose ``training`` says whether attention drops.
        projections: weight and bias of query, key and value.
        heads: their number, and the dimension of one.
        first, second: weight and bias of the product and the LayerNorm that end either half.
        inner: weight and bias of the product between, ``activation`` the module that follows it.
        dropouts: attention's, and those of either half.
        parameters: all of them, weight and bias in turn, first those of the projections.
        prepack: whether to keep weights in the order in which oneDNN multiplies.
    """

    attention: nn.Module
    projections: tuple[tuple[Tensor, Tensor], ...]
    heads: tuple[int, int]
    first: tuple[Tensor, Tensor, Any]
    inner: tuple[Tensor, Tensor]
    activation: Any
    second: tuple[Tensor, Tensor, Any]
    dropouts: tuple[Any, Any, Any]
    parameters: list[Tensor]
    prepack: bool = False
    reordered: Reordered | None = None

    @classmethod
    def of(cls, layer: Any, attention: nn.Module, *, prepack: bool = False) -> StraightLayer | None:
        """Of a layer with BERT's names (see :mod:`pyaccel.nn.encoder_layer`); None if it is of another kind.

        Its products must be plain nn.Linear with bias, its norms plain LayerNorm.
        """
        heads, first, second = layer.attention.self, layer.attention.output, layer.output
        inner = layer.intermediate.dense
        linears = (heads.query, heads.key, heads.value, first.dense, inner, second.dense)
        norms = (first.LayerNorm, second.LayerNorm)
        if not all(type(x) is nn.Linear for x in linears):
            return None
        if not all(type(x) in (nn.LayerNorm, ResidualLayerNorm) for x in norms):
            return None
        parameters = [p for x in (*linears, *norms) for p in (x.weight, x.bias)]
        if not all(type(p) in _PLAIN for p in parameters):
            return None
        return cls(
            attention=attention,
            projections=tuple((x.weight, x.bias) for x in linears[:3]),
            heads=(heads.num_attention_heads, heads.attention_head_size),
            first=(first.dense.weight, first.dense.bias, first.LayerNorm),
            inner=(inner.weight, inner.bias),
            activation=layer.intermediate.intermediate_act_fn,
            second=(second.dense.weight, second.dense.bias, second.LayerNorm),
            dropouts=(heads.dropout, first.dropout, second.dropout),
            parameters=parameters,
            prepack=prepack and onednn.can_prepack(),
        )

    def ready(self, dtype: torch.dtype) -> bool:
        """Whether all of it is on the CPU and in that dtype, nothing drops, and oneDNN has the activation fused."""
        if any(p.dtype is not dtype or not p.is_cpu for p in self.parameters):
            return False
        first, *others = self.dropouts
        # As transformers has it: attention asks its own module whether to drop, not the dropout's.
        if self.attention.training and first.p > 0.0:
            return False
        if any(dropout.training and dropout.p > 0.0 for dropout in others):
            return False
        name = activation_name(self.activation)
        return name is not None and name in onednn.ACTIVATIONS

    def __call__(self, hidden: Tensor, lengths: list[int]) -> Tensor:
        """Packed hidden states ``[total_tokens, hidden_size]`` of sequences of these lengths, without gradient."""
        copies = self._reordered() if self.prepack else None
        if copies is None:
            project = onednn.faster_way(hidden, self.projections[0][0])  # all three are of one size
            q, k, v = (project(hidden, *each).view(-1, *self.heads) for each in self.projections)
            first, inner, second = self.first[0], self.inner[0], self.second[0]
        else:
            qkv = onednn.evaluate(hidden, copies.qkv, copies.qkv_bias)
            q, k, v = qkv.view(-1, 3, *self.heads).unbind(1)
            first, inner, second = copies.first, copies.inner, copies.second
        context = varlen_by_group(q, k, v, lengths, lengths, False, None, None, 0.0).flatten(1)
        hidden = _residual_layernorm(context, hidden, first, *self.first[1:])
        activated = onednn.evaluate(hidden, inner, self.inner[1], activation_name(self.activation))
        return _residual_layernorm(activated, hidden, second, *self.second[1:])

    def _reordered(self) -> Reordered | None:
        """The copies, made where there are none of the parameters as they are now; None if none may be kept."""
        if any(p.is_inference() for p in self.parameters):  # torch counts no changes of these
            self.reordered = None
            return None
        state = [(p.data_ptr(), p._version) for p in self.parameters]
        copies = self.reordered
        if copies is None or state != copies.state:
            with torch.inference_mode(False), torch.no_grad():
                weights, biases = zip(*self.projections, strict=True)
                copies = Reordered(
                    qkv=onednn.prepacked(torch.cat(weights)),
                    qkv_bias=torch.cat(biases),
                    first=onednn.prepacked(self.first[0]),
                    inner=onednn.prepacked(self.inner[0]),
                    second=onednn.prepacked(self.second[0]),
                    state=state,
                    held=[p.detach() for p in self.parameters],
                )
            self.reordered = copies  # in one step: another thread finds all of it or nothing
        return copies


def _residual_layernorm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, norm: Any) -> Tensor:
    total = onednn.evaluate_with_residual(x, residual, weight, bias)
    return torch.layer_norm(total, total.shape[-1:], norm.weight, norm.bias, norm.eps)


def forget(layers: Sequence[StraightLayer]) -> None:
    """Let go of copies, which hold memory that a model which has moved to another device has left."""
    for layer in layers:
        layer.reordered = None


def serves(layers: Sequence[StraightLayer], hidden: Tensor, tokens: PackedLayout) -> bool:
    """Whether these layers give what :func:`pyaccel.nn.encoder_layer.encoder_layer` gives for this call.

    False wherever anything is out of the ordinary: gradients, dropout, autocast, a graph that is traced, a backend that
    was asked for, somebody who wants to know which one serves.
    """
    return (
        hidden.is_cpu
        and type(hidden) is Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and dispatch.nobody_asks(_OPS)
        and hidden.dtype in onednn.supported_dtypes()
        and tokens.key_indices is None
        and len(hidden) > 0
        and all(layer.ready(hidden.dtype) for layer in layers)
    )
