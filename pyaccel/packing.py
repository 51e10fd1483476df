"""Padded <-> packed: drop the padding once, work on real tokens only, put the padding back once.

A padded batch `[batch, seq, ...]` with a mask becomes one buffer `[total_tokens, ...]` in which the sequences
lie one behind the other. `cu_seqlens` (int32 `[batch + 1]`) says where each begins and ends, as in
FlashAttention: sequence `i` is `packed[cu_seqlens[i]:cu_seqlens[i + 1]]`.

    tokens = layout(attention_mask)
    hidden = pack(embeddings, tokens)        # [total_tokens, hidden_size]
    ...                                      # row-wise layers as they are; attention gets tokens.cu_seqlens
    output = unpack(hidden, tokens)          # [batch, seq, hidden_size], zeros where there was padding

A mask is `[batch, seq]`, bool, integer or floating point. A nonzero entry is a token, zero is padding; values
are not required to be 0 or 1, because looking at them would make a GPU wait. Padding may be anywhere: right,
left, holes, whole rows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = ["PackedLayout", "cu_seqlens", "layout", "layout_from_cu_seqlens", "pack", "unpack"]


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Where each packed token sits in the padded batch, and where each sequence sits in the packed buffer.

    Queries are all packed tokens. Keys and values are the same tokens, unless `layout(..., keep_first=True)`
    had to keep a padding slot: then `key_indices` picks the rows of the packed buffer that may be attended
    to, and `cu_seqlens_k` and `max_seqlen_k` describe the picked rows. Otherwise `key_indices` is None and
    `cu_seqlens_k is cu_seqlens`.
    """

    indices: Tensor  # int64 [total_tokens]: flat position in the padded [batch * seq], each at most once
    cu_seqlens: Tensor  # int32 [batch + 1]
    max_seqlen: int
    batch_size: int
    seq_len: int
    key_indices: Tensor | None  # int64 [total_keys]: rows of the packed buffer, or None for all of them
    cu_seqlens_k: Tensor  # int32 [batch + 1]
    max_seqlen_k: int

    @property
    def total_tokens(self) -> int:
        return self.indices.shape[0]

    @property
    def is_padded_batch(self) -> bool:
        """Whether the packed buffer is the padded batch, row by row: no padding, and nothing was sorted."""
        # Equal lengths are left in their order; with `key_indices` they need not be.
        return self.key_indices is None and self.total_tokens == self.batch_size * self.seq_len

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each packed sequence. Waits for the device, once."""
        return self.cu_seqlens.diff().tolist()

    @property
    def positions(self) -> Tensor:
        """int64 [total_tokens]: each packed token's column in the padded batch (BERT's position ids)."""
        return self.indices % self.seq_len


def cu_seqlens(attention_mask: Tensor) -> Tensor:
    """int32 `[batch + 1]`: cumulated tokens per row of a `[batch, seq]` mask, starting with 0.

    Raises ValueError for a mask that is not 2-D. Does not wait for the device.
    """
    return _cumulated(_tokens(attention_mask).sum(1))


def layout(attention_mask: Tensor, *, sort_by_length: bool = False, keep_first: bool = False) -> PackedLayout:
    """The packed layout of a `[batch, seq]` mask, nonzero = token. Waits for the device: sizes depend on it.

    sort_by_length: put the sequences into the packed buffer shortest first (rows of equal length in their
        order), so that sequences of equal length are neighbors and attention can take them in one call.
        Sequence `i` of `cu_seqlens` is then no longer row `i`; `pack` and `unpack` do not care.
    keep_first: pack position 0 of every row even where it is padding, as a query that nobody attends to.
        BERT's pooler and all heads over whole sequences read that position, and in a left-padded row stock
        models compute a real value there. Costs nothing where position 0 is a token in every row.

    Raises ValueError for a mask that is not 2-D.
    """
    keys = _tokens(attention_mask)
    batch_size, seq_len = keys.shape
    if keys.device.type == "cpu":
        if bool(keys.all()):
            return _full(batch_size, seq_len, keys.device)
        if not keep_first or bool(keys[:, 0].all()):
            return _on_host(keys, sort_by_length)
    queries = keys
    if keep_first and seq_len:
        queries = keys.clone()
        queries[:, 0] = True

    lengths, lengths_k = queries.sum(1), keys.sum(1)
    if sort_by_length:
        # A row has at most one query more than it has keys: this orders by (keys, queries).
        order = torch.argsort(lengths + lengths_k, stable=True)
        lengths, lengths_k = lengths[order], lengths_k[order]
        row, column = queries[order].nonzero(as_tuple=True)
        indices = order[row] * seq_len + column
    else:
        indices = queries.flatten().nonzero().flatten()

    max_seqlen, max_seqlen_k, only_queries = 0, 0, 0
    if batch_size:
        sizes = torch.stack([lengths.max(), lengths_k.max(), (lengths - lengths_k).sum()])
        max_seqlen, max_seqlen_k, only_queries = sizes.tolist()  # all in one, a GPU waits once
    offsets = _cumulated(lengths)
    return PackedLayout(
        indices=indices,
        cu_seqlens=offsets,
        max_seqlen=max_seqlen,
        batch_size=batch_size,
        seq_len=seq_len,
        key_indices=keys.flatten()[indices].nonzero().flatten() if only_queries else None,
        cu_seqlens_k=_cumulated(lengths_k) if only_queries else offsets,
        max_seqlen_k=max_seqlen_k,
    )


def layout_from_cu_seqlens(cu_seqlens: Tensor, max_seqlen: int, total_tokens: int) -> PackedLayout:
    """The layout of a buffer that is packed already, as if packed from a right-padded `[batch, max_seqlen]`.

    cu_seqlens: integer `[batch + 1]`, from 0, never falling, ending at `total_tokens`. max_seqlen: the
    longest sequence. Both are trusted on a GPU (looking would make it wait) and checked on the CPU:
    ValueError.
    """
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"pyaccel.packing: cu_seqlens must be an integer tensor [batch + 1], got {cu_seqlens.dtype} "
            f"{tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device.type == "cpu":
        lengths = cu_seqlens.diff()
        ok = int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == total_tokens
        if not (ok and bool(((lengths >= 0) & (lengths <= max_seqlen)).all())):
            raise ValueError(
                f"pyaccel.packing: cu_seqlens must rise from 0 to the number of tokens ({total_tokens}) in "
                f"steps of at most max_seqlen ({max_seqlen}), got {cu_seqlens.tolist()}"
            )
    offsets = cu_seqlens.to(torch.int32)
    token = torch.arange(total_tokens, device=offsets.device)
    sequence = torch.searchsorted(offsets[1:], token.int(), right=True)  # an empty sequence owns no token
    indices = sequence * max_seqlen + token - offsets[sequence]
    return _of_own_keys(indices, offsets, max_seqlen, len(offsets) - 1, max_seqlen)


def pack(padded: Tensor, layout: PackedLayout) -> Tensor:
    """`[batch, seq, ...]` -> `[total_tokens, ...]`, differentiable (padding gets gradient 0), deterministic.

    Raises ValueError when the first two sizes are not the layout's.
    """
    if padded.shape[:2] != (layout.batch_size, layout.seq_len):
        raise ValueError(
            f"pyaccel.packing.pack: the layout is of [{layout.batch_size}, {layout.seq_len}, ...], "
            f"got a tensor {tuple(padded.shape)}"
        )
    rows = padded.flatten(0, 1)
    if torch.is_grad_enabled() and rows.requires_grad:
        gathered: Tensor = _Gather.apply(rows, layout.indices)
        return gathered
    return rows.index_select(0, layout.indices)


def unpack(packed: Tensor, layout: PackedLayout) -> Tensor:
    """`[total_tokens, ...]` -> `[batch, seq, ...]`, zeros in the padding. Differentiable, deterministic.

    Raises ValueError when `packed` has another number of tokens than the layout.
    """
    if packed.dim() == 0 or packed.shape[0] != layout.total_tokens:
        raise ValueError(
            f"pyaccel.packing.unpack: the layout has {layout.total_tokens} tokens, "
            f"got a tensor {tuple(packed.shape)}"
        )
    shape = (layout.batch_size, layout.seq_len, *packed.shape[1:])
    if torch.is_grad_enabled():
        return _scatter(packed, layout.indices, layout.batch_size * layout.seq_len).view(shape)
    # Not a view: one made under no_grad can't be changed in place where gradients are recorded.
    padded = packed.new_zeros(shape)
    padded.flatten(0, 1).index_copy_(0, layout.indices, packed)
    return padded


class _Gather(torch.autograd.Function):
    """index_select for indices that occur once. Its own backward adds (atomics on a GPU, a sort when asked to
    be deterministic); with unique indices a plain store per row is enough."""

    generate_vmap_rule = True

    @staticmethod
    def forward(source: Tensor, indices: Tensor) -> Tensor:
        return source.index_select(0, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        source, indices = inputs
        ctx.rows = source.shape[0]
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return _scatter(grad, indices, ctx.rows), None


def _scatter(source: Tensor, indices: Tensor, rows: int) -> Tensor:
    return source.new_zeros(rows, *source.shape[1:]).index_copy_(0, indices, source)


def _full(batch_size: int, seq_len: int, device: torch.device) -> PackedLayout:
    """The layout of a batch without padding: there is nothing to look for."""
    offsets = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * seq_len
    indices = torch.arange(batch_size * seq_len, device=device)
    longest = seq_len if batch_size else 0
    return _of_own_keys(indices, offsets, longest, batch_size, seq_len, [seq_len] * batch_size)


def _on_host(keys: Tensor, sort_by_length: bool) -> PackedLayout:
    """The layout of a bool mask on the CPU whose queries are its keys, by as few torch calls as will do."""
    batch_size, seq_len = keys.shape
    lengths = keys.sum(1).tolist()
    order = sorted(range(batch_size), key=lengths.__getitem__) if sort_by_length else list(range(batch_size))
    if order == list(range(batch_size)):
        indices = keys.flatten().nonzero().flatten()
    else:
        by_length = torch.tensor(order, device=keys.device)
        row, column = keys[by_length].nonzero(as_tuple=True)
        indices = by_length[row] * seq_len + column
        lengths = list(map(lengths.__getitem__, order))
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=keys.device)
    return _of_own_keys(indices, offsets, max(lengths, default=0), batch_size, seq_len, lengths)


def _of_own_keys(
    indices: Tensor,
    offsets: Tensor,
    longest: int,
    batch_size: int,
    seq_len: int,
    lengths: list[int] | None = None,
) -> PackedLayout:
    """The layout of a buffer in which every token is a query and a key; ``lengths`` where the host knows them."""
    made = PackedLayout(
        indices=indices,
        cu_seqlens=offsets,
        max_seqlen=longest,
        batch_size=batch_size,
        seq_len=seq_len,
        key_indices=None,
        cu_seqlens_k=offsets,
        max_seqlen_k=longest,
    )
    if lengths is not None:
        made.__dict__["lengths"] = lengths  # where the cached property keeps it
    return made


def _cumulated(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _tokens(attention_mask: Tensor) -> Tensor:
    if attention_mask.dim() != 2:
        raise ValueError(
            f"pyaccel.packing: attention_mask must be [batch, seq] with nonzero for tokens, got "
            f"{tuple(attention_mask.shape)}; a mask per query and key has no packed form"
        )
    additive = attention_mask.is_floating_point() and attention_mask.device.type == "cpu"
    if additive and bool((attention_mask < 0).any()):
        raise ValueError(
            "pyaccel.packing: attention_mask has negative entries, like an additive mask (0 = token); "
            "pass 1 (or True) for tokens and 0 for padding, e.g. attention_mask == 0"
        )
    return attention_mask != 0
