"""The Triton backend of attention: its registered ops, their autograd Function, and what calls them.

Padded and packed batches go through the same ops: a packed ``[total, heads, dim]`` is the view ``[1, heads, total,
dim]`` with offsets. Arguments are checked by :mod:`pyaccel.ops.attention`, which calls this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyaccel import dispatch, tuned
from pyaccel.ops._attention_sdpa import forward_mode

MAX_HEAD_DIM = 256
MAX_FP32_HEAD_DIM = 64
Window = tuple[int, int]


def not_supported_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """Why the kernels can't serve a call with these tensors; empty if they can."""
    reasons = dispatch.triton_reasons(query, key, value)
    dims = sorted({t.shape[-1] for t in (query, value) if t.dim() and t.shape[-1] > MAX_HEAD_DIM})
    if dims:
        reasons.append(f"the kernels take head dimensions of up to {MAX_HEAD_DIM}, not {dims[-1]}")
    return reasons


def slow_reason(query: Tensor, value: Tensor) -> str | None:
    """Why PyTorch is to be preferred although the kernels can serve; None where it isn't."""
    dim = max(query.shape[-1], value.shape[-1])
    if query.dtype == torch.float32 and dim > MAX_FP32_HEAD_DIM and not torch.backends.cuda.matmul.allow_tf32:
        return (
            f"fp32 products have no matrix instructions, and at a head dimension of {dim} the kernels spill "
            f"registers (above {MAX_FP32_HEAD_DIM})"
        )
    return None


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


