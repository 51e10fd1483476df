"""What an executor is: one manner of running all layers of an encoder, or one layer."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from pyaccel.hf.eligibility import Call


class Executor(Protocol):
    """Built once for the modules as they are; holds their layers and parameters, never the module that is called.

    Attributes:
        name: under which the report counts it.
        layers: how many layers it runs.
    """

    name: str
    layers: int

    def why_not(self, call: Call) -> str | None:
        """Why it can't serve this call, whose modules and arguments are eligible; None if it can."""

    def run(self, module: Any, call: Call) -> Tensor:
        """The hidden states after its layers, shaped as the stock module's."""
