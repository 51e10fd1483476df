"""What is measured: a case builds inputs and says what is right; variants compute it, ours and the rivals'."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyaccel import dispatch

CASES = (
    "residual_layernorm",
    "attention",
    "varlen_attention",
    "bias_gelu",
    "linear_activation",
    "bert_embeddings",
    "masked_lm_cross_entropy",
    "int8_linear",
    "encoder",
)  # modules of this package, each with a CASE


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Attributes:
        name: as it stands in tables; ours begin with "pyaccel".
        prepare: problem -> a function without arguments that computes the case's outputs. What a user would do once
            for many calls belongs into prepare: it isn't timed.
        missing: problem -> why it can't run, or None; a missing rival is shown as missing, never left out.
        outputs: problem, what the function gave -> the case's outputs, where a rival lays them out in its own way.
            It isn't timed.
    """

    name: str
    prepare: Callable[[Any], Callable[[], tuple[Tensor, ...]]]
    missing: Callable[[Any], str | None] = lambda problem: None
    outputs: Callable[[Any, tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda problem, given: given


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
        flops: problem -> the operations that can't be avoided, where they may bound it as well as the bytes.
        cpu_sizes: the sweep on a CPU, where `sizes` would take too long there.
    """

    name: str
    sizes: dict[str, Any]
    quick: dict[str, Any]
    problem: Callable[[Any, torch.dtype, torch.device], Any]
    truth: Callable[[Any], tuple[Tensor, ...]]
    naive: Callable[[Any], tuple[Tensor, ...]]
    bytes_moved: Callable[[Any], int]
    variants: tuple[Variant, ...]
    flops: Callable[[Any], int] | None = None
    cpu_sizes: dict[str, Any] | None = None

    def sweep(self, device: torch.device, *, quick: bool) -> dict[str, Any]:
        """Label -> sizes of what is measured there."""
        if quick:
            return self.quick
        return self.cpu_sizes if device.type == "cpu" and self.cpu_sizes is not None else self.sizes


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


def no_triton(device: torch.device) -> str | None:
    """Why Triton's kernels can't be timed there, or None."""
    if device.type != "cuda":
        return "Triton's kernels need a GPU"
    return None if dispatch.has_triton() else "triton is not installed"
