"""What `accelerate` keeps: one :class:`Acceleration` for a model, one :class:`AccelerationState` for each module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pyaccel.hf.executors.base import Executor
from pyaccel.hf.fingerprint import ModuleFingerprint
from pyaccel.hf.report import Report


@dataclass
class Acceleration:
    """What one call of `accelerate` set up; all modules that it swapped hold the same one."""

    packing: bool
    backend: str
    report: Report
    # A config, and its attention implementation before.
    configs: list[tuple[Any, str]] = field(default_factory=list)
    # Where `int8` was asked for: a module, the name of a layer in it, and that layer in floating point.
    floating: list[tuple[nn.Module, str, nn.Linear]] = field(default_factory=list)
    int8: str | None = None
    prepack: bool = False
    cuda_graphs: bool | str = "auto"
    skip_logits: bool = False


@dataclass(eq=False)
class Plan:
    """The executors of modules that are what the fingerprint says."""

    fingerprint: ModuleFingerprint
    executors: list[Executor]


class AccelerationState:
    """What a swapped module carries as `module._pyaccel`: copied and pickled with it, gone when restored.

    Attributes:
        executors: names of those that its calls are to be tried by; the plan has them.
        keeps_padding: why this encoder must not drop its padding, whatever the call; None if it may.
        plan: how its calls are served, while the modules are what they were when it was made.
    """

    def __init__(
        self,
        acceleration: Acceleration,
        config: Any,
        executors: tuple[str, ...] = (),
        keeps_padding: str | None = None,
    ) -> None:
        self.acceleration = acceleration
        self.config = config
        self.executors = executors
        self.keeps_padding = keeps_padding
        self.plan: Plan | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # The plan is about these very modules. A copy starts without, and makes its own.
        return AccelerationState, (self.acceleration, self.config, self.executors, self.keeps_padding)


# What pickles say: names that stay wherever this file goes.
PICKLED = {"Acceleration": Acceleration, "AccelerationState": AccelerationState}
for _kind in (*PICKLED.values(), Report):
    _kind.__module__ = "pyaccel.hf"
