"""Texts of many lengths as batches of tokens, and token states as one embedding a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices by falling length, as many at a time as have ``batch_tokens`` tokens together, but at least one.

    Neighbors have about the same length; the longest come first, so a batch that doesn't fit fails early.
    """
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and tokens + lengths[index] > batch_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += lengths[index]
    if batch:
        yield batch


def padded(ids: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """int64 ``[batch, longest]`` of the token ids, ``pad`` behind each text, and their bool mask of real tokens."""
    lengths = torch.tensor([len(each) for each in ids])
    input_ids = torch.full((len(ids), max(1, int(lengths.max()))), pad)
    for row, each in zip(input_ids, ids, strict=True):
        row[: len(each)] = torch.tensor(each)
    return input_ids, torch.arange(input_ids.shape[1]) < lengths.unsqueeze(1)


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings ``[batch, hidden]``: the mean of the real tokens' states, in the states' dtype.

    Args:
        states: ``[batch, seq, hidden]``.
        mask: bool or integer ``[batch, seq]``, nonzero for real tokens; a text without any gives zeros.
    """
    return (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
