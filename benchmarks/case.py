"""What is measured: a case builds inputs and says what is right; variants compute it, ours and the baselines'."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyaccel import triton_support

GROUPS = ("ops", "layers", "models", "train")
OURS = "pyaccel"  # what the names of our variants begin with


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Attributes:
        name: as it stands in tables; ours begin with "pyaccel".
        prepare: problem -> a function without arguments that computes the case's outputs. What a user would do once
            for many calls belongs into prepare: it isn't timed.
        missing: problem -> why it can't run, or None; a missing baseline is shown as missing, never left out.
        outputs: problem, what the function gave -> the case's outputs, where a baseline lays them out in its own way.
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
        group: of "ops", "layers", "models", "train".
        sizes: label -> sizes of the sweep.
        smoke: label -> sizes so small that they show only that it runs and is right.
        quick: a regular expression for the labels that a quick look takes.
        problem: sizes, dtype, device -> the inputs.
        truth: problem -> the outputs in fp64.
        naive: problem -> what plain PyTorch gives in the dtype itself.
        bytes_moved: problem -> the bytes that can't be avoided: each input read and each output written once.
        variants: problem -> the contenders.
        flops: problem -> the operations that can't be avoided, where they may bound it as well as the bytes.
        cpu_sizes: the sweep on a CPU, where `sizes` would take too long there.
        about: what is measured, for a reader; by default the first sentence of its module.
    """

    name: str
    group: str
    sizes: dict[str, Any]
    smoke: dict[str, Any]
    quick: str
    problem: Callable[[Any, torch.dtype, torch.device], Any]
    truth: Callable[[Any], tuple[Tensor, ...]]
    naive: Callable[[Any], tuple[Tensor, ...]]
    bytes_moved: Callable[[Any], int]
    variants: tuple[Variant, ...]
    flops: Callable[[Any], int] | None = None
    cpu_sizes: dict[str, Any] | None = None
    about: str = ""

    def sweep(self, device: torch.device, kind: str = "full") -> dict[str, Any]:
        """Label -> sizes of what is measured there: "full", "quick" or "smoke"."""
        if kind == "smoke":
            return self.smoke
        sizes = self.cpu_sizes if device.type == "cpu" and self.cpu_sizes is not None else self.sizes
        if kind == "quick":
            return {label: size for label, size in sizes.items() if re.search(self.quick, label)}
        return sizes


def graphed(variant: Variant) -> Variant:
    """The same, captured once into a CUDA graph that each call replays: what is left without the host's launches."""

    def prepare(p: Any) -> Callable[[], tuple[Tensor, ...]]:
        call = variant.prepare(p)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is made at the first call must not be part of the graph
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            given = call()

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return given

        return replay

    def missing(p: Any) -> str | None:
        if p.device.type != "cuda":
            return "CUDA graphs need a GPU"
        return variant.missing(p)

    return Variant(f"{variant.name}, CUDA graph", prepare, missing, variant.outputs)


def no_liger(device: torch.device) -> str | None:
    """Why Liger-Kernel, whose kernels are Triton's, can't be timed there, or None."""
    return no_triton(device) or (
        None if importlib.util.find_spec("liger_kernel") else "liger_kernel is not installed"
    )


def no_triton(device: torch.device) -> str | None:
    """Why Triton's kernels can't be timed there, or None."""
    if device.type != "cuda":
        return "Triton's kernels need a GPU"
    return None if triton_support.has_triton() else "triton is not installed"
