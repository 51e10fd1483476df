"""The torch backend of packed attention: stock PyTorch ops; of padded, see :mod:`pyaccel.ops.attention.sdpa`.

On a CPU, by groups of sequences of equal lengths; elsewhere and in graphs, by
PyTorch's own kernel for packed batches where it serves, else padded on the device. Arguments are checked by
:mod:`pyaccel.ops.attention.api`, which calls this.
"""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyaccel.ops.attention import matmul as products
from pyaccel.ops.attention.params import AttentionParams, CuSeqlens
from pyaccel.ops.attention.sdpa import FEW_KEYS, sdpa, torch_sdpa
from pyaccel.reference import attention as reference

_DEFAULT = AttentionParams()


def records(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# --- the torch backend, packed, on the host -----------------------------------------------------------------


def why_on_host(query: Tensor, length: int, *, training: bool, dropout_p: float) -> str:
    """What decided how a sequence of that length is served on the CPU, for those who ask."""
    by_products, row = products.serve(query, length, training=training, dropout_p=dropout_p)
    return f"{'two products and a softmax' if by_products else 'SDPA'} by groups of equal lengths ({row})"


class Group(NamedTuple):
    """Neighboring sequences of equal lengths.

    Attributes:
        sequences: how many; ``len_q`` and ``len_k`` tokens each.
        by: what serves it: "matmul", batched matrix products and a softmax; "torch", PyTorch's SDPA; "sdpa", that with
            :func:`pyaccel.ops.attention.sdpa.sdpa` around it, for masks and NaN; "few", the latter where there is NaN.
    """

    len_q: int
    len_k: int
    sequences: int
    by: str


class Groups(NamedTuple):
    """How a packed batch is attended to on the host, chosen once for all calls of the same lengths.

    Attributes:
        rows_q, rows_k: tokens of each group; total_q, total_k: of all.
        largest: scores of the longest sequence that matrix products serve, for one head.
        attends: some query has a key.
        training: gradients are recorded.
    """

    groups: list[Group]
    rows_q: list[int]
    rows_k: list[int]
    total_q: int
    total_k: int
    largest: int
    attends: bool
    training: bool
    dropout_p: float


def groups_of(
    query: Tensor,
    lens_q: list[int],
    lens_k: list[int],
    *,
    training: bool = False,
    dropout_p: float = 0.0,
    plain: bool = True,
) -> Groups:
    """``query`` stands for its dtype, heads and head_dim; ``plain`` is False with a mask or fewer kv_heads."""
    found: list[Group] = []
    rows_q, rows_k, largest, attends = [], [], 0, False
    guarded = not plain or forward_ad._current_level >= 0
    served = (
        products.served(query, {*lens_q, *lens_k}, training=training, dropout_p=dropout_p) if plain else ()
    )
    for (len_q, len_k), run in itertools.groupby(zip(lens_q, lens_k, strict=True)):
        by = "sdpa" if guarded or not len_q else "few" if len_k < FEW_KEYS and dropout_p == 0.0 else "torch"
        if len_q in served and len_k in served:
            by, largest = "matmul", max(largest, len_q * len_k)
        count = len(list(run))
        found.append(Group(len_q, len_k, count, by))
        rows_q.append(count * len_q)
        rows_k.append(count * len_k)
        attends = attends or (len_q > 0 and len_k > 0)
    return Groups(found, rows_q, rows_k, sum(rows_q), sum(rows_k), largest, attends, training, dropout_p)


def varlen_by_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lens_q: list[int],
    lens_k: list[int],
    params: AttentionParams,
) -> Tensor:
    """One call for each run of neighboring sequences of equal lengths, on views; one copy, of the result."""
    training = records(query, key, value)
    plain = not params.is_banded and query.shape[1] == key.shape[1]
    groups = groups_of(query, lens_q, lens_k, training=training, dropout_p=params.dropout_p, plain=plain)
    return attend_by_group(query, key, value, groups, params)


