"""The registered ops of attention's Triton backend, with their launches' configurations and their FLOPs.

Padded and packed batches go through the same ops: a packed ``[total, heads, dim]`` is the view ``[1, heads, total,
dim]`` with offsets. Their autograd Function and what calls them: :mod:`pyaccel.ops.attention.triton`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyaccel import tuning
from pyaccel.ops.common import custom_op, kernels

if TYPE_CHECKING:
    from pyaccel.kernels.attention.params import AttentionCall


def forward_flops(query: Tensor, value: Tensor, seq_k: int, lengths: Sequence[int] | None = None) -> int:
    """Of scores and of their product with the values, masked ones too; tensors as the op below takes them.

    ``lengths``: of the sequences of a packed batch that attends to itself, whose offsets say it where they have values.
    """
    return 2 * _scores(query, seq_k, lengths) * (query.shape[3] + value.shape[3])


def backward_flops(query: Tensor, value: Tensor, seq_k: int, lengths: Sequence[int] | None = None) -> int:
    """Of the scores again, dquery and dkey; and of dprobs and dvalue.

    That the kernels make scores and dprobs twice, to do without atomics, isn't counted.
    """
    return 2 * _scores(query, seq_k, lengths) * (3 * query.shape[3] + 2 * value.shape[3])


def _scores(query: Tensor, seq_k: int, lengths: Sequence[int] | None) -> int:
    if lengths is None:
        return query.shape[:3].numel() * seq_k
    return query.shape[1] * sum(length**2 for length in lengths)


# --- registered ops -------------------------------------------------------------------------------------------
# Functional, of fixed arity and without aliases: what isn't wanted comes back as a tensor of size 0.
#
#   query                      [batch, heads, seq_q, head_dim], any strides; packed [1, heads, total_q, head_dim]
#   key, value                 [batch, kv_heads, seq_k, ...], packed [1, kv_heads, total_k, ...]
#   attn_mask                  [1 or batch, 1 or heads, 1 or seq_q, 1 or seq_k], bool or float
#   key_mask                   bool [1 or batch, 1 or heads, seq_k]
#   cu_seqlens_q, cu_seqlens_k int32 [sequences + 1] of a packed batch
#   seq_q, seq_k               the lengths; packed: of the longest sequence


def _forward_outputs(
    query: Tensor, value: Tensor, attn_mask: Tensor | None, want_lse: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32) if want_lse else None
    is_float = attn_mask is not None and attn_mask.dtype != torch.bool
    return _like(query, value.shape[3]), lse, None if lse is None or not is_float else torch.empty_like(lse)


@custom_op("pyaccel::attention_forward", _forward_outputs)
def forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_key: Tensor | None,
    seq_q: int,
    seq_k: int,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window_left: int,
    window_right: int,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output, laid out in memory as ``[batch, seq_q, heads, value_dim]``; LSE ``[batch, heads, seq_q]`` fp32, and what
    rounding took from it, where a float attn_mask may make that large."""
    call = _call(
        query, key, value, attn_mask, key_mask, cu_seqlens_q, cu_seqlens_k, dropout_key, seq_q, seq_k, scale,
        dropout_p, is_causal, window_left, window_right,
    )  # fmt: skip
    outputs = _forward_outputs(query, value, attn_mask, want_lse)
    short = kernels("attention.config").attention_short("forward_short", call.shape)
    if short is not None:
        kernels("attention.short").forward_short(*outputs, call, short)
    else:
        _launch("forward", query, call, partial(kernels("attention.forward").forward, *outputs, call))
    return outputs


def _launch(kernel: str, query: Tensor, call: AttentionCall, launch: Callable[[Any], None]) -> None:
    """``launch`` with the kernel's configuration for this call."""
    shape = call.shape
    # Mask and dropout take registers: what is best without them may spill with them.
    size = (shape.head_dim, 1 + shape.has_mask + 2 * shape.has_dropout)
    default = kernels("attention.config").attention(kernel, shape)
    tuning.run(f"attention_{kernel}", query, size, default, launch, exactly=True)


