"""The Triton backend of bert_embeddings: its registered ops, their autograd Function, and what calls them.

Arguments are checked by :mod:`pyaccel.ops.embeddings.api`, which calls this. Forward is one kernel; backward one pass
over the rows and a deterministic sum for each table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyaccel.ops.common import custom_op, differentiable_once
from pyaccel.ops.embeddings.checks import EmbeddingsCall

# --- registered ops -------------------------------------------------------------------------------------------
# Functional, of fixed arity and without aliases: what isn't wanted comes back as a tensor of size 0.
# Ids are flat [tokens]; token i is at position position_ids[i % period], or i % period.


def _forward_outputs(
    input_ids: Tensor, cu_seqlens: Tensor | None, word_weight: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens = input_ids.shape[0]
    return (
        word_weight.new_empty(tokens, word_weight.shape[1], dtype=out_dtype),
        word_weight.new_empty(tokens, dtype=torch.float32),
        word_weight.new_empty(tokens, dtype=torch.float32),
        word_weight.new_empty(0 if cu_seqlens is None else tokens, dtype=torch.int32),
        word_weight.new_empty(3, tokens, dtype=torch.bool),
    )


@custom_op("pyaccel::bert_embeddings_forward", _forward_outputs)
def forward_op(
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    word_weight: Tensor,
    position_weight: Tensor | None,
    token_type_weight: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_key: Tensor | None,
    period: int,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output ``[tokens, hidden]``, mean and rstd ``[tokens]`` fp32, the positions that cu_seqlens gives, int32
    ``[tokens]`` or size 0, and whether word, position and type ids are in range, bool ``[3, tokens]``."""
    from pyaccel.kernels.embeddings import config
    from pyaccel.kernels.embeddings import forward as bert_embeddings

    out, mean, rstd, positions, in_range = _forward_outputs(input_ids, cu_seqlens, word_weight, out_dtype)
    tables = (word_weight, position_weight, token_type_weight)
    bert_embeddings.forward(
        out,
        mean,
        rstd,
        None if cu_seqlens is None else positions,
        in_range,
        bert_embeddings.Lookup(input_ids, position_ids, token_type_ids, *tables, period),
        cu_seqlens,
        weight,
        bias,
        dropout_key,
        eps,
        dropout_p,
        config.bert_embeddings_forward(word_weight.shape[1]),
    )
    return out, mean, rstd, positions, in_range


