"""The launchers of the int8 products: exact sums, the epilogue by the policy, the same bits by every configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyaccel.kernels.common.device import device_info, generation
from pyaccel.kernels.int8 import config
from pyaccel.kernels.int8 import epilogue as int8_epilogue
from pyaccel.kernels.int8 import matmul as int8_matmul
from pyaccel.kernels.int8 import weight_only as int8_weight_only
from pyaccel.kernels.int8.config import Int8MatmulConfig
from pyaccel.kernels.int8.epilogue import Epilogue
from pyaccel.ops.linear.api import ACTIVATIONS
from pyaccel.reference import activation as activate
from pyaccel.reference import int8 as reference_quantize
from pyaccel.reference.int8 import int8_matmul as reference_int8_matmul
from tests.assertions import assert_bits_equal, assert_close_to_truth
from tests.kernels.test_linear import label, view
from tests.pairwise import pairwise

Alloc = Callable[..., Tensor]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Rows, in, out: parts of a tile, tiles that aren't full, in each dimension; in is a multiple of 16.
SIZES = [(1, 16, 1), (20, 48, 70), (7, 144, 300), (16, 64, 64)]


def shipped() -> list[Int8MatmulConfig]:
    """Those of every part, the copy engine's last; one of those that differ in launch options alone."""
    tables = (*config.CONFIGS.values(), *config.TMA_CONFIGS.values())
    return list({(tuple(c.blocks.values()), c.tma): c for configs in tables for c in configs}.values())


def here(launched: Int8MatmulConfig, device: torch.device) -> Int8MatmulConfig:
    """The same, or on a card one of its own: another card's may not fit."""
    if device.type == "cpu":
        return launched
    part = generation(device_info(device).arch)
    own = (*config.CONFIGS[part], *config.TMA_CONFIGS.get(part, ()))
    return launched if launched in own else own[-1]


def codes(rows: int, n_in: int, device: torch.device, kind: str = "contiguous") -> Tensor:
    x = torch.randint(-127, 128, (rows, n_in), dtype=torch.int8, device=device)
    x[0] = 127  # the largest sums
    if kind == "contiguous":
        return x
    wide = torch.full((rows + 1, n_in + 32), 99, dtype=torch.int8, device=device)
    return wide[:rows, 16 : 16 + n_in].copy_(x)


@pytest.mark.parametrize(
    ("size", "splits"),
    [*((size, 1) for size in SIZES), ((140, 48, 40), 1), ((20, 48, 70), 2), ((1, 144, 70), 5)],
    ids=str,
)
def test_sums_are_exact_by_every_configuration(
    size: tuple[int, int, int], splits: int, device: torch.device, guarded_empty: Alloc
) -> None:
    rows, n_in, n_out = size
    a, b = codes(rows, n_in, device, "gaps"), codes(n_out, n_in, device)
    b[-1] = -127
    exact = (a.cpu().int() @ b.cpu().int().T).to(device)
    for launched in {here(c, device): None for c in shipped()}:
        sums = guarded_empty((splits, rows, n_out), dtype=torch.int32, device=device)
        int8_matmul.matmul(sums, a, b, None, launched)
        assert_bits_equal(sums.sum(0, dtype=torch.int32), exact, name=launched.label)


# Every configuration makes its sums above; an epilogue knows of a tile's width, its parts, and who loaded it.
EPILOGUE_CONFIGS = [
    *(config.CONFIGS["hopper"][i] for i in (0, 3)),
    config.TMA_CONFIGS["hopper"][0],
    config.CONFIGS["interpreter"][0],
]
CASES = pairwise(
    {
        "config": EPILOGUE_CONFIGS,
        "size": SIZES,
        "activation": ACTIVATIONS,
        "out": [F32, BF16, F16],
        "bias": [None, F32, BF16],
        "residual": [None, F32, F16],
        "offset": [False, True],
        "a_scale": ["row", "one"],
        "b_scale": ["channel", "one"],
        "view": ["contiguous", "gaps", "transposed"],
    }
)


def terms(case: dict[str, Any], device: torch.device) -> tuple[dict[str, Any], Epilogue]:
    """A call of the reference, and the kernels' epilogue of it."""
    rows, n_in, n_out = case["size"]

    def scale(count: int, kind: str) -> Tensor:
        values = torch.logspace(-3, -1, count, device=device)
        return values[0] if kind == "one" else values

    def draw(dtype: torch.dtype | None, *shape: int) -> Tensor | None:
        return None if dtype is None else (torch.randn(shape, device=device) * 2 + 0.5).to(dtype)

    a, b = codes(rows, n_in, device), codes(n_out, n_in, device, "gaps")
    residual = draw(case["residual"], rows, n_out)
    call = {
        "a": a,
        "b": b,
        "a_scale": scale(rows, case["a_scale"]),
        "b_scale": scale(n_out, case["b_scale"]),
        "bias": draw(case["bias"], n_out),
        "activation": case["activation"],
        "residual": None if residual is None else view(residual, case["view"]),
        "a_offset": torch.randn(rows, device=device) if case["offset"] else None,
    }
    epilogue = Epilogue(
        **{name: call[name] for name in ("a_scale", "b_scale", "a_offset", "bias", "residual", "activation")},
        b_sum=b.sum(1, dtype=torch.int32) if case["offset"] else None,
    )
    return call, epilogue


