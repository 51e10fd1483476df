"""The numerics policy: how far a result may be from the truth, the one place that holds these numbers.

A result is judged against an fp64 truth by the error that good plain PyTorch makes in the same dtype on the same
input: at most ``RATIO`` times that error plus a few units in the last place, in the maximum and in the root mean
square, both always. The method is that of flash-attention's tests, which compare with a plain reference twice:
upcast, and in the dtype itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MAX_RATIO = 3.0
MAX_EPS = 4.0
RMS_RATIO = 3.0
RMS_RATIO_FP32 = 6.0
RMS_EPS = 0.5
# Of random results over runs, two figures that are 1 by chance: the mean square of the differences of their means in
# standard errors, and the ratio of their variances, the larger over the smaller.
RANDOM_RATIO = 1.5


@dataclass(frozen=True)
class Verdict:
    """Errors of a result beside what the policy allows.

    Attributes:
        max_error, rms_error: of the result, from the truth; inf where it isn't finite and the truth is.
        max_allowed, rms_allowed: what the policy allows them to be.
        worst: index of the largest error.
    """

    max_error: float
    max_allowed: float
    rms_error: float
    rms_allowed: float
    worst: tuple[int, ...]

    @property
    def passed(self) -> bool:
        """Whether both errors are within the policy."""
        return self.max_error <= self.max_allowed and self.rms_error <= self.rms_allowed

    def __str__(self) -> str:
        return (
            f"max error {self.max_error:.3g} (allowed {self.max_allowed:.3g}), "
            f"RMS error {self.rms_error:.3g} (allowed {self.rms_allowed:.3g}), worst at {self.worst}"
        )


def judge(out: Tensor, truth: Tensor, naive: Tensor) -> Verdict:
    """Judge ``out`` by the policy.

    Args:
        out: the result under test, floating.
        truth: the same, fp64. Its infinities must be matched exactly.
        naive: what plain PyTorch gives in the dtype of ``out``.

    Raises:
        ValueError: shapes or dtypes that can't be compared.
    """
    if truth.dtype != torch.float64:
        raise ValueError(f"the truth must be float64, got {truth.dtype}")
    if not out.shape == truth.shape == naive.shape:
        raise ValueError(f"shapes differ: {tuple(out.shape)}, {tuple(truth.shape)}, {tuple(naive.shape)}")
    if out.dtype != naive.dtype:
        raise ValueError(f"the result is {out.dtype} and plain PyTorch's {naive.dtype}")
    if out.numel() == 0:
        return Verdict(0.0, 0.0, 0.0, 0.0, ())
    eps = torch.finfo(out.dtype).eps
    ratio = RMS_RATIO_FP32 if out.dtype == torch.float32 else RMS_RATIO
    out, naive, truth = (t.detach().double().cpu() for t in (out, naive, truth))
    infinite = truth.isinf()
    wrong = torch.where(infinite, out != truth, ~out.isfinite())
    out, naive, truth = (t.masked_fill(infinite, 0.0) for t in (out, naive, truth))
    error = (out - truth).abs().masked_fill(wrong, math.inf)
    naive_error = naive - truth
    return Verdict(
        max_error=error.max().item(),
        max_allowed=MAX_RATIO * naive_error.abs().max().item() + MAX_EPS * eps * truth.abs().max().item(),
        rms_error=rms(error),
        rms_allowed=ratio * rms(naive_error) + RMS_EPS * eps * rms(truth),
        worst=tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape)),
    )


def judge_by_several(out: Tensor, truth: Tensor, naives: Sequence[Tensor]) -> Verdict:
    """:func:`judge` by the largest error of several runs of plain PyTorch, which round differently.

    For sums whose largest element stands alone, such as the gradient of a LayerNorm's weight in a real checkpoint: one
    run's error there is one draw, and three times a draw that happened to be near 0 is no measure of anything.
    """
    verdicts = [judge(out, truth, naive) for naive in naives]
    return replace(
        verdicts[0],
        max_allowed=max(v.max_allowed for v in verdicts),
        rms_allowed=max(v.rms_allowed for v in verdicts),
    )


def rms(x: Tensor) -> float:
    """Root mean square."""
    return math.sqrt(x.square().mean().item())


class RunningMoments:
    """Mean and variance of a tensor over runs (Welford 1962), in fp64."""

    def __init__(self) -> None:
        self.runs = 0
        self.mean = torch.empty(0)
        self._squares = torch.empty(0)

    def add(self, value: Tensor) -> None:
        value = value.detach().double().cpu()
        self.runs += 1
        if self.runs == 1:
            self.mean, self._squares = value.clone(), torch.zeros_like(value)
            return
        difference = value - self.mean
        self.mean += difference / self.runs
        self._squares += difference * (value - self.mean)

    @property
    def variance(self) -> Tensor:
        return self._squares / (self.runs - 1)


def judge_random(a: RunningMoments, b: RunningMoments) -> tuple[float, float]:
    """How far two random results are apart in means or spread, and how far they may be.

    The larger of two figures that are 1 by chance: the mean square, over all elements, of the differences of their
    means in standard errors; and the ratio of their mean variances. Both are needed: without dropout
    the means are right.

    Elements that don't change from run to run have no standard error and aren't counted; 0 where none does.
    """
    error = (a.variance / a.runs + b.variance / b.runs).sqrt()
    moves = error > 1e-4 * a.mean.abs().mean()
    if not moves.any():
        return 0.0, RANDOM_RATIO
    means = ((a.mean - b.mean)[moves] / error[moves]).square().mean().item()
    less, more = sorted((a.variance[moves].mean().item(), b.variance[moves].mean().item()))
    return max(means, more / less if less else math.inf), RANDOM_RATIO


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits; NaNs with equal bits are equal."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # A copy: one element is contiguous whatever its stride, and only a stride of 1 can be viewed as bytes.
    copies = (x.detach().reshape(-1).clone(memory_format=torch.contiguous_format) for x in (a, b))
    return torch.equal(*(x.view(torch.uint8) for x in copies))
