"""The one allocator of tensor descriptors, which Hopper's copy engine reads."""

from __future__ import annotations

import contextvars
from collections.abc import Callable

import torch
import triton


def launch(run: Callable[[], object], *, allocates: bool) -> None:
    """Launch a kernel that, where it ``allocates``, makes tensor descriptors itself, in memory that Triton asks for.

    Triton's allocator is a context variable. It is set in a copy of the context: the caller's own stays what it was.
    """
    if not allocates:
        run()
        return

    def with_allocator() -> None:
        triton.set_allocator(_allocate)
        run()

    contextvars.copy_context().run(with_allocator)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
