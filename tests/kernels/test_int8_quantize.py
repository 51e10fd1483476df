"""The launchers of quantization: the definition's bits, all of them, and nothing beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyaccel.kernels.common import limits
from pyaccel.kernels.int8 import config, quantize
from pyaccel.reference import int8 as reference
from tests.assertions import assert_bits_equal
from tests.kernels.test_linear import view
from tests.pairwise import pairwise

Alloc = Callable[..., Tensor]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# One column, columns that no block divides, a block, and rows that several configurations hold.
SIZES = [(1, 1), (5, 33), (9, 512), (3, 700), (2, 2049), (1, 4097), (1, 8200)]
CASES = pairwise(
    {
        "size": SIZES,
        "dtype": [F32, F16, BF16],
        "offset": [False, True],
        "factor": [False, True],
        "view": ["contiguous", "gaps", "transposed"],
    }
)


def inputs(case: dict[str, object], device: torch.device) -> tuple[Tensor, Tensor | None]:
    rows, cols = case["size"]
    x = (torch.randn(rows, cols, device=device) + 0.4) * torch.logspace(0, 2, rows, device=device)[:, None]
    x[rows // 2] = 0 if rows > 2 else x[rows // 2]
    factor = torch.rand(cols, device=device) + 0.1 if case["factor"] else None
    return view(x.to(case["dtype"]), case["view"]), factor


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x.float() if factor is None else x.float() * factor


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows(case: dict[str, object], device: torch.device, guarded_empty: Alloc) -> None:
    x, factor = inputs(case, device)
    codes = guarded_empty(x.shape, dtype=torch.int8, device=device)
    scale, offset = (guarded_empty((len(x),), device=device) for _ in range(2))
    wanted = offset if case["offset"] else None
    quantize.rows(codes, scale, wanted, x, factor, config.quantize(x.shape[1]))
    if case["offset"]:
        expected = reference.quantize_per_token_with_offset(scaled(x, factor))
    else:
        expected = reference.quantize_per_token(scaled(x, factor))
        assert offset.isnan().all()
    for found, right in zip((codes, scale, offset), expected, strict=False):
        assert_bits_equal(found, right)


@pytest.mark.parametrize("case", [c for c in CASES if not c["offset"]], ids=str)
def test_a_given_scale(case: dict[str, object], device: torch.device, guarded_empty: Alloc) -> None:
    x, factor = inputs(case, device)
    scale = torch.tensor(0.02, device=device)
    codes = guarded_empty(x.shape, dtype=torch.int8, device=device)
    quantize.tensor(codes, x, factor, scale, config.quantize_by_given_scale(x.shape[1]))
    expected, _ = reference.quantize_per_tensor(scaled(x, factor), scale)
    assert_bits_equal(codes, expected)
    assert x.numel() < 30 or expected.abs().max() == 127  # some are clamped


@pytest.mark.parametrize("with_offset", [False, True])
def test_what_isnt_finite_shows_in_its_row(with_offset: bool, device: torch.device) -> None:
    x = torch.randn(8, 40, device=device)
    x[1, 3], x[2, 39], x[3, 0], x[6, 1:3] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38])
    x[5, 7], x[5, 9] = float("inf"), float("nan")
    x[7] = 3e38
    definition = reference.quantize_per_token_with_offset if with_offset else reference.quantize_per_token
    expected = definition(x)
    codes = torch.empty(x.shape, dtype=torch.int8, device=device)
    scale, offset = torch.empty(2, 8, device=device)
    quantize.rows(codes, scale, offset if with_offset else None, x, None, config.quantize(40))
    assert_bits_equal(codes, expected[0])
    for found, right in zip((scale, offset), expected[1:], strict=False):
        assert_bits_equal(found.nan_to_num(7.0), right.nan_to_num(7.0))
    assert not scale[[1, 2, 3, 5]].isfinite().any()
    assert scale[[0, 4, 6, 7]].isfinite().all()


@pytest.mark.parametrize(("rows", "cols", "gap"), [(1, 1, 0), (8, 256, 0), (13, 300, 20), (3, 1000, 24)])
def test_sums_of_codes(rows: int, cols: int, gap: int, device: torch.device, guarded_empty: Alloc) -> None:
    wide = torch.full((rows, cols + gap), 99, dtype=torch.int8, device=device)
    codes = wide[:, :cols]
    codes.copy_(torch.randint(-127, 128, (rows, cols)))
    codes[0] = -127
    out = guarded_empty((rows,), dtype=torch.int32, device=device)
    quantize.row_sum(out, codes, config.int8_row_sum())
    assert_bits_equal(out, codes.sum(1, dtype=torch.int32))


def test_rows_have_a_limit_and_configs_are_values() -> None:
    assert [config.quantize(n).label for n in (1, 512, 768, 3072, limits.MAX_ROW)] == [
        "4x512, 4 warps",
        "4x512, 4 warps",
        "2x1024, 4 warps",
        "1x4096, 16 warps",
        "1x16384, 16 warps",
    ]
    for n_cols in range(1, limits.MAX_ROW + 1, 37):
        assert config.quantize(n_cols).block_n >= n_cols
    with pytest.raises(ValueError, match="16384"):
        config.quantize(limits.MAX_ROW + 1)
    with pytest.raises(ValueError, match="8192"):
        config.int8_finish(8193, quantize=True)
