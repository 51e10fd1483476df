"""What is measured: a case builds inputs and says what is right; variants compute it, ours and the rivals'."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CASES = ("residual_layernorm",)  # modules of this package, each with a CASE


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Attributes:
        name: as it stands in tables; ours begin with "pyaccel".
        prepare: problem -> a function without arguments that computes the case's outputs.
        missing: why it can't run here, or None; a missing rival is shown as missing, never left out.
    """

    name: str
    prepare: Callable[[Any], Callable[[], tuple[Tensor, ...]]]
    missing: Callable[[torch.device], str | None] = lambda device: None


@dataclass(frozen=True)
class Case:
    """One thing that is measured.

    Attributes:
        name: of the case.
        sizes: label -> sizes of the sweep; `quick` are those of a smoke test.
        problem: sizes, dtype, device -> the inputs.
        truth: problem -> the outputs in fp64.
        naive: problem -> what plain PyTorch gives in the dtype itself.
        bytes_moved: problem -> the bytes that can't be avoided: each input read and each output written once.
        variants: problem -> the contenders.
    """

    name: str
    sizes: dict[str, tuple[int, ...]]
    quick: dict[str, tuple[int, ...]]
    problem: Callable[[tuple[int, ...], torch.dtype, torch.device], Any]
    truth: Callable[[Any], tuple[Tensor, ...]]
    naive: Callable[[Any], tuple[Tensor, ...]]
    bytes_moved: Callable[[Any], int]
    variants: tuple[Variant, ...]


def cases(names: Iterable[str] | None = None) -> list[Case]:
    """The registered cases, or those named.

    Raises:
        ValueError: a name that isn't registered.
    """
    wanted = list(CASES if names is None else names)
    unknown = sorted(set(wanted) - set(CASES))
    if unknown:
        raise ValueError(f"unknown case {', '.join(unknown)}: expected one of {', '.join(CASES)}")
    return [importlib.import_module(f"benchmarks.{name}").CASE for name in wanted]
