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
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch
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
    if key_padding_mask is not None and not _may_hold(~key_padding_mask):
        key_padding_mask = None
    if backend == "torch" and seed is None and not return_lse:
        if is_causal and attn_mask is None and key_padding_mask is None and window_size is None:
            return _sdpa(query, key, value, None, None, scale, is_causal=True)
        allowed, bias = reference.combine_masks(
            query, key, attn_mask, key_padding_mask, is_causal, window_size
        )
        return _sdpa(query, key, value, allowed, bias, scale)
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
    if backend == "torch" and not _on_host(query):
        return _varlen_padded(
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
        return _varlen_by_group(query, key, value, lens_q, lens_k, is_causal, scale, window_size)
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


def _on_host(x: Tensor) -> bool:
    """Whether reading a value of ``x`` costs neither a device sync nor a graph break."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _may_hold(condition: Tensor) -> bool:
    """False only where it is known, at next to no cost, that ``condition`` holds nowhere."""
    return not _on_host(condition) or bool(condition.any())


# --- the torch backend, padded ------------------------------------------------------------------------------


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    *,
    is_causal: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention``, made safe for what a mask leaves unread.

    Args:
        allowed, bias: from :func:`pyaccel.reference.attention.combine_masks`.
        is_causal: in place of the two.
    """
    # By a branch: in a graph with dynamic shapes the comparison itself isn't the bool that PyTorch wants.
    gqa = True if query.shape[1] != key.shape[1] else False  # noqa: SIM210
    if allowed is None:
        if is_causal:  # keys that no query sees may hold anything
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=scale, enable_gqa=gqa
        )
    if gqa and allowed.shape[1] > 1:  # whether a key is read then differs between the heads that share it
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        gqa = False
    # PyTorch multiplies what is masked by 0, which makes NaN of NaN and inf; and what its backends make of a
    # row without keys differs. So unread keys are cleared, and an unread query sees all and is cleared later.
    idle_rows, idle_keys = reference.unread(allowed)
    has_idle_rows = _may_hold(idle_rows)
    key, value = _cleared(key, idle_keys), _cleared(value, idle_keys)
    if has_idle_rows:
        query = _cleared(query, idle_rows)
    if bias is None:
        mask = allowed | idle_rows if has_idle_rows else allowed
    else:
        if query.device.type != "cpu" and bias.dtype != query.dtype:
            # A GPU's kernels want query's dtype. A huge negative number must not become -inf, which masks.
            bias = bias.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
        mask = bias.masked_fill(~allowed, -math.inf).masked_fill(idle_rows, 0.0)
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=gqa)
    return out.masked_fill(idle_rows, 0.0) if has_idle_rows else out


def _cleared(x: Tensor, idle: Tensor) -> Tensor:
    """``x`` with 0 where ``idle``; ``x`` itself where it is known to be finite and so can't leak anything."""
    # A sum is finite only if all of x is; on a CPU it takes a thirtieth (fp32) of the time of masked_fill.
    if _on_host(x) and math.isfinite(x.detach().sum().item()):
        return x
    return x.masked_fill(idle, 0.0)


# --- the torch backend, packed, on the host -----------------------------------------------------------------

# Lengths at which two batched products and a softmax beat PyTorch's flash kernel in bf16 on a CPU (two cores
# with AVX512_BF16, head_dim 32 and 64): 1.05 times as fast at 64, 1.5 at 96, 1.8 at 128, 2 at 256, 2.2 to 2.6
# at 512; 1.5 to 1.7 on a batch of 20 to 256 tokens. Below 64 they are slower (0.2 to 0.6). The scores are
# rounded to bf16, as in Hugging Face's eager attention: twice flash's RMS error, inside the numerics policy.
# Beyond 1024 scores and weights would take over 48 MB at 12 heads. In fp32 flash stays.
_BF16_MATMUL_LENGTHS = range(96, 1025)


