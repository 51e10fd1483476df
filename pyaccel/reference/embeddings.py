"""BERT's embeddings in plain torch: word + position + token type, LayerNorm, dropout: the definition.

Source: J. Devlin et al., arXiv:1810.04805 (2018), section 3; the dropout after the normalization is that of the code
published with it. Layer normalization: arXiv:1607.06450.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyaccel.reference.layernorm import normalize
from pyaccel.reference.philox import dropout


class BertEmbeddingsOutput(NamedTuple):
    """What the reference computes: output, sum of the rows, and its row statistics (fp64 truth, or fp32)."""

    output: Tensor
    sum: Tensor
    mean: Tensor
    rstd: Tensor


def packed_positions(cu_seqlens: Tensor, total_tokens: int) -> Tensor:
    """int64 ``[total_tokens]``: each packed token's index within its sequence; 0 beyond the last offset."""
    token = torch.arange(total_tokens, device=cu_seqlens.device)
    offsets = cu_seqlens.long()
    begun = torch.searchsorted(offsets, token, right=True)  # sequences that begin at or before the token
    inside = (begun > 0) & (begun < offsets.shape[0])
    return torch.where(inside, token - offsets[(begun - 1).clamp(min=0)], 0)


def _lookup(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of a table, whose gradient is summed in fp32 at least: a CPU adds 16-bit rows in 16 bits."""
    return table.to(torch.promote_types(table.dtype, torch.float32))[ids.long()].to(table.dtype)


def bert_embeddings(
    input_ids: Tensor,
    word_weight: Tensor,
    position_weight: Tensor | None,
    token_type_weight: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    padding_idx: int | None = None,
    dropout_key: Tensor | None = None,
    upcast: bool = True,
    out_dtype: torch.dtype | None = None,
) -> BertEmbeddingsOutput:
    """``dropout(LayerNorm(word + position + token type) * weight + bias)``.

    Args:
        input_ids: ``[batch, seq]``, or packed ``[total_tokens]``; any integer dtype.
        word_weight, position_weight, token_type_weight: ``[rows, hidden]`` of one floating dtype, the last two or None.
        weight, bias: ``[hidden]`` or None.
        position_ids: ``[seq]``, ``[1, seq]`` or of input_ids' shape; by default the index in the sequence.
        token_type_ids: of input_ids' shape; 0 by default.
        cu_seqlens: int32 ``[batch + 1]``, where the packed sequences begin and end.
        padding_idx: a row of ``word_weight`` that gets no gradient.
        dropout_key: int64 ``[2]``; needed where ``dropout_p > 0``. Rows are numbered over the flattened tokens.
        upcast: True computes and returns fp64, the truth. False is what good plain PyTorch does in the dtypes
            given: three lookups, two adds, ``F.layer_norm`` and a dropout, each rounded to its own dtype.
        out_dtype: dtype of the output where ``upcast`` is False; that of the tables by default.
    """
    if upcast:
        word_weight, out_dtype = word_weight.double(), torch.float64
        position_weight, token_type_weight, weight, bias = (
            None if t is None else t.double() for t in (position_weight, token_type_weight, weight, bias)
        )
    total = _lookup(word_weight, input_ids)
    if padding_idx is not None:
        padding = (input_ids == padding_idx % word_weight.shape[0]).unsqueeze(-1)
        total = torch.where(padding, total.detach(), total)
    if position_weight is not None:
        if position_ids is not None:
            positions = position_ids.long()
        elif cu_seqlens is not None:
            positions = packed_positions(cu_seqlens, input_ids.shape[0])
        else:
            positions = torch.arange(input_ids.shape[-1], device=input_ids.device)
        total = total + _lookup(position_weight, positions)
    if token_type_weight is not None:
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        total = total + _lookup(token_type_weight, types)

    hidden = total.shape[-1]
    output = normalize(total, weight, bias, eps=eps, rms_norm=False, out_dtype=out_dtype or word_weight.dtype)
    if dropout_p > 0.0:
        if dropout_key is None:
            raise ValueError("bert_embeddings: dropout_p > 0 needs a dropout_key to replay")
        output = dropout(output.reshape(-1, hidden), dropout_key, dropout_p).reshape(output.shape)
    stats = total.to(torch.float64 if upcast else torch.float32)
    mean = stats.mean(-1)
    variance = (stats - mean.unsqueeze(-1)).square().mean(-1)
    return BertEmbeddingsOutput(output, total, mean, torch.rsqrt(variance + eps))
