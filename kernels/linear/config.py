"""Launch configurations of linear_activation, chosen by sizes, element size and architecture."""

from __future__ import annotations

from pyaccel.kernels.common.configs import MatmulConfig, enough_tiles
from pyaccel.kernels.common.device import generation

# By generation, the largest tiles first. Chosen by `pyaccel inspect`: they spill nothing, fit in the shared memory of
# every card of it and, on Hopper, leave every product to wgmma. No timing on a card has gone into them.
CONFIGS: dict[str, tuple[MatmulConfig, ...]] = {
    "hopper": (
        MatmulConfig(128, 256, 64, 8, 8, 4),
        MatmulConfig(128, 128, 64, 8, 8, 4),
        MatmulConfig(64, 64, 64, 8, 4, 4),
    ),
    "blackwell": (
        MatmulConfig(128, 256, 64, 8, 8, 3),
        MatmulConfig(128, 128, 64, 8, 8, 4),
        MatmulConfig(64, 64, 64, 8, 4, 4),
    ),
    "ampere": (
        MatmulConfig(128, 128, 32, 8, 8, 4),
        MatmulConfig(64, 64, 64, 8, 4, 4),
        MatmulConfig(32, 64, 64, 8, 4, 4),
    ),
    "amd": (
        MatmulConfig(128, 128, 64, 8, 8, 2),
        MatmulConfig(64, 64, 64, 8, 4, 2),
        MatmulConfig(32, 64, 64, 8, 4, 2),
    ),
    # fp32 has no matrix instructions on NVIDIA but TF32's.
    "fp32": (
        MatmulConfig(64, 64, 16, 8, 8, 3),
        MatmulConfig(32, 64, 16, 8, 4, 3),
    ),
    # Small, so that small matrices make several tiles, and groups that the last one doesn't fill.
    "interpreter": (
        MatmulConfig(64, 32, 32, 2, 4, 1),
        MatmulConfig(32, 32, 32, 3, 4, 1),
    ),
}
# Rows whose start isn't aligned are read element by element, each with an address in registers: no wider tile then.
MAX_UNALIGNED_N = 128


def linear_activation(n_rows: int, n_out: int, n_in: int, itemsize: int, arch: str) -> MatmulConfig:
    """The largest tiles of which the output has enough to keep a card busy; else the smallest.

    Of the inner dimension it matters only whether rows are aligned: none of the products of a BERT is deep enough to
    be split.
    """
    configs = CONFIGS[generation(arch, itemsize)]
    for config in configs:
        enough = config.tiles(n_rows, n_out) >= enough_tiles(arch)
        if enough and (n_in % 16 == 0 or config.block_n <= MAX_UNALIGNED_N):
            return config
    return configs[-1]
