"""Launch configurations: frozen values, and the pure heuristics that give them.

A heuristic is a function of sizes and device alone, so that two runs launch the same programs and give the
same bits; nothing is timed at run time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from pyaccel.kernels.common.limits import MAX_ROW


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
    def blocks(self) -> dict[str, int]:
        """The kernels' constants."""
        return {"BLOCK_ROWS": self.block_rows, "BLOCK_N": self.block_n}

    @property
    def label(self) -> str:
        """A short name for tables."""
        grid = f", {self.programs_per_sm} programs an SM" if self.programs_per_sm else ""
        return (
            f"{self.block_rows}x{self.block_n}{' tiled' if self.tiled else ''}, {self.num_warps} warps{grid}"
        )


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 1).bit_length()


def check_row(n_cols: int) -> None:
    if not 1 <= n_cols <= MAX_ROW:
        raise ValueError(f"row kernels take rows of 1 to {MAX_ROW} elements, got {n_cols}")


def check_width(n_cols: int) -> None:
    if n_cols < 1:
        raise ValueError(f"rows have 1 element or more, got {n_cols}")


def persistent_programs(config: RowConfig, n_rows: int, num_sms: int) -> int:
    """Programs of a persistent row kernel: what the device holds at once, and no more than there are blocks."""
    return min(-(-n_rows // config.block_rows), config.programs_per_sm * num_sms)


def programs_per_column(config: RowConfig, n_rows: int, n_cols: int, num_sms: int) -> int:
    """Programs that share each block of columns of a persistent grid: the device's, spread over the blocks."""
    at_once = config.programs_per_sm * num_sms // -(-n_cols // config.block_n)
    return min(-(-n_rows // config.block_rows), max(at_once, 1))


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


@functools.lru_cache(maxsize=1024)
def column_sum() -> ColumnSumConfig:
    """One shape for every size: few columns a program, so that even 768 columns keep 24 programs busy."""
    return ColumnSumConfig(block_p=64, block_n=32, num_warps=4)


@dataclass(frozen=True)
class SegmentSumConfig:
    """How a segment sum cuts its rows ``[n_rows, n_cols]``.

    Attributes:
        chunk: sorted rows that a program walks.
        block_n, num_warps: its columns and warps.
        border_p, border_n, border_warps: chunks and columns that a program of the second kernel holds at a time, and
            its warps.
    """

    chunk: int
    block_n: int
    num_warps: int
    border_p: int
    border_n: int
    border_warps: int

    @property
    def label(self) -> str:
        """A short name for tables."""
        return f"{self.chunk} rows of {self.block_n}, {self.num_warps} warps"


def segment_sum(n_rows: int) -> SegmentSumConfig:
    """A warp a chunk, a row's width in 128-bit loads: many short chunks in flight hide the lookup's latency.

    Chunks are longer where there are rows enough to fill a device, so that what crosses borders stays little.
    """
    return SegmentSumConfig(32 if n_rows <= 65536 else 128, 256, 1, border_p=64, border_n=32, border_warps=4)


@dataclass(frozen=True)
class MatmulConfig:
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

    def tiles(self, n_rows: int, n_out: int) -> int:
        """How many the output has."""
        return -(-n_rows // self.block_m) * -(-n_out // self.block_n)


def enough_tiles(arch: str) -> int:
    """Tiles of the output from which on a device is busy: about as many as a large card has SMs."""
    return 6 if arch == "interpreter" else 96
