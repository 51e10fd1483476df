"""The loss of BERT's masked-language-model head, of MiniLM, BERT-base and BERT-large: 15 % of the tokens masked."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import ops, reference
from pyaccel.benchmarks.case import Case, Variant, no_liger
from pyaccel.benchmarks.cases.common import MODES, Outputs, Problem, normal, variants

VOCAB = 30522


def problem(sizes: tuple[int, int, int, str], dtype: torch.dtype, device: torch.device) -> Problem:
    """hidden ``[tokens, hidden]``, weight ``[vocab, hidden]``, bias ``[vocab]``; labels."""
    tokens, n_hidden, vocab, mode = sizes
    generator = torch.Generator(device).manual_seed(0)
    labels = torch.randint(0, vocab, (tokens,), generator=generator, device=device)
    labels[torch.rand(tokens, generator=generator, device=device) >= 0.15] = -100
    labels[0] = 0
    draw = normal(dtype, device)
    leaves = (draw(tokens, n_hidden), draw(vocab, n_hidden, scale=n_hidden**-0.5), draw(vocab))
    return Problem(leaves, mode, fixed=(labels,))


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """What transformers' BERT does: logits of every token, and their softmax in fp32."""
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)


def gathered(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """The same of the masked tokens alone."""
    real = labels >= 0
    return plain(hidden[real], weight, bias, labels[real])


def masked(p: Problem) -> int:
    """Labels that count."""
    return int((p.fixed[0] >= 0).sum())


def bytes_moved(p: Problem) -> int:
    """Forward reads masked tokens, weight and bias; backward writes the gradients of all tokens, weight and bias."""
    hidden, weight, bias = p.leaves
    parameters = weight.numel() + bias.numel()
    of_forward = masked(p) * hidden.shape[1] + parameters
    of_backward = hidden.numel() + parameters if p.backward else 0
    return hidden.element_size() * (of_forward + of_backward)


def flops(p: Problem) -> int:
    """One product forward, two backward, of the masked tokens."""
    return 2 * masked(p) * p.leaves[1].numel() * (3 if p.backward else 1)


def sizes(
    tokens: tuple[int, ...], hidden: tuple[int, ...], vocab: int
) -> dict[str, tuple[int, int, int, str]]:
    return {
        f"{n}x{n_hidden} to {vocab} {mode}": (n, n_hidden, vocab, mode)
        for mode in MODES
        for n_hidden in hidden
        for n in tokens
    }


def prepare_liger(p: Problem) -> Callable[[], Outputs]:
    """Its fused product and loss, of the masked tokens alone."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def liger(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        real = labels >= 0
        given: Tensor | tuple[Tensor, ...] = LigerFusedLinearCrossEntropyFunction.apply(
            hidden[real], weight, labels[real], bias
        )
        return given[0] if isinstance(given, tuple) else given

    return lambda: p.by(liger)


CASE = Case(
    name="masked_lm_cross_entropy",
    group="ops",
    sizes=sizes((2048, 16384), (384, 768, 1024), VOCAB),
    cpu_sizes=sizes((512,), (384,), VOCAB),
    smoke=sizes((200,), (16,), 90),
    quick="^512x384 ",
    problem=problem,
    truth=lambda p: p.exactly_by(reference.masked_lm_cross_entropy),
    naive=lambda p: p.by(plain),
    bytes_moved=bytes_moved,
    flops=flops,
    variants=(
        *variants("masked_lm_cross_entropy", lambda p: ops.masked_lm_cross_entropy, lambda p: plain),
        Variant("eager, masked tokens", lambda p: lambda: p.by(gathered)),
        Variant("Liger-Kernel", prepare_liger, lambda p: no_liger(p.device)),
    ),
)
CASES = (CASE,)
