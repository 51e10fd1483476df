"""Assertions by the one numerics policy, :mod:`pyaccel.verify.policy`. No other test file holds a tolerance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyaccel.verify.policy import judge

# Saved statistics are fp32 numbers whatever the dtype of the data: a 16-bit bound would hide a wrong variance.
STATISTIC_EPS = 32.0
EQUIVALENT_EPS = 4.0
# Of a sum that is rounded once: half a unit in the last place at most, whatever plain PyTorch adds up in 16 bits.
SUM_EPS = 0.5
# Of random results: standard errors between means, and how far from 1 the ratio of variances.
MEANS_DIFFER = 5.0
# Of two losses after as many optimizer steps, relatively: they keep within 5e-7 where nothing is wrong.
CURVES_DIFFER = 1e-5
SPREADS_DIFFER = 0.1


def assert_close_to_truth(out: Tensor, truth: Tensor, naive: Tensor, *, name: str = "") -> None:
    """``out`` is within the policy.

    Args:
        out: the result under test.
        truth: the same in fp64.
        naive: what plain PyTorch gives in the dtype of ``out``.
    """
    verdict = judge(out, truth, naive)
    assert verdict.passed, (
        f"{name or 'result'}: {verdict}: got {out[verdict.worst].item():.9g}, "
        f"truth {truth[verdict.worst].item():.9g} (dtype {out.dtype}, shape {tuple(out.shape)})"
    )


def assert_summed_in_fp32(out: Tensor, truth: Tensor, *, name: str = "") -> None:
    """A gradient summed over many rows is the fp32 sum, rounded once to its dtype.

    Plain PyTorch is no measure of it: a CPU adds up the rows of some 16-bit gradients in 16 bits.

    Args:
        truth: the sum in fp64, of the terms that the op was given.
    """
    error, size = ((t.detach().double().square().mean().sqrt().item()) for t in (out.double() - truth, truth))
    bound = SUM_EPS * torch.finfo(out.dtype).eps * size
    assert error <= bound, f"{name or 'sum'}: RMS error {error:.3g}, over {bound:.3g} (dtype {out.dtype})"


def assert_statistic(out: Tensor, truth: Tensor, *, scale: Tensor | float = 0.0, name: str = "") -> None:
    """A saved statistic (mean, rstd, LSE) is right as an fp32 number, element by element.

    Args:
        scale: magnitude of what was summed, where the statistic itself may cancel (a mean of large values).
    """
    assert out.dtype == torch.float32, f"{name}: statistics are fp32, got {out.dtype}"
    assert out.shape == truth.shape, f"{name}: shapes {tuple(out.shape)}, {tuple(truth.shape)}"
    out, truth = out.detach().double().cpu(), truth.detach().cpu()
    infinite = truth.isinf()
    assert torch.equal(out[infinite], truth[infinite]), f"{name}: infinities differ from the truth's"
    out, truth = out.masked_fill(infinite, 0.0), truth.masked_fill(infinite, 0.0)
    bound = STATISTIC_EPS * torch.finfo(torch.float32).eps * (truth.abs() + torch.as_tensor(scale).cpu())
    wrong = ~((out - truth).abs() <= bound)
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} are over {STATISTIC_EPS} fp32 eps off, the first "
        f"{out[wrong][0].item():.9g} where the truth is {truth[wrong][0].item():.9g}"
    )


def assert_bits_equal(a: Tensor, b: Tensor, *, name: str = "") -> None:
    """Equal dtype, shape and bits; NaNs with equal bits are equal."""
    assert a.dtype == b.dtype, f"{name}: {a.dtype} against {b.dtype}"
    assert a.shape == b.shape, f"{name}: {tuple(a.shape)} against {tuple(b.shape)}"
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    different = a.detach().contiguous().view(width) != b.detach().contiguous().view(width)
    assert not different.any(), f"{name}: {int(different.sum())} of {a.numel()} elements differ in their bits"


def assert_equivalent(out: Tensor, expected: Tensor, *, name: str = "") -> None:
    """The same computation by other ops: equal but for a few roundings of the dtype at the largest magnitude.

    For what a guard lets through or sends elsewhere. Whether a path is as right as it should be is judged by
    :func:`assert_close_to_truth`.
    """
    assert out.dtype == expected.dtype, f"{name}: {out.dtype} against {expected.dtype}"
    assert out.shape == expected.shape, f"{name}: {tuple(out.shape)} against {tuple(expected.shape)}"
    bound = EQUIVALENT_EPS * torch.finfo(out.dtype).eps * expected.abs().max().item()
    error = (out.detach().double() - expected.detach().double()).abs().max().item()
    assert error <= bound, f"{name or 'result'}: differs by {error:.3g}, over {bound:.3g}"


def assert_same_distribution(
    draw: Callable[[], Tensor], expected: Callable[[], Tensor], *, runs: int
) -> None:
    """Two random results have the same mean and spread, element by element and as a whole.

    Means may differ by 5 of their standard errors, which by chance alone one in a million does; the spread of all
    elements together by a tenth.
    """
    samples = [torch.stack([one().detach().double() for _ in range(runs)]) for one in (draw, expected)]
    (mean, other), (spread, other_spread) = ([f(s, 0) for s in samples] for f in (torch.mean, torch.var))
    error = ((spread + other_spread) / runs).sqrt()
    worst = ((mean - other).abs() / error.clamp(min=1e-12)).max().item()
    assert worst <= MEANS_DIFFER, f"means differ by {worst:.2f} standard errors"
    ratio = (spread.mean() / other_spread.mean()).item()
    assert abs(ratio - 1) <= SPREADS_DIFFER, f"variances are {ratio:.3f} to 1"


def assert_same_curve(losses: list[float], expected: list[float]) -> None:
    """Losses of the same training by other ops: roundings feed back into the weights, and yet they stay together."""
    ours, theirs = torch.tensor(losses, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    worst = ((ours - theirs).abs() / theirs.abs()).max().item()
    assert worst <= CURVES_DIFFER, f"losses differ by {worst:.2g} of themselves: {losses} against {expected}"
