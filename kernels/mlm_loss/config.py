"""Launch configurations of the masked-language-model loss, and its chunks."""

from __future__ import annotations

from pyaccel.kernels.common.configs import RowConfig

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
