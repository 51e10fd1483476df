"""Attention over padded batches, forward and with its backward, at BERT's shapes and those of published figures.

query, key, value and the gradient are ``[batch, heads, seq, head_dim]`` as BERT has them: views of what a Linear
wrote, ``[batch, seq, heads, head_dim]`` in memory. Masks are key padding masks. What is right is said by
:mod:`pyaccel.reference`, a few sequences and heads at a time, since the fp64 scores of all would not fit.

There is no dropout here: a baseline's dropout mask can't be replayed, so its gradients could not be checked before they
are timed, and what isn't checked isn't timed.

A backend of SDPA is asked for by a context manager, inside the time: about 10 us of the host's, which only the very
smallest batches can notice. "SDPA" alone is PyTorch's own choice, without it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyaccel import dispatch, ops, reference
from pyaccel.benchmarks.case import Case, Variant, no_triton
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

PART = 2**28  # scores held at once by truth and naive: 2 GiB in fp64, one head of 16384 tokens


@dataclass(frozen=True)
class Problem:
    """query, key, value; the gradient of the output, or None for the forward alone; which keys are real, or None."""

    shape: Shape
    tensors: tuple[Tensor, Tensor, Tensor]
    grad: Tensor | None
    lengths: Tensor
    key_mask: Tensor | None

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.lengths.device


def problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> Tensor:
        x = torch.randn(
            shape.batch, shape.seq, shape.heads, shape.head_dim, generator=generator, device=device
        )
        return x.to(dtype).transpose(1, 2)

    query, key, value = (normal().requires_grad_(shape.backward) for _ in range(3))
    grad = normal() if shape.backward else None
    lengths = torch.tensor(shape.lengths, device=device)
    key_mask = torch.arange(shape.seq, device=device) < lengths[:, None] if shape.masked else None
    return Problem(shape, (query, key, value), grad, lengths, key_mask)


def by_reference(p: Problem, *, upcast: bool) -> Outputs:
    """Output and gradients by the definition, a few sequences and heads at a time."""
    shape = p.shape
    pairs = max(1, PART // shape.seq**2)  # of a sequence and a head
    heads = min(shape.heads, pairs)
    sequences = max(1, pairs // shape.heads)
    whole = [torch.empty_like(p.tensors[0], dtype=torch.float64 if upcast else None, requires_grad=False)]
    whole += [torch.empty_like(whole[0]) for _ in range(3 if shape.backward else 0)]
    for first in range(0, shape.batch, sequences):
        for head in range(0, shape.heads, heads):
            part = (slice(first, first + sequences), slice(head, head + heads))
            tensors = tuple(t.detach()[part].to(whole[0].dtype) for t in p.tensors)
            parts = results(
                reference.scaled_dot_product_attention,
                tuple(t.requires_grad_(shape.backward) for t in tensors),
                None if p.grad is None else p.grad[part].to(whole[0].dtype),
                key_padding_mask=None if p.key_mask is None else p.key_mask[part[0]],
                upcast=upcast,
            )
            for target, source in zip(whole, parts, strict=True):
                target[part] = source.detach()
    return tuple(whole)


def bytes_moved(p: Problem) -> int:
    """Forward reads query and the real keys and values and writes the output.

    Backward reads them, output and gradient, and writes three gradients.
    """
    everything = p.tensors[0].numel()
    real = p.shape.heads * p.shape.head_dim * p.shape.tokens
    elements = 2 * everything + 2 * real
    if p.shape.backward:
        elements += 6 * everything + 2 * real
    return elements * p.tensors[0].element_size()


def plain(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    """Explicit softmax maths, as in Hugging Face's eager attention."""
    scores = query @ key.mT * (1.0 / math.sqrt(query.shape[-1]))
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -math.inf)
    return torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ value


def prepare_ours(backend: str) -> Callable[[Problem], Callable[[], Outputs]]:
    def prepare(p: Problem) -> Callable[[], Outputs]:
        def call() -> Outputs:
            with dispatch.use_backend(backend, ops=["scaled_dot_product_attention"]):
                return results(
                    ops.scaled_dot_product_attention, p.tensors, p.grad, key_padding_mask=p.key_mask
                )

        return call

    return prepare


def prepare_plain(p: Problem) -> Callable[[], Outputs]:
    return lambda: results(plain, p.tensors, p.grad, p.key_mask)


def prepare_compiled(p: Problem) -> Callable[[], Outputs]:
    compiled = torch.compile(plain, dynamic=False)
    return lambda: results(compiled, p.tensors, p.grad, p.key_mask)


def prepare_sdpa(p: Problem) -> Callable[[], Outputs]:
    mask = None if p.key_mask is None else p.key_mask[:, None, None, :]
    return lambda: results(F.scaled_dot_product_attention, p.tensors, p.grad, attn_mask=mask)