def attend_by_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Groups,
    params: AttentionParams = _DEFAULT,
) -> Tensor:
    """:func:`varlen_by_group` of groups that were chosen before, whose ``dropout_p`` holds."""
    _, is_causal, scale, window_size, *_ = params
    heads, kv_heads, value_dim = query.shape[1], key.shape[1], value.shape[2]
    dropout_p, training = groups.dropout_p, groups.training
    if len(groups.groups) == 1 and (len(query), len(key)) == (groups.total_q, groups.total_k):
        queries, keys, values, rest = [query], [key], [value], None
    else:
        # split, not a slice for each group: its backward is one concatenation, a slice's a full-size tensor.
        *queries, rest = query.split([*groups.rows_q, len(query) - groups.total_q])
        *keys, _ = key.split([*groups.rows_k, len(key) - groups.total_k])
        *values, _ = value.split([*groups.rows_k, len(value) - groups.total_k])
    # One buffer for all of a call: malloc gives blocks of this size back, and faults every page in again.
    scratch = None if training or dropout_p > 0.0 else query.new_empty(2, heads * groups.largest)
    out = []
    for (len_q, len_k, count, by), q, k, v in zip(groups.groups, queries, keys, values, strict=True):
        if len_q == 0 or len_k == 0:
            out.append(reference.zero_output(q, value_dim))
        elif by != "matmul":
            if by == "few":  # what is finite can't hide a NaN; see sdpa
                wide = torch.float32 if q.dtype == torch.float16 else None
                total = q.detach().sum(dtype=wide) + k.detach().sum(dtype=wide)
                by = "torch" if math.isfinite(total.item()) else "sdpa"
            q = q.view(count, len_q, heads, -1).transpose(1, 2)
            k = k.view(count, len_k, kv_heads, -1).transpose(1, 2)
            v = v.view(count, len_k, kv_heads, value_dim).transpose(1, 2)
            if by == "torch":
                context = torch_sdpa(q, k, v, None, dropout_p, scale=scale)
            elif window_size is None:
                context = sdpa(q, k, v, None, None, scale, is_causal=is_causal, dropout_p=dropout_p)
            else:
                masks = reference.combine_masks(q, k, None, None, is_causal, window_size)
                context = sdpa(q, k, v, *masks, scale, dropout_p=dropout_p)
            # The flash kernel lays its result out as [batch, seq, heads, head_dim], so this is a view.
            out.append(context.transpose(1, 2).reshape(count * len_q, heads, value_dim))
        elif scratch is None:
            out.append(products.attention(q, k, v, count, scale, dropout_p))
        else:
            for sequence in zip(q.split(len_q), k.split(len_k), v.split(len_k), strict=True):
                out.append(products.evaluate(*sequence, scale, scratch))
    if rest is not None and (rest.shape[0] or not out):
        out.append(reference.zero_output(rest, value_dim))
    joined = torch.cat(out) if len(out) > 1 else out[0]
    if training and not groups.attends:
        return _joined_to(joined, key, value)
    return joined


def _joined_to(out: Tensor, *tensors: Tensor) -> Tensor:
    """``out`` as a function of tensors that it didn't read: their gradients are 0, as the reference's, not None."""
    for t in tensors:
        out = out + t[:0].sum().to(out.dtype)
    return out


# --- the torch backend, packed, on other devices and in graphs ----------------------------------------------


