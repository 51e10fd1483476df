"""Launch configurations of attention, chosen by generation, element size, head dimension and kind of call."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from pyaccel.kernels.common.device import generation
from pyaccel.kernels.common.limits import MAX_HEAD_DIM


@dataclass(frozen=True)
class AttentionConfig:
    """How an attention kernel cuts its scores.

    Attributes:
        block_m, block_n: queries and keys a program holds at a time.
        num_warps, num_stages: launch options of Triton.
        tiles: tiles that a program of the short forward kernel has one after the other; 0 for the other kernels.
        tma: load keys and values through Hopper's copy engine, where a call allows it; forward kernel alone.
        split: compute dkey and dvalue in two launches, because one has no registers for both.
        skip_masked: skip the blocks that attn_mask masks wholly, in the backward kernels that know one. Loads under
            such a branch aren't pipelined, and then the addresses of all that wgmma reads stay in registers.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tiles: int = 0
    tma: bool = False
    split: bool = False
    skip_masked: bool = True

    @functools.cached_property
    def blocks(self) -> dict[str, int]:
        """The kernels' constants."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}

    @functools.cached_property
    def launch_options(self) -> dict[str, int]:
        """Those of Triton."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    @property
    def label(self) -> str:
        """A short name for tables."""
        tiles = f"{self.tiles} x " if self.tiles else ""
        return f"{tiles}{self.block_m}x{self.block_n}, {self.num_warps} warps, {self.num_stages} stages"


@dataclass(frozen=True)
class AttentionShape:
    """What the launch configuration of an attention kernel depends on.

    Attributes:
        seq_q, seq_k: lengths; in a packed batch the longest.
        head_dim: the larger of query's and value's.
        itemsize: bytes of an element.
        arch: as :class:`pyaccel.kernels.common.device.DeviceInfo` has it.
        group: query heads to a key head.
        has_mask, has_dropout: whether there are an attn_mask (beyond one of keys) and dropout.
    """

    seq_q: int
    seq_k: int
    head_dim: int
    itemsize: int
    arch: str
    group: int
    has_mask: bool
    has_dropout: bool


