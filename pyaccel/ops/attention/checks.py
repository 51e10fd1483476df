"""What attention's arguments may be: every reason why they can't, and the one form that backends take them in.

Nothing here reads a value of a tensor, and nothing fails on odd ranks or types: each is a reason of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyaccel.ops.attention.params import Window
from pyaccel.ops.dropout import dropout_reasons

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NUMBER = (int, float, torch.SymInt, torch.SymFloat)
Shape = tuple[int, ...]
Scores = tuple[int | None, ...]  # [batch, heads, seq_q, seq_k], None where arguments contradict each other


def padded_reasons(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
    key_padding_mask: Tensor | None,
    window_size: Window | None,
) -> list[str]:
    """Why ``scaled_dot_product_attention`` can't take these arguments; empty if it can."""
    reasons = _option_reasons(dropout_p, scale, window_size)
    if odd := _tensor_reasons(query=query, key=key, value=value):
        return odd + reasons
    reasons += _dtype_and_device_reasons(query, key, value)
    wrong, scores = _padded_shapes((tuple(query.shape), tuple(key.shape), tuple(value.shape)), enable_gqa)
    if attn_mask is None and key_padding_mask is None:
        return reasons + wrong
    return reasons + wrong + _mask_reasons(query, attn_mask, key_padding_mask, scores)


def probs_reasons(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    key_padding_mask: Tensor | None,
    window_size: Window | None,
) -> list[str]:
    """Why ``attention_probs`` can't take these arguments; empty if it can."""
    reasons = _option_reasons(0.0, scale, window_size)
    if odd := _tensor_reasons(query=query, key=key, lse=lse):
        return odd + reasons
    reasons += _dtype_and_device_reasons(query, key)
    wrong, scores = _padded_shapes((tuple(query.shape), tuple(key.shape)), enable_gqa)
    reasons += wrong
    wide = torch.promote_types(query.dtype, torch.float32) if query.dtype in DTYPES else torch.float32
    if lse.dtype != wide:
        reasons.append(f"lse must be {wide}, as scaled_dot_product_attention returns it, got {lse.dtype}")
    rank = max(query.dim(), key.dim())
    expected = scores[4 - rank : -1]
    if None not in scores and tuple(lse.shape) != expected:
        reasons.append(f"lse must be [batch, heads, seq_q] = {expected}, got {tuple(lse.shape)}")
    if lse.device != query.device:
        reasons.append(f"lse is on {lse.device}, query on {query.device}")
    return reasons + _mask_reasons(query, attn_mask, key_padding_mask, scores)


def packed_reasons(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    scale: float | None,
    window_size: Window | None,
) -> list[str]:
    """Why ``varlen_attention`` can't take these arguments, by shapes and dtypes; empty if it can."""
    reasons = _option_reasons(dropout_p, scale, window_size)
    offsets = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    if odd := _tensor_reasons(query=query, key=key, value=value, **offsets):
        return odd + reasons
    reasons += _dtype_and_device_reasons(query, key, value)
    reasons += _packed_shape_reasons(tuple(query.shape), tuple(key.shape), tuple(value.shape))
    for name, cu in offsets.items():
        if cu.dtype != torch.int32 or cu.dim() != 1 or cu.shape[0] == 0:
            reasons.append(f"{name} must be int32 [batch + 1], got {cu.dtype} {tuple(cu.shape)}")
        if cu.device != query.device:
            reasons.append(f"{name} is on {cu.device}, query on {query.device}")
    q_shape, k_shape = tuple(cu_seqlens_q.shape), tuple(cu_seqlens_k.shape)
    if q_shape != k_shape:
        got = f"{q_shape} and {k_shape}"
        reasons.append(f"cu_seqlens_q and cu_seqlens_k must count the same sequences, got {got}")
    lengths = (max_seqlen_q, max_seqlen_k)
    if not all(isinstance(n, (int, torch.SymInt)) for n in lengths):
        reasons.append(f"max_seqlen_q and max_seqlen_k must be of type int, got {_types(*lengths)}")
    elif max_seqlen_q < 0 or max_seqlen_k < 0:
        reasons.append(
            f"max_seqlen_q and max_seqlen_k must not be negative, got {max_seqlen_q}, {max_seqlen_k}"
        )
    return reasons


def _types(*values: object) -> str:
    return ", ".join(type(value).__name__ for value in values)


def _tensor_reasons(**given: Any) -> list[str]:
    reasons = []
    for name, t in given.items():
        if not isinstance(t, Tensor):
            reasons.append(f"{name} must be a tensor, got {_types(t)}")
        elif t.is_nested or t.layout is not torch.strided:
            reasons.append(f"{name} must be a dense tensor, got one that is nested or {t.layout}")
    return reasons


