"""The masked-language-model head's loss: the registered ops, their autograd Functions and the public function.

Only masked tokens are multiplied by the decoder, a chunk of them at a time, and their gradients are computed in the
forward pass, over the logits. Source: BERT, arXiv:1810.04805; the fusion is that of Liger-Kernel's fused linear cross
entropy, arXiv:2410.10989.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch, reference
from pyaccel.reference.masked_lm_cross_entropy import items

OP = "masked_lm_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")


# --- registered ops -------------------------------------------------------------------------------------------
# Functional, of fixed arity and without aliases: what isn't wanted comes back as a tensor of size 0. How many tokens
# are masked is known inside alone: a compiled graph has no sizes that depend on data.


@torch.library.custom_op("pyaccel::masked_lm_cross_entropy_forward", mutates_args=())
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
    # As wide as the buffer's rows, so that the kernel's accesses to it are.
    padded_bias = None if bias is None else F.pad(bias, (0, width - vocab))
    want_grad = want_dhidden or want_dweight or want_dbias
    with torch.autocast(hidden.device.type, enabled=False):
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


@forward_op.register_fake
def _(
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
    return _forward_outputs(hidden, weight, want_dhidden, want_dweight, want_dbias)


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
    from pyaccel.kernels import config

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
        from pyaccel.kernels import config, cross_entropy

        cross_entropy.rows(loss, padded, bias, labels, scale, vocab, want_grad, config.cross_entropy(vocab))
        return
    logits = padded[:, :vocab]
    x = logits.to(loss.dtype)  # this chunk's, the one thing of its size in fp32
    if bias is not None:
        x = x + bias[:vocab]
    log_probs = x.log_softmax(1)
    labels = labels[:, None]
    torch.neg(log_probs.gather(1, labels).squeeze(1), out=loss)
    if want_grad:
        grad = log_probs.exp_()
        grad.scatter_add_(1, labels, grad.new_full((), -1.0).expand(labels.shape))
        logits.copy_(grad if scale is None else grad * scale[:, None])


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


@torch.library.custom_op("pyaccel::masked_lm_cross_entropy_backward", mutates_args=())
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


def _backward_outputs(
    dhidden: Tensor, dweight: Tensor, dbias: Tensor, *dtypes: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = (
        grad.new_empty(grad.shape if dtype is not None else (0, *grad.shape[1:]), dtype=dtype)
        for grad, dtype in zip((dhidden, dweight, dbias), dtypes, strict=True)
    )
    return a, b, c


@backward_op.register_fake
def _(
    dloss: Tensor,
    dhidden: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    hidden_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_outputs(dhidden, dweight, dbias, hidden_dtype, weight_dtype, bias_dtype)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        f"pyaccel.ops.{OP}: a double backward (the gradient of a gradient) was asked for, and only the reference "
        f"backend has one: pyaccel.use_backend('reference', ops=['{OP}'])."
    )


forward_op.register_autograd(_no_double_backward)
backward_op.register_autograd(_no_double_backward)


# --- autograd -------------------------------------------------------------------------------------------------


class SumFunction(torch.autograd.Function):
    """The sum of the losses. Saves its three gradients, computed with it; backward multiplies them by a scalar.

    They are saved unscaled, whatever the mean divides by: a share of 1e-5 beside fp16's smallest number would be
    lost before a gradient scaler's factor arrives.
    """

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
        given = _cast(hidden, weight, bias, dtype)
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
        out = backward_op(dloss, *ctx.saved_tensors, *dtypes)
        return *(g if n else None for g, n in zip(out, needed, strict=True)), *(None,) * 6


class PerTokenFunction(torch.autograd.Function):
    """Each token's loss. Saves the inputs; backward computes the logits again, for their rows' factors."""

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
        given = _cast(hidden, weight, bias, dtype)
        off = (False, False, False)
        return forward_op(*given, labels, None, ignore_index, chunk_size, use_triton, *off)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:]

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        *given, labels = ctx.saved_tensors
        dtype, *options = ctx.options
        needed = ctx.needs_input_grad[:3]
        cast = _cast(*given, dtype)
        grads = forward_op(*cast, labels, dlosses.contiguous(), *options, *needed)[1:]
        # A gradient that isn't in its input's dtype yet is cast to it; one that is comes back as it is.
        wanted = (
            g.to(t.dtype) if n and t is not None else None
            for g, t, n in zip(grads, given, needed, strict=True)
        )
        return *wanted, *(None,) * 5


def _cast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As autocast does it, which leaves fp64 alone."""
    if dtype is None or hidden.dtype == torch.float64:
        return hidden, weight, bias
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


# --- the public function --------------------------------------------------------------------------------------


