"""A linear layer that is watched while calibration data runs through the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ObservedLinear(nn.Linear):
    """An nn.Linear whose inputs and outputs an observer sees. The output is nn.Linear's.

    Made of an nn.Linear in place by :meth:`watch`, and one again after :meth:`release`: the same object and Parameters.
    """

    _observe: Callable[[Tensor, Tensor], Any]

    @staticmethod
    def watch(linear: nn.Linear, observe: Callable[[Tensor, Tensor], Any]) -> None:
        """Call ``observe(x, out)`` after each forward, with ``[tokens, in]`` and ``[tokens, out]``, detached.

        Raises TypeError for what isn't exactly an nn.Linear.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"ObservedLinear: only an nn.Linear can be watched, got a {type(linear).__name__}"
            )
        linear._observe = observe  # type: ignore[assignment]
        linear.__class__ = ObservedLinear

    def release(self: nn.Linear) -> None:
        """Make it an nn.Linear again, whatever is left of a :meth:`watch` that was interrupted."""
        if isinstance(self, ObservedLinear):
            self.__class__ = nn.Linear  # type: ignore[assignment]
        self.__dict__.pop("_observe", None)

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        with torch.no_grad():
            self._observe(x.detach().flatten(0, -2), out.detach().flatten(0, -2))
        return out
