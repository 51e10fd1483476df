"""The dropout key: what makes a dropout mask reproducible, on the device and without a host sync."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def dropout_key(device: torch.device) -> torch.Tensor:
    """Draw a Philox key, int64 ``[2]``, from torch's own generator of ``device``.

    Because the key comes out of that generator, ``torch.manual_seed``, activation checkpointing (which
    restores the generator's state) and ``torch.compile`` reproduce the mask. See
    :func:`pyaccel.reference.philox.keep_mask` for the mask that a key stands for.
    """
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)


def dropout_reasons(dropout_p: float) -> list[str]:
    """Why ``dropout_p`` is not a probability; empty if it is."""
    if not 0.0 <= dropout_p <= 1.0:
        return [f"dropout_p must be between 0 and 1, got {dropout_p}"]
    return []


def keep_mask_on_host(shape: Sequence[int], dropout_p: float) -> torch.Tensor:
    """Draw what dropout keeps: bool of that shape on the CPU, each True with probability ``1 - dropout_p``.

    ``dropout_p``, below 1, is rounded to a multiple of 2^-15: two elements share one draw of torch's generator, which
    takes a quarter of the time of ``Tensor.bernoulli_``. The mask that GPUs draw
    (:func:`pyaccel.reference.philox.keep_mask`) would take many times as long in PyTorch ops.
    """
    count = math.prod(shape)
    # 31 random bits, moved up by one: the upper half has 16 of them, the lower one 15 and a zero.
    draws = torch.empty((count + 1) // 2, dtype=torch.int32, device="cpu").random_().bitwise_left_shift_(1)
    dropped = round(dropout_p * 2**15)
    keep: torch.Tensor = draws.view(torch.int16)[:count] >= min(2 * dropped - 2**15, 2**15 - 1)
    return keep.view(tuple(shape))
