"""The loss of BERT's masked-language-model head, of MiniLM, BERT-base and BERT-large: 15 % of the tokens masked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch, ops, reference
from pyaccel.benchmarks.registry import Case, Variant, no_liger, no_triton

MODES = ("forward", "forward+backward")
VOCAB = 30522
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """hidden ``[tokens, hidden]``, weight ``[vocab, hidden]``, bias ``[vocab]``, labels; a mode of :data:`MODES`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    mode: str

    @property
    def masked(self) -> int:
        """Labels that count."""
        return int((self.labels >= 0).sum())


def problem(sizes: tuple[int, int, int, str], dtype: torch.dtype, device: torch.device) -> Problem:
    tokens, n_hidden, vocab, mode = sizes
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    labels = torch.randint(0, vocab, (tokens,), generator=generator, device=device)
    labels[torch.rand(tokens, generator=generator, device=device) >= 0.15] = -100
    labels[0] = 0
    leaves = (draw(tokens, n_hidden), draw(vocab, n_hidden, scale=n_hidden**-0.5), draw(vocab))
    hidden, weight, bias = (t.requires_grad_(mode == "forward+backward") for t in leaves)
    return Problem(hidden, weight, bias, labels, mode)


def by(function: Callable[..., Tensor], p: Problem) -> Outputs:
    """What the mode asks of a function of hidden, weight, bias and labels: the loss, or that and three gradients."""
    leaves = (p.hidden, p.weight, p.bias)
    loss = function(*leaves, p.labels)
    return (loss, *torch.autograd.grad(loss, leaves)) if p.mode == "forward+backward" else (loss,)


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """What transformers' BERT does: logits of every token, and their softmax in fp32."""
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)


def gathered(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """The same of the masked tokens alone."""
    real = labels >= 0
    return plain(hidden[real], weight, bias, labels[real])


def truth(p: Problem) -> Outputs:
    hidden, weight, bias = (
        t.detach().double().requires_grad_(t.requires_grad) for t in (p.hidden, p.weight, p.bias)
    )
    return by(reference.masked_lm_cross_entropy, Problem(hidden, weight, bias, p.labels, p.mode))


def bytes_moved(p: Problem) -> int:
    """Forward reads masked tokens, weight and bias; backward writes the gradients of all tokens, weight and bias."""
    parameters = p.weight.numel() + p.bias.numel()
    of_forward = p.masked * p.hidden.shape[1] + parameters
    of_backward = p.hidden.numel() + parameters if p.mode == "forward+backward" else 0
    return p.hidden.element_size() * (of_forward + of_backward)


def flops(p: Problem) -> int:
    """One product forward, two backward, of the masked tokens."""
    return 2 * p.masked * p.weight.numel() * (3 if p.mode == "forward+backward" else 1)


def prepare_ours(backend: str) -> Callable[[Problem], Callable[[], Outputs]]:
    def ours(*given: Tensor) -> Tensor:
        with dispatch.use_backend(backend, ops=["masked_lm_cross_entropy"]):
            return ops.masked_lm_cross_entropy(*given)

    return lambda p: lambda: by(ours, p)


def prepare_compiled(p: Problem) -> Callable[[], Outputs]:
    compiled = torch.compile(plain, dynamic=False)
    return lambda: by(compiled, p)


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
        given = LigerFusedLinearCrossEntropyFunction.apply(hidden[real], weight, labels[real], bias)
        return given[0] if isinstance(given, tuple) else given

    return lambda: by(liger, p)


CASE = Case(
    name="masked_lm_cross_entropy",
    group="ops",
    sizes=sizes((2048, 16384), (384, 768, 1024), VOCAB),
    cpu_sizes=sizes((512,), (384,), VOCAB),
    smoke=sizes((200,), (16,), 90),
    quick="^512x384 ",
    problem=problem,
    truth=truth,
    naive=lambda p: by(plain, p),
    bytes_moved=bytes_moved,
    flops=flops,
    variants=(
        Variant("pyaccel triton", prepare_ours("triton"), lambda p: no_triton(p.hidden.device)),
        Variant("pyaccel torch", prepare_ours("torch")),
        Variant("eager", lambda p: lambda: by(plain, p)),
        Variant("eager, masked tokens", lambda p: lambda: by(gathered, p)),
        Variant("torch.compile", prepare_compiled),
        Variant("Liger-Kernel", prepare_liger, lambda p: no_liger(p.hidden.device)),
    ),
)
CASES = (CASE,)
