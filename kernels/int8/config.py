"""Launch configurations of the int8 products, chosen by sizes and architecture."""

from __future__ import annotations

from dataclasses import dataclass

from pyaccel.kernels.bias_act.config import bias_gelu_forward, bias_gelu_quantize
from pyaccel.kernels.common import limits
from pyaccel.kernels.common.configs import (
    MatmulConfig,
    RowConfig,
    check_row,
    check_width,
    enough_tiles,
    next_power_of_2,
)
from pyaccel.kernels.common.device import generation


@dataclass(frozen=True)
class Int8MatmulConfig(MatmulConfig):
    """How a product is cut, and what is done beside.

    Attributes:
        subtile: columns of a tile that the epilogue holds at a time.
        tma: load tiles through Hopper's copy engine, by one persistent program an SM.
    """

    subtile: int = 128
    tma: bool = False

    @property
    def blocks(self) -> dict[str, int]:
        """The kernel's constants."""
        return {**super().blocks, "SUBTILE": self.subtile}

    @property
    def label(self) -> str:
        """A short name for tables."""
        return f"{super().label}{', TMA' if self.tma else ''}, finished by {self.subtile}"


# By generation, the largest tiles first, the last for ROWS_OF_SMALL rows or fewer. Chosen by `pyaccel inspect`: they
# spill nothing, fit in the shared memory of every card of it and, on Hopper, leave every product of more rows to
# wgmma. No timing on a card has gone into them.
CONFIGS: dict[str, tuple[Int8MatmulConfig, ...]] = {
    "hopper": (
        Int8MatmulConfig(128, 256, 128, 8, 8, 4, subtile=64),
        Int8MatmulConfig(128, 128, 128, 8, 8, 4),
        Int8MatmulConfig(64, 64, 128, 8, 4, 4),
        Int8MatmulConfig(16, 64, 128, 1, 4, 4),
    ),
    "blackwell": (
        Int8MatmulConfig(128, 128, 128, 8, 8, 4, subtile=64),
        Int8MatmulConfig(64, 64, 128, 8, 4, 4),
        Int8MatmulConfig(16, 64, 128, 1, 4, 4),
    ),
    "ampere": (
        Int8MatmulConfig(128, 128, 64, 8, 8, 4),
        Int8MatmulConfig(64, 64, 128, 8, 4, 4),
        Int8MatmulConfig(16, 64, 128, 1, 4, 4),
    ),
    "amd": (
        Int8MatmulConfig(128, 128, 64, 8, 8, 2),
        Int8MatmulConfig(64, 64, 128, 8, 4, 2),
        Int8MatmulConfig(16, 64, 128, 1, 4, 2),
    ),
    # Small, so that small matrices make several tiles, and groups that the last one doesn't fill.
    "interpreter": (
        Int8MatmulConfig(64, 64, 32, 2, 4, 1, subtile=32),
        Int8MatmulConfig(32, 32, 32, 3, 4, 1),
        Int8MatmulConfig(16, 32, 32, 1, 4, 1),
    ),
}
# Through Hopper's copy engine, by persistent programs: compiled and tested, not chosen before a card has timed them.
TMA_CONFIGS: dict[str, tuple[Int8MatmulConfig, ...]] = {
    "hopper": (
        Int8MatmulConfig(128, 256, 128, 8, 8, 3, subtile=64, tma=True),
        Int8MatmulConfig(128, 128, 128, 8, 8, 4, subtile=64, tma=True),
    ),
}
ROWS_OF_SMALL = 16
# Steps of the inner loop that a part of a split must have, for loads to overlap with products.
MIN_STEPS = 3


def int8_matmul(n_rows: int, n_out: int, arch: str) -> Int8MatmulConfig:
    """The largest tiles of which the output has enough to keep a card busy; for few rows the smallest."""
    *larger, small = CONFIGS[generation(arch)]
    if n_rows <= ROWS_OF_SMALL:
        return small
    for config in larger:
        if config.tiles(n_rows, n_out) >= enough_tiles(arch):
            return config
    return larger[-1]


def splits(n_rows: int, n_out: int, n_in: int, arch: str, config: Int8MatmulConfig) -> int:
    """Parts of the inner dimension that different programs sum: several where few rows make few tiles.

    int32 sums are exact, so it changes no bits; it costs a second launch, which adds them up.
    """
    if n_rows > ROWS_OF_SMALL:
        return 1
    steps = -(-n_in // config.block_k)
    wanted = enough_tiles(arch) // max(config.tiles(n_rows, n_out), 1)
    return max(1, min(wanted, steps // MIN_STEPS))


# Few rows, for the weight's bytes bound them; 64 for more, whose product is then PyTorch's business.
WEIGHT_ONLY_CONFIGS: dict[str, tuple[MatmulConfig, ...]] = {
    "cards": (MatmulConfig(64, 64, 64, 8, 4, 3), MatmulConfig(16, 32, 128, 1, 4, 4)),
    "interpreter": (MatmulConfig(32, 64, 32, 2, 4, 1), MatmulConfig(16, 32, 32, 1, 4, 1)),
}


def weight_only(n_rows: int, arch: str) -> MatmulConfig:
    """By the number of rows alone."""
    many, few = WEIGHT_ONLY_CONFIGS["interpreter" if arch == "interpreter" else "cards"]
    return few if n_rows <= ROWS_OF_SMALL else many


def quantize(n_cols: int) -> RowConfig:
    """Whole rows, as :func:`bias_gelu_quantize`; of 4096 columns 8 elements a thread, see the LayerNorm above."""
    check_row(n_cols)
    block_n = max(next_power_of_2(n_cols), 512)
    return RowConfig(max(2048 // block_n, 1), block_n, num_warps=4 if block_n <= 2048 else 16)


def quantize_by_given_scale(n_cols: int) -> RowConfig:
    """As :func:`bias_gelu_forward`: tiles."""
    return bias_gelu_forward(n_cols)


def int8_row_sum() -> RowConfig:
    """8 rows a program, 16 bytes a thread: even 384 rows keep 48 programs busy."""
    return RowConfig(8, 256, num_warps=4, tiled=True)


def int8_finish(n_cols: int, *, quantize: bool) -> RowConfig:
    """Whole rows where they are quantized; else tiles of one row, since it is few rows that a split product has."""
    if quantize:
        if n_cols > limits.MAX_QUANTIZED_ROW:
            raise ValueError(
                f"rows of {limits.MAX_QUANTIZED_ROW} elements at most are quantized again, got {n_cols}"
            )
        return bias_gelu_quantize(n_cols)
    check_width(n_cols)
    return RowConfig(1, 512, num_warps=2)
