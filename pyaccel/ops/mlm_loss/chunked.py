"""The registered ops of masked_lm_cross_entropy and their autograd Functions: by Triton's kernel, or torch's softmax.

Arguments are checked by :mod:`pyaccel.ops.mlm_loss.api`, which calls this. Only masked tokens are multiplied
by the decoder, a chunk of them at a time, and their gradients are computed in the forward pass, over the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch
from pyaccel.ops.common import custom_op, differentiable_once, without_autocast

OP = "masked_lm_cross_entropy"


# --- registered ops -------------------------------------------------------------------------------------------
# Functional, of fixed arity and without aliases: what isn't wanted comes back as a tensor of size 0. How many tokens
# are masked is known inside alone: a compiled graph has no sizes that depend on data.


def _forward_outputs(
    hidden: Tensor, weight: Tensor, want_dhidden: bool, want_dweight: bool, want_dbias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, hidden_size = hidden.shape
    vocab, wide = weight.shape[0], _wide(hidden.dtype)
    return (
        hidden.new_empty(tokens, dtype=wide),
        hidden.new_empty(tokens if want_dhidden else 0, hidden_size),
        hidden.new_empty(vocab if want_dweight else 0, hidden_size, dtype=wide),
        hidden.new_empty(vocab if want_dbias else 0, dtype=wide),
    )


@custom_op("pyaccel::masked_lm_cross_entropy_forward", _forward_outputs)
def forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_scale: Tensor | None,
    ignore_index: int,
    chunk_size: int,
    use_triton: bool,
    want_dhidden: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses ``[tokens]``, and the gradients of their sum, each row's multiplied by ``row_scale`` ``[tokens]``.

    hidden is ``[tokens, hidden_size]``; its gradient has its dtype, those of weight and bias are fp32 (fp64 for fp64).
    """
    outputs = _forward_outputs(hidden, weight, want_dhidden, want_dweight, want_dbias)
    losses, dhidden, dweight, dbias = outputs
    real = labels != ignore_index
    check_labels(labels, real, weight.shape[0])
    index = real.nonzero().squeeze(1)  # on a GPU the host waits here, to learn how many there are
    for out in (losses, dhidden, dbias) if index.shape[0] else outputs:
        out.zero_()  # of dweight the first chunk writes everything
    vocab, width = weight.shape[0], _width(weight.shape[0])
    chunk_size = min(chunk_size, index.shape[0])
    logits_buffer = hidden.new_empty(chunk_size, width)
    logits_buffer[:, vocab:] = 0
    # As wide as the buffer's rows, so that the kernel's accesses to it are.
    padded_bias = None if bias is None else F.pad(bias, (0, width - vocab))
    want_grad = want_dhidden or want_dweight or want_dbias
    with without_autocast(hidden.device):
        for first in range(0, index.shape[0], max(chunk_size, 1)):
            chosen = index[first : first + chunk_size]
            x = hidden.index_select(0, chosen)
            padded = logits_buffer[: chosen.shape[0]]
            logits = padded[:, :vocab]
            torch.mm(x, weight.t(), out=logits)
            scale = None if row_scale is None else row_scale[chosen]
            loss = losses.new_empty(chosen.shape[0])
            _rows(loss, padded, padded_bias, labels[chosen], scale, vocab, want_grad, use_triton)
            losses[chosen] = loss
            if want_dhidden:
                dhidden[chosen] = torch.mm(logits, weight)
            if want_dweight:
                _add_product(dweight, logits.t(), x, first == 0)
            if want_dbias:
                # torch's sum: it reads 16 bits and adds in fp32, in an order of its sizes alone.
                dbias += logits.sum(0, dtype=dbias.dtype)
    return outputs