def not_supported_reasons(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    num_items: int | float | Tensor | None,
    reduction: str,
    chunk_size: int | None,
) -> list[str]:
    """Every reason why these arguments make no sense, on any backend; empty if they do."""
    reasons = []
    if hidden.ndim == 0 or weight.ndim != 2 or 0 in weight.shape or hidden.shape[-1] != weight.shape[-1]:
        reasons.append(
            f"hidden must be [..., hidden_size] and weight [vocab, hidden_size], neither of size 0, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    elif bias is not None and bias.shape != weight.shape[:1]:
        reasons.append(f"bias must be [{weight.shape[0]}], the vocabulary, got {tuple(bias.shape)}")
    if labels.shape != hidden.shape[:-1]:
        reasons.append(
            f"labels must be {tuple(hidden.shape[:-1])}, the leading dimensions of hidden, got {tuple(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        reasons.append(f"labels must be int64, got {labels.dtype}")
    dtypes = {t.dtype for t in (hidden, weight, bias) if t is not None}
    if not all(dtype.is_floating_point for dtype in dtypes):
        reasons.append(f"hidden, weight and bias must be of a floating dtype, got {_names(dtypes)}")
    elif len(dtypes) > 1 and (torch.float64 in dtypes or not torch.is_autocast_enabled(hidden.device.type)):
        reasons.append(
            f"hidden, weight and bias must have one dtype, got {_names(dtypes)}: convert them, or use autocast"
        )
    for name, tensor in (("weight", weight), ("bias", bias), ("labels", labels)):
        if tensor is not None and tensor.device != hidden.device:
            reasons.append(f"{name} is on {tensor.device} and hidden on {hidden.device}: move one of them")
    if reduction not in REDUCTIONS:
        reasons.append(f"unknown reduction {reduction!r}: expected one of {', '.join(REDUCTIONS)}")
    if num_items is not None:
        if reduction != "mean":
            reasons.append(f"num_items is what a mean divides by: reduction {reduction!r} has no use for it")
        if isinstance(num_items, Tensor):
            if num_items.ndim != 0:
                reasons.append(f"num_items must be a number or a 0-dim tensor, got {tuple(num_items.shape)}")
        elif not 0 <= num_items < math.inf:
            reasons.append(f"num_items must be a count, at least 0, got {num_items}")
    if chunk_size is not None and chunk_size < 1:
        reasons.append(f"chunk_size must be at least 1, got {chunk_size}")
    return reasons


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def masked_lm_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    num_items: int | float | Tensor | None = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """``F.cross_entropy(F.linear(hidden, weight, bias), labels)``, of the tokens whose label isn't ``ignore_index``.

    Only they are multiplied by ``weight``, ``chunk_size`` of them at a time, so that no tensor of all tokens by the
    whole vocabulary exists, and with 16-bit operands Triton holds no chunk of it in fp32 either. The gradients are
    computed with the loss where they will be needed; "none" computes the logits again in its backward.

    Args:
        hidden: ``[..., hidden_size]``, floating; any strides. What it holds of ignored tokens counts for nothing.
        weight: ``[vocab, hidden_size]``, in hidden's dtype (any under autocast, which casts as for ``F.linear``).
        bias: ``[vocab]`` or None.
        labels: int64 ``[...]``; each is ``ignore_index`` or of the vocabulary.
        ignore_index: the label of tokens that don't count.
        num_items: what the sum is divided by for "mean", a number or a 0-dim tensor: the count of labels over all
            micro-batches of a step, so that their losses and gradients add up to the whole batch's. By default
            the count of the labels here. 0 is taken for 1.
        reduction: "mean", "sum", or "none" for a loss a token, 0 where it is ignored.
        chunk_size: tokens a chunk; by default as many as make 128 MiB of logits.

    Returns:
        the loss in fp32 (fp64 for fp64 tensors): 0-dim, or ``[...]`` for "none". Without any label that counts it
        is 0 and so are the gradients, where ``F.cross_entropy``'s mean is NaN: a micro-batch in which nothing was
        masked must not poison the step.

    The gradients of a 16-bit weight and bias are summed in fp32 over all chunks and rounded once. On a GPU the host
    waits once for the device, to learn how many tokens there are; a label outside the vocabulary is a device assert
    there and an error at once on a CPU. Without Triton, PyTorch's ops do the same with one chunk's softmax in fp32.

    Raises:
        ValueError: naming every argument that makes no sense.
        pyaccel.dispatch.NotSupportedError: the backend asked for can't serve this call.
    """
    dispatch.invalid(
        OP,
        not_supported_reasons(
            hidden,
            weight,
            bias,
            labels,
            num_items=num_items,
            reduction=reduction,
            chunk_size=chunk_size,
        ),
    )
    choice = _choose(hidden, weight, bias)
    real = labels != ignore_index
    device_type = hidden.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    if choice.backend == "reference":
        if not torch.compiler.is_compiling():
            check_labels(labels, real, weight.shape[0])
        given = _cast(hidden, weight, bias, dtype)
        return reference.masked_lm_cross_entropy(
            *given,
            labels,
            ignore_index=ignore_index,
            num_items=num_items,
            reduction=reduction,
            upcast=False,
        )
    if chunk_size is None:
        from pyaccel.kernels import config

        chunk_size = config.cross_entropy_chunk(weight.shape[0], (dtype or hidden.dtype).itemsize)
    tensors = (hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    rest = (labels.reshape(-1), dtype, ignore_index, chunk_size, choice.backend == "triton")
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)
    if reduction == "none":
        losses = PerTokenFunction.apply(*tensors, *rest)
        return losses.view(labels.shape)
    total = SumFunction.apply(*tensors, *rest, wanted)[0]
    return total if reduction == "sum" else total / items(real, num_items).to(total.dtype)


def _choose(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dispatch.Choice:
    reasons = {"triton": dispatch.triton_reasons(hidden, weight, bias), "torch": [], "reference": []}
    if hidden.device.type == "cpu":
        return dispatch.choose(OP, reasons, "torch", "on the CPU")
    return dispatch.choose(OP, reasons)
