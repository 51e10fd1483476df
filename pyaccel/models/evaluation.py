"""A BERT layer on a CPU in evaluation, in a straight line.

A small batch's matrix products take some tens of microseconds each: no longer than it takes to look up a module's
parameters, to ask whether arguments make sense and who serves them. :class:`StraightLayer` has looked them up once, and
runs what :mod:`pyaccel.ops` would run there: oneDNN's products with bias, GELU and residual in their epilogues, and
attention by groups of equal lengths.

It holds parameters, and unless it is asked to no copies of their values: what is changed in place is used, and what is
put in another's place is for its owner to notice (:class:`pyaccel.hf.guard.Structure`). Moving or casting a module in
place is noticed here. With ``prepack`` it holds weights in oneDNN's order, and makes them anew where the memory of a
weight is another one or torch has counted a change in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyaccel import dispatch
from pyaccel.models.bert import activation_name, fused_qkv
from pyaccel.nn import ResidualLayerNorm
from pyaccel.ops import linear
from pyaccel.ops._attention_torch import varlen_by_group
from pyaccel.packing import PackedLayout

_OPS = ("linear_activation", "residual_layernorm", "varlen_attention")
_PLAIN = (Tensor, nn.Parameter)


@dataclass(eq=False)
class StraightLayer:
    """One layer's parameters in the order of their use; made by :meth:`of`.

    Attributes:
        attention: the module whose ``training`` says whether attention drops.
        projections: has the three layers for query, key and value.
        heads: their number, and the dimension of one.
        first, second: weight and bias of the product and the LayerNorm that end either half.
        inner: weight and bias of the product between, ``activation`` the module that follows it.
        dropouts: attention's, and those of either half.
        parameters: all of them, weight and bias in turn, first those of the projections.
        prepack: whether to keep weights in the order in which oneDNN multiplies.
    """

    attention: nn.Module
    projections: Any
    heads: tuple[int, int]
    first: tuple[Tensor, Tensor, Any]
    inner: tuple[Tensor, Tensor]
    activation: Any
    second: tuple[Tensor, Tensor, Any]
    dropouts: tuple[Any, Any, Any]
    parameters: list[Tensor]
    prepack: bool = False
    # Weight and bias of the one product for query, key and value; where the six parameters were when it was made.
    qkv: tuple[Tensor, Tensor | None] | None = None
    pointers: list[int] = field(default_factory=list)
    # The four products' weights and the first one's bias; where all parameters were then, at which version, and views
    # that keep that memory in use.
    packed: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor] | None = None
    state: list[tuple[int, int]] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, layer: Any, attention: nn.Module, *, prepack: bool = False) -> StraightLayer | None:
        """Of a layer with BERT's names (see :func:`pyaccel.models.bert.encoder_layer`); None if it is of another kind.

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
            projections=heads,
            heads=(heads.num_attention_heads, heads.attention_head_size),
            first=(first.dense.weight, first.dense.bias, first.LayerNorm),
            inner=(inner.weight, inner.bias),
            activation=layer.intermediate.intermediate_act_fn,
            second=(second.dense.weight, second.dense.bias, second.LayerNorm),
            dropouts=(heads.dropout, first.dropout, second.dropout),
            parameters=parameters,
            prepack=prepack and linear.can_prepack(),
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
        return name is not None and name in linear.ONEDNN_ACTIVATIONS

    def __call__(self, hidden: Tensor, lengths: list[int]) -> Tensor:
        """Packed hidden states ``[total_tokens, hidden_size]`` of sequences of these lengths, without gradient."""
        qkv_weight, qkv_bias, first_weight, inner_weight, second_weight = self._weights()
        qkv = linear.evaluate(hidden, qkv_weight, qkv_bias)
        q, k, v = qkv.view(-1, 3, *self.heads).unbind(1)
        context = varlen_by_group(q, k, v, lengths, lengths, False, None, None, 0.0).flatten(1)
        hidden = _residual_layernorm(context, hidden, first_weight, *self.first[1:])
        inner = linear.evaluate(hidden, inner_weight, self.inner[1], activation_name(self.activation))
        return _residual_layernorm(inner, hidden, second_weight, *self.second[1:])

    def _weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        """Of the four products, and the bias of the first.

        What is held of the parameters that were reordered keeps others from lying where those did: as long as they
        lie there and torch has counted no change, they are those.
        """
        if not self.prepack or any(
            p.is_inference() for p in self.parameters
        ):  # torch counts no changes of these
            self.packed = None
            return *self._fused(), self.first[0], self.inner[0], self.second[0]
        state = [(p.data_ptr(), p._version) for p in self.parameters]
        if self.packed is None or state != self.state:
            weight, bias = fused_qkv(self.projections)
            rest = (self.first[0], self.inner[0], self.second[0])
            first, inner, second = map(linear.prepacked, rest)
            bias = None if bias is None else bias.detach().clone()
            self.packed, self.state = (linear.prepacked(weight), bias, first, inner, second), state
            self.held = [p.detach() for p in self.parameters]
        return self.packed

    def _fused(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the one product, as long as the three layers' lie where they lay.

        The view keeps that memory in use, so nothing else can be where they were. A copy, which it is where they aren't
        neighbours, must be made anew each time, and isn't kept.
        """
        pointers = [p.data_ptr() for p in self.parameters[:6]]
        if self.qkv is not None and pointers == self.pointers:
            return self.qkv
        weight, bias = fused_qkv(self.projections)
        is_view = bias is not None and [weight.data_ptr(), bias.data_ptr()] == pointers[:2]
        self.qkv, self.pointers = ((weight, bias), pointers) if is_view else (None, [])
        return weight, bias


def _residual_layernorm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, norm: Any) -> Tensor:
    total = linear.evaluate_with_residual(x, residual, weight, bias)
    return torch.layer_norm(total, total.shape[-1:], norm.weight, norm.bias, norm.eps)


def forget(layers: Sequence[StraightLayer]) -> None:
    """Let go of views and copies, which hold memory that a model which has moved to another device has left."""
    for layer in layers:
        layer.qkv = layer.packed = None
        layer.held = []


def serves(layers: Sequence[StraightLayer], hidden: Tensor, tokens: PackedLayout) -> bool:
    """Whether these layers give what :func:`pyaccel.models.bert.encoder_layer` gives for this call.

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
        and hidden.dtype in linear.onednn_dtypes()
        and tokens.key_indices is None
        and len(hidden) > 0
        and all(layer.ready(hidden.dtype) for layer in layers)
    )