def check_labels(labels: Tensor, real: Tensor, vocab: int) -> None:
    """Raise unless each label that counts is of the vocabulary: at once on a CPU, by a device assert on a GPU."""
    wrong = real & ((labels < 0) | (labels >= vocab))
    if labels.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"pyaccel.ops.{OP}: a label is outside 0 to {vocab - 1}")
    elif wrong.any():
        found = int(labels[wrong][0])
        dispatch.invalid(
            OP,
            [
                f"labels must be ignore_index or between 0 and {vocab - 1}, the last of the vocabulary, got {found}"
            ],
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _width(vocab: int) -> int:
    from pyaccel.kernels.mlm_loss import config

    return config.cross_entropy_width(vocab)


def _rows(
    loss: Tensor,
    padded: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor | None,
    vocab: int,
    want_grad: bool,
    use_triton: bool,
) -> None:
    """The rows' losses, and their gradients over the logits: by the kernel, or by torch with the same meaning."""
    if use_triton:
        from pyaccel.kernels.mlm_loss import config, cross_entropy

        cross_entropy.rows(loss, padded, bias, labels, scale, vocab, want_grad, config.cross_entropy(vocab))
        return
    logits = padded[:, :vocab]
    x = logits.to(loss.dtype)
    if bias is not None:
        x = x + bias[:vocab]  # in place it would change fp32 logits
    log_probs = x.log_softmax(1)
    labels = labels[:, None]
    torch.neg(log_probs.gather(1, labels).squeeze(1), out=loss)
    if want_grad:
        grad = log_probs.exp_()
        grad.scatter_add_(1, labels, grad.new_full((), -1.0).expand(labels.shape))
        logits.copy_(grad if scale is None else grad.mul_(scale[:, None]))


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total += a @ b``, in total's fp32 for 16-bit operands, as far as the device's matrix products go.

    On a GPU they write fp32. A CPU's round to 16 bits: once for each chunk, which is then added in fp32.
    """
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
        return
    product = torch.mm(a, b, out_dtype=total.dtype) if a.is_cuda else torch.mm(a, b)
    if first:
        total.copy_(product)
    else:
        total.add_(product)


def _backward_outputs(
    dhidden: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    hidden_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    def like(grad: Tensor, dtype: torch.dtype | None) -> Tensor:
        return grad.new_empty((0, *grad.shape[1:]) if dtype is None else grad.shape, dtype=dtype)

    return like(dhidden, hidden_dtype), like(dweight, weight_dtype), like(dbias, bias_dtype)


@custom_op("pyaccel::masked_lm_cross_entropy_backward", _backward_outputs)
def backward_op(
    dloss: Tensor,
    dhidden: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    hidden_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The saved gradients of the sum, multiplied by that of the sum (0-dim); size 0 where the dtype is None."""
    saved = (dhidden, dweight, dbias)
    outs = _backward_outputs(*saved, hidden_dtype, weight_dtype, bias_dtype)
    for out, grad in zip(outs, saved, strict=True):
        if out.numel():
            # In fp32, rounded once: as a 0-dim factor dloss would be rounded to 16 bits first.
            torch.mul(grad, dloss.to(_wide(grad.dtype)).reshape(1), out=out)
    return outs


_OTHERS = f"pyaccel.use_backend('reference', ops=['{OP}'])"
forward_once = differentiable_once(forward_op, OP, _OTHERS)
backward_once = differentiable_once(backward_op, OP, _OTHERS)


# --- autograd -------------------------------------------------------------------------------------------------


class SumFunction(torch.autograd.Function):
    """The sum of the losses. Saves its three gradients, computed with it; backward multiplies them by a scalar.

    They are saved unscaled, whatever the mean divides by: a share of 1e-5 beside fp16's smallest number would be
    lost before a gradient scaler's factor arrives.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        dtype: torch.dtype | None,
        ignore_index: int,
        chunk_size: int,
        use_triton: bool,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The sum, and its gradients: outputs, so that a gradient of a gradient is noticed and refused."""
        given = cast(hidden, weight, bias, dtype)
        losses, *grads = forward_op(*given, labels, None, ignore_index, chunk_size, use_triton, *wanted)
        return losses.sum(), *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])
        ctx.dtypes = tuple(None if t is None else t.dtype for t in inputs[:3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dloss = grads[0]
        if dloss is None:
            return (None,) * 9
        needed = ctx.needs_input_grad[:3]
        dtypes = (d if n else None for d, n in zip(ctx.dtypes, needed, strict=True))
        out = backward_once(dloss, *ctx.saved_tensors, *dtypes)
        return *(g if n else None for g, n in zip(out, needed, strict=True)), *(None,) * 6


class PerTokenFunction(torch.autograd.Function):
    """Each token's loss. Saves the inputs; backward computes the logits again, for their rows' factors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        dtype: torch.dtype | None,
        ignore_index: int,
        chunk_size: int,
        use_triton: bool,
    ) -> Tensor:
        """Losses ``[tokens]``."""
        given = cast(hidden, weight, bias, dtype)
        off = (False, False, False)
        return forward_op(*given, labels, None, ignore_index, chunk_size, use_triton, *off)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:]

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        dtype, *options = ctx.options
        needed = ctx.needs_input_grad[:3]
        converted = cast(hidden, weight, bias, dtype)
        grads = forward_once(*converted, labels, dlosses.contiguous(), *options, *needed)[1:]
        # A gradient that isn't in its input's dtype yet is cast to it; one that is comes back as it is.
        wanted = (
            g.to(t.dtype) if n and t is not None else None
            for g, t, n in zip(grads, (hidden, weight, bias), needed, strict=True)
        )
        return *wanted, *(None,) * 5


def cast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As autocast does it, which leaves fp64 alone."""
    if dtype is None or hidden.dtype == torch.float64:
        return hidden, weight, bias
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
