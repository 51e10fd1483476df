"""Launch configurations: frozen values, and the pure heuristics that give them.

A heuristic is a function of sizes and device alone, so that two runs launch the same programs and give the
same bits; nothing is timed at run time.
"""

from __future__ import annotations

import functools
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


@functools.lru_cache(maxsize=1024)
def residual_layernorm_forward(n_cols: int) -> RowConfig:
    """Rows stay in registers, several short rows a program.

    The number of rows plays no part: a row's bits don't depend on what it is batched with.
    """
    _check_row(n_cols)
    block_n = max(_next_power_of_2(n_cols), 64)
    # 16 elements a thread. Of 4096 columns 8: ptxas aims at 48 registers on sm_100 and misses it with int8 codes.
    return RowConfig(max(2048 // block_n, 1), block_n, num_warps=4 if block_n <= 2048 else 16)


@functools.lru_cache(maxsize=1024)
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


@functools.lru_cache(maxsize=1024)
def column_sum() -> ColumnSumConfig:
    """One shape for every size: few columns a program, so that even 768 columns keep 24 programs busy."""
    return ColumnSumConfig(block_p=64, block_n=32, num_warps=4)


def persistent_programs(config: RowConfig, n_rows: int, num_sms: int) -> int:
    """Programs of a persistent row kernel: what the device holds at once, and no more than there are blocks."""
    return min(-(-n_rows // config.block_rows), config.programs_per_sm * num_sms)


def bert_embeddings_forward(n_cols: int) -> RowConfig:
    """As :func:`residual_layernorm_forward`, in four shapes: BERT's hidden sizes are 384, 768 and 1024."""
    _check_row(n_cols)
    return residual_layernorm_forward(next(n for n in (512, 1024, 4096, MAX_ROW) if n_cols <= n))


def bert_embeddings_backward(n_cols: int) -> RowConfig:
    """A persistent grid; rows above 1024 are tiled: rows of three tables and two column sums are to be held."""
    _check_row(n_cols)
    if n_cols > 1024:
        return RowConfig(4, 1024, num_warps=16, programs_per_sm=1, tiled=True)
    block_n = 512 if n_cols <= 512 else 1024
    return RowConfig(2048 // block_n, block_n, num_warps=8, programs_per_sm=2)


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


# A chunk of logits: large enough for matrix products at full speed, small beside a layer's activations.
CROSS_ENTROPY_CHUNK_BYTES = 128 * 2**20
CROSS_ENTROPY_MIN_CHUNK = 256


def cross_entropy(n_cols: int) -> RowConfig:
    """A row of the vocabulary in tiles, 8 elements a thread: with 16, beside a maximum and a sum each, it spills."""
    block_n = 1024 if n_cols <= 1024 else 2048
    return RowConfig(1, block_n, num_warps=block_n // 256, tiled=True)


def cross_entropy_width(n_cols: int) -> int:
    """Columns of the buffer that holds rows of ``n_cols`` logits: each row starts at a multiple of 128 bytes."""
    return -(-n_cols // 64) * 64


def cross_entropy_chunk(n_cols: int, itemsize: int) -> int:
    """Rows of logits that are held at a time: 2048 of BERT's vocabulary in 16 bits."""
    rows = CROSS_ENTROPY_CHUNK_BYTES // (cross_entropy_width(n_cols) * itemsize)
    return max(1 << max(rows, 1).bit_length() - 1, CROSS_ENTROPY_MIN_CHUNK)


@functools.lru_cache(maxsize=1024)
def bias_gelu_forward(n_cols: int) -> RowConfig:
    """Tiles of 16 elements a thread. The widths of feed-forward layers are multiples of 512."""
    _check_width(n_cols)
    block_n = 512 if n_cols >= 512 else 128
    return RowConfig(2048 // block_n, block_n, num_warps=4)


@functools.lru_cache(maxsize=1024)
def bias_gelu_backward(n_cols: int) -> RowConfig:
    """A persistent grid of tiles: 8 elements a thread of each gradient and of the column sums, 32 warps an SM."""
    _check_width(n_cols)
    block_n = 512 if n_cols >= 512 else 128
    return RowConfig(2048 // block_n, block_n, num_warps=8, programs_per_sm=4)


def bias_gelu_quantize(n_cols: int) -> RowConfig:
    """Rows stay in registers, 16 elements a thread or 32: a row needs its largest value before its first code."""
    _check_row(n_cols)
    block_n = max(_next_power_of_2(n_cols), 512)
    return RowConfig(max(2048 // block_n, 1), block_n, num_warps=min(max(block_n // 512, 4), 16))


def quantize(n_cols: int) -> RowConfig:
    """Whole rows, as :func:`bias_gelu_quantize`; of 4096 columns 8 elements a thread, see the LayerNorm above."""
    _check_row(n_cols)
    block_n = max(_next_power_of_2(n_cols), 512)
    return RowConfig(max(2048 // block_n, 1), block_n, num_warps=4 if block_n <= 2048 else 16)


def quantize_by_given_scale(n_cols: int) -> RowConfig:
    """As :func:`bias_gelu_forward`: tiles."""
    return bias_gelu_forward(n_cols)


def int8_row_sum() -> RowConfig:
    """8 rows a program, 16 bytes a thread: even 384 rows keep 48 programs busy."""
    return RowConfig(8, 256, num_warps=4, tiled=True)


MAX_CODES_ROW = 8192  # longer rows don't fit in registers beside their residual


def int8_finish(n_cols: int, *, quantize: bool) -> RowConfig:
    """Whole rows where they are quantised; else tiles of one row, since it is few rows that a split product has."""
    if quantize:
        if n_cols > MAX_CODES_ROW:
            raise ValueError(f"rows of {MAX_CODES_ROW} elements at most are quantised again, got {n_cols}")
        return bias_gelu_quantize(n_cols)
    _check_width(n_cols)
    return RowConfig(1, 512, num_warps=2)


def programs_per_column(config: RowConfig, n_rows: int, n_cols: int, num_sms: int) -> int:
    """Programs that share each block of columns of a persistent grid: the device's, spread over the blocks."""
    at_once = config.programs_per_sm * num_sms // -(-n_cols // config.block_n)
    return min(-(-n_rows // config.block_rows), max(at_once, 1))


def _check_width(n_cols: int) -> None:
    if n_cols < 1:
        raise ValueError(f"rows have 1 element or more, got {n_cols}")
