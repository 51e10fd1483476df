"""The launchers: they write what they should, all of it, and nothing else, with every shipped configuration."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyaccel import reference
from pyaccel.kernels.bias_act import config
from pyaccel.kernels.bias_act import kernels as bias_gelu
from pyaccel.kernels.common import configs, limits
from pyaccel.kernels.common.configs import RowConfig
from pyaccel.ops.bias_act.api import ACTIVATIONS
from tests.assertions import assert_bits_equal, assert_close_to_truth
from tests.pairwise import pairwise

Alloc = Callable[..., Tensor]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Both tiles: one that the row fills in part, several with a part of one left, and several blocks of rows.
SIZES = [(1, 1), (19, 100), (7, 200), (5, 512), (6, 700)]
CASES = pairwise(
    {
        "activation": ACTIVATIONS,
        "size": SIZES,
        "dtypes": [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (BF16, None)],
        "view": ["contiguous", "transposed", "gaps"],
    }
)


def label(case: dict[str, object]) -> str:
    return "-".join(str(value).replace("torch.", "").replace(" ", "") for value in case.values())


def view(t: Tensor, kind: str) -> Tensor:
    """The same values in other places, NaN between them."""
    if kind == "transposed":
        return t.t().contiguous().t()
    if kind == "gaps":
        rows, cols = t.shape
        wide = torch.full((rows, 2, cols + 3), float("nan"), dtype=t.dtype, device=t.device)
        wide[:, 0, :cols] = t
        return wide[:, 0, :cols]
    return t


def inputs(case: dict[str, object], device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
    """x from far below to far above the bend, a bias that matters, a gradient of mean 0.3."""
    (rows, cols), (x_dtype, bias_dtype) = case["size"], case["dtypes"]
    x = torch.randn(rows, cols, device=device) * 2 + torch.linspace(-2, 1, rows, device=device)[:, None]
    bias = None if bias_dtype is None else torch.randn(cols, device=device).to(bias_dtype)
    dy = torch.randn(rows, cols, device=device) + 0.3
    return view(x.to(x_dtype), case["view"]), bias, view(dy.to(x_dtype), case["view"])


def expected(
    x: Tensor, bias: Tensor | None, dy: Tensor, activation: str, *, upcast: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, dx and dbias of the reference."""
    dtype = torch.float64 if upcast else None
    given = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, bias) if t is not None]
    out = reference.bias_gelu(given[0], *given[1:] or [None], activation, upcast=upcast)
    grads = torch.autograd.grad(out, given, dy.to(out.dtype))
    return out, grads[0], grads[1] if bias is not None else None


def programs(x: Tensor, row_config: RowConfig, num_sms: int) -> int:
    return configs.programs_per_column(row_config, *x.shape, num_sms)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_forward_and_backward_are_right_and_write_nothing_else(
    case: dict[str, object], device: torch.device, guarded_empty: Alloc
) -> None:
    x, bias, dy = inputs(case, device)
    activation, cols = case["activation"], x.shape[1]
    truth, naive = (expected(x, bias, dy, activation, upcast=upcast) for upcast in (True, False))
    out, dx = (guarded_empty(x.shape, dtype=x.dtype, device=device) for _ in range(2))
    bias_gelu.forward(out, x, bias, activation, config.bias_gelu_forward(cols))
    assert_close_to_truth(out, truth[0], naive[0], name="out")

    row_config = config.bias_gelu_backward(cols)
    partial = guarded_empty((programs(x, row_config, 1), cols), device=device)
    bias_gelu.backward(dx, partial, dy, x, bias, activation, partial.shape[0], row_config)
    assert_close_to_truth(dx, truth[1], naive[1], name="dx")
    if bias is not None:
        assert_close_to_truth(partial.sum(0).to(bias.dtype), truth[2], naive[2], name="dbias")


