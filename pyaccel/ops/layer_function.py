"""A post-norm layer on packed hidden states, by the Triton kernels and PyTorch's products, as one autograd Function.

What :func:`pyaccel.ops.varlen_attention`, :func:`pyaccel.ops.layernorm_mlp` and :func:`pyaccel.ops.residual_layernorm`
run in the end, with their numbers and no more saved than they save. Between them PyTorch's engine would run some thirty
nodes a layer, each of which takes about as long as a kernel launch.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel.ops.attention import custom_ops as attention
from pyaccel.ops.attention.params import CuSeqlens
from pyaccel.ops.bias_act import triton as bias_act
from pyaccel.ops.common import differentiable_once, runs_directly
from pyaccel.ops.dropout import dropout_key
from pyaccel.ops.layernorm import triton as layernorm
from pyaccel.ops.linear import triton as linear


class LayerCall(NamedTuple):
    """What a layer takes beside its hidden states and parameters.

    Attributes:
        cu_seqlens: where the sequences lie.
        key_indices: int64 ``[keys]``, the rows that are keys; None where all are.
        heads: of attention, and the dimension of one.
        activation: between the products of the feed-forward network.
        eps: of the LayerNorm after attention, and of the last.
        dropout_p: of attention's weights, and before each LayerNorm; 0 where dropout doesn't act.
    """

    cu_seqlens: CuSeqlens
    key_indices: Tensor | None
    heads: tuple[int, int]
    activation: str
    eps: tuple[float, float]
    dropout_p: tuple[float, float, float]

    def attention(self, key: Tensor | None) -> tuple[Any, ...]:
        """What attention's ops take after query, key and value."""
        cu_q, cu_k, max_q, max_k = self.cu_seqlens
        scale = 1.0 / math.sqrt(self.heads[1])
        return None, None, cu_q, cu_k, key, max_q, max_k, scale, self.dropout_p[0], False, -1, -1


class _Ops(NamedTuple):
    """What the backward calls: the registered ops, or their functions where nothing would notice."""

    attention: Any
    layernorm: Any
    layernorm_again: Any
    activation: Any
    activation_again: Any


_OPS = _Ops(
    attention.backward_op,
    layernorm.backward_op,
    layernorm.forward_op,
    linear.backward_op,
    bias_act.forward_op,
)
_FUNCTIONS = _Ops(*[op.function for op in _OPS])


