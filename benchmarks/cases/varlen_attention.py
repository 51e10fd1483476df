"""Attention within each sequence of a packed batch, forward and with its backward, at the lengths of real batches.

query, key, value and the gradient are ``[total_tokens, heads, head_dim]``; the sequences come in no order. Baselines
that want padding get the same tokens padded, and nested tensors are made, before the clock starts, and what they
give is packed for the check after it has stopped: the time is that of attention alone. FLOPs and bytes are those of
the real tokens, whoever computes more. Batches without any padding show what packing itself costs.

There is no dropout here, as in :mod:`pyaccel.benchmarks.cases.attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch, ops, reference
from pyaccel.benchmarks.case import Case, Variant, no_triton
from pyaccel.benchmarks.cases import attention
from pyaccel.benchmarks.cases.attention_shapes import (
    CPU_HEADS,
    HEADS,
    TOKENS,
    Shape,
    both_ways,
    results,
    sentences,
    squad,
)
from pyaccel.benchmarks.cases.common import Outputs


@dataclass(frozen=True)
class Problem:
    """query, key, value; the gradient of the output, or None for the forward alone; where sequences begin and end."""

    shape: Shape
    tensors: tuple[Tensor, ...]
    grad: Tensor | None
    cu_seqlens: Tensor

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.cu_seqlens.device

    @property
    def offsets(self) -> tuple[Tensor, Tensor, int, int]:
        """As ``varlen_attention`` takes them."""
        return self.cu_seqlens, self.cu_seqlens, self.shape.seq, self.shape.seq

    @property
    def slots(self) -> Tensor:
        """Bool ``[batch, seq]``: which slots of the padded batch hold a token."""
        return torch.arange(self.shape.seq, device=self.device) < self.cu_seqlens.diff()[:, None]


def problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> Tensor:
        x = torch.randn(shape.tokens, shape.heads, shape.head_dim, generator=generator, device=device)
        return x.to(dtype)

    tensors = tuple(normal().requires_grad_(shape.backward) for _ in range(3))
    ends = torch.tensor(shape.lengths, device=device).cumsum(0)
    cu_seqlens = F.pad(ends, (1, 0)).to(torch.int32)
    return Problem(shape, tensors, normal() if shape.backward else None, cu_seqlens)


def by_reference(p: Problem, *, upcast: bool) -> Outputs:
    dtype = torch.float64 if upcast else p.tensors[0].dtype
    tensors = tuple(t.detach().to(dtype).requires_grad_(p.shape.backward) for t in p.tensors)
    grad = None if p.grad is None else p.grad.to(dtype)
    return results(reference.varlen_attention, tensors, grad, *p.offsets, upcast=upcast)


def bytes_moved(p: Problem) -> int:
    """Forward reads three and writes one; backward reads those and the gradient, and writes three."""
    return (12 if p.shape.backward else 4) * p.tensors[0].numel() * p.tensors[0].element_size()


def prepare_ours(backend: str) -> Callable[[Problem], Callable[[], Outputs]]:
    def prepare(p: Problem) -> Callable[[], Outputs]:
        def call() -> Outputs:
            with dispatch.use_backend(backend, ops=["varlen_attention"]):
                return results(ops.varlen_attention, p.tensors, p.grad, *p.offsets)

        return call

    return prepare


def padded(p: Problem) -> attention.Problem:
    """The same tokens as a padded batch; a mask only where there is padding."""

    def pad(packed: Tensor) -> Tensor:
        x = packed.new_zeros(p.shape.batch, p.shape.seq, p.shape.heads, p.shape.head_dim)
        x[p.slots] = packed.detach()
        return x.transpose(1, 2)

    query, key, value = (pad(t).requires_grad_(p.shape.backward) for t in p.tensors)
    return attention.Problem(
        shape=p.shape,
        tensors=(query, key, value),
        grad=None if p.grad is None else pad(p.grad),
        lengths=p.cu_seqlens.diff(),
        key_mask=p.slots if p.shape.masked else None,
    )


def on_padded(variant: Variant) -> Variant:
    """A way to compute the padded case as one of this."""
    return Variant(
        f"{variant.name}, padded",
        prepare=lambda p: variant.prepare(padded(p)),
        missing=lambda p: variant.missing(padded(p)),
        outputs=lambda p, given: tuple(t.transpose(1, 2)[p.slots] for t in given),
    )


def prepare_varlen_attn(p: Problem) -> Callable[[], Outputs]:
    from torch.nn.attention.varlen import varlen_attn

    return lambda: results(varlen_attn, p.tensors, p.grad, *p.offsets)


def no_varlen_attn(p: Problem) -> str | None:
    if p.device.type != "cuda":
        return "varlen_attn is for CUDA"
    if p.tensors[0].dtype not in (torch.float16, torch.bfloat16):
        return f"varlen_attn takes float16 and bfloat16, not {p.tensors[0].dtype}"
    return None


def prepare_nested(p: Problem) -> Callable[[], Outputs]:
    offsets = p.cu_seqlens.long()

    def nested(packed: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(
            packed.detach(), offsets, min_seqlen=min(p.shape.lengths), max_seqlen=p.shape.seq
        )

    tensors = tuple(nested(t).requires_grad_(p.shape.backward) for t in p.tensors)
    grad = None if p.grad is None else nested(p.grad)

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        return out.transpose(1, 2)

    return lambda: results(sdpa, tensors, grad)


def prepare_flex(p: Problem) -> Callable[[], Outputs]:
    """FlexAttention over all tokens as one sequence; the block mask is made once, as for the layers of a model."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    lengths = p.cu_seqlens.diff()
    document = torch.arange(len(lengths), device=p.device).repeat_interleave(lengths)

    def is_same(batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return document[row] == document[col]

    total = p.shape.tokens
    block_mask = create_block_mask(is_same, None, None, total, total, device=str(p.device))
    query, key, value = (t.detach().transpose(0, 1)[None].requires_grad_(p.shape.backward) for t in p.tensors)
    grad = None if p.grad is None else p.grad.transpose(0, 1)[None]
    return lambda: results(compiled, (query, key, value), grad, block_mask=block_mask)


def sizes(heads: tuple[tuple[int, int], ...], tokens: int, full: tuple[int, int]) -> dict[str, Shape]:
    """For each heads x head_dim: the two mixes at about that many real tokens, and a batch of equal lengths."""
    sweep: dict[str, Shape] = {}
    for pair in heads:
        for name, mix, mean in (("squad", squad, 177), ("sentences", sentences, 25)):
            lengths = mix(tokens // mean)
            sweep |= both_ways(*pair, f"{len(lengths)} {name}", max(lengths), lengths)
        count, seq = full
        sweep |= both_ways(*pair, f"{count} of {seq}", seq, (seq,) * count)
    return sweep


CASE = Case(
    name="varlen_attention",
    group="ops",
    sizes=sizes(HEADS, TOKENS, (32, 512)),
    cpu_sizes=sizes(CPU_HEADS, 2048, (4, 512)),
    smoke={
        "3x16 3 forward": Shape(3, 16, 17, (5, 17, 1), backward=False),
        "3x16 3 forward+backward": Shape(3, 16, 17, (5, 17, 1), backward=True),
    },
    quick="^12x32 .* (squad|sentences) forward$",
    problem=problem,
    truth=lambda p: by_reference(p, upcast=True),
    naive=lambda p: by_reference(p, upcast=False),
    bytes_moved=bytes_moved,
    flops=lambda p: p.shape.flops(sum(n * n for n in p.shape.lengths)),
    variants=(
        Variant("pyaccel triton", prepare_ours("triton"), lambda p: no_triton(p.device)),
        Variant("pyaccel torch", prepare_ours("torch")),
        Variant("varlen_attn", prepare_varlen_attn, no_varlen_attn),
        Variant(
            "SDPA nested",
            prepare_nested,
            outputs=lambda p, given: tuple(t.values() for t in given),
        ),
        Variant(
            "FlexAttention",
            prepare_flex,
            attention.no_flex,
            outputs=lambda p, given: tuple(t[0].transpose(0, 1) for t in given),
        ),
        *(on_padded(v) for v in attention.CASE.variants if v.name == "pyaccel triton" or "SDPA" in v.name),
    ),
)
CASES = (CASE,)
