"""BERT's embeddings: the registered ops, their autograd Function and the public function.

Word, position and token type lookup, LayerNorm and dropout as one kernel forward; backward one pass over the rows and
a deterministic sum for each table. Source: arXiv:1810.04805, section 3; LayerNorm, arXiv:1607.06450.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch, reference
from pyaccel.ops._dropout import dropout_key, dropout_reasons
from pyaccel.reference.bert_embeddings import packed_positions

OP = "bert_embeddings"
MAX_HIDDEN = 16384


# --- registered ops -------------------------------------------------------------------------------------------
# Functional, of fixed arity and without aliases: what isn't wanted comes back as a tensor of size 0.
# Ids are flat [tokens]; token i is at position position_ids[i % period], or i % period.


@torch.library.custom_op("pyaccel::bert_embeddings_forward", mutates_args=())
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
    from pyaccel.kernels import bert_embeddings, config

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


@forward_op.register_fake
def _(
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
    return _forward_outputs(input_ids, cu_seqlens, word_weight, out_dtype)


@torch.library.custom_op("pyaccel::bert_embeddings_backward", mutates_args=())
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
    from pyaccel.kernels import bert_embeddings, bert_embeddings_backward, column_sum, config
    from pyaccel.kernels.device import device_info

    tables = (word_weight, position_weight, token_type_weight)
    want = (want_dword, want_dposition, want_dtype)
    grads = _backward_outputs(tables, want, dweight_dtype, dbias_dtype)
    tokens, hidden = dy.shape
    row_config = config.bert_embeddings_backward(hidden)
    n_programs = config.persistent_programs(row_config, tokens, device_info(dy.device).num_sms)
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
    column_sum.column_sum((dweight, dbias, None), (dweight_partial, dbias_partial, None), config.column_sum())
    if dz is not None:
        if want_dword:
            _table_gradient(grads[0], dz, *_sorted(input_ids), padding_idx)
        if want_dposition:
            _table_gradient(grads[1], dz, *_sorted_positions(position_ids, input_ids, period), -1)
        if want_dtype:
            _table_gradient(grads[2], dz, *_sorted_types(token_type_ids, input_ids), -1)
    return grads


def _table_gradient(grad: Tensor, dz: Tensor, ids: Tensor, order: Tensor | None, skip: int) -> None:
    from pyaccel.kernels import config, segment_sum

    segment_sum.segment_sum(grad, dz, ids, order, skip, config.segment_sum(dz.shape[0]))


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


def _backward_outputs(
    tables: tuple[Tensor, Tensor | None, Tensor | None],
    want: tuple[bool, bool, bool],
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    word, hidden = tables[0], tables[0].shape[1]

    def table(t: Tensor | None, wanted: bool) -> Tensor:
        # Dense and 0 where no token is, as nn.Embedding's; contiguous, whatever the table's strides.
        return word.new_zeros(0 if t is None or not wanted else t.shape[0], hidden)

    def vector(dtype: torch.dtype | None) -> Tensor:
        return word.new_empty(0 if dtype is None else hidden, dtype=dtype)

    dword, dposition, dtype = (table(t, wanted) for t, wanted in zip(tables, want, strict=True))
    return dword, dposition, dtype, vector(dweight_dtype), vector(dbias_dtype)


@backward_op.register_fake
def _(
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
    tables = (word_weight, position_weight, token_type_weight)
    return _backward_outputs(tables, (want_dword, want_dposition, want_dtype), dweight_dtype, dbias_dtype)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        f"pyaccel.ops.{OP}: a double backward (the gradient of a gradient) was asked for, and the Triton backend has "
        f"none. Use another backend for this call: pyaccel.use_backend('torch', ops=[{OP!r}])."
    )


backward_op.register_autograd(_no_double_backward)


# --- autograd -------------------------------------------------------------------------------------------------


class BertEmbeddingsFunction(torch.autograd.Function):
    """Saves ids, mean and rstd in fp32 and the dropout key; the sum is looked up again, the mask drawn again."""

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
        period: int,
        eps: float,
        dropout_p: float,
        out_dtype: torch.dtype,
        padding_idx: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What :func:`forward_op` gives; the output alone carries a gradient."""
        tables = (word_weight, position_weight, token_type_weight)
        ids = (input_ids, position_ids, token_type_ids, cu_seqlens)
        return forward_op(*ids, *tables, weight, bias, key, period, eps, dropout_p, out_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input_ids, position_ids, token_type_ids, cu_seqlens, *tables, weight, bias, key = inputs[:10]
        _, mean, rstd, positions, _ = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        if cu_seqlens is not None:
            position_ids = positions
        ids = (input_ids, position_ids, token_type_ids)
        ctx.save_for_backward(*ids, *tables, weight, mean, rstd, key)
        ctx.numbers = (inputs[10], inputs[12], inputs[14])  # period, dropout_p, padding_idx
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        if dy is None:
            return (None,) * 15
        needed = ctx.needs_input_grad[4:9]
        dtypes = (d if n else None for d, n in zip(ctx.dtypes, needed[3:], strict=True))
        out = backward_op(dy, *ctx.saved_tensors, *ctx.numbers, *needed[:3], *dtypes)
        wanted = (g if n else None for g, n in zip(out, needed, strict=True))
        return *(None,) * 4, *wanted, *(None,) * 6


# --- the public function --------------------------------------------------------------------------------------


def not_supported_reasons(
    input_ids: Tensor,
    word_weight: Tensor,
    position_weight: Tensor | None,
    token_type_weight: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    dropout_p: float,
    padding_idx: int | None,
) -> list[str]:
    """Every reason why these arguments make no sense, on any backend; empty if they do. Looks at no id's value."""
    reasons = dropout_reasons(dropout_p)
    if not eps >= 0.0:
        reasons.append(f"eps must be at least 0, got {eps}")
    if not word_weight.is_floating_point():
        reasons.append(f"word_weight must be of a floating dtype, got {word_weight.dtype}")
    if word_weight.ndim != 2 or 0 in word_weight.shape:
        return [
            *reasons,
            f"word_weight must be [vocab, hidden], each at least 1, got {tuple(word_weight.shape)}",
        ]
    vocab, hidden = word_weight.shape
    tables = {"position_weight": position_weight, "token_type_weight": token_type_weight}
    for name, table in tables.items():
        if table is None:
            continue
        if table.ndim != 2 or table.shape[1] != hidden or table.shape[0] == 0:
            reasons.append(
                f"{name} must be [rows, {hidden}], as wide as word_weight, got {tuple(table.shape)}"
            )
        if table.dtype != word_weight.dtype:
            reasons.append(f"{name} must be of word_weight's dtype {word_weight.dtype}, got {table.dtype}")
    vectors = {"weight": weight, "bias": bias}
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (hidden,):
            reasons.append(f"{name} must be [{hidden}], as wide as word_weight, got {tuple(vector.shape)}")
        if vector is not None and not vector.is_floating_point():
            reasons.append(f"{name} must be of a floating dtype, got {vector.dtype}")
    if padding_idx is not None and not -vocab <= padding_idx < vocab:
        reasons.append(f"padding_idx must be a row of word_weight, in [{-vocab}, {vocab}), got {padding_idx}")
    ids = {"input_ids": input_ids, "position_ids": position_ids, "token_type_ids": token_type_ids}
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
    return reasons + _shape_reasons(
        input_ids, position_weight, token_type_weight, position_ids, token_type_ids, cu_seqlens
    )


def _shape_reasons(
    input_ids: Tensor,
    position_weight: Tensor | None,
    token_type_weight: Tensor | None,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> list[str]:
    """What is wrong with the shapes of the ids, and with ids that have no table."""
    shape = tuple(input_ids.shape)
    if len(shape) not in (1, 2):
        return [f"input_ids must be [batch, seq], or packed [total_tokens], got {shape}"]
    reasons, seq = [], shape[-1]
    if cu_seqlens is not None and len(shape) == 2:
        reasons.append(f"cu_seqlens is for packed input_ids [total_tokens], got {shape}: leave it out")
    if token_type_ids is not None and token_type_weight is None:
        reasons.append("token_type_ids were given without a token_type_weight to look them up in")
    if token_type_ids is not None and tuple(token_type_ids.shape) != shape:
        reasons.append(
            f"token_type_ids must have input_ids' shape {shape}, got {tuple(token_type_ids.shape)}"
        )
    if position_ids is not None:
        if position_weight is None:
            reasons.append("position_ids were given without a position_weight to look them up in")
        if tuple(position_ids.shape) not in ((seq,), (1, seq), shape):
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
        pyaccel.dispatch.NotSupportedError: the backend asked for can't serve this call.
    """
    dispatch.invalid(
        OP,
        not_supported_reasons(
            input_ids,
            word_weight,
            position_weight,
            token_type_weight,
            weight,
            bias,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            cu_seqlens=cu_seqlens,
            eps=eps,
            dropout_p=dropout_p,
            padding_idx=padding_idx,
        ),
    )
    dropout_p = dropout_p if training else 0.0
    device = word_weight.device
    out_dtype = torch.float32 if torch.is_autocast_enabled(device.type) else word_weight.dtype
    tables = (word_weight, position_weight, token_type_weight)
    packed = cu_seqlens if position_ids is None and position_weight is not None else None
    choice = _choose(*tables, weight, bias)
    at_once = device.type == "cpu" and not torch.compiler.is_compiling()
    if choice.backend != "triton" or at_once:
        given = {"input_ids": input_ids, "position_ids": position_ids, "token_type_ids": token_type_ids}
        if packed is not None:
            given["position_ids"] = packed_positions(packed, len(input_ids))
        for (name, ids), table in zip(given.items(), tables, strict=True):
            if ids is not None and table is not None:
                _check_range(name, ids, len(table), packed is not None, at_once)
        if choice.backend == "torch":
            position_ids = given["position_ids"]
            ids3 = (input_ids, position_ids, token_type_ids)
            return _torch_backend(*ids3, *tables, weight, bias, eps, dropout_p, padding_idx, out_dtype)
    key = dropout_key(device) if dropout_p > 0.0 else None
    if choice.backend == "reference":
        return reference.bert_embeddings(
            input_ids,
            *tables,
            weight,
            bias,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            cu_seqlens=packed,
            eps=eps,
            dropout_p=dropout_p,
            padding_idx=padding_idx,
            dropout_key=key,
            upcast=False,
            out_dtype=out_dtype,
        ).output
    tokens = input_ids.numel()
    by_token = position_ids is not None and position_ids.shape == input_ids.shape
    period = tokens if by_token or input_ids.ndim == 1 else input_ids.shape[1]
    ids4 = (
        None if t is None else t.reshape(-1).contiguous()
        for t in (input_ids, position_ids, token_type_ids, packed)
    )
    vectors = (None if t is None else t.contiguous() for t in (weight, bias))
    args = (*ids4, *tables, *vectors, key, period, eps, dropout_p, out_dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tables, weight, bias)):
        padding = -1 if padding_idx is None else padding_idx % word_weight.shape[0]
        out, _, _, _, in_range = BertEmbeddingsFunction.apply(*args, padding)
    else:
        out, _, _, _, in_range = forward_op(*args)
    if not at_once:
        # The kernel has looked at every id, and reads nothing outside of a table whatever it is.
        rights = in_range.all(dim=1).unbind()
        names = ("input_ids", "position_ids", "token_type_ids")
        looked_up = (input_ids, position_ids if packed is None else packed, token_type_ids)
        for name, ids, right, table in zip(names, looked_up, rights, tables, strict=True):
            if ids is not None and table is not None:
                torch._assert_async(right, _out_of_range(name, len(table), packed is not None))
    return out.view(*input_ids.shape, word_weight.shape[1])


def _out_of_range(name: str, size: int, packed: bool) -> str:
    table = {
        "input_ids": "word_weight",
        "position_ids": "position_weight",
        "token_type_ids": "token_type_weight",
    }
    what = "the positions that cu_seqlens gives" if packed and name == "position_ids" else name
    return f"pyaccel.ops.{OP}: {what} must be in [0, {size}), the rows of {table[name]}"


def _check_range(name: str, ids: Tensor, size: int, packed: bool, at_once: bool) -> None:
    """Raise IndexError for an id that is no row of its table; not ``at_once``, leave that to the device."""
    right = (ids >= 0) & (ids < size)
    if not at_once:
        torch._assert_async(right.all(), _out_of_range(name, size, packed))
    elif not right.all():
        raise IndexError(f"{_out_of_range(name, size, packed)}, got {int(ids[~right][0])}")


def _choose(word_weight: Tensor, *others: Tensor | None) -> dispatch.Choice:
    triton = dispatch.triton_reasons(word_weight, *others)
    if word_weight.shape[1] > MAX_HIDDEN:
        triton.append(f"the kernels take hidden sizes of up to {MAX_HIDDEN}, not {word_weight.shape[1]}")
    served: dict[str, list[str]] = {"triton": triton, "torch": [], "reference": []}
    if word_weight.device.type == "cpu":
        return dispatch.choose(OP, served, "torch", "on the CPU")
    return dispatch.choose(OP, served)


def _torch_backend(
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word_weight: Tensor,
    position_weight: Tensor | None,
    token_type_weight: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    padding_idx: int | None,
    out_dtype: torch.dtype,
) -> Tensor:
    total = F.embedding(input_ids, word_weight, padding_idx)
    if token_type_weight is not None:
        types = (
            token_type_weight[0] if token_type_ids is None else F.embedding(token_type_ids, token_type_weight)
        )
        total = total + types
    if position_weight is not None:
        if position_ids is None:
            total = total + position_weight[: input_ids.shape[1]]
        else:
            total = total + F.embedding(position_ids, position_weight)
    # F.layer_norm wants one dtype; 16-bit tables with fp32 parameters are normalised in fp32, as autocast does it.
    dtype = total.dtype
    for vector in (weight, bias):
        dtype = dtype if vector is None else torch.promote_types(dtype, vector.dtype)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    out = F.layer_norm(total.to(dtype), (total.shape[-1],), weight, bias, eps).to(out_dtype)
    return F.dropout(out, dropout_p) if dropout_p > 0.0 else out
