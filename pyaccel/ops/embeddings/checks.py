"""What bert_embeddings takes: every reason to refuse its arguments, and the check that ids are rows of their tables."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyaccel.ops import common
from pyaccel.ops.dropout import dropout_reasons

OP = "bert_embeddings"


class EmbeddingsCall(NamedTuple):
    """One call of :func:`pyaccel.ops.bert_embeddings`, whose arguments these are, under its names.

    ``dropout_p`` is 0 outside of training; ``out_dtype`` is the output's.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    token_type_ids: Tensor | None
    cu_seqlens: Tensor | None
    word_weight: Tensor
    position_weight: Tensor | None
    token_type_weight: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    dropout_p: float
    padding_idx: int | None
    out_dtype: torch.dtype

    @property
    def ids(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of words, positions and token types."""
        return self.input_ids, self.position_ids, self.token_type_ids

    @property
    def tables(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What they are looked up in."""
        return self.word_weight, self.position_weight, self.token_type_weight


def not_supported_reasons(call: EmbeddingsCall) -> list[str]:
    """Every reason why these arguments make no sense, on any backend; empty if they do. Looks at no id's value."""
    word_weight, cu_seqlens, padding_idx = call.word_weight, call.cu_seqlens, call.padding_idx
    reasons = dropout_reasons(call.dropout_p)
    if not call.eps >= 0.0:
        reasons.append(f"eps must be at least 0, got {call.eps}")
    if not word_weight.is_floating_point():
        reasons.append(f"word_weight must be of a floating dtype, got {word_weight.dtype}")
    if word_weight.ndim != 2 or 0 in word_weight.shape:
        return [
            *reasons,
            f"word_weight must be [vocab, hidden], each at least 1, got {tuple(word_weight.shape)}",
        ]
    vocab, hidden = word_weight.shape
    tables = {"position_weight": call.position_weight, "token_type_weight": call.token_type_weight}
    for name, table in tables.items():
        if table is None:
            continue
        if table.ndim != 2 or table.shape[1] != hidden or table.shape[0] == 0:
            reasons.append(
                f"{name} must be [rows, {hidden}], as wide as word_weight, got {tuple(table.shape)}"
            )
        if table.dtype != word_weight.dtype:
            reasons.append(f"{name} must be of word_weight's dtype {word_weight.dtype}, got {table.dtype}")
    vectors = {"weight": call.weight, "bias": call.bias}
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (hidden,):
            reasons.append(f"{name} must be [{hidden}], as wide as word_weight, got {tuple(vector.shape)}")
        if vector is not None and not vector.is_floating_point():
            reasons.append(f"{name} must be of a floating dtype, got {vector.dtype}")
    if padding_idx is not None and not -vocab <= padding_idx < vocab:
        reasons.append(f"padding_idx must be a row of word_weight, in [{-vocab}, {vocab}), got {padding_idx}")
    ids = dict(zip(("input_ids", "position_ids", "token_type_ids"), call.ids, strict=True))
    for name, given in ids.items():
        if given is not None and given.dtype not in (torch.int64, torch.int32):
            reasons.append(f"{name} must be int64 or int32, got {given.dtype}")
    if cu_seqlens is not None and (
        cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) == 0
    ):
        reasons.append(
            f"cu_seqlens must be int32 [batch + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    others: dict[str, Tensor | None] = {**ids, "cu_seqlens": cu_seqlens, **tables, **vectors}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != word_weight.device:
            reasons.append(
                f"{name} is on {tensor.device} and word_weight on {word_weight.device}: move one of them"
            )
    return reasons + _shape_reasons(call)


def _shape_reasons(call: EmbeddingsCall) -> list[str]:
    """What is wrong with the shapes of the ids, and with ids that have no table."""
    (input_ids, position_ids, token_type_ids), cu_seqlens = call.ids, call.cu_seqlens
    position_weight = call.position_weight
    shape = tuple(input_ids.shape)
    if len(shape) not in (1, 2):
        return [f"input_ids must be [batch, seq], or packed [total_tokens], got {shape}"]
    reasons, seq = [], shape[-1]
    if cu_seqlens is not None and len(shape) == 2:
        reasons.append(f"cu_seqlens is for packed input_ids [total_tokens], got {shape}: leave it out")
    if token_type_ids is not None and call.token_type_weight is None:
        reasons.append("token_type_ids were given without a token_type_weight to look them up in")
    if token_type_ids is not None and tuple(token_type_ids.shape) != shape:
        reasons.append(
            f"token_type_ids must have input_ids' shape {shape}, got {tuple(token_type_ids.shape)}"
        )
    if position_ids is not None:
        if position_weight is None:
            reasons.append("position_ids were given without a position_weight to look them up in")
        # Dimensions are counted first: a comparison of sizes would specialize a graph that is traced.
        fits = position_ids.ndim == 1 and position_ids.shape[0] == seq
        fits = fits or (position_ids.ndim == len(shape) == 2 and tuple(position_ids.shape) == shape)
        fits = fits or (position_ids.ndim == 2 and tuple(position_ids.shape) == (1, seq))
        if not fits:
            reasons.append(
                f"position_ids must be [{seq}], [1, {seq}] or of input_ids' shape {shape}, got "
                f"{tuple(position_ids.shape)}"
            )
    elif position_weight is not None and cu_seqlens is None:
        if len(shape) == 1:
            reasons.append("packed input_ids [total_tokens] need cu_seqlens or position_ids")
        elif seq > position_weight.shape[0]:
            reasons.append(
                f"input_ids are {seq} long and position_weight has {position_weight.shape[0]} rows: shorten them, or "
                f"pass position_ids"
            )
    return reasons


def out_of_range(name: str, size: int, packed: bool) -> str:
    table = {
        "input_ids": "word_weight",
        "position_ids": "position_weight",
        "token_type_ids": "token_type_weight",
    }
    what = "the positions that cu_seqlens gives" if packed and name == "position_ids" else name
    return f"pyaccel.ops.{OP}: {what} must be in [0, {size}), the rows of {table[name]}"


def check_range(name: str, ids: Tensor, size: int, packed: bool, at_once: bool) -> None:
    """Raise IndexError for an id that is no row of its table; not ``at_once``, leave that to the device."""
    right = (ids >= 0) & (ids < size)
    if not at_once:
        assert_later(right, out_of_range(name, size, packed))
    elif not right.all():
        raise IndexError(f"{out_of_range(name, size, packed)}, got {int(ids[~right][0])}")


def assert_later(right: Tensor, message: str) -> None:
    """Let the device find out whether all of ``right`` is True; under ``vmap``, of all examples together."""
    if torch.compiler.is_compiling():
        torch._assert_async(right.all(), message)
        return
    transformed = torch._C._are_functorch_transforms_active()
    while torch._C._functorch.is_functorch_wrapped_tensor(right):
        right = torch._C._functorch.get_unwrapped(right)
    if not (common.on_host(right) or (transformed and right.is_cpu)):
        torch._assert_async(right.all(), message)
    elif not right.all():
        raise IndexError(message)
