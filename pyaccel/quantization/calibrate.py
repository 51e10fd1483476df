"""What goes into each linear layer of an encoder, seen over real data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from pyaccel.nn import Int8Linear, ObservedLinear

Observer = Literal["amax", "percentile"]
OBSERVERS: tuple[Observer, ...] = ("amax", "percentile")

# |x| by its binary logarithm: 32 bins for each power of two, so that a percentile is right to 2 %, in bounded memory.
BINS_PER_OCTAVE = 32
LOWEST, HIGHEST = -40, 40


@dataclass
class InputStatistics:
    """What one layer's input was.

    Attributes:
        tokens: how many rows were seen.
        channel_amax: fp32 ``[in_features]``, the largest ``|x|`` of each input channel.
        histogram: int64 counts of ``|x|`` by binary logarithm; zeros are in the lowest bin.
    """

    tokens: int
    channel_amax: Tensor
    histogram: Tensor

    @property
    def amax(self) -> float:
        """The largest ``|x|`` of all."""
        return self.channel_amax.max().item()

    def percentile(self, percent: float) -> float:
        """The value that ``percent`` of all ``|x|`` don't exceed, to the width of a bin; never above :attr:`amax`."""
        counts = self.histogram.cumsum(0)
        index = int(torch.searchsorted(counts.double(), counts[-1].double() * percent / 100))
        upper: float = 2.0 ** (LOWEST + (index + 1) / BINS_PER_OCTAVE)
        return min(upper, self.amax)


@dataclass
class Calibration:
    """What :func:`calibrate` saw: for each layer's name its inputs' statistics, and how many batches there were."""

    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    batches: int = 0

    def add(self, name: str, x: Tensor) -> None:
        """Count ``[tokens, in_features]`` in."""
        size = x.abs().float()
        if not bool(size.isfinite().all()):
            raise ValueError(
                f"calibration: the input of {name} has NaN or inf; a scale can't be found from these data"
            )
        channels = size.amax(0) if len(size) else size.new_zeros(size.shape[1])
        logarithm = size.clamp_min(2.0**LOWEST).log2_().clamp_(LOWEST, HIGHEST)
        histogram = torch.histc(logarithm, (HIGHEST - LOWEST) * BINS_PER_OCTAVE, LOWEST, HIGHEST).long()
        before = self.inputs.get(name)
        if before is None:
            self.inputs[name] = InputStatistics(len(x), channels, histogram)
        else:
            before.tokens += len(x)
            before.channel_amax = torch.maximum(before.channel_amax, channels)
            before.histogram += histogram

    def input_scale(self, name: str, observer: Observer, percent: float) -> float:
        """The static scale of a layer's input, above 0."""
        seen = self.inputs[name]
        largest = seen.amax if observer == "amax" else seen.percentile(percent)
        return largest / 127 or 1.0


def calibrate(model: nn.Module, data: Iterable[Any], *, progress: bool = True) -> Calibration:
    """Run ``data`` through ``model`` and note what goes into each linear layer of its encoder.

    Args:
        model: in evaluation for the time being; as it was afterwards. Accelerated with packing, padding isn't seen;
            otherwise padding counts as the model computes it.
        data: batches as the model takes them: dicts (passed by name), tuples or lists (by position) or tensors. What is
            a tensor is moved to the model's device.
        progress: show a bar.

    Raises:
        ValueError: no data, no linear layer that runs, or NaN in a layer's input.
    """
    calibration = Calibration()

    def observer(name: str) -> Callable[[Tensor, Tensor], None]:
        return lambda x, _: calibration.add(name, x)

    with watched(model, observer):
        calibration.batches = run(model, data, progress=progress, description="calibrating")
    return calibration


def encoder_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of an encoder by name: those inside the layers of a ModuleList, quantized ones too.

    Embeddings, poolers and heads are none of them.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    prefixes = tuple(f"{name}." if name else "" for name in lists)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Int8Linear, ObservedLinear) and name.startswith(prefixes)
    }


@contextmanager
def watched(model: nn.Module, observer: Callable[[str], Callable[[Tensor, Tensor], Any]]) -> Iterator[None]:
    """Inside, each floating linear layer of the encoder tells ``observer(name)`` what goes in and comes out."""
    linears = {name: module for name, module in encoder_linears(model).items() if type(module) is nn.Linear}
    if not linears:
        raise ValueError(
            f"pyaccel.quantization: no floating linear layer in the encoder layers of this {type(model).__name__}"
        )
    try:
        for name, linear in linears.items():
            ObservedLinear.watch(linear, observer(name))
        yield
    finally:
        for linear in linears.values():
            ObservedLinear.release(linear)


@torch.no_grad()
def run(model: nn.Module, data: Iterable[Any], *, progress: bool, description: str) -> int:
    """Every batch through the model, in evaluation; returns how many there were."""
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    batches = 0
    try:
        model.eval()
        console = Console(stderr=True)
        for batch in track(data, description, console=console, transient=True, disable=not progress):
            moved = _to(batch, device)
            if isinstance(moved, Mapping):
                model(**moved)
            elif isinstance(moved, tuple | list):
                model(*moved)
            else:
                model(moved)
            batches += 1
    finally:
        for module, training in modes.items():
            module.training = training
    if batches == 0:
        raise ValueError(
            "pyaccel.quantization: there are no batches to calibrate with; pass a loader of real data"
        )
    return batches


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _to(item, device) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device) for item in value)
    return value