@torch.library.custom_op("pyaccel::attention_forward", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, laid out in memory as ``[batch, seq_q, heads, value_dim]``; LSE ``[batch, heads, seq_q]`` fp32, and what
    rounding took from it, where a float attn_mask may make that large."""
    from pyaccel.kernels import attention, attention_short
    from pyaccel.kernels import attention_config as config

    call = _call(
        query, key, value, attn_mask, key_mask, cu_seqlens_q, cu_seqlens_k, dropout_key, seq_q, seq_k, scale,
        dropout_p, is_causal, window_left, window_right,
    )  # fmt: skip
    out, lse, lse_error = _forward_outputs(query, value, attn_mask, want_lse)
    wanted = (_wanted(lse), _wanted(lse_error))
    short = config.attention_short("forward_short", call.shape)
    if short is not None:
        attention_short.forward_short(out, *wanted, call, short)
    else:
        _launch("forward", query, call, partial(attention.forward, out, *wanted, call))
    return out, lse, lse_error


def _launch(kernel: str, query: Tensor, call: Any, launch: Callable[[Any], None]) -> None:
    """``launch`` with the kernel's configuration for this call."""
    from pyaccel.kernels import attention_config

    shape = call.shape
    # Mask and dropout take registers: what is best without them may spill with them.
    size = (shape.head_dim, 1 + shape.has_mask + 2 * shape.has_dropout)
    default = attention_config.attention(kernel, shape)
    tuned.run(f"attention_{kernel}", query, size, default, launch, exactly=True)


def _wanted(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def _like(x: Tensor, dim: int) -> Tensor:
    """An empty ``[batch, heads, seq, dim]`` with the heads inside: what a Linear and a packed batch want."""
    batch, heads, seq, _ = x.shape
    return x.new_empty(batch, seq, heads, dim).transpose(1, 2)


def _forward_outputs(
    query: Tensor, value: Tensor, attn_mask: Tensor | None, want_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3] if want_lse else 0, dtype=torch.float32)
    is_float = want_lse and attn_mask is not None and attn_mask.dtype != torch.bool
    return _like(query, value.shape[3]), lse, torch.empty_like(lse) if is_float else lse.new_empty(0)


@forward_op.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_outputs(query, value, attn_mask, want_lse)


@torch.library.custom_op("pyaccel::attention_backward", mutates_args=())
def backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_error: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, in their shapes, and of attn_mask, in its; size 0 if that isn't wanted."""
    from pyaccel.kernels import attention_config as config
    from pyaccel.kernels import (
        attention_dkey_dvalue,
        attention_dquery,
        attention_scores,
        attention_short,
    )

    call = _call(
        query, key, value, attn_mask, key_mask, cu_seqlens_q, cu_seqlens_k, dropout_key, seq_q, seq_k, scale,
        dropout_p, is_causal, window_left, window_right,
    )  # fmt: skip
    dq, dk, dv, dmask = _backward_outputs(query, key, value, attn_mask, want_dmask)
    error = _wanted(lse_error)
    short = config.attention_short("backward_short", call.shape)
    if short is not None:
        attention_short.backward_short(dq, dk, dv, dout, out, lse, error, dlse, call, short)
        return dq, dk, dv, dmask
    delta = torch.empty_like(lse)
    dquery = partial(attention_dquery.dquery, dq, delta, dout, out, lse, error, dlse, call)
    _launch("dquery", query, call, dquery)
    dkey_dvalue = partial(attention_dkey_dvalue.dkey_dvalue, dk, dv, dout, lse, error, delta, call)
    _launch("dkey_dvalue", query, call, dkey_dvalue)
    if want_dmask:
        attention_scores.dmask(dmask, dout, lse, error, delta, call, config.attention("scores", call.shape))
    return dq, dk, dv, dmask


def _backward_outputs(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, want_dmask: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dmask = (
        query.new_empty(0)
        if attn_mask is None or not want_dmask
        else attn_mask.new_empty(attn_mask.shape)  # contiguous, whatever the mask is
    )
    return (
        _like(query, query.shape[3]),
        _like(key, key.shape[3]),
        _like(value, value.shape[3]),
        dmask,
    )


@backward_op.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_error: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward_outputs(query, key, value, attn_mask, want_dmask)


@torch.library.custom_op("pyaccel::attention_probs", mutates_args=())
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
    from pyaccel.kernels import attention_config as config
    from pyaccel.kernels import attention_scores

    call = _call(
        query, key, key, attn_mask, key_mask, None, None, None, query.shape[2], key.shape[2], scale, 0.0,
        is_causal, window_left, window_right,
    )  # fmt: skip
    probs = query.new_empty(*query.shape[:3], key.shape[2])
    attention_scores.probs(probs, lse, call, config.attention("scores", call.shape))
    return probs


@probs_op.register_fake
def _(
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
    return query.new_empty(*query.shape[:3], key.shape[2])


def _call(
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
) -> Any:
    from pyaccel.kernels.attention_call import AttentionCall

    batch, heads = query.shape[:2]
    full = (batch, heads, seq_q, seq_k)
    return AttentionCall(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        # A packed batch may have nothing but rows beyond its last offset, and these want a launch too.
        seq_q if cu_seqlens_q is None else max(seq_q, 1),
        seq_k if cu_seqlens_k is None else max(seq_k, 1),
        None if key_mask is None else key_mask.expand(batch, heads, seq_k),
        None if attn_mask is None else attn_mask.expand(full),
        is_causal,
        (window_left, window_right),
        scale,
        dropout_key,
        dropout_p,
        # PyTorch's own flag for products of fp32 on CUDA.
        allow_tf32=query.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32,
    )


# --- autograd -------------------------------------------------------------------------------------------------


class AttentionFunction(torch.autograd.Function):
    """Saves query, key, value, output, LSE, and masks and dropout key as they came: nothing of a score's size."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What :func:`forward_op` gives; the arguments are its."""
        return forward_op(query, key, value, attn_mask, *rest, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*output, *inputs[:8])
        ctx.options = inputs[8:]

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None, dlse_error: None
    ) -> tuple[Tensor | None, ...]:
        out, lse, lse_error, *inputs = ctx.saved_tensors
        if dout is None:
            dout = out.new_zeros(()).expand_as(out)
        if dlse is not None:
            dlse = dlse.contiguous()
        # A graph has no double backward of its own accord, and takes no Function in that of another.
        run = backward_op if torch.compiler.is_compiling() else _BackwardFunction.apply
        want_dmask = ctx.needs_input_grad[3]
        grads = run(dout, dlse, out, lse, lse_error, *inputs, *ctx.options, want_dmask)
        needed = ctx.needs_input_grad[:4]
        return *(g if n else None for g, n in zip(grads, needed, strict=True)), *(None,) * (
            4 + len(ctx.options)
        )


class _BackwardFunction(torch.autograd.Function):
    """:func:`backward_op`, under torch.func's transforms too, which run it with gradients recorded."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return backward_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "pyaccel.ops.scaled_dot_product_attention: a double backward (the gradient of a gradient) was asked for, "
            "and the Triton backend has none. Use another backend for this call: "
            "pyaccel.use_backend('torch', ops=['scaled_dot_product_attention', 'varlen_attention'])."
        )


def _in_turn(op: Any) -> None:
    """Let torch.func.vmap run ``op`` for one after the other of what it maps over."""

    def run(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        results = [
            op(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    op.register_vmap(run)


for _op in (forward_op, backward_op, probs_op):
    _in_turn(_op)


def _refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise where a derivative is taken forward: a registered op would drop it without a word."""
    if forward_mode() and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(
            "pyaccel.ops: a forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad) of attention was asked "
            "for, and the Triton backend has none. Use another backend for this call: pyaccel.use_backend('torch', "
            "ops=['scaled_dot_product_attention', 'varlen_attention', 'attention_probs'])."
        )


def _attend(*arguments: Any, want_lse: bool) -> tuple[Tensor, Tensor]:
    _refuse_forward_mode(*arguments[:4])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:4]):
        if torch.compiler.is_compiling():
            arguments = _distinct(arguments)
        out, lse, _ = AttentionFunction.apply(*arguments)
    else:
        out, lse, _ = forward_op(*arguments, want_lse)
    return out, lse


