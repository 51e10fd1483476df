"""Scaled-dot-product attention over padded and packed batches: the public functions.

What masks mean is written once, in :mod:`pyaccel.reference.attention`, what arguments may be in
:mod:`pyaccel.ops.attention.checks`. More that holds for every function here:

* query, key and value share one dtype. Under autocast they (fp64 aside) are cast to its dtype first, as
  ``F.scaled_dot_product_attention`` does, so there they may differ; the output has that dtype.
* They trace under ``torch.compile(fullgraph=True)``. What reads values on the host (the offsets of a packed
  batch, whether a mask masks anything) is done on CPUs in eager mode only, where it costs no device sync.
* Triton serves fp16, bf16 and fp32 and head dims of up to 256 on GPUs; on a CPU torch is preferred.
* Bad arguments raise :class:`pyaccel.errors.InvalidArgumentError` (a ``ValueError`` and a ``RuntimeError``) that
  names every reason at once, those of the Triton kernels too where they were asked for.
"""

from __future__ import annotations

from typing import Literal, cast, overload

import torch
from torch import Tensor

from pyaccel.ops import common
from pyaccel.ops.attention import checks as arguments
from pyaccel.ops.attention import triton as triton_backend
from pyaccel.ops.attention.choice import cast_under_autocast, choose, refuse, without_leading
from pyaccel.ops.attention.params import AttentionParams, Window
from pyaccel.ops.attention.sdpa import may_hold, sdpa
from pyaccel.ops.dropout import dropout_key
from pyaccel.reference import attention as reference


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    key_padding_mask: Tensor | None = ...,
    window_size: Window | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    key_padding_mask: Tensor | None = ...,
    window_size: Window | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@cast_under_autocast("query", "key", "value")
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    window_size: Window | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(query @ key^T * scale + mask) @ value``, with every mask given holding at once.

    Args:
        query: ``[batch, heads, seq_q, head_dim]``, any strides; ``key`` ``[batch, kv_heads, seq_k,
            head_dim]``, ``value`` ``[batch, kv_heads, seq_k, value_dim]``; fp16, bf16, fp32 or fp64. As in
            PyTorch, ``batch``, or it and ``heads``, may be left out, and either may be 1 in some of the three
            and n in others.
        attn_mask: broadcastable to ``[batch, heads, seq_q, seq_k]``; bool, True = attend, or float (fp32 or
            query's dtype), added to the scores, where -inf masks. A float mask may need a gradient.
            Mask with -inf: beside the lowest finite number scores vanish, and a row of it gets equal weights.
            ``torch.nn.attention.bias``'s causal masks are taken too.
        dropout_p: probability of dropping a weight. Always acts: pass 0 in evaluation.
        is_causal: query ``i`` sees keys ``j <= i`` (aligned top left, as in PyTorch).
        scale: ``1 / sqrt(head_dim)`` by default.
        enable_gqa: ``heads`` may be a multiple of ``kv_heads``; without it ``kv_heads`` is ``heads`` or 1.
        key_padding_mask: bool ``[batch, seq_k]`` (batch 1 where query has none), True = a real key. It is
            never expanded over queries, unless it meets another mask that has them.
        window_size: ``(left, right)`` keys around the query's own (aligned bottom right, as in
            FlashAttention); -1 leaves a side open.
        return_lse: also return the natural log-sum-exp of the scores, fp32 ``[batch, heads, seq_q]`` (fp64
            for fp64 inputs). It has a gradient.

    Returns:
        ``[batch, heads, seq_q, value_dim]`` in query's dtype, or ``(output, lse)``; without the dimensions that
        query, key and value have none of.

    Raises:
        pyaccel.errors.InvalidArgumentError: naming everything that is wrong with the arguments.
        pyaccel.errors.NotSupportedError: the backend asked for can't serve this call.

    The torch backend is ``F.scaled_dot_product_attention``; on a CPU in eager mode it draws PyTorch's own dropout
    mask, not that of the other backends. With dropout elsewhere, or where the LSE is asked for, it is two matrix
    products and an fp32 softmax, which hold the ``[batch, heads, seq_q, seq_k]`` weights in memory: PyTorch's own
    kernels neither take our dropout mask nor return the LSE through a public function.
    """
    op = "scaled_dot_product_attention"
    reasons = arguments.padded_reasons(
        query, key, value, attn_mask, dropout_p, scale, enable_gqa, key_padding_mask, window_size
    )
    if reasons:
        refuse(op, reasons, query, key, value)
    absent = 0 if query.dim() == 4 else 4 - max(query.dim(), key.dim(), value.dim())
    query, key, value = arguments.padded_views(query, key, value)
    attn_mask, is_causal, window_size = arguments.without_causal_bias(attn_mask, is_causal, window_size)
    backend = choose(op, query, key, value, seqlen=query.shape[2])
    # On a CPU in eager mode the torch backend drops by PyTorch's mask: ours takes it three times the attention.
    drops_itself = backend == "torch" and common.on_host(query) and not return_lse
    seed = dropout_key(query.device) if dropout_p > 0.0 and not drops_itself else None
    params = AttentionParams(
        dropout_p, is_causal, scale, window_size, seed, return_lse, attn_mask, key_padding_mask
    )
    serve = {"triton": triton_backend.padded, "torch": _torch}.get(backend, _reference)
    return without_leading(serve(query, key, value, params), absent)


def _reference(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> Tensor | tuple[Tensor, Tensor]:
    result = reference.scaled_dot_product_attention(
        query,
        key,
        value,
        enable_gqa=query.shape[1] != key.shape[1],
        **{name: x for name, x in params._asdict().items() if name != "cu_seqlens"},
        upcast=False,
    )
    return cast("Tensor | tuple[Tensor, Tensor]", result)


def _torch(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> Tensor | tuple[Tensor, Tensor]:
    if params.key_padding_mask is not None and not may_hold(~params.key_padding_mask):
        params = params._replace(key_padding_mask=None)
    if params.dropout_key is not None or params.return_lse:
        return _reference(query, key, value, params)
    dropout_p, is_causal, scale, window_size, *_ = params
    attn_mask, key_padding_mask = params.attn_mask, params.key_padding_mask
    if is_causal and attn_mask is None and key_padding_mask is None and window_size is None:
        return sdpa(query, key, value, None, None, scale, is_causal=True, dropout_p=dropout_p)
    allowed, bias = reference.combine_masks(query, key, attn_mask, key_padding_mask, is_causal, window_size)
    return sdpa(query, key, value, allowed, bias, scale, dropout_p=dropout_p)


@cast_under_autocast("query", "key")
def attention_probs(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    window_size: Window | None = None,
) -> Tensor:
    """The softmax weights before dropout, rebuilt from the log-sum-exp: ``exp(scores - lse)``.

    Args:
        lse: ``[batch, heads, seq_q]`` fp32 (fp64 for fp64 inputs), as :func:`scaled_dot_product_attention`
            returned it with ``return_lse=True`` for the same query, key, masks and scale. A weight is as exact
            as it: the LSE of a row of nothing but the lowest finite number says nothing of its keys.

    The other arguments, and what is raised, are as in :func:`scaled_dot_product_attention`; the output has the
    gradients of query, key, lse and a float ``attn_mask``.

    Returns:
        ``[batch, heads, seq_q, seq_k]`` in query's dtype, without the dimensions that query and key have none of;
        0 where masked, and for a query that may attend to no key (LSE -inf).

    The Triton kernel has no gradient: where one is needed, torch serves the call.
    """
    op = "attention_probs"
    reasons = arguments.probs_reasons(
        query, key, lse, attn_mask, scale, enable_gqa, key_padding_mask, window_size
    )
    if reasons:
        refuse(op, reasons, query, key, key)
    absent = 4 - max(query.dim(), key.dim())
    query, key, _ = arguments.padded_views(query, key, key)
    lse = lse[(None,) * absent]
    attn_mask, is_causal, window_size = arguments.without_causal_bias(attn_mask, is_causal, window_size)
    no_kernel = []
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (query, key, lse, attn_mask)
    ):
        no_kernel.append(
            "the kernel has no gradient, and one is needed: detach the inputs or use torch.no_grad()"
        )
    backend = choose(op, query, key, key, no_kernel)
    if backend == "triton":
        params = AttentionParams(
            0.0, is_causal, scale, window_size, attn_mask=attn_mask, key_padding_mask=key_padding_mask
        )
        return without_leading(triton_backend.probs(query, key, lse, params), absent)
    probs = reference.attention_probs(
        query,
        key,
        lse,
        attn_mask,
        is_causal,
        scale,
        query.shape[1] != key.shape[1],
        key_padding_mask=key_padding_mask,
        window_size=window_size,
        upcast=False,
    )
    return without_leading(probs, absent)
