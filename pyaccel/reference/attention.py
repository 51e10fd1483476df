"""Scaled-dot-product attention, padded and packed, in plain torch: the definition.

Source: A. Vaswani et al., arXiv:1706.03762 (2017), section 3.2.1. Names and conventions are those of
``torch.nn.functional.scaled_dot_product_attention`` and, for ``window_size`` and the packed form, of
FlashAttention's ``flash_attn_func`` and ``flash_attn_varlen_func``.

What the masks mean, in every backend:

* A query that may attend to no key gives output 0, log-sum-exp -inf and gradient 0. So does one whose scores are all
  -inf for another reason (an infinite query, say), as in PyTorch.
* -inf in a float mask masks, and nothing else of it does: NaN and +inf are values, and make NaN of the query's row.
* A key that no query of its head may attend to is never read: NaN or inf there changes neither outputs nor
  gradients. The same goes for a query that may attend to no key.
* ``is_causal`` is aligned to the top left, as PyTorch's is: query ``i`` sees keys ``j <= i``.
* ``window_size=(left, right)`` is aligned to the bottom right, as FlashAttention's is: query ``i`` sees keys
  ``i + shift - left <= j <= i + shift + right`` with ``shift = seq_k - seq_q``; -1 leaves a side open.
  ``(-1, 0)`` is thus FlashAttention's causal. Where ``seq_q == seq_k`` the two alignments agree.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyaccel.reference.philox import keep_mask, keep_scale

Window = tuple[int, int]


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
    dropout_key: Tensor | None = None,
    return_lse: bool = False,
    return_probs: bool = False,
    upcast: bool = True,
) -> Tensor | tuple[Tensor, ...]:
    """``softmax(query @ key^T * scale + mask) @ value``.

    Args:
        query: ``[batch, heads, seq_q, head_dim]``.
        key: ``[batch, kv_heads, seq_k, head_dim]``.
        value: ``[batch, kv_heads, seq_k, value_dim]``.
        attn_mask: broadcastable to ``[batch, heads, seq_q, seq_k]``; bool, True = attend, or float, added to
            the scaled scores, where -inf masks.
        dropout_p: probability of dropping a softmax weight; always acts, there is no training flag.
        scale: ``1 / sqrt(head_dim)`` by default.
        enable_gqa: ``heads`` may be a multiple of ``kv_heads``; key head ``i`` serves the ``i``-th run of
            heads.
        key_padding_mask: bool ``[batch, seq_k]``, True = a real key.
        window_size: ``(left, right)``, see the module's text.
        dropout_key: int64 ``[2]``, needed where ``dropout_p > 0``: query index, key index and
            ``batch * heads + head`` are row, column and stream of :func:`pyaccel.reference.philox.keep_mask`.
        return_lse: also return the natural log-sum-exp of the scores, ``[batch, heads, seq_q]``, fp64 where
            ``upcast`` or the inputs are, else fp32 (in fp32 throughout, whatever the dtype).
        return_probs: also return the softmax weights before dropout, ``[batch, heads, seq_q, seq_k]``.
        upcast: True computes and returns fp64, the truth. False is what good plain PyTorch (Hugging Face's
            eager attention) does in the dtype: products in it (of fp16 in fp32, where they don't overflow),
            softmax in fp32, weights rounded to it.

    Returns:
        the output ``[batch, heads, seq_q, value_dim]``, or a tuple of it with what else was asked for.
    """
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    allowed, bias = combine_masks(query, key, attn_mask, key_padding_mask, is_causal, window_size)
    out, lse, probs = masked_attention(
        query,
        key,
        value,
        allowed,
        bias,
        scale,
        dropout_p,
        dropout_key=dropout_key,
        return_lse=return_lse,
        upcast=upcast,
    )
    extras = ([lse] if return_lse else []) + ([probs] if return_probs else [])
    return (out, *extras) if extras else out


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
    dropout_key: Tensor | None = None,
    return_lse: bool = False,
    upcast: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each sequence of a packed batch, one sequence at a time.

    Args:
        query: ``[total_q, heads, head_dim]``; ``key`` and ``value`` ``[total_k, kv_heads, ...]``, where
            ``kv_heads`` divides ``heads``.
        cu_seqlens_q, cu_seqlens_k: int ``[batch + 1]``: sequence ``i`` is rows ``cu[i]`` to ``cu[i + 1]``.
            Sequences may be empty; rows beyond the last offset belong to none, and get output 0, LSE -inf.
        max_seqlen_q, max_seqlen_k: not needed here; they keep the argument order of the op.

    Dropout's row and column are positions within the sequence, its stream is ``sequence * heads + head``. The
    other arguments are those of :func:`scaled_dot_product_attention`.

    Returns:
        the output ``[total_q, heads, value_dim]``, or ``(output, lse)`` with lse ``[heads, total_q]``.
    """
    heads, repeats = query.shape[1], query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    outs, lses = [], []
    offsets_q, offsets_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(offsets_q) - 1):
        rows, keys = slice(*offsets_q[i : i + 2]), slice(*offsets_k[i : i + 2])
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query[rows], key[keys], value[keys]))
        allowed, bias = combine_masks(q, k, None, None, is_causal, window_size)
        out, lse, _ = masked_attention(
            q,
            k,
            v,
            allowed,
            bias,
            scale,
            dropout_p,
            dropout_key=dropout_key,
            first_stream=i * heads,
            return_lse=return_lse,
            upcast=upcast,
        )
        outs.append(out.squeeze(0).transpose(0, 1))
        lses.append(lse)
    dtype = torch.float64 if upcast else query.dtype
    rest = query[offsets_q[-1] :]
    outs.append(zero_output(rest, value.shape[-1]).to(dtype))
    if not return_lse:
        return torch.cat(outs)
    return torch.cat(outs), torch.cat([*lses, no_lse(rest.to(dtype))[None]], dim=2).squeeze(0)


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
    upcast: bool = True,
) -> Tensor:
    """The softmax weights before dropout, ``exp(scores - lse)``, rebuilt from the log-sum-exp.

    Args:
        lse: ``[batch, heads, seq_q]``, as :func:`scaled_dot_product_attention` returns it for the same arguments.

    The other arguments, ``upcast`` included, are those of :func:`scaled_dot_product_attention`; the scores are
    computed in the precision of ``lse``, or the weights of a query would not add up to 1.

    Returns:
        ``[batch, heads, seq_q, seq_k]`` in query's dtype (fp64 where ``upcast``): 0 where a mask says so, and for
        queries whose LSE is -inf.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    allowed, bias = combine_masks(query, key, attn_mask, key_padding_mask, is_causal, window_size)
    dtype = torch.float64 if upcast else query.dtype
    wide = lse_dtype(dtype)
    idle_rows = (lse == -math.inf).unsqueeze(-1)
    if allowed is not None:
        no_keys, idle_keys = unread(allowed)
        idle_rows = idle_rows | no_keys
        key = key.masked_fill(idle_keys, 0.0)
    query, lse = query.masked_fill(idle_rows, 0.0), lse.unsqueeze(-1).masked_fill(idle_rows, 0.0)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    scores = (query.to(wide) @ key.to(wide).mT) * scale  # [batch, heads, seq_q, seq_k]
    if bias is not None:
        scores = scores + bias.to(wide)
    unseen = idle_rows if allowed is None else idle_rows | ~allowed
    # Before exp, which may overflow where a mask keeps the score out of the LSE: exp(-inf) has gradient 0.
    return (scores - lse.to(wide)).masked_fill(unseen, -math.inf).exp().to(dtype)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, softmax and LSE where the data has ``dtype``: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def zero_output(query: Tensor, value_dim: int) -> Tensor:
    """The output ``[rows, heads, value_dim]`` of packed queries without keys: 0, and gradient 0 for them."""
    everywhere = torch.ones((), dtype=torch.bool, device=query.device)
    return query[..., :1].masked_fill(everywhere, 0.0).repeat(1, 1, value_dim)


def no_lse(query: Tensor) -> Tensor:
    """The LSE ``[heads, rows]`` of packed queries without keys: -inf, and gradient 0 for them."""
    everywhere = torch.ones((), dtype=torch.bool, device=query.device)
    return query[..., 0].T.to(lse_dtype(query.dtype)).masked_fill(everywhere, -math.inf)


def band_mask(
    seq_q: int,
    seq_k: int,
    is_causal: bool,
    window_size: Window | None,
    device: torch.device,
    shift: int | Tensor | None = None,
) -> Tensor | None:
    """Which key each query sees by ``is_causal`` and ``window_size``, bool ``[seq_q, seq_k]``; None if all.

    Args:
        shift: ``seq_k - seq_q`` of the window; a tensor ``[batch, 1, 1, 1]`` where it differs by sequence.
    """
    left, right = window_size or (-1, -1)
    if not is_causal and left < 0 and right < 0:
        return None
    rows = torch.arange(seq_q, device=device).unsqueeze(1)
    cols = torch.arange(seq_k, device=device).unsqueeze(0)
    center = rows + (seq_k - seq_q if shift is None else shift)
    sides = []
    if is_causal:
        sides.append(cols <= rows)
    if left >= 0:
        sides.append(cols >= center - left)
    if right >= 0:
        sides.append(cols <= center + right)
    band = sides[0]
    for side in sides[1:]:
        band = band & side
    return band


def combine_masks(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window_size: Window | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Every mask as one: ``allowed`` (bool, 4-D, broadcastable to the scores) and ``bias`` (float, no -inf).

    Either is None where nothing asks for it. A key padding mask stays ``[batch, 1, 1, seq_k]``, a view.
    """
    allowed = band_mask(query.shape[2], key.shape[2], is_causal, window_size, query.device)
    if allowed is not None:
        allowed = allowed[None, None]
    if key_padding_mask is not None:
        keys = key_padding_mask[:, None, None, :]
        allowed = keys if allowed is None else allowed & keys
    bias = None
    if attn_mask is not None:
        mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        if mask.dtype != torch.bool:
            bias, mask = mask.masked_fill(mask == -math.inf, 0.0), mask != -math.inf
        allowed = mask if allowed is None else allowed & mask
    return allowed, bias


