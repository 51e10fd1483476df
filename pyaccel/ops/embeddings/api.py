"""BERT's embeddings: word, position and token type lookup, LayerNorm and dropout.

Source: arXiv:1810.04805, section 3; LayerNorm, arXiv:1607.06450. The Triton backend's ops are in
:mod:`pyaccel.ops.embeddings.triton`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch, reference, triton_support, tuning
from pyaccel.kernels.common.limits import MAX_ROW
from pyaccel.ops import common
from pyaccel.ops.common import autocast_dtype
from pyaccel.ops.dropout import dropout_key
from pyaccel.ops.embeddings import triton as triton_backend
from pyaccel.ops.embeddings.checks import (
    OP,
    EmbeddingsCall,
    assert_later,
    check_range,
    not_supported_reasons,
    out_of_range,
)
from pyaccel.reference.embeddings import packed_positions
from pyaccel.reference.layernorm import normalize

_IDS = ("input_ids", "position_ids", "token_type_ids")


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
    training: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """``dropout(LayerNorm(word + position + token type) * weight + bias)`` of padded or packed ids, in one pass.

    Args:
        input_ids: int64 or int32, padded ``[batch, seq]`` or packed ``[total_tokens]``; any strides.
        word_weight: ``[vocab, hidden]``, floating; any strides.
        position_weight: ``[positions, hidden]`` of the same dtype, or None (models with rotary positions).
        token_type_weight: ``[types, hidden]`` of the same dtype, or None (models without types).
        weight, bias: ``[hidden]``, the affine parameters of the LayerNorm in any floating dtype, or None.
        position_ids: ``[seq]``, ``[1, seq]`` or of input_ids' shape; it goes before cu_seqlens. By default
            ``arange(seq)``, and for packed ids the index within the sequence.
        token_type_ids: of input_ids' shape; 0 by default.
        cu_seqlens: int32 ``[batch + 1]``, where packed sequences begin and end. Tokens beyond the last offset are at
            position 0.
        eps: added to the variance; BERT's 1e-12 by default (not torch's 1e-5).
        dropout_p: probability of dropping an element of the output; it counts only in training.
        training: whether dropout is active.
        padding_idx: the row of word_weight that gets no gradient, as in ``nn.Embedding``.

    Returns:
        ``[*input_ids.shape, hidden]`` in word_weight's dtype; under autocast in float32, as ``F.layer_norm``'s output
        is. On Triton the sum isn't rounded, and statistics are fp32.

    Gradients of the tables are dense, and on Triton deterministic: every row's is a sum in a fixed order, in fp32.
    Triton serves float32, float16 and bfloat16 and hidden sizes of up to 16384. The Triton and reference backends draw
    the same dropout mask (:func:`pyaccel.reference.philox.keep_mask`), whose rows are the flattened tokens; the torch
    backend uses ``F.dropout``.

    Raises:
        ValueError: naming every argument that makes no sense.
        IndexError: an id that is not a row of its table, on the CPU. On a GPU, which isn't waited for, and in a
            compiled graph it is an assertion that says the same but for the id.
        pyaccel.errors.NotSupportedError: the backend asked for can't serve this call.
    """
    device = word_weight.device
    call = EmbeddingsCall(
        input_ids, position_ids, token_type_ids, cu_seqlens, word_weight, position_weight, token_type_weight, weight,
        bias, eps, dropout_p, padding_idx,
        word_weight.dtype if autocast_dtype(device) is None else torch.float32,
    )  # fmt: skip
    dispatch.invalid(OP, not_supported_reasons(call))
    packed = cu_seqlens if position_ids is None and position_weight is not None else None
    call = call._replace(dropout_p=dropout_p if training else 0.0, cu_seqlens=packed)
    backend = _choose(call).backend
    at_once = common.on_host(word_weight) and common.on_host(input_ids)
    if backend != "triton" or at_once:
        placed = (
            call
            if packed is None
            else call._replace(position_ids=packed_positions(packed, input_ids.shape[0]))
        )
        for name, ids, table in zip(_IDS, placed.ids, call.tables, strict=True):
            if ids is not None and table is not None:
                check_range(name, ids, table.shape[0], packed is not None, at_once)
        if backend == "torch":
            return _torch_backend(placed)
    key = dropout_key(device) if call.dropout_p > 0.0 else None
    if backend == "reference":
        return reference.bert_embeddings(
            input_ids,
            *call.tables,
            weight,
            bias,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            cu_seqlens=packed,
            eps=eps,
            dropout_p=call.dropout_p,
            padding_idx=padding_idx,
            dropout_key=key,
            upcast=False,
            out_dtype=call.out_dtype,
        ).output
    out, in_range = triton_backend.bert_embeddings(call, key)
    if not at_once:
        # The kernel has looked at every id, and reads nothing outside of a table whatever it is.
        looked_up = (input_ids, position_ids if packed is None else packed, token_type_ids)
        for name, ids, right, table in zip(_IDS, looked_up, in_range.unbind(), call.tables, strict=True):
            if ids is not None and table is not None:
                assert_later(right, out_of_range(name, table.shape[0], packed is not None))
    return out


def _choose(call: EmbeddingsCall) -> dispatch.Choice:
    word_weight = call.word_weight
    triton = triton_support.unsupported_reasons(*call.tables, call.weight, call.bias)
    if word_weight.shape[1] > MAX_ROW:
        triton.append(f"the kernels take hidden sizes of up to {MAX_ROW}, not {word_weight.shape[1]}")
    served: dict[str, list[str]] = {"triton": triton, "torch": [], "reference": []}
    if word_weight.device.type == "cpu":
        return dispatch.choose(OP, served, "torch", "on the CPU")
    size = (call.input_ids.numel(), word_weight.shape[1])
    measured = tuning.preferred(OP, word_weight.device, word_weight.dtype, size, ("triton", "torch"))
    return dispatch.choose(OP, served, *measured)


def _torch_backend(call: EmbeddingsCall) -> Tensor:
    (input_ids, position_ids, token_type_ids), dropout_p = call.ids, call.dropout_p
    word_weight, position_weight, token_type_weight = call.tables
    total = _lookup(input_ids, word_weight, call.padding_idx)
    if token_type_weight is not None:
        types = token_type_weight[0] if token_type_ids is None else _lookup(token_type_ids, token_type_weight)
        total = total + types
    if position_weight is not None:
        if position_ids is None:
            total = total + position_weight[: input_ids.shape[1]]
        else:
            total = total + _lookup(position_ids, position_weight)
    out = normalize(total, call.weight, call.bias, eps=call.eps, rms_norm=False, out_dtype=call.out_dtype)
    return F.dropout(out, dropout_p) if dropout_p > 0.0 else out


class LookupFunction(torch.autograd.Function):
    """``F.embedding``, whose gradient is summed in fp32 and rounded once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(ids: Tensor, table: Tensor, padding_idx: int | None) -> Tensor:
        """The rows ``[*ids.shape, hidden]``."""
        return F.embedding(ids, table, padding_idx)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ids, table, padding_idx = inputs
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype = table.shape[0], table.dtype
        ctx.padding = None if padding_idx is None else padding_idx % table.shape[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        ids, rows = ids.reshape(-1), grad.reshape(-1, grad.shape[-1]).float()
        if ctx.padding is not None:
            rows = rows.masked_fill((ids == ctx.padding).unsqueeze(-1), 0.0)
        total = rows.new_zeros(ctx.rows, rows.shape[-1]).index_add(0, ids, rows)
        return None, total.to(ctx.dtype), None


def _lookup(ids: Tensor, table: Tensor, padding_idx: int | None = None) -> Tensor:
    """``F.embedding``. On a CPU PyTorch adds the gradients of 16-bit rows in 16 bits, where 256 of one token stick."""
    if table.is_cpu and table.dtype.itemsize == 2 and torch.is_grad_enabled() and table.requires_grad:
        out: Tensor = LookupFunction.apply(ids, table, padding_idx)
        return out
    return F.embedding(ids, table, padding_idx)