def varlen_on_device(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> Tensor | tuple[Tensor, Tensor]:
    """By ``varlen_attn`` where it serves, else padded: nothing leaves the device."""
    cu = _cu_seqlens(params)
    if 0 in (cu.q.shape[0] - 1, query.shape[0], key.shape[0], cu.max_q, cu.max_k):
        out = _joined_to(reference.zero_output(query, value.shape[2]), key, value)
        return (out, reference.no_lse(query)) if params.return_lse else out
    serve = varlen_padded if varlen_attn_reasons(query, key, value, params) else varlen_by_varlen_attn
    return serve(query, key, value, params)


def _cu_seqlens(params: AttentionParams) -> CuSeqlens:
    assert params.cu_seqlens is not None
    return params.cu_seqlens


def varlen_attn_reasons(query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> list[str]:
    """Why ``torch.nn.attention.varlen.varlen_attn`` can't serve this call as :mod:`pyaccel.reference` defines it."""
    cu = _cu_seqlens(params)
    if query.device.type != "cuda":
        return [f"it is for CUDA, not {query.device.type}"]
    reasons = []
    if not _has_flash_kernels(query.device):
        reasons.append("its kernels are for NVIDIA GPUs of compute capability 8.0 and up")
    if query.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"it takes fp16 and bf16, not {query.dtype}")
    head_dim = query.shape[2]
    if not head_dim == key.shape[2] == value.shape[2] or head_dim % 8 or head_dim > 256:
        reasons.append("it takes one head_dim, a multiple of 8, for query, key and value, of up to 256")
    if any(t.stride(2) != 1 for t in (query, key, value)):
        reasons.append("it wants a last dimension of stride 1")
    if params.dropout_p > 0.0:
        reasons.append("it has no dropout")
    if params.is_banded and cu.q is not cu.k:
        # Its causal is aligned at the bottom right, and a key that no query sees, NaN say, may lie in a tile of
        # those that one does. With equal lengths the alignments agree and every key is seen.
        reasons.append("is_causal and window_size need keys as long as queries: one tensor as both offsets")
    if params.return_lse and records(query, key, value):
        reasons.append("its LSE has no gradient")
    needed = {
        "scale": params.scale is not None,
        "window_size": params.is_banded,
        "enable_gqa": query.shape[1] != key.shape[1],
        "return_aux": params.return_lse,
    }
    missing = {name for name, need in needed.items() if need} - set(_varlen_attn_parameters())
    if missing:
        reasons.append(f"this PyTorch's has no {', '.join(sorted(missing))}")
    return reasons


def _has_flash_kernels(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_properties(device).major >= 8


_parameters: tuple[str, ...] | None = None  # of varlen_attn; () without one


def _varlen_attn_parameters() -> tuple[str, ...]:
    """Looked up once, and late: importing that module takes a second. Not functools.cache, of which dynamo warns."""
    global _parameters
    if _parameters is None:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            _parameters = ()
        else:
            _parameters = tuple(inspect.signature(varlen_attn).parameters)
    return _parameters


def varlen_by_varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> Tensor | tuple[Tensor, Tensor]:
    """``torch.nn.attention.varlen.varlen_attn``, and what it leaves undefined: rows that see, or serve, nothing.

    It doesn't write rows beyond the last offset, and says +inf for the LSE of a row without keys.
    """
    from torch.nn.attention import varlen

    cu = _cu_seqlens(params)
    idle_q, idle_k = _idle_rows(cu.q, cu.k, query.shape[0], key.shape[0])
    if records(query, key, value):  # gradients of idle rows aren't written either
        query = query.masked_fill(idle_q[:, None, None], 0.0)
        key, value = (t.masked_fill(idle_k[:, None, None], 0.0) for t in (key, value))
    options: dict[str, Any] = {}
    if params.scale is not None:
        options["scale"] = params.scale
    if params.is_banded:
        left, right = params.window_size or (-1, -1)
        options["window_size"] = (left, 0 if params.is_causal else right)
    if query.shape[1] != key.shape[1]:
        options["enable_gqa"] = True
    if params.return_lse:
        options["return_aux"] = varlen.AuxRequest(lse=True)
    result: Any = varlen.varlen_attn(query, key, value, *cu, **options)
    if not params.return_lse:
        return result.masked_fill(idle_q[:, None, None], 0.0)
    out, lse = result  # [heads, total_q]
    return out.masked_fill(idle_q[:, None, None], 0.0), lse.masked_fill(idle_q | (lse == math.inf), -math.inf)


def _idle_rows(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int, total_k: int
) -> tuple[Tensor, Tensor]:
    """Queries without a key and keys without a query, bool ``[total_q]`` and ``[total_k]``."""
    idle = []
    for own, other, total in ((cu_seqlens_q, cu_seqlens_k, total_q), (cu_seqlens_k, cu_seqlens_q, total_k)):
        _, sequence, real = _sequence_of(own, total)
        idle.append(~real | (other.diff()[sequence] == 0))
    return idle[0], idle[1]


def _sequence_of(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each packed row: its index, its sequence (the last one if none) and whether it has one."""
    rows = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    # The number of sequences that end at a row or before it is the index of its own.
    sequence = torch.searchsorted(cu_seqlens[1:], rows, right=True)
    real = sequence < cu_seqlens.shape[0] - 1
    return rows, sequence.clamp(max=cu_seqlens.shape[0] - 2), real


def _slots(cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Packed row of each slot of the padded batch, int64 ``[batch, max_seqlen]``; whether it is in use."""
    rows = cu_seqlens[:-1, None].long() + torch.arange(max_seqlen, device=cu_seqlens.device)
    in_use = rows < cu_seqlens[1:, None]
    return rows.masked_fill(~in_use, 0), in_use


def varlen_padded(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> Tensor | tuple[Tensor, Tensor]:
    """Pad, attend under a key mask, pack again: nothing leaves the device."""
    dropout_p, is_causal, scale, window_size, seed, return_lse, *_ = params
    cu = _cu_seqlens(params)
    total, heads, _ = query.shape
    rows_q, real_q = _slots(cu.q, cu.max_q)
    rows_k, real_k = _slots(cu.k, cu.max_k)
    # Indexing, not index_select: its backward sums in a fixed order on a GPU. Unused slots repeat row 0.
    q, k, v = query[rows_q], key[rows_k], value[rows_k]  # [batch, max_seqlen, heads, head_dim]
    q = q.masked_fill(~real_q[..., None, None], 0.0)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    # A key that only unused slots would read counts as unread: what it holds must not leak.
    allowed = (real_k & real_q.any(-1, keepdim=True))[:, None, None, :]
    shift = (cu.k.diff() - cu.q.diff())[:, None, None, None]
    band = reference.band_mask(cu.max_q, cu.max_k, is_causal, window_size, query.device, shift)
    if band is not None:
        allowed = allowed & band & real_q[:, None, :, None]
    if seed is None and not return_lse:
        out = sdpa(q, k, v, allowed, None, scale)
    else:
        repeats = heads // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        out, lse, _ = reference.masked_attention(
            q, k, v, allowed, None, scale, dropout_p, dropout_key=seed, return_lse=return_lse, upcast=False
        )
    rows, sequence, real = _sequence_of(cu.q, total)
    position = (rows - cu.q[sequence]).masked_fill(~real, 0)
    out = out.transpose(1, 2)[sequence, position].masked_fill(~real[:, None, None], 0.0)
    if not return_lse:
        return out
    return out, lse.transpose(1, 2)[sequence, position].masked_fill(~real[:, None], -math.inf).T