def _option_reasons(dropout_p: float, scale: float | None, window_size: Window | None) -> list[str]:
    reasons = []
    if isinstance(dropout_p, NUMBER):
        reasons = dropout_reasons(dropout_p)
    else:
        reasons.append(f"dropout_p must be a number, got {_types(dropout_p)}")
    if scale is not None and not isinstance(scale, NUMBER):
        reasons.append(f"scale must be a number or None, got {_types(scale)}")
    if window_size is not None and not (
        isinstance(window_size, (tuple, list))
        and len(window_size) == 2
        and all(isinstance(side, (int, torch.SymInt)) and side >= -1 for side in window_size)
    ):
        reasons.append(f"window_size must be (left, right), each -1 or more, got {window_size}")
    return reasons


def _names(values: tuple[Any, ...]) -> str:
    return "query, key and value" if len(values) == 3 else "query and key"


def _dtype_and_device_reasons(*tensors: Tensor) -> list[str]:
    """Of query, key and, if there is one, value."""
    first, key, last = tensors[0], tensors[1], tensors[-1]
    reasons = []
    if not (first.dtype == key.dtype == last.dtype and first.dtype in DTYPES):
        got = ", ".join(f"{t.dtype}" for t in tensors)
        reasons.append(f"{_names(tensors)} must share one dtype, fp16, bf16, fp32 or fp64; got {got}")
    if not first.device == key.device == last.device:
        got = ", ".join(f"{t.device}" for t in tensors)
        reasons.append(f"{_names(tensors)} must be on one device, got {got}")
    return reasons


def _broadcast(*sizes: int) -> int | None:
    """The one size other than 1 (1 if there is none); None where there are several."""
    n = 1
    for size in sizes:
        if size != 1:
            if n not in (1, size):
                return None
            n = size
    return n


def _listed(shapes: tuple[Shape, ...]) -> str:
    return ", ".join(
        f"{shape}" for shape in shapes
    )  # for errors alone: a graph with dynamic sizes can't have it


def _padded_shapes(shapes: tuple[Shape, ...], enable_gqa: bool) -> tuple[list[str], Scores]:
    """What is wrong with the shapes of query, key and, if there is one, value; and the shape of the scores."""
    q, k, v = shapes if len(shapes) == 3 else (*shapes, shapes[1])
    is_4d = len(q) == len(k) == len(v) == 4
    if is_4d and q[:2] == k[:2] == v[:2] and q[3] == k[3] and k[2:3] == v[2:3] and 0 not in q[1::2]:
        return [], (*q[:3], k[2])  # what nearly every call is
    names = _names(shapes)
    reasons = []
    if not all(2 <= len(shape) <= 4 for shape in shapes):
        reasons.append(
            f"{names} must be [batch, heads, seq, head_dim], [heads, seq, head_dim] or [seq, head_dim], "
            f"got {_listed(shapes)}"
        )
        if not all(shape[1:] for shape in shapes):  # a rank below 2: there is no sequence to speak of
            return reasons, (None,) * 4
    q, k, v = ((1,) * (4 - len(shape)) + shape[-4:] for shape in (q, k, v))
    batch = _broadcast(q[0], k[0], v[0])
    if batch is None:
        reasons.append(f"the batch sizes of {names} must be equal or 1, got {_listed(shapes)}")
    heads: int | None = q[1]
    divides = 0 not in (k[1], v[1]) and q[1] % k[1] == q[1] % v[1] == 0
    if 0 in (q[1], k[1], v[1], q[3]):
        reasons.append(f"there must be a head and head_dim must not be 0, got {_listed(shapes)}")
        heads = None
    elif enable_gqa and not (divides or q[1] == k[1] == v[1]):
        reasons.append(f"query's {q[1]} heads must be a multiple of key's {k[1]} (value: {v[1]})")
        heads = None
    elif not enable_gqa:
        heads = _broadcast(q[1], k[1], v[1])
        if heads is None:
            hint = "pass enable_gqa=True if that is meant" if divides else "they must be equal, or 1"
            reasons.append(f"query has {q[1]} heads, key {k[1]}, value {v[1]}: {hint}")
    if k[3] != q[3]:
        reasons.append(f"query has head_dim {q[3]}, key {k[3]}")
    if v[2] != k[2]:
        reasons.append(f"value {shapes[-1]} must match key {shapes[1]} in seq")
    return reasons, (batch, heads, q[2], k[2])