# block_m, block_n, num_warps, num_stages by the head dimension up to which they serve; first without attn_mask and
# dropout, which take registers, then with. Chosen by `pyaccel inspect`: the largest tiles that spill nothing and,
# on Hopper, leave every product to wgmma. No timing on a card has gone into them.
_Tiles = dict[int, tuple[int, int, int, int]]
_ATTENTION: dict[tuple[str, str], tuple[_Tiles, _Tiles]] = {
    ("forward", "hopper"): (
        {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
        {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 16, 8, 1)},
    ),
    ("forward", "ampere"): (
        {32: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 1)},
        {64: (128, 64, 8, 3), 128: (64, 32, 4, 2), 256: (64, 32, 8, 1)},
    ),
    ("forward", "amd"): (
        {128: (128, 64, 4, 2), 256: (64, 32, 8, 1)},
        {64: (128, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 8, 1)},
    ),
    ("forward_short", "hopper"): (
        {128: (64, 64, 4, 1), 256: (64, 64, 8, 1)},
        {128: (64, 64, 4, 1)},
    ),
    ("forward_short", "ampere"): (
        {128: (64, 64, 4, 1), 256: (64, 64, 8, 1)},
        {32: (64, 64, 8, 1), 64: (64, 64, 4, 1), 128: (64, 64, 8, 1)},
    ),
    ("forward_short", "amd"): ({128: (64, 64, 4, 1)}, {128: (64, 64, 4, 1)}),
    ("forward_short_128", "hopper"): ({128: (128, 128, 8, 1)}, {32: (128, 128, 8, 1)}),
    ("forward_short_128", "ampere"): ({64: (128, 128, 8, 1), 128: (64, 128, 8, 1)}, {32: (128, 128, 8, 1)}),
    ("forward_short_128", "amd"): ({32: (128, 128, 8, 1), 128: (64, 128, 4, 1)}, {}),
    ("dquery", "hopper"): (
        {32: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
        {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 16, 8, 2)},
    ),
    ("dquery", "ampere"): (
        {32: (128, 64, 4, 3), 64: (128, 64, 8, 3), 128: (64, 64, 8, 2), 256: (64, 32, 8, 1)},
        {32: (128, 64, 8, 3), 64: (128, 32, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
    ),
    ("dquery", "amd"): (
        {64: (128, 64, 4, 2), 128: (128, 32, 8, 2), 256: (64, 16, 4, 1)},
        {64: (128, 64, 4, 2), 128: (64, 32, 8, 2), 256: (32, 16, 8, 1)},
    ),
    ("dkey_dvalue", "hopper"): (
        {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (16, 64, 8, 2)},
        {32: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (16, 64, 8, 2)},
    ),
    ("dkey_dvalue", "ampere"): (
        {32: (64, 128, 8, 2), 64: (32, 128, 8, 2), 128: (64, 64, 8, 2), 256: (16, 64, 8, 1)},
        {32: (32, 128, 8, 1), 64: (32, 64, 4, 1), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
    ),
    ("dkey_dvalue", "amd"): (
        {32: (32, 64, 4, 1), 128: (64, 64, 4, 2), 256: (16, 32, 4, 1)},
        {32: (32, 64, 4, 1), 64: (32, 64, 8, 1), 128: (16, 64, 8, 1), 256: (16, 32, 4, 1)},
    ),
    ("backward_short", "hopper"): ({128: (64, 64, 8, 1)}, {64: (64, 64, 8, 1)}),
    ("backward_short", "ampere"): (
        {32: (64, 32, 8, 1), 64: (64, 16, 8, 1)},
        {32: (64, 32, 8, 1), 64: (64, 16, 8, 1)},
    ),
    ("backward_short", "amd"): (
        {32: (64, 32, 8, 1), 128: (64, 32, 4, 1)},
        {64: (64, 32, 8, 1)},
    ),
    ("backward_short_128", "hopper"): ({64: (128, 64, 8, 1)}, {64: (128, 64, 8, 1)}),
    ("backward_short_128", "ampere"): ({32: (128, 64, 8, 1), 64: (128, 32, 8, 1)}, {32: (128, 64, 8, 1)}),
    ("backward_short_128", "amd"): ({32: (128, 16, 8, 1)}, {}),
    ("scores", "hopper"): ({}, {64: (64, 64, 8, 1), 128: (64, 32, 4, 1), 256: (64, 16, 8, 1)}),
    ("scores", "ampere"): ({}, {32: (64, 64, 8, 1), 128: (64, 32, 8, 1), 256: (64, 16, 8, 1)}),
    ("scores", "amd"): ({}, {128: (64, 64, 4, 1), 256: (32, 32, 4, 1)}),
    # Where it differs from Hopper.
    ("forward_short_128", "blackwell"): ({128: (64, 128, 8, 1)}, {32: (128, 128, 8, 1)}),
    ("dquery", "blackwell"): (
        {32: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 1)},
        {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (32, 32, 8, 1)},
    ),
    ("dkey_dvalue", "blackwell"): (
        {64: (64, 128, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
        {32: (64, 128, 8, 2), 64: (32, 128, 8, 2), 128: (32, 64, 4, 1), 256: (32, 32, 8, 1)},
    ),
    # fp32 has no matrix instructions on NVIDIA but TF32's. A thread then holds whole rows of its operands, which above
    # a head dimension of 64 is more than it has registers for: those spill, and dispatch leaves them to PyTorch.
    ("forward", "fp32"): (
        {32: (32, 32, 8, 1), 64: (32, 32, 4, 1), 256: (32, 32, 8, 1)},
        {32: (32, 32, 8, 1), 64: (32, 16, 8, 1), 256: (32, 32, 8, 1)},
    ),
    ("forward_short", "fp32"): ({64: (32, 64, 8, 1)}, {}),
    ("forward_short_128", "fp32"): ({}, {}),
    ("dquery", "fp32"): ({256: (32, 32, 8, 1)},) * 2,
    ("dkey_dvalue", "fp32"): (
        {256: (32, 32, 8, 1)},
        {32: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
    ),
    ("backward_short", "fp32"): ({64: (64, 16, 8, 1)},) * 2,
    ("backward_short_128", "fp32"): ({}, {}),
    ("scores", "fp32"): ({}, {256: (32, 32, 8, 1)}),
    # Small, so that small tensors make several tiles.
    ("forward", "interpreter"): ({256: (32, 32, 4, 1)},) * 2,
    ("forward_short", "interpreter"): ({256: (32, 64, 4, 1)},) * 2,
    ("forward_short_128", "interpreter"): ({}, {}),
    ("dquery", "interpreter"): ({256: (32, 32, 4, 1)},) * 2,
    ("dkey_dvalue", "interpreter"): ({256: (32, 32, 4, 1)},) * 2,
    ("backward_short", "interpreter"): ({256: (64, 32, 4, 1)},) * 2,
    ("backward_short_128", "interpreter"): ({}, {}),
    ("scores", "interpreter"): ({}, {256: (32, 32, 4, 1)}),
}


@functools.lru_cache(maxsize=4096)
def attention(kernel: str, shape: AttentionShape) -> AttentionConfig:
    """The configuration of ``"forward"``, ``"dquery"``, ``"dkey_dvalue"`` or ``"scores"`` (which makes weights and
    gradients of masks)."""
    extras = shape.has_mask or shape.has_dropout or kernel == "scores"
    tiles = _tiles(kernel, shape, extras)
    if tiles is None:
        raise ValueError(
            f"attention kernels take head dimensions of up to {MAX_HEAD_DIM}, not {shape.head_dim}"
        )
    chip = generation(shape.arch, shape.itemsize)
    split = chip in ("hopper", "blackwell") and shape.head_dim > 64
    return AttentionConfig(
        *tiles,
        split=split and kernel == "dkey_dvalue" and extras,
        skip_masked=not (chip == "hopper" and shape.head_dim > 128),
    )


@functools.lru_cache(maxsize=4096)
def attention_short(kernel: str, shape: AttentionShape) -> AttentionConfig | None:
    """The configuration of ``"forward_short"`` or ``"backward_short"``, or None where it doesn't serve."""
    forward = kernel == "forward_short"
    length = shape.seq_k if forward else shape.seq_q
    if length > 128 or (not forward and (shape.group > 1 or shape.has_mask)):
        return None
    tiles = _tiles(kernel + "_128" * (length > 64), shape, shape.has_mask or shape.has_dropout)
    if tiles is None:
        return None
    # Where a sequence has few queries, a program takes several heads, so that loads overlap products.
    return AttentionConfig(*tiles, tiles=(4 if shape.seq_q <= 32 else 1) if forward else 0)


def _tiles(kernel: str, shape: AttentionShape, extras: bool) -> tuple[int, int, int, int] | None:
    chip = generation(shape.arch, shape.itemsize)
    if chip == "blackwell" and (kernel, chip) not in _ATTENTION:
        chip = "hopper"
    table = _ATTENTION[kernel, chip][extras]
    return next((table[dim] for dim in sorted(table) if shape.head_dim <= dim), None)
