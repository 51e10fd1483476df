"""The masked-language-model head's loss, in plain torch: the definition.

Masked language modeling: J. Devlin et al., BERT, arXiv:1810.04805 (2018). The loss is the mean over the masked
tokens of the negative log-likelihood of what was there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_lm_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    num_items: int | float | Tensor | None = None,
    reduction: str = "mean",
    upcast: bool = True,
) -> Tensor:
    """``cross_entropy(hidden @ weight.T + bias, labels)`` over the tokens whose label isn't ``ignore_index``.

    Args:
        hidden: ``[..., hidden_size]``; weight ``[vocab, hidden_size]``; bias ``[vocab]`` or None; one dtype.
        labels: int64 ``[...]``, each 0 to vocab - 1 or ``ignore_index``.
        num_items: what the sum is divided by for "mean"; the number of labels that count by default. 0 is taken
            for 1, so that no label at all gives the loss 0.
        reduction: "mean", "sum", or "none" for a loss a token, 0 where it is ignored.
        upcast: True computes and returns fp64, the truth. False is what good plain PyTorch does in the dtype
            given: logits in that dtype, their softmax and the loss in fp32.
    """
    if upcast:
        hidden, weight, bias = hidden.double(), weight.double(), None if bias is None else bias.double()
    real = labels != ignore_index
    # What is ignored may hold NaN, and 0 * NaN is NaN in the weight's gradient: it is left out before the product.
    logits = F.linear(torch.where(real[..., None], hidden, 0.0), weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = torch.where(real, labels, 0)
    losses = F.cross_entropy(logits.reshape(-1, weight.shape[0]), target.flatten(), reduction="none")
    losses = losses.view(labels.shape)
    losses = torch.where(real, losses, 0.0)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / items(real, num_items).to(total.dtype)


def items(real: Tensor, num_items: int | float | Tensor | None) -> Tensor:
    """What the sum is divided by, a 0-dim tensor: the count of ``real``, or ``num_items``; 1 in place of 0."""
    count = real.sum() if num_items is None else torch.as_tensor(num_items, device=real.device)
    return torch.where(count == 0, 1, count)
