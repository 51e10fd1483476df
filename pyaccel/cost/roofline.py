"""What a GPU can do at best: the two ceilings of a roofline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyaccel.timing import time_in_turn


@dataclass(frozen=True)
class DeviceSpec:
    """Datasheet rates: bytes a second of memory, dense 16-bit FLOPs a second of the matrix units."""

    bandwidth: float
    flops: float


DEVICE_SPECS = {
    "A100": DeviceSpec(2.039e12, 312e12),
    "H100": DeviceSpec(3.35e12, 989e12),
    "H200": DeviceSpec(4.8e12, 989e12),
    "L4": DeviceSpec(0.3e12, 121e12),
    "MI300X": DeviceSpec(5.3e12, 1307e12),
}


def measured_card(dtype: torch.dtype) -> DeviceSpec:
    """This CPU's rates: the best of a few copies and of a few large matrix products in ``dtype``."""
    source = torch.ones(32 * 2**20)
    target = torch.empty_like(source)
    a = torch.ones(1024, 1024, dtype=dtype)
    contenders = {"copy": lambda: target.copy_(source), "product": lambda: a @ a}
    taken, failed = time_in_turn(contenders, 5, torch.device("cpu"))
    for error in failed.values():
        raise error
    copy, product = (min(each.seconds for each in taken[name]) for name in contenders)
    return DeviceSpec(bandwidth=2 * source.nbytes / copy, flops=2 * 1024**3 / product)
