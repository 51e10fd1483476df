"""What is asked of the device that a call is on."""

from __future__ import annotations

import torch
from torch import Tensor


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def is_capturing() -> bool:
    """Whether what is launched now becomes part of a graph, in which nothing may wait for the device. On a GPU."""
    return torch.cuda.is_current_stream_capturing()
