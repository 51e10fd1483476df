"""The dropout key: what makes a dropout mask reproducible, on the device and without a host sync."""

from __future__ import annotations

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
