"""The math of a post-norm encoder layer, for any module with the attribute names of BERT's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyaccel import ops, reference
from pyaccel.activations import activation_name
from pyaccel.nn import Int8Linear, ResidualLayerNorm
from pyaccel.ops.common import autocast_dtype
from pyaccel.packing import PackedLayout


def encoder_layer(
    layer: Any,
    hidden: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    chunk_size: int = 0,
) -> Tensor:
    """One post-norm BERT layer: attention and feed-forward network, each with its residual and LayerNorm.

    Args:
        layer: a module with the attribute names of transformers' BertLayer:
            `attention.self.{query,key,value}`, `attention.output` and `output` (`dense`, `LayerNorm`,
            `dropout`), `intermediate` (`dense`, `intermediate_act_fn`).
        hidden: `[..., hidden_size]`, packed `[tokens, hidden_size]` or padded `[batch, seq, hidden_size]`.
        attend: takes q, k and v `[..., num_heads, head_dim]`, returns the context `[..., hidden_size]`. Attention's
            own dropout is its business.
        chunk_size: run the feed-forward network on so many rows at a time (in the second last dimension), for less
            memory and the same numbers; 0: on all rows together.

    Returns:
        `[..., hidden_size]`. Dropout acts where the layer's dropout modules are in training mode.
    """
    attention = layer.attention
    context = attend(*(x.unflatten(-1, heads_of(layer)) for x in project_qkv(attention.self, hidden)))

    name = activation_name(layer.intermediate.intermediate_act_fn)
    dense = (attention.output.dense, layer.intermediate.dense, layer.output.dense)
    if name and not chunk_size and torch.is_grad_enabled() and context.requires_grad and _are_plain(dense):
        return _training_feed_forward(layer, context, hidden, name)
    hidden = linear_residual_layernorm(attention.output, context, hidden)

    def feed_forward(hidden: Tensor) -> Tensor:
        return linear_residual_layernorm(layer.output, intermediate(layer.intermediate, hidden), hidden)

    if not chunk_size:
        return feed_forward(hidden)
    return torch.cat([feed_forward(part) for part in hidden.split(chunk_size, -2)], -2)


def intermediate(module: Any, x: Tensor) -> Tensor:
    """``act(dense(x))`` of `module.{dense, intermediate_act_fn}`, in one op where the activation can be fused."""
    name = activation_name(module.intermediate_act_fn)
    inner = project(module.dense, x, name)
    return inner if name else module.intermediate_act_fn(inner)


def project(linear: Any, x: Tensor, activation: str | None = None) -> Tensor:
    """``activation(linear(x))`` of an nn.Linear, fused; of an Int8Linear, fused; or of what else is in its place."""
    if type(linear) is nn.Linear:
        return ops.linear_activation(x, linear.weight, linear.bias, activation)
    if isinstance(linear, Int8Linear):
        return linear.linear_activation(x, activation)
    return reference.activation(linear(x), activation)


def project_qkv(attention_self: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    """q, k and v ``[..., hidden_size]`` of the three projections; int8 layers quantize their common input once."""
    projections = (attention_self.query, attention_self.key, attention_self.value)
    scales = _shared_input_scales(projections)
    if scales is None or (torch.is_grad_enabled() and hidden.requires_grad):
        return tuple(project(linear, hidden) for linear in projections)
    codes, scale, offset = ops.quantize_per_token_with_offset(hidden)
    dtype = autocast_dtype(hidden.device) or hidden.dtype
    return tuple(
        ops.int8_matmul(
            codes, linear.weight, scale, weight_scale, linear.bias, out_dtype=dtype, a_offset=offset
        )
        for linear, weight_scale in zip(projections, scales, strict=True)
    )


def _are_plain(linears: tuple[Any, ...]) -> bool:
    return all(type(linear) is nn.Linear for linear in linears)


def _shared_input_scales(linears: tuple[Any, ...]) -> list[Tensor] | None:
    """The weights' scales, if these are int8 layers that quantize their common input in the same way."""
    scales = []
    for linear in linears:
        if (
            not isinstance(linear, Int8Linear)
            or linear.method != "dynamic"
            or linear.smooth_scale is not None
        ):
            return None
        if linear.weight_scale is None or (
            torch.is_grad_enabled() and linear.bias is not None and linear.bias.requires_grad
        ):
            return None
        scales.append(linear.weight_scale)
    return scales


