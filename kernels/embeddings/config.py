"""Launch configurations of bert_embeddings."""

from __future__ import annotations

from pyaccel.kernels.common.configs import RowConfig, check_row
from pyaccel.kernels.common.limits import MAX_ROW
from pyaccel.kernels.layernorm.config import residual_layernorm_forward


def bert_embeddings_forward(n_cols: int) -> RowConfig:
    """As :func:`residual_layernorm_forward`, in four shapes: BERT's hidden sizes are 384, 768 and 1024."""
    check_row(n_cols)
    return residual_layernorm_forward(next(n for n in (512, 1024, 4096, MAX_ROW) if n_cols <= n))


def bert_embeddings_backward(n_cols: int) -> RowConfig:
    """A persistent grid; rows above 1024 are tiled: rows of three tables and two column sums are to be held."""
    check_row(n_cols)
    if n_cols > 1024:
        return RowConfig(4, 1024, num_warps=16, programs_per_sm=1, tiled=True)
    block_n = 512 if n_cols <= 512 else 1024
    return RowConfig(2048 // block_n, block_n, num_warps=8, programs_per_sm=2)
