"""A pytest plugin for PyTorch's own tests: F.scaled_dot_product_attention is pyaccel's."""

from __future__ import annotations

from typing import Any

import torch

from pyaccel import ops


def pytest_configure(config: Any) -> None:
    torch.nn.functional.scaled_dot_product_attention = ops.scaled_dot_product_attention
