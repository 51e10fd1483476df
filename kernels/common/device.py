"""What a launch needs to know of a device, read once and never at import."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceInfo:
    """A device as launch heuristics see it.

    Attributes:
        name: the driver's name of the card.
        arch: ``"sm_90"``, ``"gfx942"``, or ``"interpreter"`` for CPU tensors.
        num_sms: streaming multiprocessors (compute units on AMD).
    """

    name: str
    arch: str
    num_sms: int


# Few enough that small tensors make a persistent kernel take several turns.
INTERPRETER = DeviceInfo("Triton interpreter", "interpreter", 3)


@functools.cache
def device_info(device: torch.device) -> DeviceInfo:
    """The :class:`DeviceInfo` of a CUDA or ROCm device, or of the interpreter for the CPU."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return DeviceInfo(properties.name, arch, properties.multi_processor_count)


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the device of ``tensor`` current: Triton launches on the current one, wherever its arguments are."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def generation(arch: str, itemsize: int = 2) -> str:
    """Which row of a table of matrix products' configurations serves an architecture and an element size.

    fp32 has a row of its own: on NVIDIA it has no matrix instructions but TF32's.
    """
    if arch == "interpreter":
        return arch
    if itemsize == 4:
        return "fp32"
    if arch.startswith("gfx"):
        return "amd"
    capability = int(arch.removeprefix("sm_"))
    return "blackwell" if capability >= 100 else "hopper" if capability >= 90 else "ampere"
