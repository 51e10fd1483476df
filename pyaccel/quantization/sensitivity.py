"""Which layers int8 costs most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyaccel.nn import Int8Linear
from pyaccel.quantization.calibrate import encoder_linears, run, watched


@dataclass
class Sensitivity:
    """What int8 costs each layer, and what leaving it in floating point would.

    Attributes:
        sqnr_db: SQNR in dB of each layer's output, in int8 against floating point on the same input: the lower, the
            costlier.
        saved_bytes: how many fewer its weight takes in int8.
    """

    sqnr_db: dict[str, float]
    saved_bytes: dict[str, int] = field(default_factory=dict)

    def costliest(self) -> list[str]:
        """Names, the costliest first."""
        return sorted(self.sqnr_db, key=self.sqnr_db.__getitem__)

    def leave(
        self, *, count: int | None = None, below_db: float | None = None, max_bytes: int | None = None
    ) -> list[str]:
        """Layers to leave in floating point (``skip=`` of quantize), the costliest first.

        Args:
            count: so many.
            below_db: all whose SQNR is lower.
            max_bytes: those that fit: together they may take so many bytes more than in int8.
        """
        if sum(limit is not None for limit in (count, below_db, max_bytes)) != 1:
            raise ValueError("Sensitivity.leave: give one of count, below_db and max_bytes")
        if count is not None:
            return self.costliest()[:count]
        if below_db is not None:
            return [name for name in self.costliest() if self.sqnr_db[name] < below_db]
        assert max_bytes is not None
        left = []
        for name in self.costliest():
            if self.saved_bytes[name] <= max_bytes:
                max_bytes -= self.saved_bytes[name]
                left.append(name)
        return left

    def __str__(self) -> str:
        lines = [f"{self.sqnr_db[name]:6.1f} dB  {name}" for name in self.costliest()]
        return "\n".join(["SQNR of each layer in int8, the costliest first", *lines])


def sensitivity(model: nn.Module, data: Iterable[Any], *, progress: bool = True) -> Sensitivity:
    """How much each layer of a floating model loses in dynamic int8, one at a time: every other stays floating.

    Args:
        model, data: as :func:`pyaccel.quantization.calibrate` takes them.

    Raises:
        ValueError: no data, or nothing to quantize.
    """
    power: dict[str, list[float]] = {}
    layers = {
        name: Int8Linear.from_linear(linear)
        for name, linear in encoder_linears(model).items()
        if type(linear) is nn.Linear
    }

    def observer(name: str) -> Callable[[Tensor, Tensor], None]:
        sums = power.setdefault(name, [0.0, 0.0])

        def observe(x: Tensor, out: Tensor) -> None:
            noise = layers[name](x).double() - out.double()
            sums[0] += out.double().square().sum().item()
            sums[1] += noise.square().sum().item()

        return observe

    with torch.no_grad(), watched(model, observer):
        run(model, data, progress=progress, description="sensitivity")
    # An int8 weight has a byte a value, and 4 for the scale of each row.
    saved = {
        name: layer.weight.numel() * (layer.weight.element_size() - 1) - 4 * layer.out_features
        for name, layer in layers.items()
    }
    return Sensitivity({name: _decibels(*sums) for name, sums in power.items()}, saved)


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