def prepare_sdpa_by(backend: SDPBackend) -> Callable[[Problem], Callable[[], Outputs]]:
    def prepare(p: Problem) -> Callable[[], Outputs]:
        by_choice = prepare_sdpa(p)

        def call() -> Outputs:
            with sdpa_kernel(backend):
                return by_choice()

        return call

    return prepare


def no_sdpa_by(backend: SDPBackend) -> Callable[[Problem], str | None]:
    """Why a backend of SDPA can't take a problem: what PyTorch itself says."""

    def missing(p: Problem) -> str | None:
        if p.device.type != "cuda":
            return "it is one of SDPA's backends on CUDA"
        mask = None if p.key_mask is None else p.key_mask[:, None, None, :]
        params = torch.backends.cuda.SDPAParams(*p.tensors, mask, 0.0, False, False)
        usable = {
            SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
            SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.can_use_efficient_attention,
            SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
        }[backend]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if usable(params, True):
                return None
        reasons = [str(warning.message).split(" (Triggered")[0] for warning in said]
        return "; ".join(reasons) or "PyTorch says it can't serve this call"

    return missing


def prepare_flex(p: Problem) -> Callable[[], Outputs]:
    """FlexAttention with a block mask, which is made once, as for the layers of a model."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = None
    if p.key_mask is not None:

        def is_real(batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
            return col < p.lengths[batch]

        shape = p.shape
        block_mask = create_block_mask(is_real, shape.batch, None, shape.seq, shape.seq, device=str(p.device))
    return lambda: results(compiled, p.tensors, p.grad, block_mask=block_mask)


def no_flex(p: Any) -> str | None:
    """Why FlexAttention can't serve: on CPUs it has a forward alone."""
    if p.device.type == "cpu" and p.shape.backward:
        return "FlexAttention has no backward on the CPU"
    return None


def sizes(heads: tuple[tuple[int, int], ...], tokens: int, seqs: tuple[int, ...]) -> dict[str, Shape]:
    """For each heads x head_dim: full batches of that many slots, masked ones, and single short sequences."""
    sweep: dict[str, Shape] = {}
    for pair in heads:
        for seq in seqs:
            batch = max(1, tokens // seq) if seq <= 512 else 1
            sweep |= both_ways(*pair, f"{batch}x{seq}", seq, (seq,) * batch)
        for name, mix, seq in (("squad", squad, 384), ("sentences", sentences, 128)):
            batch = max(1, tokens // seq)
            sweep |= both_ways(*pair, f"{batch}x{seq} {name}", seq, mix(batch))
        for seq in (32, 128):
            sweep |= both_ways(*pair, f"1x{seq}", seq, (seq,))
    return sweep


def published() -> dict[str, Shape]:
    """What FlashAttention's charts show: hidden size 2048, 16384 tokens, not causal."""
    sweep: dict[str, Shape] = {}
    for seq in (512, 4096, 16384):
        sweep |= both_ways(32, 64, f"{TOKENS // seq}x{seq}", seq, (seq,) * (TOKENS // seq))
    return sweep


CASE = Case(
    name="attention",
    group="ops",
    sizes=sizes(HEADS, TOKENS, (32, 128, 256, 512, 4096, 16384)) | published(),
    cpu_sizes=sizes(CPU_HEADS, 2048, (32, 128, 512)),
    smoke={
        "3x16 2x9 forward": Shape(3, 16, 9, (9, 9), backward=False),
        "3x16 2x17 masked forward": Shape(3, 16, 17, (17, 5), backward=False),
        "3x16 2x17 masked forward+backward": Shape(3, 16, 17, (17, 5), backward=True),
    },
    quick="^12x32 (16x128|5x384 squad) forward$",
    problem=problem,
    truth=lambda p: by_reference(p, upcast=True),
    naive=lambda p: by_reference(p, upcast=False),
    bytes_moved=bytes_moved,
    flops=lambda p: p.shape.flops(p.shape.seq * p.shape.tokens),
    variants=(
        Variant("pyaccel triton", prepare_ours("triton"), lambda p: no_triton(p.device)),
        Variant("pyaccel torch", prepare_ours("torch")),
        Variant("eager", prepare_plain),
        Variant("torch.compile", prepare_compiled),
        Variant("SDPA", prepare_sdpa),
        *(
            Variant(f"SDPA {name}", prepare_sdpa_by(backend), no_sdpa_by(backend))
            for name, backend in (
                ("flash", SDPBackend.FLASH_ATTENTION),
                ("cuDNN", SDPBackend.CUDNN_ATTENTION),
                ("efficient", SDPBackend.EFFICIENT_ATTENTION),
            )
        ),
        Variant("FlexAttention", prepare_flex, no_flex),
    ),
)
CASES = (CASE,)