@pytest.mark.parametrize("cols", [130, 700])
def test_any_number_of_programs_gives_the_same_gradients(cols: int, device: torch.device) -> None:
    """The persistent loop takes several turns, or many programs take one."""
    rows = 83 if cols < 512 else 29
    row_config = config.bias_gelu_backward(cols)
    case = {"size": (rows, cols), "dtypes": (F32, F32), "view": "contiguous"}
    x, bias, dy = inputs(case, device)
    truth, naive = (expected(x, bias, dy, "gelu", upcast=upcast) for upcast in (True, False))
    results = []
    for n_programs in (1, 2, -(-rows // row_config.block_rows)):
        dx, partial = (
            torch.full_like(x, float("nan")),
            torch.full((n_programs, cols), float("nan"), device=device),
        )
        bias_gelu.backward(dx, partial, dy, x, bias, "gelu", n_programs, row_config)
        assert_close_to_truth(partial.sum(0), truth[2], naive[2], name="dbias")
        results.append(dx)
        # What isn't wanted changes nothing of what is.
        alone = torch.full_like(partial, float("nan"))
        bias_gelu.backward(None, alone, dy, x, bias, "gelu", n_programs, row_config)
        assert_bits_equal(alone, partial, name="dbias alone")
        alone = torch.full_like(x, float("nan"))
        bias_gelu.backward(alone, None, dy, x, bias, "gelu", n_programs, row_config)
        assert_bits_equal(alone, dx, name="dx alone")
    for dx in results:
        assert_bits_equal(dx, results[0])


# Every configuration, rows that leave a part of it empty, and a row that fills it.
WIDTHS = [1, 33, 512, 900, 2000, 3072, 6000, 16384]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("cols", WIDTHS)
def test_int8_codes_are_those_of_the_fp32_result_bit_for_bit(
    cols: int, dtype: torch.dtype, device: torch.device, guarded_empty: Alloc
) -> None:
    activation = ACTIVATIONS[WIDTHS.index(cols) % 4]
    rows = 6 if cols < 2000 else 2
    case = {"size": (rows, cols), "dtypes": (dtype, None if cols == 900 else F32), "view": "gaps"}
    x, bias, _ = inputs(case, device)
    x[-1] *= 0.01
    result = torch.empty(rows, cols, device=device)
    bias_gelu.forward(result, x.float(), bias, activation, config.bias_gelu_forward(cols))
    codes = guarded_empty((rows, cols), dtype=torch.int8, device=device)
    scale = guarded_empty((rows,), device=device)
    bias_gelu.quantize(codes, scale, x, bias, activation, config.bias_gelu_quantize(cols))
    for a, b in zip((codes, scale), reference.quantize_per_token(result), strict=True):
        assert_bits_equal(a, b)
    assert (codes.abs().amax(1) == 127).all() or cols == 1


def test_configs_are_values_and_int8_rows_have_a_limit() -> None:
    assert {config.bias_gelu_forward(n) for n in (1536, 3072, 4096)} == {config.bias_gelu_forward(512)}
    assert hash(config.bias_gelu_backward(3072)) == hash(config.bias_gelu_backward(100_000))
    assert {config.bias_gelu_quantize(n) for n in WIDTHS} == {
        config.bias_gelu_quantize(n) for n in range(1, limits.MAX_ROW + 1)
    }
    for cols in WIDTHS:
        assert config.bias_gelu_quantize(cols).block_n >= cols
    with pytest.raises(ValueError, match="1 to 16384"):
        config.bias_gelu_quantize(16385)
    for heuristic in (config.bias_gelu_forward, config.bias_gelu_backward):
        with pytest.raises(ValueError, match="1 element or more"):
            heuristic(0)


@pytest.mark.parametrize(
    ("rows", "cols", "num_sms", "expected"),
    [
        (0, 3072, 132, 0),
        (1, 3072, 132, 1),
        (16384, 3072, 132, 88),
        (16384, 3072, 1, 1),
        (16384, 100, 132, 528),
    ],
)
def test_the_persistent_grid_is_spread_over_the_columns(
    rows: int, cols: int, num_sms: int, expected: int
) -> None:
    assert configs.programs_per_column(config.bias_gelu_backward(cols), rows, cols, num_sms) == expected