def _backward_outputs(
    word_weight: Tensor,
    position_weight: Tensor | None,
    token_type_weight: Tensor | None,
    want_dword: bool,
    want_dposition: bool,
    want_dtype: bool,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden = word_weight.shape[1]

    def table(t: Tensor | None, wanted: bool) -> Tensor:
        # Dense and 0 where no token is, as nn.Embedding's; contiguous, whatever the table's strides.
        return word_weight.new_zeros(0 if t is None or not wanted else t.shape[0], hidden)

    def vector(dtype: torch.dtype | None) -> Tensor:
        return word_weight.new_empty(0 if dtype is None else hidden, dtype=dtype)

    return (
        table(word_weight, want_dword),
        table(position_weight, want_dposition),
        table(token_type_weight, want_dtype),
        vector(dweight_dtype),
        vector(dbias_dtype),
    )


@custom_op("pyaccel::bert_embeddings_backward", _backward_outputs)
def backward_op(
    dy: Tensor,
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word_weight: Tensor,
    position_weight: Tensor | None,
    token_type_weight: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_key: Tensor | None,
    period: int,
    dropout_p: float,
    padding_idx: int,
    want_dword: bool,
    want_dposition: bool,
    want_dtype: bool,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the three tables, weight and bias; size 0 for what isn't wanted. ``padding_idx`` -1 is none."""
    from pyaccel.kernels.common import configs
    from pyaccel.kernels.common import reduce as column_sum
    from pyaccel.kernels.common.device import device_info
    from pyaccel.kernels.embeddings import backward as bert_embeddings_backward
    from pyaccel.kernels.embeddings import config
    from pyaccel.kernels.embeddings import forward as bert_embeddings

    tables = (word_weight, position_weight, token_type_weight)
    want = (want_dword, want_dposition, want_dtype)
    grads = _backward_outputs(*tables, *want, dweight_dtype, dbias_dtype)
    tokens, hidden = dy.shape
    row_config = config.bert_embeddings_backward(hidden)
    n_programs = configs.persistent_programs(row_config, tokens, device_info(dy.device).num_sms)
    # In the tables' dtype, as every other activation's gradient: sums of it are the tables' gradients, in fp32. Of the
    # bytes that backward moves, it is the most.
    dz = dy.new_empty(tokens, hidden, dtype=word_weight.dtype) if any(want) else None
    dweight = None if dweight_dtype is None else grads[3]
    dbias = None if dbias_dtype is None else grads[4]
    dweight_partial, dbias_partial = (
        None if grad is None else grad.new_empty(n_programs, hidden, dtype=torch.float32)
        for grad in (dweight, dbias)
    )
    bert_embeddings_backward.backward(
        dz,
        dweight_partial,
        dbias_partial,
        dy,
        mean,
        rstd,
        bert_embeddings.Lookup(input_ids, position_ids, token_type_ids, *tables, period),
        weight,
        dropout_key,
        dropout_p,
        n_programs,
        row_config,
    )
    column_sum.column_sum(
        (dweight, dbias, None), (dweight_partial, dbias_partial, None), configs.column_sum()
    )
    if dz is not None:
        if want_dword:
            _table_gradient(grads[0], dz, *_sorted(input_ids), padding_idx)
        if want_dposition:
            _table_gradient(grads[1], dz, *_sorted_positions(position_ids, input_ids, period), -1)
        if want_dtype:
            _table_gradient(grads[2], dz, *_sorted_types(token_type_ids, input_ids), -1)
    return grads


def _table_gradient(grad: Tensor, dz: Tensor, ids: Tensor, order: Tensor | None, skip: int) -> None:
    from pyaccel.kernels.common import configs, segment_sum

    segment_sum.segment_sum(grad, dz, ids, order, skip, configs.segment_sum(dz.shape[0]))


def _sorted(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted ids, and the token of each; equal ids in the order of their tokens."""
    return torch.sort(ids, stable=True)


def _sorted_positions(
    position_ids: Tensor | None, input_ids: Tensor, period: int
) -> tuple[Tensor, Tensor | None]:
    sequences = input_ids.shape[0] // max(period, 1)
    if position_ids is not None:
        return _sorted(position_ids.repeat(sequences))
    # Without given ids nothing has to be sorted: the tokens of one position are a period apart.
    tokens = torch.arange(input_ids.shape[0], device=input_ids.device)
    order = tokens.view(sequences, period).t().reshape(-1)
    return order % max(period, 1), order


def _sorted_types(token_type_ids: Tensor | None, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
    return (torch.zeros_like(input_ids), None) if token_type_ids is None else _sorted(token_type_ids)


backward_once = differentiable_once(
    backward_op, "bert_embeddings", "pyaccel.use_backend('torch', ops=['bert_embeddings'])"
)


# --- autograd -------------------------------------------------------------------------------------------------


class BertEmbeddingsFunction(torch.autograd.Function):
    """Saves ids, mean and rstd in fp32 and the dropout key; the sum is looked up again, the mask drawn again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input_ids: Tensor,
        position_ids: Tensor | None,
        token_type_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        word_weight: Tensor,
        position_weight: Tensor | None,
        token_type_weight: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        key: Tensor | None,
        numbers: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What :func:`forward_op` gives; the output alone carries a gradient. numbers: its last four, padding_idx."""
        tables = (word_weight, position_weight, token_type_weight)
        ids = (input_ids, position_ids, token_type_ids, cu_seqlens)
        return forward_op(*ids, *tables, weight, bias, key, *numbers[:4])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input_ids, position_ids, token_type_ids, cu_seqlens, *tables, weight, bias, key, numbers = inputs
        _, mean, rstd, positions, _ = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        if cu_seqlens is not None:
            position_ids = positions
        ids = (input_ids, position_ids, token_type_ids)
        ctx.save_for_backward(*ids, *tables, weight, mean, rstd, key)
        period, _, dropout_p, _, padding_idx = numbers
        ctx.numbers = (period, dropout_p, padding_idx)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        if dy is None:
            return (None,) * 11
        needed = ctx.needs_input_grad[4:9]
        dtypes = (d if n else None for d, n in zip(ctx.dtypes, needed[3:], strict=True))
        out = backward_once(dy, *ctx.saved_tensors, *ctx.numbers, *needed[:3], *dtypes)
        wanted = (g if n else None for g, n in zip(out, needed, strict=True))
        return *(None,) * 4, *wanted, None, None


def bert_embeddings(call: EmbeddingsCall, key: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output ``[*input_ids.shape, hidden]``, and whether word, position and type ids are in range ``[3, tokens]``.

    The kernel looks at every id, and reads nothing outside of a table whatever it is.
    """
    input_ids, position_ids, word_weight = call.input_ids, call.position_ids, call.word_weight
    by_token = (
        position_ids is not None
        and position_ids.ndim == input_ids.ndim
        and position_ids.shape == input_ids.shape
    )
    period = input_ids.numel() if by_token or input_ids.ndim == 1 else input_ids.shape[1]
    ids = (None if t is None else t.reshape(-1).contiguous() for t in call[:4])
    vectors = (None if t is None else t.contiguous() for t in (call.weight, call.bias))
    args = (*ids, *call.tables, *vectors, key)
    numbers = (period, call.eps, call.dropout_p, call.out_dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call[4:9]):
        padding = -1 if call.padding_idx is None else call.padding_idx % word_weight.shape[0]
        out, _, _, _, in_range = BertEmbeddingsFunction.apply(*args, (*numbers, padding))
    else:
        out, _, _, _, in_range = forward_op(*args, *numbers)
    return out.view(*input_ids.shape, word_weight.shape[1]), in_range
