"""Philox4x32-10 in plain torch, and the dropout mask that every kernel of this project draws with it.

Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11 (2011). The mask depends on a
key and on logical positions alone, never on how a kernel tiles its work, so it can be rebuilt bit for bit here.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def _mul_hi_lo(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a * x`` for 32-bit values held in int64, by 16-bit halves of ``a``."""
    low_part = (a & 0xFFFF) * x
    high_part = (a >> 16) * x
    carried = high_part + (low_part >> 16)
    return carried >> 16, ((carried & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox(key: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words for each counter.

    Args:
        key: int64 scalar tensor; its low and high 32 bits are the two words of the key.
        c0, c1, c2, c3: int64, broadcastable; the low 32 bits of each are a word of the counter.

    Returns:
        four int64 tensors of values in ``[0, 2**32)``.
    """
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    c0, c1, c2, c3 = (c & _LOW for c in torch.broadcast_tensors(c0, c1, c2, c3))
    for _ in range(10):
        b_high, b_low = _mul_hi_lo(_ROUND_B, c2)
        a_high, a_low = _mul_hi_lo(_ROUND_A, c0)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = (k0 + _KEY_A) & _LOW, (k1 + _KEY_B) & _LOW
    return c0, c1, c2, c3


def drop_threshold(p: float) -> int:
    """The 32-bit word below which an element is dropped: ``round(p * 2**32)``, at most ``2**32 - 1``."""
    return min(round(p * 2**32), _LOW)


def keep_scale(p: float) -> float:
    """What kept elements are multiplied by: ``1 / (1 - p)``, and 0 where p is 1 and nothing is kept."""
    return 0.0 if p >= 1.0 else 1.0 / (1.0 - p)


def keep_mask(key: Tensor, rows: Tensor, cols: Tensor, p: float, stream: int | Tensor = 0) -> Tensor:
    """Which elements dropout keeps (True).

    Args:
        key: int64 ``[2]``, see :func:`pyaccel.ops.dropout.dropout_key`.
        rows: int64, logical row of each element (query index; row of a matrix).
        cols: int64, logical column (key index; column of a matrix); broadcastable with ``rows``.
        p: probability of dropping an element.
        stream: ``batch * heads`` index for attention, 0 elsewhere; int or broadcastable int64.

    Returns:
        bool, of the broadcast shape. Element ``(row, col)`` takes word ``col % 4`` of
        ``Philox(key[0], (col // 4, row, stream, key[1] mod 2**32))`` and is kept where that word is at least
        ``round(p * 2**32)``; where p is 1 nothing is kept.
    """
    streams = torch.as_tensor(stream, dtype=torch.int64, device=rows.device)
    rows, cols, streams = torch.broadcast_tensors(rows.long(), cols.long(), streams)
    if p >= 1.0:
        return torch.zeros_like(rows, dtype=torch.bool)
    words = torch.stack(philox(key[0], cols // 4, rows, streams, key[1] & _LOW), dim=-1)
    word = words.gather(-1, (cols % 4).unsqueeze(-1)).squeeze(-1)
    return word >= drop_threshold(p)


def dropout(x: Tensor, key: Tensor, p: float) -> Tensor:
    """Dropout of ``x`` ``[rows, columns]`` in its own dtype with the mask of :func:`keep_mask`."""
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    cols = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
    return torch.where(keep_mask(key, rows, cols, p), x * keep_scale(p), 0.0)