def _distinct(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same, with views in place of tensors that come again: a compiled autograd Function takes none twice."""
    distinct: list[Any] = []
    for argument in arguments:
        again = isinstance(argument, Tensor) and any(argument is earlier for earlier in distinct)
        distinct.append(argument.view_as(argument) if again else argument)
    return tuple(distinct)


# --- calls ----------------------------------------------------------------------------------------------------


def padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    window_size: Window | None,
    seed: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`pyaccel.ops.scaled_dot_product_attention` of valid 4-D arguments."""
    attn_mask, key_mask = _masks(attn_mask, key_padding_mask)
    out, lse = _attend(
        query, key, value, attn_mask, key_mask, None, None, seed, query.shape[2], key.shape[2],
        _scale(query, scale), dropout_p, is_causal, *(window_size or (-1, -1)), want_lse=return_lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    window_size: Window | None,
    seed: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`pyaccel.ops.varlen_attention` of valid arguments."""
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    out, lse = _attend(
        q, k, v, None, None, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), seed, max_seqlen_q,
        max_seqlen_k, _scale(query, scale), dropout_p, is_causal, *(window_size or (-1, -1)), want_lse=return_lse,
    )  # fmt: skip
    out = out.squeeze(0).transpose(0, 1)
    return (out, lse.squeeze(0)) if return_lse else out


def probs(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window_size: Window | None,
) -> Tensor:
    """:func:`pyaccel.ops.attention_probs` of valid 4-D arguments."""
    _refuse_forward_mode(query, key, lse, attn_mask)
    attn_mask, key_mask = _masks(attn_mask, key_padding_mask)
    window = window_size or (-1, -1)
    return probs_op(
        query, key, lse.contiguous(), attn_mask, key_mask, _scale(query, scale), is_causal, *window
    )


def _scale(query: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)


def _masks(attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """attn_mask as 4-D, and a mask of keys [1 or batch, 1 or heads, seq_k]: what is known by key is read by key."""
    key_mask = None if key_padding_mask is None else key_padding_mask[:, None]
    if attn_mask is None:
        return None, key_mask
    attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    by_key = attn_mask.shape[2] == 1 or attn_mask.stride(2) == 0
    if attn_mask.dtype != torch.bool or not by_key:
        return attn_mask, key_mask
    keys = attn_mask[:, :, 0]
    return None, keys if key_mask is None else keys & key_mask
