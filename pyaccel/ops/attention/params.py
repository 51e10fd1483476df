"""What a call of attention says beside its query, key and value: a value, made once in the public functions."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

Window = tuple[int, int]


class CuSeqlens(NamedTuple):
    """Where the sequences of a packed batch lie.

    Attributes:
        q, k: int32 ``[sequences + 1]``, the rows between which each one's queries and keys are.
        max_q, max_k: at least the length of the longest.
    """

    q: Tensor
    k: Tensor
    max_q: int
    max_k: int


class AttentionParams(NamedTuple):
    """Valid arguments of the public functions, by their names.

    Attributes:
        dropout_key: int64 ``[2]``, of our own dropout mask; None without dropout, or where PyTorch draws its mask.
        attn_mask, key_padding_mask: of a padded batch.
        cu_seqlens: of a packed one.
    """

    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    window_size: Window | None = None
    dropout_key: Tensor | None = None
    return_lse: bool = False
    attn_mask: Tensor | None = None
    key_padding_mask: Tensor | None = None
    cu_seqlens: CuSeqlens | None = None

    @property
    def is_banded(self) -> bool:
        return self.is_causal or self.window_size is not None

    def flat(self, query: Tensor, key: Tensor) -> tuple[Any, ...]:
        """What the registered ops of :mod:`pyaccel.ops.attention.custom_ops` take after query, key and value ``[batch,
        heads, seq, dim]``."""
        attn_mask, key_mask = self._masks()
        cu = self.cu_seqlens
        return (
            attn_mask,
            key_mask,
            None if cu is None else cu.q.contiguous(),
            None if cu is None else cu.k.contiguous(),
            self.dropout_key,
            query.shape[2] if cu is None else cu.max_q,
            key.shape[2] if cu is None else cu.max_k,
            1.0 / math.sqrt(query.shape[-1]) if self.scale is None else float(self.scale),
            self.dropout_p,
            self.is_causal,
            *(self.window_size or (-1, -1)),
        )

    def _masks(self) -> tuple[Tensor | None, Tensor | None]:
        """attn_mask as 4-D, and a mask of keys ``[1 or batch, 1 or heads, seq_k]``: what is known by key is read by
        key."""
        attn_mask = self.attn_mask
        key_mask = None if self.key_padding_mask is None else self.key_padding_mask[:, None]
        if attn_mask is None:
            return None, key_mask
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        by_key = attn_mask.shape[2] == 1 or attn_mask.stride(2) == 0
        if attn_mask.dtype is not torch.bool or not by_key:
            return attn_mask, key_mask
        keys = attn_mask[:, :, 0]
        return None, keys if key_mask is None else keys & key_mask
