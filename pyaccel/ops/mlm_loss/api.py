"""The masked-language-model head's loss: the public function.

Only masked tokens are multiplied by the decoder, a chunk of them at a time, and their gradients are computed in the
forward pass, over the logits. Source: BERT, arXiv:1810.04805; the fusion is that of Liger-Kernel's fused linear cross
entropy, arXiv:2410.10989.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyaccel import dispatch, reference, triton_support, tuning
from pyaccel.ops import common
from pyaccel.ops.common import autocast_dtype
from pyaccel.ops.mlm_loss.chunked import OP, PerTokenFunction, SumFunction, cast, check_labels
from pyaccel.reference.mlm_loss import items

REDUCTIONS = ("mean", "sum", "none")


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
    elif len(dtypes) > 1 and (torch.float64 in dtypes or autocast_dtype(hidden.device) is None):
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
            if num_items.is_meta and not hidden.is_meta:
                reasons.append(f"num_items is on meta and hidden on {hidden.device}: it has no value there")
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
        pyaccel.errors.NotSupportedError: the backend asked for can't serve this call.
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
    dtype = autocast_dtype(hidden.device)
    if choice.backend == "reference":
        if common.on_host(labels) or not (labels.is_cpu or torch.compiler.is_compiling()):
            check_labels(labels, real, weight.shape[0])
        given = cast(hidden, weight, bias, dtype)
        return reference.masked_lm_cross_entropy(
            *given,
            labels,
            ignore_index=ignore_index,
            num_items=num_items,
            reduction=reduction,
            upcast=False,
        )
    if chunk_size is None:
        from pyaccel.kernels.mlm_loss import config

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
    reasons = {
        "triton": triton_support.unsupported_reasons(hidden, weight, bias),
        "torch": [],
        "reference": [],
    }
    if hidden.device.type == "cpu":
        return dispatch.choose(OP, reasons, "torch", "on the CPU")
    size = (math.prod(hidden.shape[:-1]), hidden.shape[-1], weight.shape[0])
    measured = tuning.preferred(OP, hidden.device, hidden.dtype, size, ("triton", "torch"))
    return dispatch.choose(OP, reasons, *measured)
