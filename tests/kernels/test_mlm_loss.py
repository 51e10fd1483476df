"""The launcher: it writes what it should, all of it, and nothing else, with every shipped configuration."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel.kernels.mlm_loss import config, cross_entropy
from tests.assertions import assert_bits_equal, assert_close_to_truth
from tests.pairwise import pairwise

Alloc = Callable[..., Tensor]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# One tile that is filled in part or wholly, several with a part of one left.
COLS = [1, 70, 1000, 1024, 1030, 4096, 9000]
CASES = pairwise(
    {
        "cols": COLS,
        "dtype": [F32, BF16, F16],
        "bias_dtype": ["same", F32, None],
        "rows": [3, 19],
        "scaled": [True, False],
    }
)


def label(case: dict[str, object]) -> str:
    return "-".join(str(value).replace("torch.", "") for value in case.values())


def inputs(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits ``[rows, cols]`` with rows far from 0 and one of great range; labels with the first and last word."""
    logits = torch.randn(rows, cols, device=device) * 2
    logits[1:2] += 60.0
    logits[2:3] *= 30.0
    labels = torch.randint(0, cols, (rows,), device=device)
    labels[0], labels[-1] = 0, cols - 1
    return logits.to(dtype), labels


def padded(logits: Tensor, empty: Alloc) -> Tensor:
    """The same in rows of the buffer's width, NaN behind them."""
    rows, cols = logits.shape
    out = empty((rows, config.cross_entropy_width(cols)), dtype=logits.dtype, device=logits.device)
    out[:, :cols] = logits
    return out