def _varlen_by_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lens_q: list[int],
    lens_k: list[int],
    is_causal: bool,
    scale: float | None,
    window_size: Window | None,
) -> Tensor:
    """One call for each run of neighbouring sequences of equal lengths, on views; one copy, of the result."""
    heads, kv_heads, value_dim = query.shape[1], key.shape[1], value.shape[2]
    pairs = zip(lens_q, lens_k, strict=True)
    groups = [(len_q, len_k, len(list(run))) for (len_q, len_k), run in itertools.groupby(pairs)]
    # split, not a slice for each group: its backward is one concatenation, a slice's a full-size tensor.
    *queries, rest = _split(query, [len_q * count for len_q, _, count in groups])
    *keys, _ = _split(key, [len_k * count for _, len_k, count in groups])
    *values, _ = _split(value, [len_k * count for _, len_k, count in groups])
    recording = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    by_matmul = {
        (len_q, len_k)
        for len_q, len_k, _ in groups
        if len_q in _BF16_MATMUL_LENGTHS and len_k in _BF16_MATMUL_LENGTHS
        if query.dtype == torch.bfloat16 and heads == kv_heads and not recording
        if not is_causal and window_size is None
    }
    # One buffer for all of a call: malloc gives blocks of this size back, and faults every page in anew.
    scratch = query.new_empty(2, heads * max((len_q * len_k for len_q, len_k in by_matmul), default=0))
    parts = []
    for (len_q, len_k, count), q, k, v in zip(groups, queries, keys, values, strict=True):
        if len_q == 0 or len_k == 0:
            parts.append(reference.zero_output(q, value_dim))
        elif (len_q, len_k) in by_matmul:
            sequences = zip(q.split(len_q), k.split(len_k), v.split(len_k), strict=True)
            parts.extend(_bf16_matmul_attention(*sequence, scale, scratch) for sequence in sequences)
        else:
            q = q.view(count, len_q, heads, -1).transpose(1, 2)
            k = k.view(count, len_k, kv_heads, -1).transpose(1, 2)
            v = v.view(count, len_k, kv_heads, value_dim).transpose(1, 2)
            if window_size is None:
                out = _sdpa(q, k, v, None, None, scale, is_causal=is_causal)
            else:
                out = _sdpa(
                    q, k, v, *reference.combine_masks(q, k, None, None, is_causal, window_size), scale
                )
            # The flash kernel lays its result out as [batch, seq, heads, head_dim], so this is a view.
            parts.append(out.transpose(1, 2).reshape(count * len_q, heads, value_dim))
    if rest.shape[0] or not parts:
        parts.append(reference.zero_output(rest, value_dim))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _split(packed: Tensor, rows: list[int]) -> tuple[Tensor, ...]:
    """Runs of that many rows, and the rest."""
    return packed.split([*rows, packed.shape[0] - sum(rows)])


def _bf16_matmul_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, scratch: Tensor
) -> Tensor:
    """Attention of one sequence, ``[seq, heads, head_dim]``, without gradient; ``scratch`` is overwritten."""
    len_q, heads, head_dim = query.shape
    len_k = key.shape[0]
    scores, weights = (s[: heads * len_q * len_k].view(heads, len_q, len_k) for s in scratch)
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    q, k = query.transpose(0, 1), key.permute(1, 2, 0)
    torch.baddbmm(scores, q, k, beta=0.0, alpha=scale, out=scores)  # beta 0: what is in scratch isn't read
    torch.softmax(scores, -1, out=weights)
    return torch.bmm(weights, value.transpose(0, 1)).transpose(0, 1)


# --- the torch backend, packed, on other devices and in graphs ----------------------------------------------


def _slots(cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Packed row of each slot of the padded batch, int64 ``[batch, max_seqlen]``; whether it is in use."""
    rows = cu_seqlens[:-1, None].long() + torch.arange(max_seqlen, device=cu_seqlens.device)
    in_use = rows < cu_seqlens[1:, None]
    return rows.masked_fill(~in_use, 0), in_use


def _varlen_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float | None,
    window_size: Window | None,
    dropout_p: float,
    seed: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Pad, attend under a key mask, pack again: nothing leaves the device."""
    total, heads, _ = query.shape
    batch = cu_seqlens_q.shape[0] - 1
    if 0 in (batch, total, key.shape[0], max_seqlen_q, max_seqlen_k):
        out = reference.zero_output(query, value.shape[2])
        lse = torch.full(
            (heads, total), -math.inf, dtype=reference.lse_dtype(query.dtype), device=query.device
        )
        return (out, lse) if return_lse else out
    rows_q, real_q = _slots(cu_seqlens_q, max_seqlen_q)
    rows_k, real_k = _slots(cu_seqlens_k, max_seqlen_k)
    # Indexing, not index_select: its backward sums in a fixed order on a GPU. Unused slots repeat row 0.
    q, k, v = query[rows_q], key[rows_k], value[rows_k]  # [batch, max_seqlen, heads, head_dim]
    q = q.masked_fill(~real_q[..., None, None], 0.0)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    # A key that only unused slots would read counts as unread: what it holds must not leak.
    allowed = (real_k & real_q.any(-1, keepdim=True))[:, None, None, :]
    shift = (cu_seqlens_k.diff() - cu_seqlens_q.diff())[:, None, None, None]
    band = reference.band_mask(max_seqlen_q, max_seqlen_k, is_causal, window_size, query.device, shift)
    if band is not None:
        allowed = allowed & band & real_q[:, None, :, None]
    if seed is None and not return_lse:
        out = _sdpa(q, k, v, allowed, None, scale)
    else:
        repeats = heads // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        out, lse, _ = reference.masked_attention(
            q, k, v, allowed, None, scale, dropout_p, dropout_key=seed, return_lse=return_lse, upcast=False
        )
    tokens = torch.arange(total, device=query.device, dtype=cu_seqlens_q.dtype)
    # The number of sequences that end at a token or before it is the index of its own.
    sequence = torch.searchsorted(cu_seqlens_q[1:], tokens, right=True)
    real = sequence < batch
    sequence = sequence.clamp(max=batch - 1)
    position = (tokens - cu_seqlens_q[sequence]).masked_fill(~real, 0)
    out = out.transpose(1, 2)[sequence, position].masked_fill(~real[:, None, None], 0.0)
    if not return_lse:
        return out
    return out, lse.transpose(1, 2)[sequence, position].masked_fill(~real[:, None], -math.inf).T