def _like(x: Tensor, dim: int) -> Tensor:
    """An empty ``[batch, heads, seq, dim]`` with the heads inside: what a Linear and a packed batch want."""
    batch, heads, seq, _ = x.shape
    return x.new_empty(batch, seq, heads, dim).transpose(1, 2)


def _backward_outputs(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, want_dmask: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    # Contiguous, whatever the mask is.
    dmask = attn_mask.new_empty(attn_mask.shape) if attn_mask is not None and want_dmask else None
    return (
        _like(query, query.shape[3]),
        _like(key, key.shape[3]),
        _like(value, value.shape[3]),
        dmask,
    )


@custom_op("pyaccel::attention_backward", _backward_outputs)
def backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_error: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_key: Tensor | None,
    seq_q: int,
    seq_k: int,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window_left: int,
    window_right: int,
    want_dmask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value, in their shapes, and of attn_mask, in its, if that is wanted."""
    call = _call(
        query, key, value, attn_mask, key_mask, cu_seqlens_q, cu_seqlens_k, dropout_key, seq_q, seq_k, scale,
        dropout_p, is_causal, window_left, window_right,
    )  # fmt: skip
    dq, dk, dv, dmask = _backward_outputs(query, key, value, attn_mask, want_dmask)
    error = lse_error if lse_error is not None and lse_error.numel() else None
    config = kernels("attention.config")
    short = config.attention_short("backward_short", call.shape)
    if short is not None:
        kernels("attention.short").backward_short(dq, dk, dv, dout, out, lse, error, dlse, call, short)
        return dq, dk, dv, dmask
    delta = torch.empty_like(lse)
    dquery, dkey_dvalue = kernels("attention.dq").dquery, kernels("attention.dkv").dkey_dvalue
    _launch("dquery", query, call, partial(dquery, dq, delta, dout, out, lse, error, dlse, call))
    _launch("dkey_dvalue", query, call, partial(dkey_dvalue, dk, dv, dout, lse, error, delta, call))
    if dmask is not None:
        write = kernels("attention.scores").dmask
        write(dmask, dout, lse, error, delta, call, config.attention("scores", call.shape))
    return dq, dk, dv, dmask


def _probs_outputs(query: Tensor, key: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:3], key.shape[2])


@custom_op("pyaccel::attention_probs", _probs_outputs)
def probs_op(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    is_causal: bool,
    window_left: int,
    window_right: int,
) -> Tensor:
    """The weights before dropout, ``[batch, heads, seq_q, seq_k]``, of a padded batch."""
    call = _call(
        query, key, key, attn_mask, key_mask, None, None, None, query.shape[2], key.shape[2], scale, 0.0,
        is_causal, window_left, window_right,
    )  # fmt: skip
    probs = query.new_empty(*query.shape[:3], key.shape[2])
    config = kernels("attention.config").attention("scores", call.shape)
    kernels("attention.scores").probs(probs, lse, call, config)
    return probs


def _call(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> AttentionCall:
    """The kernels' view of a call; ``rest`` as :meth:`pyaccel.ops.attention.params.AttentionParams.flat` has it."""
    attn_mask, key_mask, cu_q, cu_k, dropout_key, seq_q, seq_k, scale, dropout_p, is_causal, *window = rest
    batch, heads = query.shape[:2]
    made: AttentionCall = kernels("attention.params").AttentionCall(
        query,
        key,
        value,
        cu_q,
        cu_k,
        # A packed batch may have nothing but rows beyond its last offset, and these want a launch too.
        seq_q if cu_q is None else max(seq_q, 1),
        seq_k if cu_k is None else max(seq_k, 1),
        None if key_mask is None else key_mask.expand(batch, heads, seq_k),
        None if attn_mask is None else attn_mask.expand(batch, heads, seq_q, seq_k),
        is_causal,
        tuple(window),
        scale,
        dropout_key,
        dropout_p,
        # PyTorch's own flag for products of fp32 on CUDA.
        allow_tf32=query.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32,
    )
    return made
