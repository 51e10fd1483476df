"""What the attention cases share: shapes, with the lengths of real batches, and the operations they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyaccel.cost.model import length_mix

TOKENS = (
    16384  # of a batch, real ones where it is packed and slots where it is padded: those of published figures
)
HEADS = ((12, 64), (16, 64), (12, 32))  # heads x head_dim of BERT-base, BERT-large and MiniLM
CPU_HEADS = ((12, 64), (12, 32))


@dataclass(frozen=True)
class Shape:
    """A batch: its lengths, what they would be padded to, and whether the gradients are computed too."""

    heads: int
    head_dim: int
    seq: int
    lengths: tuple[int, ...]
    backward: bool

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Real ones."""
        return sum(self.lengths)

    @property
    def masked(self) -> bool:
        """Whether a padded batch has any padding."""
        return min(self.lengths) < self.seq

    def flops(self, query_key_pairs: int) -> int:
        """Two products forward (the figures of FlashAttention's papers count them so), five backward."""
        forward = 4 * self.heads * self.head_dim * query_key_pairs
        return forward * 7 // 2 if self.backward else forward


def both_ways(heads: int, head_dim: int, batch: str, seq: int, lengths: tuple[int, ...]) -> dict[str, Shape]:
    """Label -> shape, forward alone and with its backward."""
    return {
        f"{heads}x{head_dim} {batch} {way}": Shape(heads, head_dim, seq, lengths, backward)
        for way, backward in (("forward", False), ("forward+backward", True))
    }


def squad(count: int) -> tuple[int, ...]:
    """Lengths of questions with their paragraph: mean 177, the longest 384."""
    return (*length_mix("squad", count - 1, 384), 384)


def sentences(count: int) -> tuple[int, ...]:
    """Lengths of sentences: mean 25, the longest 128."""
    return (*length_mix("sentences", count - 1, 128), 128)


def results(
    function: Callable[..., Any], tensors: tuple[Tensor, ...], grad: Tensor | None, *more: Any, **options: Any
) -> tuple[Tensor, ...]:
    """``function(*tensors, *more, **options)`` and, where there is a ``grad`` of it, the gradients of the tensors."""
    if grad is None:
        with torch.no_grad():
            return (function(*tensors, *more, **options),)
    out = function(*tensors, *more, **options)
    return (out, *torch.autograd.grad(out, tensors, grad))
