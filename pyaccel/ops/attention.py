"""Scaled-dot-product attention over padded and packed batches: the public functions and their torch backend.

What masks mean is written once, in :mod:`pyaccel.reference.attention`. Two more things hold for both
functions:

* query, key and value share one dtype. Under autocast they (fp64 aside) are cast to its dtype first, as
  ``F.scaled_dot_product_attention`` does, so there they may differ; the output has that dtype.
* Both trace under ``torch.compile(fullgraph=True)``. What reads values on the host (the offsets of a packed
  batch, whether a mask masks anything) is done on CPUs in eager mode only, where it costs no device sync.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast, overload

import torch
from torch import Tensor

from pyaccel import dispatch
from pyaccel.ops import _attention_torch as torch_backend
from pyaccel.ops._dropout import dropout_key, dropout_reasons
from pyaccel.reference import attention as reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS: dict[str, list[str]] = {"torch": [], "reference": []}  # both serve every valid call
Window = tuple[int, int]
Attention = TypeVar("Attention", bound=Callable[..., Any])


def _cast_under_autocast(function: Attention) -> Attention:
    @functools.wraps(function)
    def wrapper(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        kind = query.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return function(query, key, value, *args, **kwargs)
        dtype = torch.get_autocast_dtype(kind)
        given = (t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value))
        with torch.autocast(kind, enabled=False):
            return function(*given, *args, **kwargs)

    return cast(Attention, wrapper)


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
@_cast_under_autocast
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
            head_dim]``, ``value`` ``[batch, kv_heads, seq_k, value_dim]``; fp16, bf16, fp32 or fp64.
        attn_mask: broadcastable to ``[batch, heads, seq_q, seq_k]``; bool, True = attend, or float (fp32 or
            query's dtype), added to the scores, where -inf masks. A float mask may need a gradient.
        dropout_p: probability of dropping a weight. Always acts: pass 0 in evaluation.
        is_causal: query ``i`` sees keys ``j <= i`` (aligned top left, as in PyTorch).
        scale: ``1 / sqrt(head_dim)`` by default.
        enable_gqa: ``heads`` may be a multiple of ``kv_heads``.
        key_padding_mask: bool ``[batch, seq_k]``, True = a real key. It is never expanded over queries,
            unless it meets another mask that has them.
        window_size: ``(left, right)`` keys around the query's own (aligned bottom right, as in
            FlashAttention); -1 leaves a side open.
        return_lse: also return the natural log-sum-exp of the scores, fp32 ``[batch, heads, seq_q]`` (fp64
            for fp64 inputs).

    Returns:
        ``[batch, heads, seq_q, value_dim]`` in query's dtype, or ``(output, lse)``.

    Raises:
        ValueError: naming everything that is wrong with the arguments.
        pyaccel.dispatch.NotSupportedError: the backend asked for can't serve this call.

    The torch backend is ``F.scaled_dot_product_attention``. With dropout, or where the LSE is asked for, it
    is two matrix products and an fp32 softmax, which hold the ``[batch, heads, seq_q, seq_k]`` weights in
    memory: PyTorch's own kernels neither take our dropout mask nor return the LSE through a public function.
    """
    op = "scaled_dot_product_attention"
    dispatch.invalid(
        op,
        not_supported_reasons(
            query, key, value, attn_mask, dropout_p, enable_gqa, key_padding_mask, window_size
        ),
    )
    backend = dispatch.choose(op, BACKENDS).backend
    seed = dropout_key(query.device) if dropout_p > 0.0 else None
    if key_padding_mask is not None and not torch_backend.may_hold(~key_padding_mask):
        key_padding_mask = None
    if backend == "torch" and seed is None and not return_lse:
        if is_causal and attn_mask is None and key_padding_mask is None and window_size is None:
            return torch_backend.sdpa(query, key, value, None, None, scale, is_causal=True)
        allowed, bias = reference.combine_masks(
            query, key, attn_mask, key_padding_mask, is_causal, window_size
        )
        return torch_backend.sdpa(query, key, value, allowed, bias, scale)
    return cast(
        "Tensor | tuple[Tensor, Tensor]",
        reference.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            key_padding_mask=key_padding_mask,
            window_size=window_size,
            dropout_key=seed,
            return_lse=return_lse,
            upcast=False,
        ),
    )


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
@_cast_under_autocast
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

    On CPUs the torch backend calls ``F.scaled_dot_product_attention`` once for each run of neighbouring
    sequences of equal lengths (so sort a batch by length), on views of the packed tensors. Elsewhere, and
    under ``torch.compile``, it pads to ``[batch, heads, max_seqlen, head_dim]`` on the device, with no host
    sync.
    """
    op = "varlen_attention"
    dispatch.invalid(
        op,
        varlen_not_supported_reasons(
            query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, window_size
        ),
    )
    backend = dispatch.choose(op, BACKENDS).backend
    seed = dropout_key(query.device) if dropout_p > 0.0 else None
    if backend == "torch" and not torch_backend.on_host(query):
        return torch_backend.varlen_padded(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            is_causal,
            scale,
            window_size,
            dropout_p,
            seed,
            return_lse,
        )
    lens_q = lens_k = _lengths("q", cu_seqlens_q, query.shape[0], max_seqlen_q)
    if cu_seqlens_k is not cu_seqlens_q or (key.shape[0], max_seqlen_k) != (query.shape[0], max_seqlen_q):
        lens_k = _lengths("k", cu_seqlens_k, key.shape[0], max_seqlen_k)
    if backend == "torch" and seed is None and not return_lse:
        return torch_backend.varlen_by_group(query, key, value, lens_q, lens_k, is_causal, scale, window_size)
    return reference.varlen_attention(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        window_size=window_size,
        dropout_key=seed,
        return_lse=return_lse,
        upcast=False,
    )


# --- arguments ---------------------------------------------------------------------------------------------


def not_supported_reasons(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    key_padding_mask: Tensor | None = None,
    window_size: Window | None = None,
) -> list[str]:
    """Why :func:`scaled_dot_product_attention` can't take these arguments; empty if it can."""
    reasons = _qkv_reasons(query, key, value, "[batch, heads, seq, head_dim]")
    reasons += dropout_reasons(dropout_p) + _window_reasons(window_size)
    if any(t.dim() != 4 for t in (query, key, value)):
        return reasons
    batch, heads, seq_q, _ = query.shape
    seq_k = key.shape[2]
    if key.shape[0] != batch:
        reasons.append(f"query has batch {batch}, key {key.shape[0]}")
    if heads != key.shape[1] and not enable_gqa:
        reasons.append(f"query has {heads} heads, key {key.shape[1]}: pass enable_gqa=True if that is meant")
    if attn_mask is not None:
        shape = tuple(attn_mask.shape)
        full = (batch, heads, seq_q, seq_k)
        if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
            reasons.append(
                f"attn_mask must be bool (True = attend), or float32 or query's {query.dtype} (added to the "
                f"scores), got {attn_mask.dtype}"
            )
        if len(shape) > 4 or any(m not in (1, n) for m, n in zip(shape[::-1], full[::-1], strict=False)):
            reasons.append(f"attn_mask {shape} can't be broadcast to [batch, heads, seq_q, seq_k] = {full}")
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool:
            reasons.append(
                f"key_padding_mask must be bool, True = a real key, got {key_padding_mask.dtype}: use .bool()"
            )
        if tuple(key_padding_mask.shape) != (batch, seq_k):
            shape = tuple(key_padding_mask.shape)
            reasons.append(f"key_padding_mask must be [batch, seq_k] = {(batch, seq_k)}, got {shape}")
    for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
        if mask is not None and mask.device != query.device:
            reasons.append(f"{name} is on {mask.device}, query on {query.device}")
    return reasons