def _mask_reasons(
    query: Tensor, attn_mask: Any, key_padding_mask: Tensor | None, scores: Scores
) -> list[str]:
    reasons = []
    if attn_mask is not None:
        if odd := _tensor_reasons(attn_mask=attn_mask):
            reasons += odd
        elif is_causal_bias(attn_mask):
            shape = (attn_mask.seq_len_q, attn_mask.seq_len_kv)
            if not _is(shape, scores[2:]):
                reasons.append(f"attn_mask is a CausalBias of {shape}, seq_q and seq_k are {scores[2:]}")
        else:
            reasons += _attn_mask_reasons(query, attn_mask, scores)
    if key_padding_mask is not None:
        if odd := _tensor_reasons(key_padding_mask=key_padding_mask):
            return reasons + odd
        if key_padding_mask.dtype != torch.bool:
            reasons.append(
                f"key_padding_mask must be bool, True = a real key, got {key_padding_mask.dtype}: use .bool()"
            )
        expected = (scores[0], scores[3])
        if not _is(tuple(key_padding_mask.shape), expected):
            got = tuple(key_padding_mask.shape)
            reasons.append(f"key_padding_mask must be [batch, seq_k] = {expected}, got {got}")
        if key_padding_mask.device != query.device:
            reasons.append(f"key_padding_mask is on {key_padding_mask.device}, query on {query.device}")
    return reasons


def _attn_mask_reasons(query: Tensor, attn_mask: Tensor, scores: Scores) -> list[str]:
    reasons = []
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        reasons.append(
            f"attn_mask must be bool (True = attend), or float32 or query's {query.dtype} (added to the "
            f"scores), got {attn_mask.dtype}"
        )
    shape = tuple(attn_mask.shape)
    if len(shape) > 4 or any(
        n is not None and m not in (1, n) for m, n in zip(shape[::-1], scores[::-1], strict=False)
    ):
        reasons.append(f"attn_mask {shape} can't be broadcast to [batch, heads, seq_q, seq_k] = {scores}")
    if attn_mask.device != query.device:
        reasons.append(f"attn_mask is on {attn_mask.device}, query on {query.device}")
    return reasons


def _is(shape: Shape, expected: Scores) -> bool:
    """Whether they are equal as far as the latter is known."""
    return shape == expected or (
        len(shape) == len(expected) and all(n is None or m == n for m, n in zip(shape, expected, strict=True))
    )


def _packed_shape_reasons(q: Shape, k: Shape, v: Shape) -> list[str]:
    if not len(q) == len(k) == len(v) == 3:
        return [f"query, key and value must be [total_tokens, heads, head_dim], got {q}, {k}, {v}"]
    reasons = []
    if not (q[1] and k[1] and q[2]):
        reasons.append(f"there must be a head and head_dim must not be 0, got query {q}")
    elif q[1] % k[1]:
        reasons.append(f"query's {q[1]} heads must be a multiple of key's {k[1]}")
    if k[2] != q[2]:
        reasons.append(f"query has head_dim {q[2]}, key {k[2]}")
    if v[:2] != k[:2]:
        reasons.append(f"value {v} must match key {k} in all but the last dimension")
    return reasons


# --- one form for the backends ------------------------------------------------------------------------------


def padded_views(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Valid arguments as 4-D tensors of one batch size; one count of key and value heads divides query's.

    Missing dimensions are put in front and dimensions of size 1 expanded, both as views. Key and value that share
    one head keep one. Only key and value of different head counts, neither of them 1, are copied.
    """
    q, k, v = query.shape, key.shape, value.shape
    if len(q) == len(k) == len(v) == 4 and q[0] == k[0] == v[0] and q[1] >= k[1] == v[1]:
        return query, key, value
    query, key, value = (t if t.dim() == 4 else t[(None,) * (4 - t.dim())] for t in (query, key, value))
    batch = _broadcast(query.shape[0], key.shape[0], value.shape[0])
    assert batch is not None  # the arguments are valid
    heads = max(query.shape[1], key.shape[1], value.shape[1])
    if key.shape[1] != value.shape[1]:
        key, value = _repeat_heads(key, heads), _repeat_heads(value, heads)
    query = _repeat_heads(query, heads)
    query, key, value = (
        t if t.shape[0] == batch else t.expand(batch, -1, -1, -1) for t in (query, key, value)
    )
    return query, key, value


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    if x.shape[1] == heads:
        return x
    return x.expand(-1, heads, -1, -1) if x.shape[1] == 1 else x.repeat_interleave(heads // x.shape[1], 1)


def is_causal_bias(attn_mask: Any) -> bool:
    """Whether it is a ``torch.nn.attention.bias.CausalBias``: a tensor in name only, whose memory means nothing.

    By name, since importing that module takes a second.
    """
    return type(attn_mask).__module__ == "torch.nn.attention.bias"


def without_causal_bias(
    attn_mask: Any, is_causal: bool, window_size: Window | None
) -> tuple[Tensor | None, bool, Window | None]:
    """The same masks, with a ``CausalBias`` said by ``is_causal`` or ``window_size``."""
    if attn_mask is None or not is_causal_bias(attn_mask):
        return attn_mask, is_causal, window_size
    if attn_mask.variant.name == "UPPER_LEFT":
        return None, True, window_size
    left = -1 if window_size is None else window_size[0]
    return None, is_causal, (left, 0)  # lower right: j <= i + seq_k - seq_q, of any window the left half
