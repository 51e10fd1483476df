"""Launch configurations: frozen values, and the pure heuristics that give them.

A heuristic is a function of sizes and device alone, so that two runs launch the same programs and give the
same bits; nothing is timed at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_ROW = 16384


@dataclass(frozen=True)
class RowConfig:
    """How a row kernel cuts ``[n_rows, n_cols]``.

    Attributes:
        block_rows: rows a program holds at a time.
        block_n: columns a program holds at a time, a power of two.
        num_warps: warps a program.
        programs_per_sm: size of a persistent grid; 0 where the grid covers the rows.
        tiled: the row doesn't fit in registers and is walked in tiles of ``block_n`` columns.
    """

    block_rows: int
    block_n: int
    num_warps: int
    programs_per_sm: int = 0
    tiled: bool = False

    @property
    def label(self) -> str:
        """A short name for tables."""
        grid = f", {self.programs_per_sm} programs an SM" if self.programs_per_sm else ""
        return (
            f"{self.block_rows}x{self.block_n}{' tiled' if self.tiled else ''}, {self.num_warps} warps{grid}"
        )


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 1).bit_length()


def _check_row(n_cols: int) -> None:
    if not 1 <= n_cols <= MAX_ROW:
        raise ValueError(f"row kernels take rows of 1 to {MAX_ROW} elements, got {n_cols}")


def residual_layernorm_forward(n_cols: int) -> RowConfig:
    """Rows stay in registers, 16 elements a thread, several short rows a program.

    The number of rows plays no part: a row's bits don't depend on what it is batched with.
    """
    _check_row(n_cols)
    block_n = max(_next_power_of_2(n_cols), 64)
    block_rows = max(2048 // block_n, 1)
    return RowConfig(block_rows, block_n, num_warps=min(max(block_n // 512, 4), 16))


def residual_layernorm_backward(n_cols: int) -> RowConfig:
    """A persistent grid whose programs keep the column sums of their rows in registers.

    Above 4096 columns these sums no longer fit beside the row; the tiled kernel keeps them in memory.
    """
    _check_row(n_cols)
    block_n = max(_next_power_of_2(n_cols), 64)
    # 8 elements a thread and 16 warps an SM: row, gradients and sums then fit in registers on every part.
    if block_n > 4096:
        return RowConfig(4, 1024, num_warps=16, programs_per_sm=1, tiled=True)
    num_warps = max(block_n // 256, 8)
    return RowConfig(max(2048 // block_n, 1), block_n, num_warps, programs_per_sm=16 // num_warps)


@dataclass(frozen=True)
class ColumnSumConfig:
    """How partial sums ``[n_partials, n_cols]`` are added up: columns a program, rows it holds at a time."""

    block_p: int
    block_n: int
    num_warps: int

    @property
    def label(self) -> str:
        """A short name for tables."""
        return f"{self.block_p}x{self.block_n}, {self.num_warps} warps"


def column_sum() -> ColumnSumConfig:
    """One shape for every size: few columns a program, so that even 768 columns keep 24 programs busy."""
    return ColumnSumConfig(block_p=64, block_n=32, num_warps=4)


def persistent_programs(config: RowConfig, n_rows: int, num_sms: int) -> int:
    """Programs of a persistent row kernel: what the device holds at once, and no more than there are blocks."""
    return min(-(-n_rows // config.block_rows), config.programs_per_sm * num_sms)


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

    @property
    def blocks(self) -> dict[str, int]:
        """The kernels' constants."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}

    @property
    def launch_options(self) -> dict[str, int]:
        """Those of Triton."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    @property
    def label(self) -> str:
        """A short name for tables."""
        tiles = f"{self.tiles} x " if self.tiles else ""
        return f"{tiles}{self.block_m}x{self.block_n}, {self.num_warps} warps, {self.num_stages} stages"


# --- attention ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionShape:
    """What the launch configuration of an attention kernel depends on.

    Attributes:
        seq_q, seq_k: lengths; in a packed batch the longest.
        head_dim: the larger of query's and value's.
        itemsize: bytes of an element.
        arch: as :class:`pyaccel.kernels.device.DeviceInfo` has it.
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


def attention_part(arch: str, itemsize: int) -> str:
    """Which column of the table serves an architecture and element size."""
    if arch == "interpreter":
        return "interpreter"
    if itemsize == 4:
        return "fp32"
    if arch.startswith("gfx"):
        return "amd"
    capability = int(arch.removeprefix("sm_"))
    return "blackwell" if capability >= 100 else "hopper" if capability >= 90 else "ampere"


def attention(kernel: str, shape: AttentionShape) -> AttentionConfig:
    """The configuration of ``"forward"``, ``"dquery"``, ``"dkey_dvalue"`` or ``"scores"`` (which makes weights and
    gradients of masks)."""
    extras = shape.has_mask or shape.has_dropout or kernel == "scores"
    tiles = _tiles(kernel, shape, extras)
    if tiles is None:
        raise ValueError(f"attention kernels take head dimensions of up to 256, not {shape.head_dim}")
    part = attention_part(shape.arch, shape.itemsize)
    split = part in ("hopper", "blackwell") and shape.head_dim > 64
    return AttentionConfig(
        *tiles,
        split=split and kernel == "dkey_dvalue" and extras,
        skip_masked=not (part == "hopper" and shape.head_dim > 128),
    )


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
    part = attention_part(shape.arch, shape.itemsize)
    if part == "blackwell" and (kernel, part) not in _ATTENTION:
        part = "hopper"
    table = _ATTENTION[kernel, part][extras]
    return next((table[dim] for dim in sorted(table) if shape.head_dim <= dim), None)