def attend(
    hidden: Tensor, parameters: tuple[Tensor, ...], call: LayerCall, *, records: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """``[total_tokens, hidden_size]`` of each sequence's attention to itself, and what its backward takes."""
    key = dropout_key(hidden.device) if call.dropout_p[0] > 0.0 else None
    q, k, v = [F.linear(hidden, *parameters[i : i + 2]) for i in (0, 2, 4)]
    if call.key_indices is not None:
        k, v = k.index_select(0, call.key_indices), v.index_select(0, call.key_indices)
    q, k, v = [x.view(1, -1, *call.heads).transpose(1, 2) for x in (q, k, v)]
    out, lse, _ = attention.forward_op.function(q, k, v, *call.attention(key), records)
    return _tokens(out), (q, k, v, out, lse, key)


def forward(
    hidden: Tensor, parameters: tuple[Tensor, ...], call: LayerCall, *, records: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The layer's output ``[total_tokens, hidden_size]``, and with ``records`` what the backward takes.

    Args:
        hidden: ``[total_tokens, hidden_size]``.
        parameters: weight and bias of query, key, value, attention's output, its LayerNorm, the two products of the
            feed-forward network and the last LayerNorm; in one dtype, hidden's.
    """
    context, attended = attend(hidden, parameters, call, records=records)
    weight, bias, norm_weight, norm_bias, weight1, bias1, weight2, bias2, *last_norm = parameters[6:]
    _, p1, p2 = call.dropout_p
    wanted = (hidden.dtype, False, True, records, False, records)
    key1 = dropout_key(hidden.device) if p1 > 0.0 else None
    normed, total1, _, _, mean1, rstd1 = layernorm.forward_op.function(
        F.linear(context, weight), hidden, norm_weight, norm_bias, bias, key1, call.eps[0], p1, *wanted
    )
    # Of the pre-activation that is saved, rounded, in training.
    pre = F.linear(normed, weight1, bias1 if records else None)
    inner = bias_act.forward_op.function(pre, None if records else bias1, call.activation)
    key2 = dropout_key(hidden.device) if p2 > 0.0 else None
    out, total2, _, _, mean2, rstd2 = layernorm.forward_op.function(
        F.linear(inner, weight2), normed, *last_norm, bias2, key2, call.eps[1], p2, *wanted
    )
    return out, (*attended, total1, mean1, rstd1, key1, pre, total2, mean2, rstd2, key2)


class LayerFunction(torch.autograd.Function):
    """Saves the input, q, k, v, output and LSE of attention, both sums and their statistics, and the pre-activation.

    Nothing transforms or compiles a call of it: see :func:`pyaccel.ops.layer_choice.triton_serves`.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, call: LayerCall, *parameters: Tensor) -> Tensor:
        """The output."""
        out, saved = forward(hidden, parameters, call, records=True)
        ctx.save_for_backward(*saved, hidden, *parameters)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        given = (dout, *ctx.saved_tensors)
        if runs_directly(*given):
            return _backward(_FUNCTIONS, ctx.call, ctx.needs_input_grad, *given)
        found: tuple[Tensor | None, ...] = _backward_once(ctx.call, ctx.needs_input_grad, *given)
        return found


def _backward(
    ops: _Ops, call: LayerCall, needed: tuple[bool, ...], dout: Tensor, *saved: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of what :class:`LayerFunction` takes, of those that are needed; products in the engine's order."""
    total1, mean1, rstd1, key1, pre, total2, mean2, rstd2, key2, hidden, *parameters = saved[6:]
    weight, _, norm_weight, norm_bias, weight1, _, weight2, _, last_weight, _ = parameters[6:]
    need_hidden, _, *need = needed
    dtype = hidden.dtype
    wanted = [dtype if each else None for each in need]
    _, p1, p2 = call.dropout_p

    dx, dnormed, dlast_weight, dlast_bias, dbias2 = ops.layernorm(
        dout, None, total2, mean2, rstd2, last_weight, key2, p2, dtype, dtype, *wanted[14:], wanted[13]
    )
    dweight2 = dx.mT @ ops.activation_again(pre, None, call.activation) if need[12] else None
    dpre, dbias1 = ops.activation(dx @ weight2, pre, call.activation, True, wanted[11])
    dweight1 = None
    if need[10]:
        # Of the rounded sum, and so what plain LayerNorm gives, whose input is that sum.
        normed, *_ = ops.layernorm_again(
            total1, None, norm_weight, norm_bias, None, None, call.eps[0], 0.0, dtype,
            False, True, False, False, False,
        )  # fmt: skip
        dweight1 = dpre.mT @ normed
    dx, dhidden, dnorm_weight, dnorm_bias, dbias = ops.layernorm(
        torch.addmm(dnormed, dpre, weight1), None, total1, mean1, rstd1, norm_weight, key1, p1,
        dtype, dtype if need_hidden else None, *wanted[8:10], wanted[7],
    )  # fmt: skip
    dweight = dx.mT @ _tokens(saved[3]) if need[6] else None
    # Of this dtype also where a backward runs under autocast.
    dcontext = (dx @ weight).to(dtype)
    projections = _backward_attention(ops, call, dcontext, *saved[:6])
    if need_hidden:
        for i in (4, 2, 0):
            dhidden += projections[i // 2] @ parameters[i]
    found: list[Tensor | None] = [None] * 6
    for i, d in enumerate(projections):
        if need[2 * i]:
            found[2 * i] = d.mT @ hidden
        if need[2 * i + 1]:
            found[2 * i + 1] = d.sum(0)
    found += [dweight, dbias, dnorm_weight, dnorm_bias, dweight1, dbias1, dweight2, dbias2]
    found += [dlast_weight, dlast_bias]
    return (
        dhidden if need_hidden else None,
        None,
        *[g if n else None for g, n in zip(found, need, strict=True)],
    )


def _backward_attention(
    ops: _Ops,
    call: LayerCall,
    dcontext: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key: Tensor | None,
) -> list[Tensor]:
    """Gradients of the three projections, ``[total_tokens, hidden_size]``."""
    dout = dcontext.view(1, -1, *call.heads).transpose(1, 2)
    found = ops.attention(dout, None, out, lse, None, q, k, v, *call.attention(key), False)
    dq, dk, dv = [_tokens(each) for each in found[:3]]
    if call.key_indices is not None:
        dk, dv = [torch.zeros_like(dq).index_add_(0, call.key_indices, each) for each in (dk, dv)]
    return [dq, dk, dv]


def _tokens(x: Tensor) -> Tensor:
    """``[1, heads, tokens, head_dim]`` as ``[tokens, heads * head_dim]``."""
    return x.transpose(1, 2).reshape(x.shape[2], -1)


_backward_once = differentiable_once(
    partial(_backward, _OPS), "varlen_attention and layernorm_mlp", "pyaccel.use_backend('torch')"
)
