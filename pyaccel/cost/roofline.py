"""What a GPU can do at best: the two ceilings of a roofline."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """Datasheet rates: bytes a second of memory, dense 16-bit FLOPs a second of the matrix units."""

    bandwidth: float
    flops: float


CARDS = {
    "A100": Card(2.039e12, 312e12),
    "H100": Card(3.35e12, 989e12),
    "H200": Card(4.8e12, 989e12),
    "L4": Card(0.3e12, 121e12),
    "MI300X": Card(5.3e12, 1307e12),
}