def varlen_not_supported_reasons(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    window_size: Window | None = None,
) -> list[str]:
    """Why :func:`varlen_attention` can't take these arguments, by shapes and dtypes; empty if it can."""
    reasons = _qkv_reasons(query, key, value, "[total_tokens, heads, head_dim]")
    reasons += dropout_reasons(dropout_p) + _window_reasons(window_size)
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.dtype != torch.int32 or cu.dim() != 1 or len(cu) == 0:
            reasons.append(f"{name} must be int32 [batch + 1], got {cu.dtype} {tuple(cu.shape)}")
        if cu.device != query.device:
            reasons.append(f"{name} is on {cu.device}, query on {query.device}")
    q_shape, k_shape = tuple(cu_seqlens_q.shape), tuple(cu_seqlens_k.shape)
    if q_shape != k_shape:
        got = f"{q_shape} and {k_shape}"
        reasons.append(f"cu_seqlens_q and cu_seqlens_k must count the same sequences, got {got}")
    if max_seqlen_q < 0 or max_seqlen_k < 0:
        reasons.append(
            f"max_seqlen_q and max_seqlen_k must not be negative, got {max_seqlen_q}, {max_seqlen_k}"
        )
    return reasons


def _qkv_reasons(query: Tensor, key: Tensor, value: Tensor, layout: str) -> list[str]:
    reasons = []
    dtype, device = query.dtype, query.device
    if not (dtype == key.dtype == value.dtype and dtype in DTYPES):
        got = f"{dtype}, {key.dtype}, {value.dtype}"
        reasons.append(f"query, key and value must share one dtype, fp16, bf16, fp32 or fp64; got {got}")
    if not device == key.device == value.device:
        got = f"{device}, {key.device}, {value.device}"
        reasons.append(f"query, key and value must be on one device, got {got}")
    q_shape, k_shape, v_shape = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    if not len(q_shape) == len(k_shape) == len(v_shape) == layout.count(",") + 1:
        return [*reasons, f"query, key and value must be {layout}, got {q_shape}, {k_shape}, {v_shape}"]
    heads, kv_heads, head_dim = q_shape[1], k_shape[1], q_shape[-1]
    if not (heads and kv_heads and head_dim):
        reasons.append(f"there must be a head and head_dim must not be 0, got query {q_shape}")
    elif heads % kv_heads:
        reasons.append(f"query's {heads} heads must be a multiple of key's {kv_heads}")
    if k_shape[-1] != head_dim:
        reasons.append(f"query has head_dim {head_dim}, key {k_shape[-1]}")
    if v_shape[:-1] != k_shape[:-1]:
        reasons.append(f"value {v_shape} must match key {k_shape} in all but the last dimension")
    return reasons


def _window_reasons(window_size: Window | None) -> list[str]:
    if window_size is not None and (len(window_size) != 2 or min(window_size) < -1):
        return [f"window_size must be (left, right), each -1 or more, got {window_size}"]
    return []


def _lengths(name: str, cu_seqlens: Tensor, total: int, max_seqlen: int) -> list[int]:
    """Sequence lengths, from offsets that are checked on the way."""
    offsets = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(offsets)]
    longest = max(lengths, default=0)
    reasons = []
    if offsets[0] != 0 or min(lengths, default=0) < 0 or offsets[-1] > total:
        reasons.append(
            f"cu_seqlens_{name} must rise from 0 to at most the {total} tokens there are, got {offsets}"
        )
    if longest > max_seqlen:
        reasons.append(f"max_seqlen_{name} is {max_seqlen}, but a sequence has {longest} tokens")
    dispatch.invalid("varlen_attention", reasons)
    return lengths
