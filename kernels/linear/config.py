"""Launch configurations of linear_activation, chosen by sizes, element size and architecture."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearActivationConfig:
    """How a matrix product is cut.

    Attributes:
        block_m, block_n: rows and columns of the output that a program makes.
        block_k: elements of the inner dimension that it holds at a time.
        group_m: row tiles that are made together, so that they find the weight in the L2 cache.
        num_warps, num_stages: launch options of Triton.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int

    @property
    def blocks(self) -> dict[str, int]:
        """The kernel's constants."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
        }

    @property
    def launch_options(self) -> dict[str, int]:
        """Those of Triton."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    @property
    def label(self) -> str:
        """A short name for tables."""
        return (
            f"{self.block_m}x{self.block_n}x{self.block_k}, {self.num_warps} warps, {self.num_stages} stages"
        )


# By part, the largest tiles first. Chosen by `pyaccel inspect`: they spill nothing, fit in the shared memory of every
# card of the part and, on Hopper, leave every product to wgmma. No timing on a card has gone into them.
CONFIGS: dict[str, tuple[LinearActivationConfig, ...]] = {
    "hopper": (
        LinearActivationConfig(128, 256, 64, 8, 8, 4),
        LinearActivationConfig(128, 128, 64, 8, 8, 4),
        LinearActivationConfig(64, 64, 64, 8, 4, 4),
    ),
    "blackwell": (
        LinearActivationConfig(128, 256, 64, 8, 8, 3),
        LinearActivationConfig(128, 128, 64, 8, 8, 4),
        LinearActivationConfig(64, 64, 64, 8, 4, 4),
    ),
    "ampere": (
        LinearActivationConfig(128, 128, 32, 8, 8, 4),
        LinearActivationConfig(64, 64, 64, 8, 4, 4),
        LinearActivationConfig(32, 64, 64, 8, 4, 4),
    ),
    "amd": (
        LinearActivationConfig(128, 128, 64, 8, 8, 2),
        LinearActivationConfig(64, 64, 64, 8, 4, 2),
        LinearActivationConfig(32, 64, 64, 8, 4, 2),
    ),
    # fp32 has no matrix instructions on NVIDIA but TF32's.
    "fp32": (
        LinearActivationConfig(64, 64, 16, 8, 8, 3),
        LinearActivationConfig(32, 64, 16, 8, 4, 3),
    ),
    # Small, so that small matrices make several tiles, and groups that the last one doesn't fill.
    "interpreter": (
        LinearActivationConfig(64, 32, 32, 2, 4, 1),
        LinearActivationConfig(32, 32, 32, 3, 4, 1),
    ),
}
# Rows whose start isn't aligned are read element by element, each with an address in registers: no wider tile then.
MAX_UNALIGNED_N = 128
# Tiles of the output from which on larger ones are worth it: about as many as a large card has SMs.
ENOUGH = {"interpreter": 6}
ENOUGH_ON_CARDS = 96


def linear_activation_part(arch: str, itemsize: int) -> str:
    """Which row of :data:`CONFIGS` serves an architecture and element size."""
    if arch == "interpreter":
        return "interpreter"
    if itemsize == 4:
        return "fp32"
    if arch.startswith("gfx"):
        return "amd"
    capability = int(arch.removeprefix("sm_"))
    return "blackwell" if capability >= 100 else "hopper" if capability >= 90 else "ampere"


def linear_activation(n_rows: int, n_out: int, n_in: int, itemsize: int, arch: str) -> LinearActivationConfig:
    """The largest tiles of which the output has enough to keep a card busy; else the smallest.

    Of the inner dimension it matters only whether rows are aligned: none of the products of a BERT is deep enough to
    be split.
    """
    part = linear_activation_part(arch, itemsize)
    enough = ENOUGH.get(part, ENOUGH_ON_CARDS)
    for config in CONFIGS[part]:
        tiles = -(-n_rows // config.block_m) * -(-n_out // config.block_n)
        if tiles >= enough and (n_in % 16 == 0 or config.block_n <= MAX_UNALIGNED_N):
            return config
    return CONFIGS[part][-1]
