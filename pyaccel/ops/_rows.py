"""Tensors as matrices of rows."""

from __future__ import annotations

import math

from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """``[..., cols]`` as ``[rows, cols]``, without a copy where strides allow it; any size may be 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
