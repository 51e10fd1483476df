"""Random choices of one case, and tensors that hide nothing: odd strides, NaN around them, values at the edges."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 33)
# What no view of a buffer shows. Whoever reads it computes nonsense, and whoever writes to it is found out.
FILL = {torch.bool: True, torch.int8: 113, torch.int32: 2**30, torch.int64: 2**40}
GUARD = 40
KINDS = ("constant rows", "tiny variance", "zeros", "negative zeros", "denormals", "huge", "one large row")


class Draw:
    """A source of random choices that gives the same ones for the same lane, seed and case."""

    def __init__(self, lane: str, seed: int, case: int) -> None:
        self.random = random.Random(f"{lane} {seed} {case}")
        self.torch = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.buffers: list[tuple[str, Tensor, Tensor]] = []

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def pick(self, *options: T) -> T:
        return self.random.choice(options)

    def size(self, empty: float = 0.02) -> int:
        """A size: 1, odd, prime, powers of two; 0 with probability ``empty``."""
        return 0 if self.chance(empty) else self.random.choice(SIZES)

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.torch)

    def integers(self, low: int, high: int, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers in ``[low, high)``."""
        return torch.randint(low, high, tuple(shape), generator=self.torch, dtype=dtype)

    def booleans(self, shape: Sequence[int], p: float) -> Tensor:
        return torch.rand(tuple(shape), generator=self.torch) < p

    def values(
        self, shape: Sequence[int], dtype: torch.dtype, *, kind: str = "", scale: float = 1.0
    ) -> Tensor:
        """Floating values of that kind, one of :data:`KINDS`, or random ones around a mean that isn't 0."""
        x = self.normal(shape) * scale + self.random.choice((0.0, 0.3, -0.5)) * scale
        rows = (*tuple(shape)[:-1], 1) if len(shape) else ()
        if kind == "constant rows":
            x = (self.normal(rows) * 30).expand(tuple(shape)).clone()
        elif kind == "tiny variance":
            x = x * 1e-3 + self.normal(rows) * 5
        elif kind == "zeros":
            x = torch.zeros_like(x)
        elif kind == "negative zeros":
            x = torch.where(self.booleans(shape, 0.5), x, -0.0)
        elif kind == "denormals":
            x = x * (1e-39 if dtype != torch.float16 else 1e-6)
        elif kind == "huge":
            x = x * (2e3 if dtype == torch.float16 else 1e9)
        elif kind == "one large row":
            x = x * torch.where(self.booleans(rows, 0.2), 300.0, 1.0)
        return x.to(dtype)

    def spoiled(self, x: Tensor) -> Tensor:
        """``x`` with NaN or an infinity in a few places."""
        where = self.booleans(x.shape, min(1.0, 1.5 / max(x.numel(), 1)))
        return x.masked_fill(where, self.random.choice((math.nan, math.inf, -math.inf)))

    def place(self, name: str, x: Tensor) -> Tensor:
        """``x`` in memory of its own with strides by chance: permuted, stepped, expanded, offset, misaligned.

        An expanded dimension holds the values of its first element.
        """
        order = list(range(x.dim()))
        steps = [1] * x.dim()
        offset = 0
        if self.chance(0.65):
            if self.chance(0.5):
                self.random.shuffle(order)
            steps = [self.random.choice((1, 1, 1, 2, 3)) for _ in order]
            offset = self.random.choice((0, 0, 1, 3, 16))
            if self.chance(0.25) and order:
                steps[self.random.choice(order)] = 0
        narrow = x
        for dim, step in enumerate(steps):
            if step == 0 and x.shape[dim] > 1:
                narrow = narrow.narrow(dim, 0, 1)
        strides = [0] * x.dim()
        stride = 1
        for dim in reversed(order):
            step = max(steps[dim], 1)
            strides[dim] = stride * step
            stride = max(stride * step * max(narrow.shape[dim], 1) + self.random.choice((0, 0, 0, 1, 5)), 1)
        buffer = torch.empty(stride + offset + 2 * GUARD, dtype=x.dtype)
        buffer.fill_(math.nan if x.is_floating_point() else FILL.get(x.dtype, 1))
        view = buffer.as_strided(narrow.shape, strides, GUARD + offset)
        view.copy_(narrow)
        self.buffers.append((name, buffer, buffer.clone()))
        return view.expand(x.shape)

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype, **kind: Any) -> Tensor:
        """:meth:`values`, placed."""
        return self.place(name, self.values(shape, dtype, **kind))

    def modified(self) -> list[str]:
        """The names of what was placed whose memory has changed since, within the tensor or around it."""
        return [name for name, now, then in self.buffers if not same_memory(now, then)]


def same_memory(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