def run(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor | None,
    empty: Alloc,
    want_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Losses, and the buffer after the launch."""
    n_cols = logits.shape[1]
    buffer, loss = padded(logits, empty), empty(labels.shape, device=logits.device)
    if bias is not None:
        bias = F.pad(bias, (0, buffer.shape[1] - n_cols))
    cross_entropy.rows(loss, buffer, bias, labels, scale, n_cols, want_grad, config.cross_entropy(n_cols))
    return loss, buffer


def expected(
    logits: Tensor, bias: Tensor | None, labels: Tensor, scale: Tensor | None, *, upcast: bool
) -> tuple[Tensor, Tensor]:
    """Losses and gradients of torch: in fp64, or in fp32 with a gradient in the logits' dtype."""
    wide = torch.float64 if upcast else F32
    leaf = logits.to(wide if upcast else logits.dtype).detach().requires_grad_()
    x = leaf.to(wide)
    if bias is not None:
        x = x + bias.to(wide)
    loss = F.cross_entropy(x, labels, reduction="none")
    factor = torch.ones_like(loss) if scale is None else scale.to(wide)
    return loss, torch.autograd.grad(loss, leaf, factor)[0]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_losses_and_gradients_are_right_and_nothing_else_is_written(
    case: dict[str, object], device: torch.device, guarded_empty: Alloc
) -> None:
    rows, cols, dtype = case["rows"], case["cols"], case["dtype"]
    logits, labels = inputs(rows, cols, dtype, device)
    bias_dtype = dtype if case["bias_dtype"] == "same" else case["bias_dtype"]
    bias = None if bias_dtype is None else torch.randn(cols, device=device).to(bias_dtype)
    scale = torch.randn(rows, device=device) + 0.3 if case["scaled"] else None
    truth, naive = (expected(logits, bias, labels, scale, upcast=upcast) for upcast in (True, False))
    loss, grad = run(logits, bias, labels, scale, guarded_empty)
    assert_close_to_truth(loss, truth[0], naive[0], name="loss")
    assert_close_to_truth(grad[:, :cols], truth[1], naive[1], name="gradient")
    assert not grad[:, cols:].any()
    # Without gradients: the same losses, and the logits stay.
    alone, buffer = run(logits, bias, labels, scale, guarded_empty, want_grad=False)
    assert_bits_equal(alone, loss)
    assert_bits_equal(buffer[:, :cols], logits)


@pytest.mark.parametrize("cols", [70, 5000])
def test_what_is_behind_a_row_does_not_count_and_rows_do_not_mix(
    cols: int, device: torch.device, guarded_empty: Alloc
) -> None:
    logits, labels = inputs(6, cols, F32, device)
    whole = run(logits, None, labels, None, guarded_empty)
    for row in range(6):
        part = slice(row, row + 1)
        for a, b in zip(run(logits[part], None, labels[part], None, guarded_empty), whole, strict=True):
            assert_bits_equal(a, b[part])
    logits[2, 3], logits[4, -1] = float("nan"), float("inf")
    loss, grad = run(logits, None, labels, None, guarded_empty)
    others = [0, 1, 3, 5]
    assert loss[2].isnan()
    assert loss[4].isnan() or loss[4].isinf()
    assert grad[2, :cols].isnan().all()
    assert_bits_equal(loss[others], whole[0][others])
    assert_bits_equal(grad[others], whole[1][others])


def test_extreme_logits(device: torch.device, guarded_empty: Alloc) -> None:
    """Words ruled out by -inf or the smallest number, rows beyond the range of exp, and rows of equal logits."""
    low = torch.finfo(F32).min
    logits = torch.randn(7, 1100, device=device)
    labels = torch.full((7,), 1099, device=device)
    logits[0, :600] = float("-inf")
    logits[1, :600] = low
    logits[2, :1099] = low
    logits[3] -= 1e4
    logits[4] += 1e4
    logits[5] = 2.5
    logits[6, :1099] = float("-inf")
    truth, naive = (expected(logits, None, labels, None, upcast=upcast) for upcast in (True, False))
    loss, grad = run(logits, None, labels, None, guarded_empty)
    for rows in ([0, 1, 5], [2, 6], [3, 4]):  # those of like magnitude together
        for name, a, b, c in (
            ("loss", loss, truth[0], naive[0]),
            ("gradient", grad[:, :1100], truth[1], naive[1]),
        ):
            assert_close_to_truth(a[rows], b[rows], c[rows], name=f"{name} of rows {rows}")
    # An impossible word was there.
    labels[0] = 0
    assert run(logits, None, labels, None, guarded_empty)[0][0] == float("inf")


def test_no_rows(device: torch.device, guarded_empty: Alloc) -> None:
    logits, labels = torch.empty(0, 64, device=device), torch.empty(0, dtype=torch.int64, device=device)
    cross_entropy.rows(labels.float(), logits, None, labels, None, 60, True, config.cross_entropy(60))


def test_offsets_beyond_two_to_the_31(device: torch.device, guarded_empty: Alloc) -> None:
    """Rows 2**30 elements apart: the last begins at 2**31. Memory not touched isn't taken."""
    near, labels = inputs(3, 1024, F16, device)
    far = torch.empty(3, 2**30, dtype=F16, device=device)
    far[:, :1024] = near
    loss, grad = run(near, None, labels, None, guarded_empty)
    found = torch.empty_like(loss)
    cross_entropy.rows(found, far, None, labels, None, 1024, True, config.cross_entropy(1024))
    assert_bits_equal(found, loss)
    assert_bits_equal(far[:, :1024], grad)


def test_configs_are_values_of_the_vocabulary_alone() -> None:
    assert {config.cross_entropy(n) for n in COLS} == {config.cross_entropy(n) for n in range(1, 40_000, 7)}
    assert hash(config.cross_entropy(30522)) == hash(config.cross_entropy(250_002))
    for n in (*COLS, 30522, 119_547):
        width = config.cross_entropy_width(n)
        assert n <= width < n + 64
        assert width % 64 == 0
        # The tiles cover the padding, whose gradients they write too.
        block_n = config.cross_entropy(n).block_n
        assert -(-n // block_n) * block_n >= width


@pytest.mark.parametrize(
    ("vocab", "itemsize", "expected"),
    [(30522, 2, 2048), (30522, 4, 1024), (250_002, 2, 256), (64, 4, 524_288), (10**7, 4, 256)],
)
def test_a_chunk_is_a_power_of_two_of_rows_that_fits(vocab: int, itemsize: int, expected: int) -> None:
    assert config.cross_entropy_chunk(vocab, itemsize) == expected
