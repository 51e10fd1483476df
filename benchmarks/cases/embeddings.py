"""BERT's embeddings with their LayerNorm: inference and training, at MiniLM's, BERT-base's and BERT-large's sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch, ops
from pyaccel.benchmarks.registry import Case, Variant, no_triton

VOCABULARY, POSITIONS, TYPES = 30522, 512, 2
EPS = 1e-12
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """Ids ``[batch, seq]``; the three tables, weight and bias; the output's gradient, or None in inference."""

    input_ids: Tensor
    token_type_ids: Tensor
    parameters: tuple[Tensor, ...]
    grad: Tensor | None


def problem(sizes: tuple[int, int, int, int, bool], dtype: torch.dtype, device: torch.device) -> Problem:
    batch, seq, hidden, vocabulary, training = sizes
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    # Words by a power law, as text has them: the gradient of a frequent one is a long sum.
    uniform = torch.rand(batch, seq, generator=generator, device=device)
    input_ids = (vocabulary**uniform).long().clamp_(max=vocabulary - 1)
    token_type_ids = (torch.arange(seq, device=device) >= seq // 2).long().expand(batch, seq).contiguous()
    tables = (normal(vocabulary, hidden), normal(POSITIONS, hidden), normal(TYPES, hidden))
    parameters = (*tables, normal(hidden) + 0.5, normal(hidden))
    return Problem(
        input_ids,
        token_type_ids,
        tuple(p.requires_grad_(training) for p in parameters),
        normal(batch, seq, hidden) if training else None,
    )


def by(function: Callable[..., Tensor], p: Problem) -> Outputs:
    out = function(p.input_ids, p.token_type_ids, *p.parameters)
    return (out,) if p.grad is None else (out, *torch.autograd.grad(out, p.parameters, p.grad))


def plain(
    input_ids: Tensor, token_type_ids: Tensor, words: Tensor, positions: Tensor, types: Tensor,
    weight: Tensor, bias: Tensor,
) -> Tensor:  # fmt: skip
    total = F.embedding(input_ids, words) + F.embedding(token_type_ids, types)
    total = total + positions[: input_ids.shape[1]]
    return F.layer_norm(total, (words.shape[1],), weight, bias, EPS)


def truth(p: Problem) -> Outputs:
    parameters = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in p.parameters)
    grad = None if p.grad is None else p.grad.double()
    return by(plain, Problem(p.input_ids, p.token_type_ids, parameters, grad))


def bytes_moved(p: Problem) -> int:
    """A token's word row read and output row written; in training its dy read, too, the word row again, its gradient
    written and read, and every gradient of a table written once. Position and type rows stay in cache."""
    words = p.parameters[0]
    row = words.shape[1] * words.element_size()
    tokens = p.input_ids.numel()
    if p.grad is None:
        return 2 * tokens * row
    return 6 * tokens * row + sum(t.numel() * t.element_size() for t in p.parameters[:3])


def prepare_ours(backend: str) -> Callable[[Problem], Callable[[], Outputs]]:
    def ours(input_ids: Tensor, token_type_ids: Tensor, *parameters: Tensor) -> Any:
        with dispatch.use_backend(backend, ops=["bert_embeddings"]):
            return ops.bert_embeddings(input_ids, *parameters, token_type_ids=token_type_ids, eps=EPS)

    return lambda p: lambda: by(ours, p)


def prepare_compiled(p: Problem) -> Callable[[], Outputs]:
    compiled = torch.compile(plain, dynamic=False)
    return lambda: by(compiled, p)


CASE = Case(
    name="bert_embeddings",
    group="ops",
    sizes={
        f"{batch}x{seq}x{hidden} {'forward+backward' if training else 'forward'}": (
            batch, seq, hidden, VOCABULARY, training,
        )
        for training in (False, True)
        for hidden in (384, 768, 1024)
        for batch, seq in ((1, 128), (16, 128), (32, 512))
    },
    smoke={"3x7x64 forward+backward": (3, 7, 64, 100, True), "3x7x64 forward": (3, 7, 64, 100, False)},
    quick="^16x128x384 ",
    problem=problem,
    truth=truth,
    naive=lambda p: by(plain, p),
    bytes_moved=bytes_moved,
    variants=(
        Variant("pyaccel triton", prepare_ours("triton"), lambda p: no_triton(p.input_ids.device)),
        Variant("pyaccel torch", prepare_ours("torch")),
        Variant("eager", lambda p: lambda: by(plain, p)),
        Variant("torch.compile", prepare_compiled),
    ),
)  # fmt: skip
CASES = (CASE,)
