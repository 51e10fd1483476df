"""The launcher: it writes what it should, all of it, and nothing else, with every shipped configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pyaccel.kernels.common.configs import MatmulConfig
from pyaccel.kernels.common.device import device_info, generation
from pyaccel.kernels.common.tiles import tile_of_program
from pyaccel.kernels.linear import config
from pyaccel.kernels.linear import kernels as linear_activation
from pyaccel.ops.linear.api import ACTIVATIONS
from pyaccel.reference import activation as apply_activation
from tests.assertions import assert_bits_equal, assert_close_to_truth
from tests.pairwise import pairwise

Alloc = Callable[..., Tensor]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

SHIPPED = list(dict.fromkeys(c for configs in config.CONFIGS.values() for c in configs))
CASES = pairwise(
    {
        "config": SHIPPED,
        # Rows, in, out: parts of a tile, tiles that aren't full, in each dimension.
        "size": [(1, 1, 1), (33, 40, 70), (140, 96, 40), (7, 64, 300)],
        "activation": ACTIVATIONS,
        "dtypes": [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (BF16, None)],
        "views": [("contiguous", "gaps"), ("transposed", "contiguous"), ("gaps", "transposed")],
    }
)


def label(case: dict[str, object]) -> str:
    values = (getattr(value, "label", value) for value in case.values())
    return "-".join(str(value).replace("torch.", "").replace(" ", "") for value in values)


def view(t: Tensor, kind: str) -> Tensor:
    """The same values in other places, NaN between and behind them."""
    if kind == "contiguous":
        return t
    rows, cols = t.shape
    wide = torch.full((rows + 1, 2, cols + 3), float("nan"), dtype=t.dtype, device=t.device)
    gaps = wide[:rows, 0, :cols]
    if kind == "transposed":
        gaps = torch.full((cols + 1, rows + 1), float("nan"), dtype=t.dtype, device=t.device)[
            :cols, :rows
        ].t()
    return gaps.copy_(t)


def inputs(
    rows: int, n_in: int, n_out: int, dtypes: tuple[torch.dtype, torch.dtype | None], device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(rows, n_in, device=device).to(dtypes[0])
    weight = (torch.randn(n_out, n_in, device=device) * n_in**-0.5).to(dtypes[0])
    bias = None if dtypes[1] is None else torch.randn(n_out, device=device).to(dtypes[1])
    return x, weight, bias


def expected(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Output and pre-activation."""
    pre = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return apply_activation(pre, activation), pre


@pytest.mark.parametrize("case", CASES, ids=label)
def test_it_writes_output_and_pre_activation_and_nothing_else(
    case: dict[str, object], device: torch.device, guarded_empty: Alloc
) -> None:
    activation, launched = case["activation"], case["config"]
    if device.type == "cuda" and launched not in _of(device, case["dtypes"][0].itemsize):
        launched = _of(device, case["dtypes"][0].itemsize)[-1]  # another card's may not fit
    x, weight, bias = inputs(*case["size"], case["dtypes"], device)
    truth, naive = (expected(x, weight, bias, activation, dtype) for dtype in (torch.float64, x.dtype))
    given = (view(x, case["views"][0]), view(weight, case["views"][1]), bias)
    out, pre, alone = (guarded_empty(naive[0].shape, dtype=x.dtype, device=device) for _ in range(3))
    linear_activation.forward(out, pre, *given, activation, launched)
    assert_close_to_truth(out, truth[0], naive[0], name="out")
    assert_close_to_truth(pre, truth[1], naive[1], name="pre")
    linear_activation.forward(alone, None, *given, activation, launched)
    assert_bits_equal(alone, out, name="out alone")


def _of(device: torch.device, itemsize: int) -> tuple[MatmulConfig, ...]:
    return config.CONFIGS[generation(device_info(device).arch, itemsize)]


@pytest.mark.parametrize("group_m", [1, 2, 3, 8])
def test_any_order_of_tiles_gives_the_same_bits(group_m: int, device: torch.device) -> None:
    """Groups that divide the tiles, that don't, and one group for all of them."""
    small = MatmulConfig(16, 16, 16, 1, 4, 1)
    x, weight, bias = inputs(75, 24, 40, (F32, F32), device)
    results = []
    for launched in (small, dataclasses.replace(small, group_m=group_m)):
        results.append(torch.full((75, 40), float("nan"), device=device))
        linear_activation.forward(results[-1], None, x, weight, bias, "gelu", launched)
    assert_bits_equal(*results)


@triton.jit
def order_kernel(out_ptr, n_rows, n_out, BLOCK: tl.constexpr, GROUP_M: tl.constexpr):
    tile_m, tile_n = tile_of_program(tl.program_id(0), n_rows, n_out, BLOCK, BLOCK, GROUP_M)
    tl.store(out_ptr + 2 * tl.program_id(0), tile_m)
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, tile_n)


def test_programs_of_a_group_share_the_columns(device: torch.device) -> None:
    """The point of a group: GROUP_M programs after each other read the same rows of the weight."""
    out = torch.full((18, 2), -1, dtype=torch.int32, device=device)
    order_kernel[(18,)](out, 16 * 5 + 1, 16 * 3, BLOCK=16, GROUP_M=4)
    order = [tuple(tile) for tile in out.tolist()]
    assert sorted(order) == [(m, n) for m in range(6) for n in range(3)]
    assert order[:5] == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1)]
    assert order[12:15] == [(4, 0), (5, 0), (4, 1)]


def test_configs_are_values() -> None:
    for arch in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter"):
        for itemsize in (2, 4):
            configs = config.CONFIGS[generation(arch, itemsize)]
            for sizes in ((0, 1, 1), (1, 3072, 768), (128, 768, 768), (10**6, 4096, 1024)):
                chosen = config.linear_activation(*sizes, itemsize, arch)
                assert chosen in configs
                assert hash(chosen) == hash(config.linear_activation(*sizes, itemsize, arch))
    assert [config.linear_activation(rows, 3072, 768, 2, "sm_90").label for rows in (1, 128, 512, 4096)] == [
        "64x64x64, 4 warps, 4 stages",
        "64x64x64, 4 warps, 4 stages",
        "128x128x64, 8 warps, 4 stages",
        "128x256x64, 8 warps, 4 stages",
    ]
    # Rows that aren't aligned take too many registers for the widest tiles.
    assert config.linear_activation(4096, 3072, 776, 2, "sm_90").block_n == 128