def unread(allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Queries without a key ``[.., seq_q or 1, 1]`` and keys without a query ``[.., seq_k or 1, 1]``."""
    return ~allowed.any(-1, keepdim=True), ~allowed.any(-2, keepdim=True).mT


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    dropout_p: float = 0.0,
    *,
    dropout_key: Tensor | None = None,
    first_stream: int = 0,
    return_lse: bool = False,
    upcast: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, LSE (size 0 if not asked for) and weights before dropout; equal head counts.

    ``allowed`` and ``bias`` are from :func:`combine_masks`, the rest is as above.
    """
    dtype = torch.float64 if upcast else query.dtype
    wide = lse_dtype(dtype)
    # Products of fp16 overflow: q.k before its scale, and the gradient of the weights in backward.
    narrow = wide if dtype == torch.float16 else dtype
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    if allowed is not None:
        # 0 * NaN is NaN, in the products and in their gradients, so what no one reads is cleared.
        idle_rows, idle_keys = unread(allowed)
        query = query.masked_fill(idle_rows, 0.0)
        key, value = key.masked_fill(idle_keys, 0.0), value.masked_fill(idle_keys, 0.0)
    is_rounded = narrow != dtype
    scores = _masked_scores(query.to(narrow), key.to(narrow), allowed, bias, scale, wide, is_rounded)
    # A row of -inf alone has a NaN softmax and NaN gradients: it is computed as zeros, then cleared.
    empty = (scores.detach() == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    probs = torch.softmax(scores, -1).masked_fill(empty, 0.0)
    lse = scores.new_empty(0)
    if return_lse:  # a statistic: fp32 from the first, where the output may do with the dtype's scores
        if is_rounded or narrow != wide:
            scores = _masked_scores(query.to(wide), key.to(wide), allowed, bias, scale, wide)
            scores = scores.masked_fill(empty, 0.0)
        # Its gradient is exp(scores - lse), which needs the difference exact: beside the lowest number it isn't.
        about = torch.logsumexp(scores.detach(), -1, keepdim=True).nan_to_num(0.0, 0.0, 0.0)
        lse = torch.logsumexp(scores - about, -1) + about.squeeze(-1)
        lse = lse.masked_fill(empty.squeeze(-1), -math.inf)
    weights = probs
    if dropout_p > 0.0:
        if dropout_key is None:
            raise ValueError("attention: dropout_p > 0 needs a dropout_key to replay")
        batch, heads, seq_q, seq_k = scores.shape
        rows = torch.arange(seq_q, device=query.device).unsqueeze(1)
        cols = torch.arange(seq_k, device=query.device)
        stream = first_stream + torch.arange(batch * heads, device=query.device).view(batch, heads, 1, 1)
        keep = keep_mask(dropout_key, rows, cols, dropout_p, stream)
        weights = torch.where(keep, probs * keep_scale(dropout_p), 0.0)
    weights = _InFp16.apply(weights) if is_rounded else weights.to(narrow)
    return (weights @ value.to(narrow)).to(dtype), lse, probs.to(dtype)


class _InFp16(torch.autograd.Function):
    """Rounds to fp16 what doesn't overflow there, and its gradient too: what plain fp16 products give otherwise."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        rounded = x.to(torch.float16).to(x.dtype)
        return torch.where(rounded.isfinite(), rounded, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        rounded: Tensor = _InFp16.apply(grad)
        return rounded

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        rounded: Tensor = _InFp16.apply(tangent)
        return rounded


def _masked_scores(
    query: Tensor,
    key: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    scale: float,
    wide: torch.dtype,
    is_rounded: bool = False,
) -> Tensor:
    """The scores in ``wide``, of products in query's dtype, -inf where masked: ``[batch, heads, seq_q, seq_k]``."""
    product = query @ key.mT
    scores = (_InFp16.apply(product) if is_rounded else product).to(wide) * scale
    if bias is not None:
        scores = scores + bias.to(wide)
    return scores if allowed is None else scores.masked_fill(~allowed, -math.inf)