@pytest.mark.parametrize("case", CASES, ids=label)
def test_epilogue(case: dict[str, Any], device: torch.device, guarded_empty: Alloc) -> None:
    """In the product's own launch, behind a split one, and quantized again: one result."""
    call, epilogue = terms(case, device)
    launched = here(case["config"], device)
    rows, _, n_out = case["size"]
    truth = reference_int8_matmul(**call)
    naive = reference_int8_matmul(**call, out_dtype=case["out"], upcast=False)
    out, split = (guarded_empty((rows, n_out), dtype=case["out"], device=device) for _ in range(2))
    int8_matmul.matmul(out, call["a"], call["b"], epilogue, launched)
    assert_close_to_truth(out, truth, naive)

    sums = guarded_empty((3, rows, n_out), dtype=torch.int32, device=device)
    int8_matmul.matmul(sums, call["a"], call["b"], None, launched)
    int8_epilogue.finish(split, None, sums, epilogue, config.int8_finish(n_out, quantize=False))
    assert_bits_equal(split, out, name="split")

    wide = torch.empty(rows, n_out, device=device)
    int8_epilogue.finish(wide, None, sums, epilogue, config.int8_finish(n_out, quantize=False))
    again = guarded_empty((rows, n_out), dtype=torch.int8, device=device)
    scale = guarded_empty((rows,), device=device)
    int8_epilogue.finish(again, scale, sums, epilogue, config.int8_finish(n_out, quantize=True))
    for found, right in zip((again, scale), reference_quantize.quantize_per_token(wide), strict=True):
        assert_bits_equal(found, right, name="int8")


def test_a_persistent_grid_makes_every_tile(device: torch.device) -> None:
    """More tiles than programs, and a last group of fewer rows of tiles."""
    launched = Int8MatmulConfig(16, 32, 32, 3, 4, 1, subtile=16)
    a, b = codes(75, 64, device), codes(130, 64, device)
    sums = [torch.full((1, 75, 130), 7, dtype=torch.int32, device=device) for _ in range(2)]
    int8_matmul.matmul(sums[0], a, b, None, launched)
    assert_bits_equal(sums[0][0], (a.cpu().int() @ b.cpu().int().T).to(device))
    if device_info(device).arch in ("interpreter", "sm_90", "sm_100"):
        int8_matmul.matmul(sums[1], a, b, None, dataclasses.replace(launched, block_m=64, tma=True))
        assert_bits_equal(sums[1], sums[0])


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_weight_only(
    dtype: torch.dtype, activation: str | None, rows: int, device: torch.device, guarded_empty: Alloc
) -> None:
    n_in, n_out = 656, 70  # sums of many blocks, the last of them not full
    x = (torch.randn(rows, n_in, device=device) + 0.3).to(dtype)
    weight, scale = codes(n_out, n_in, device, "gaps"), torch.logspace(-4, -2, n_out, device=device)
    bias = None if activation == "relu" else torch.randn(n_out, device=device).to(dtype)

    def expected(wide: torch.dtype) -> Tensor:
        pre = (x.to(wide) @ weight.to(wide).T) * scale.to(wide)
        return activate(pre if bias is None else pre + bias.to(wide), activation)

    launched = {config.weight_only(rows, device_info(device).arch)}
    if device.type == "cpu":
        launched |= {c for configs in config.WEIGHT_ONLY_CONFIGS.values() for c in configs}
    for one in launched:
        out = guarded_empty((rows, n_out), dtype=dtype, device=device)
        int8_weight_only.weight_only(out, x, weight, scale, bias, activation, one)
        assert_close_to_truth(out, expected(torch.float64), expected(F32).to(dtype), name=one.label)


def test_what_can_be_read_16_bytes_at_a_time(device: torch.device) -> None:
    x = torch.zeros(8, 64, dtype=torch.int8, device=device)
    for good in (x, x[:, 16:48], x[1:3], x[::2], x[3:4, :32]):
        assert int8_matmul.aligned(good)
    for bad in (x[:, :40], x[:, 8:40], x.T, x.view(-1)[8:].view(-1)[:80].view(2, 40), x[:, ::2]):
        assert not int8_matmul.aligned(bad)
    half = torch.zeros(4, 24, dtype=BF16, device=device)
    assert not int8_matmul.aligned(half)
    assert int8_matmul.aligned(half.view(6, 16))


def test_configs_are_values() -> None:
    sizes = [(rows, 768) for rows in (1, 16, 17, 128, 1024, 4096)]
    for arch in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter"):
        for n_rows, n_out in sizes:
            chosen = config.int8_matmul(n_rows, n_out, arch)
            assert chosen in config.CONFIGS[generation(arch)]
            assert (chosen.block_m == 16) == (n_rows <= 16)
    assert [config.int8_matmul(rows, 3072, "sm_90").label for rows in (1, 17, 512, 4096)] == [
        "16x64x128, 4 warps, 4 stages, finished by 128",
        "64x64x128, 4 warps, 4 stages, finished by 128",
        "128x128x128, 8 warps, 4 stages, finished by 128",
        "128x256x128, 8 warps, 4 stages, finished by 64",
    ]

    def splits(n_rows: int, n_out: int, n_in: int) -> int:
        return config.splits(n_rows, n_out, n_in, "sm_90", config.int8_matmul(n_rows, n_out, "sm_90"))

    # Few rows: as many programs as keep a card busy, of three steps at least; else the tiles themselves do.
    assert [splits(*size) for size in ((1, 3072, 768), (16, 768, 3072), (7, 768, 768), (17, 768, 3072))] == [
        2, 8, 2, 1,
    ]  # fmt: skip
    assert splits(1, 30522, 768) == 1
    assert splits(0, 768, 768) == 2
