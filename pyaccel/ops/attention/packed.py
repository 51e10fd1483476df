"""The public function of packed attention; of padded attention, see :mod:`pyaccel.ops.attention.api`."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from pyaccel.errors import NotSupportedError
from pyaccel.ops import common
from pyaccel.ops.attention import checks as arguments
from pyaccel.ops.attention import triton as triton_backend
from pyaccel.ops.attention import varlen as torch_backend
from pyaccel.ops.attention.choice import cast_under_autocast, choose, lengths_of, refuse
from pyaccel.ops.attention.params import AttentionParams, CuSeqlens, Window
from pyaccel.ops.dropout import dropout_key
from pyaccel.reference import attention as reference


@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    window_size: Window | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    window_size: Window | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@cast_under_autocast("query", "key", "value")
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Window | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each sequence of a packed batch.

    Args:
        query: ``[total_q, heads, head_dim]``, any strides (a view into a packed QKV buffer needs no copy);
            ``key`` ``[total_k, kv_heads, head_dim]``, ``value`` ``[total_k, kv_heads, value_dim]``; ``heads``
            is a multiple of ``kv_heads``.
        cu_seqlens_q, cu_seqlens_k: int32 ``[batch + 1]`` on query's device, from 0, never falling: sequence
            ``i`` is rows ``cu[i]`` to ``cu[i + 1]``. Empty sequences are fine; rows beyond the last offset
            belong to no sequence, are never read, and get output 0, LSE -inf and gradient 0.
        max_seqlen_q, max_seqlen_k: at least the length of the longest sequence.

    The other arguments, and what is raised, are as in :func:`scaled_dot_product_attention`; ``is_causal`` and
    ``window_size`` are aligned within each sequence.

    Returns:
        ``[total_q, heads, value_dim]`` in query's dtype, or ``(output, lse)`` with lse ``[heads, total_q]``.

    On CPUs the torch backend serves each run of neighboring sequences of equal lengths in one call (sort a batch by
    length), on views of the packed tensors: by ``F.scaled_dot_product_attention``, or by two matrix products and a
    softmax where those are faster; with dropout, they save the weights for backward. On GPUs it is
    ``torch.nn.attention.varlen.varlen_attn`` where that serves the call. Else, and on CPUs under
    ``torch.compile``, it pads to ``[batch, heads, max_seqlen, head_dim]`` on the device, with no host sync.
    """
    op = "varlen_attention"
    reasons = arguments.packed_reasons(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        scale,
        window_size,
    )
    if reasons:
        refuse(op, reasons, query, key, value)
    backend = choose(op, query, key, value, seqlen=max_seqlen_q, dropout_p=dropout_p)
    on_host = common.on_host(query)
    drops_itself = backend == "torch" and on_host and not return_lse
    seed = dropout_key(query.device) if dropout_p > 0.0 and not drops_itself else None
    cu_seqlens = CuSeqlens(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    params = AttentionParams(
        dropout_p, is_causal, scale, window_size, seed, return_lse, cu_seqlens=cu_seqlens
    )
    if backend == "torch" and not on_host:
        return torch_backend.varlen_on_device(query, key, value, params)
    no_values = query.is_meta or (not torch.compiler.is_compiling() and torch._C._is_tracing())
    if backend == "reference" and no_values:
        raise NotSupportedError(
            "pyaccel.ops.varlen_attention: the reference backend reads cu_seqlens, which meta tensors don't hold and a "
            "trace would keep. Use another one here: pyaccel.use_backend('auto', ops=['varlen_attention'])."
        )
    lens_q: list[int] = []
    lens_k: list[int] = []
    if on_host or backend == "reference":
        lens_q = lens_k = lengths_of("q", cu_seqlens_q, query.shape[0], max_seqlen_q)
        if cu_seqlens_k is not cu_seqlens_q or (key.shape[0], max_seqlen_k) != (query.shape[0], max_seqlen_q):
            lens_k = lengths_of("k", cu_seqlens_k, key.shape[0], max_seqlen_k)
    if backend == "triton":
        return triton_backend.packed(query, key, value, params)
    if backend == "torch" and seed is None and not return_lse:
        return torch_backend.varlen_by_group(query, key, value, lens_q, lens_k, params)
    return reference.varlen_attention(
        query,
        key,
        value,
        *cu_seqlens,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        window_size=window_size,
        dropout_key=seed,
        return_lse=return_lse,
        upcast=False,
    )
