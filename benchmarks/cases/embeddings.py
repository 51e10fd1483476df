"""BERT's embeddings with their LayerNorm: inference and training, at MiniLM's, BERT-base's and BERT-large's sizes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import ops
from pyaccel.benchmarks.case import Case
from pyaccel.benchmarks.cases.common import Problem, normal, variants

VOCABULARY, POSITIONS, TYPES = 30522, 512, 2
EPS = 1e-12


def problem(sizes: tuple[int, int, int, int, bool], dtype: torch.dtype, device: torch.device) -> Problem:
    """The three tables, weight and bias; ids ``[batch, seq]``; the output's gradient."""
    batch, seq, hidden, vocabulary, training = sizes
    generator = torch.Generator(device).manual_seed(0)

    # Words by a power law, as text has them: the gradient of a frequent one is a long sum.
    uniform = torch.rand(batch, seq, generator=generator, device=device)
    input_ids = (vocabulary**uniform).long().clamp_(max=vocabulary - 1)
    token_type_ids = (torch.arange(seq, device=device) >= seq // 2).long().expand(batch, seq).contiguous()
    draw = normal(dtype, device)
    tables = (draw(vocabulary, hidden), draw(POSITIONS, hidden), draw(TYPES, hidden))
    leaves = (*tables, draw(hidden) + 0.5, draw(hidden))
    mode = "forward+backward" if training else "forward"
    return Problem(leaves, mode, draw(batch, seq, hidden), fixed=(input_ids, token_type_ids))


def plain(
    words: Tensor, positions: Tensor, types: Tensor, weight: Tensor, bias: Tensor,
    input_ids: Tensor, token_type_ids: Tensor,
) -> Tensor:  # fmt: skip
    total = F.embedding(input_ids, words) + F.embedding(token_type_ids, types)
    total = total + positions[: input_ids.shape[1]]
    return F.layer_norm(total, (words.shape[1],), weight, bias, EPS)


def ours(*given: Tensor) -> Any:
    *parameters, input_ids, token_type_ids = given
    return ops.bert_embeddings(input_ids, *parameters, token_type_ids=token_type_ids, eps=EPS)


def bytes_moved(p: Problem) -> int:
    """A token's word row read and output row written; in training its dy read, too, the word row again, its gradient
    written and read, and every gradient of a table written once. Position and type rows stay in cache."""
    words = p.leaves[0]
    row = words.shape[1] * words.element_size()
    tokens = p.fixed[0].numel()
    if not p.backward:
        return 2 * tokens * row
    return 6 * tokens * row + sum(t.numel() * t.element_size() for t in p.leaves[:3])


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
    truth=lambda p: p.exactly_by(plain),
    naive=lambda p: p.by(plain),
    bytes_moved=bytes_moved,
    variants=variants("bert_embeddings", lambda p: ours, lambda p: plain),
)  # fmt: skip
CASES = (CASE,)
