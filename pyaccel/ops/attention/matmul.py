"""Attention on a CPU by batched matrix products and a softmax: with gradient, of groups of equal lengths.

PyTorch's flash kernel for CPUs is slow in bf16 and in its backward, and with dropout PyTorch has none: it takes two
products, a softmax and a mask by Bernoulli draws, one at a time. In training the ways here are, in fp32 and bf16 on two
cores with AVX-512 (``pyaccel tune`` measures other machines), as fast as the table below says. In bf16 scores are
rounded to bf16, as in Hugging Face's eager attention: twice flash's RMS error, inside the numerics policy.

Forward is ``O = D(P) V / keep``, ``P = softmax(scale Q K^T)``; with ``D`` the dropout mask, backward is::

    dV = D(P)^T dO / keep          dP = D(dO V^T) / keep
    dS = P * (dP - rowsum(dP * P)) dQ = scale dS K,  dK = scale dS^T Q

(FlashAttention, arXiv:2205.14135, appendix B, without its tiles.) Without dropout P is made again in backward, so that
nothing is saved but query, key and value; with it P is saved, negative where dropped.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyaccel import tuning
from pyaccel.ops.dropout import keep_mask_on_host

# Lengths at which, where no table of this machine says it, products beat PyTorch's flash kernel (two cores with
# AVX512_BF16, head_dim 32 and 64). A sequence at a time without gradient, bf16: 1.05 times as fast at 64, 1.5 at 96,
# 1.8 at 128, 2 at 256, 2.2 to 2.6 at 512, slower below 64 (0.2 to 0.6); fp32: 1.1 to 1.5 from 64 to 224, no faster
# elsewhere. Forward and backward of 1024 tokens, bf16: 6 times at 16, 3 to 4 at 64, 2.5 to 2.8 at 128, 1.6 at 256, 1.4
# to 1.5 at 512; fp32: 0.7 to 0.9. With dropout, where nothing is made again in backward, 1.3 to 2.3 times at all
# of them in both.
_EVALUATION = {torch.bfloat16: range(96, 1025), torch.float32: range(64, 225)}
_TRAINING = {torch.bfloat16: range(1, 1025)}
# Beyond, scores and weights would take over 48 MB at 12 heads.
LONGEST = 1024
NAMES = ("sdpa", "matmul")
# Weights of a chunk of sequences, 2 MB in bf16: what one pass leaves for the next stays in the caches.
_CHUNK = 2**20
_CPU = torch.device("cpu")


def serve(query: Tensor, length: int, *, training: bool, dropout_p: float) -> tuple[bool, str]:
    """Whether products serve sequences of that length, and what says so: they are faster, or are not.

    ``query`` is ``[total, heads, head_dim]``; ``training``: a gradient is recorded.
    """
    if length > LONGEST:
        why = f"longer than {LONGEST}, where products would take much memory"
    elif not _takes(query.dtype, dropout_p):
        why = "products take fp32 and bf16, a dropout_p below 1, and have no forward-mode derivative"
    elif dropout_p > 0.0:
        why = "with dropout PyTorch takes products too, and slower ones"
    else:
        size = (length, *query.shape[1:])
        _, why = tuning.preferred(_table(training), _CPU, query.dtype, size, NAMES)
        why = why or "nothing near was measured on this machine: `pyaccel tune` does"
    return length in served(query, {length}, training=training, dropout_p=dropout_p), why


def served(query: Tensor, lengths: set[int], *, training: bool, dropout_p: float) -> set[int]:
    """Those of these lengths that products serve, where they are faster."""
    if not _takes(query.dtype, dropout_p):
        return set()
    lengths = {length for length in lengths if 0 < length <= LONGEST}
    if dropout_p > 0.0 or not lengths:
        return lengths
    heads, head_dim = query.shape[1:]
    sizes = [(length, heads, head_dim) for length in lengths]
    names = tuning.preferred_each(_table(training), _CPU, query.dtype, sizes, NAMES)
    known = (_TRAINING if training else _EVALUATION).get(query.dtype, range(0))
    found = set()
    for length, name in zip(lengths, names, strict=True):
        if length in known if name is None else name == "matmul":
            found.add(length)
    return found


def _table(training: bool) -> str:
    return "varlen_attention_training" if training else "varlen_attention"


def _takes(dtype: torch.dtype, dropout_p: float) -> bool:
    """Products of fp16 may overflow."""
    return dtype in _EVALUATION and dropout_p < 1.0 and forward_ad._current_level < 0


def evaluate(query: Tensor, key: Tensor, value: Tensor, scale: float | None, scratch: Tensor) -> Tensor:
    """Attention of one sequence, ``[seq, heads, head_dim]``, without gradient; ``scratch`` is overwritten."""
    len_q, heads, head_dim = query.shape
    len_k = key.shape[0]
    scores, weights = (s[: heads * len_q * len_k].view(heads, len_q, len_k) for s in scratch)
    q, k = query.transpose(0, 1), key.permute(1, 2, 0)
    # beta 0: what is in scratch isn't read
    torch.baddbmm(scores, q, k, beta=0.0, alpha=_scale(scale, head_dim), out=scores)
    torch.softmax(scores, -1, out=weights)
    return torch.bmm(weights, value.transpose(0, 1)).transpose(0, 1)


def attention(
    query: Tensor, key: Tensor, value: Tensor, count: int, scale: float | None, dropout_p: float
) -> Tensor:
    """Attention of ``count`` sequences of one length, with gradient.

    Args:
        query: ``[count * seq_q, heads, head_dim]``, fp32 or bf16; ``key``, ``value`` ``[count * seq_k, heads, ...]``.
        dropout_p: below 1; by the mask of :func:`pyaccel.ops.dropout.keep_mask_on_host`.
    """
    out: Tensor = _Attention.apply(query, key, value, count, _scale(scale, query.shape[-1]), dropout_p)
    return out


def _scale(scale: float | None, head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim) if scale is None else scale


class _Attention(torch.autograd.Function):
    """See the module; sequences go through it by the chunk."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, count: int, scale: float, dropout_p: float
    ) -> Tensor:
        seqs = (query.shape[0] // count, key.shape[0] // count)
        size = max(1, _CHUNK // (query.shape[1] * seqs[0] * seqs[1]))
        out = value.new_empty(query.shape[0], *value.shape[1:])
        saved, rescale = [], 1.0 / (1.0 - dropout_p)
        for q, k, v, o in _chunks(size, seqs, query, key, value, out):
            weights = _weights(q, k, scale)
            if dropout_p > 0.0:
                keep = keep_mask_on_host(weights.shape, dropout_p)
                weights = torch.where(keep, weights, -weights)
                saved.append(weights)
                weights = weights.relu()
            _put(o, _product(weights, v, rescale))
        ctx.save_for_backward(query, key, value, *saved)
        ctx.size, ctx.seqs, ctx.scale, ctx.rescale = size, seqs, scale, rescale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        dquery, dkey, dvalue = (x.new_empty(x.shape) for x in (query, key, value))
        chunks = _chunks(ctx.size, ctx.seqs, query, key, value, grad, dquery, dkey, dvalue)
        for i, (q, k, v, do, dq, dk, dv) in enumerate(chunks):
            weights = saved[i] if saved else _weights(q, k, ctx.scale)
            kept = weights.relu() if saved else weights
            _put(dv, _product(kept.transpose(1, 2), do, ctx.rescale))
            dweights = _product(do, v.transpose(1, 2), ctx.rescale)
            if saved:
                dweights.masked_fill_(weights < 0.0, 0.0)
                weights = weights.abs()
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            _put(dq, _product(dscores, k, ctx.scale))
            _put(dk, _product(dscores.transpose(1, 2), q, ctx.scale))
        return dquery, dkey, dvalue, None, None, None


def _chunks(size: int, seqs: tuple[int, int], *packed: Tensor) -> Any:
    """Of each chunk of ``size`` sequences the inputs, ``[sequences * heads, seq, head_dim]``, a view where it is one
    sequence; and of the results, which come after them, ``[sequences, heads, seq, head_dim]``, always views.

    ``packed`` are query, key, value and the output, or those and its gradient, and then the three of the others.
    """
    len_q, len_k = seqs
    lengths = (len_q, len_k, len_k, len_q, len_q, len_k, len_k)[: len(packed)]
    inputs = 3 if len(packed) == 4 else 4
    pieces = (x.split(size * length) for x, length in zip(packed, lengths, strict=True))
    for chunk in zip(*pieces, strict=True):
        views = [
            x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x, length in zip(chunk, lengths, strict=True)
        ]
        yield *(x.flatten(0, 1) for x in views[:inputs]), *views[inputs:]


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.softmax(_product(q, k.transpose(1, 2), scale), -1)


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """``factor * a @ b``, batched: baddbmm with beta 0 doesn't read what it would add."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0.0, alpha=factor)


def _put(place: Tensor, result: Tensor) -> None:
    place.copy_(result.view(place.shape))