def _training_feed_forward(layer: Any, context: Tensor, residual: Tensor, activation: str) -> Tensor:
    """The same from attention's output on, with hidden states and activation made again in the backward."""
    first, last = layer.attention.output, layer.output
    hidden, out = ops.layernorm_mlp(
        F.linear(context, first.dense.weight),
        residual,
        first.LayerNorm.weight,
        first.LayerNorm.bias,
        layer.intermediate.dense.weight,
        layer.intermediate.dense.bias,
        last.dense.weight,
        activation=activation,
        eps=first.LayerNorm.eps,
        dropout_p=first.dropout.p,
        training=first.dropout.training,
        x_bias=first.dense.bias,
    )
    return ops.residual_layernorm(
        out,
        hidden,
        last.LayerNorm.weight,
        last.LayerNorm.bias,
        eps=last.LayerNorm.eps,
        dropout_p=last.dropout.p,
        training=last.dropout.training,
        x_bias=last.dense.bias,
    )


def linear_residual_layernorm(module: Any, x: Tensor, residual: Tensor) -> Tensor:
    """LayerNorm(dropout(dense(x)) + residual) with the parameters of `module.{dense, LayerNorm, dropout}`."""
    dense, norm, dropout = module.dense, module.LayerNorm, module.dropout
    if type(dense) is not nn.Linear:
        return ops.residual_layernorm(
            project(dense, x),
            residual,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            dropout_p=dropout.p,
            training=dropout.training,
        )
    return ops.linear_residual_layernorm(
        x,
        dense.weight,
        dense.bias,
        residual,
        norm.weight,
        norm.bias,
        eps=norm.eps,
        dropout_p=dropout.p,
        training=dropout.training,
    )


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: PackedLayout,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """Each sequence attends to its own tokens: `[tokens, heads, head_dim]` -> `[tokens, hidden_size]`."""
    if tokens.key_indices is not None:
        k, v = k.index_select(0, tokens.key_indices), v.index_select(0, tokens.key_indices)
    context = ops.varlen_attention(
        q,
        k,
        v,
        tokens.cu_seqlens,
        tokens.cu_seqlens_k,
        tokens.max_seqlen,
        tokens.max_seqlen_k,
        dropout_p=dropout_p,
        is_causal=is_causal,
    )
    return context.flatten(-2)


def heads_of(view: Any) -> tuple[int, int]:
    """Heads of a layer's attention, and the dimension of one."""
    return view.attention.self.num_attention_heads, view.attention.self.attention_head_size


def plain_modules(view: Any) -> tuple[Any, ...]:
    """Products and norms of a layer, in the order of their use."""
    heads, first, second = view.attention.self, view.attention.output, view.output
    inner = view.intermediate.dense
    return (
        heads.query, heads.key, heads.value, first.dense, first.LayerNorm, inner, second.dense, second.LayerNorm
    )  # fmt: skip


def is_plain(view: Any) -> bool:
    """Whether its products are nn.Linear with bias and its norms LayerNorm with both parameters, all plain tensors."""
    kinds = [type(x) for x in plain_modules(view)]
    return (
        all(kind is nn.Linear for kind in (*kinds[:4], *kinds[5:7]))
        and all(kind in (nn.LayerNorm, ResidualLayerNorm) for kind in (kinds[4], kinds[7]))
        and all(type(p) in (Tensor, nn.Parameter) for x in plain_modules(view) for p in (x.weight, x.bias))
    )
