"""Machine code of the linear_activation family: every launch configuration that ships, for real GPUs.

What is compiled: in bf16, which is what users run, the training kernel with erf GELU and every configuration for every
architecture, and for sm_90 inner dimensions that a block doesn't divide, and by the largest configuration inference and
the other activations, which take fewer registers; in autocast's mix the training kernel for sm_90 by the largest, and
in fp32 for sm_80. PYACCEL_EVERY_ARCH=1 takes every configuration for each of these. fp16 is left out: it is bf16 with
another conversion instruction. The backward pass is bias_gelu's kernel without a bias, which takes fewer registers than
with one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyaccel.inspect.compile import MachineCode, tasks
from pyaccel.inspect.spec import KernelSpec
from pyaccel.inspect.specs import linear as linear_activation_specs
from pyaccel.inspect.specs.registry import specs
from pyaccel.kernels.common.device import generation
from pyaccel.kernels.linear import config
from pyaccel.kernels.linear import kernels as linear_activation
from pyaccel.ops.linear.api import ACTIVATIONS
from tests.machine_code import ARCHS, DISTINCT_ARCHS, EVERY
from tests.machine_code.budgets import (
    Check,
    Compiled,
    as_spec,
    compile_specs,
    hopper_multiplies_with_wgmma_alone,
    no_spills_and_no_stack,
    parametrize,
    products_are_matrix_instructions,
    shared_memory_fits,
    violations,
    wide_bits,
    wide_bytes_loaded,
)


def wanted(spec: KernelSpec, arch: str) -> bool:
    variant, activation = spec.name.rsplit(", ", 1)
    easier = arch == "sm_90" and (EVERY or spec.config == config.CONFIGS["hopper"][0].label)
    if spec.dtype == "fp32":
        return arch == "sm_80" and variant == "training"
    if spec.dtype != "bf16":
        return spec.dtype != "fp16" and easier and variant == "training"
    if activation != "gelu":
        return easier and variant == "training"
    if variant == "training":
        return arch in DISTINCT_ARCHS
    if variant == "inference":
        return easier
    return arch == "sm_90" or (arch == "sm_100" and variant == "training, unaligned")


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """Every kernel of the matrix with its machine code."""
    chosen = [(spec, arch) for spec, arch in tasks(specs("linear_activation"), ARCHS) if wanted(spec, arch)]
    return compile_specs(chosen)


def test_every_configuration_and_activation_is_there(compiled: Compiled) -> None:
    for dtype, itemsize, archs in (
        ("bf16", 2, DISTINCT_ARCHS),
        ("bf16 + fp32", 2, ["sm_90"]),
        ("fp32", 4, ["sm_80"]),
    ):
        for arch in archs:
            shipped = {c.label for c in config.CONFIGS[generation(arch, itemsize)]}
            if dtype == "bf16 + fp32" and not EVERY:
                shipped = {config.CONFIGS["hopper"][0].label}
            there = {
                spec.config
                for spec, code in compiled
                if (code.dtype, code.arch, spec.name) == (dtype, arch, "training, gelu")
            }
            assert there == shipped
    assert {spec.name.rsplit(", ", 1)[1] for spec, _ in compiled} == set(ACTIVATIONS) - {None}
    for variant in ("inference", "training, uneven", "training, unaligned"):
        assert f"{variant}, gelu" in {spec.name for spec, _ in compiled}


def matrices_move_512_bytes_a_warp(spec: KernelSpec, code: MachineCode) -> str:
    """Both operands are read and all outputs are written with accesses of 512 bytes a warp.

    What is left for narrower loads is the bias; rows that aren't aligned can only be read element by element.
    """
    blocks = [spec.constexprs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
    itemsize = linear_activation_specs.DTYPES[spec.dtype][2]
    tiles = (blocks[0] + blocks[1]) * blocks[2] * itemsize
    narrow = any(bits < wide_bits(code) for bits in code.stores) or not code.stores
    if "unaligned" not in spec.name:
        narrow = narrow or wide_bytes_loaded(code) < tiles
    return f"loads {code.loads}, stores {code.stores}" * narrow


@parametrize(
    no_spills_and_no_stack,
    shared_memory_fits,
    hopper_multiplies_with_wgmma_alone,
    products_are_matrix_instructions,
    matrices_move_512_bytes_a_warp,
)
def test_machine_code(compiled: Compiled, check: Check) -> None:
    assert violations(compiled, check) == []


# What is compiled above must be what the launcher launches: the same kernel, types, constants and options.

TORCH_DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "bf16 + fp32": (torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_the_specs_are_what_the_launcher_launches(arch: str, dtype: str, launches: list[Any]) -> None:
    x_dtype, bias_dtype = TORCH_DTYPES[dtype]
    out = torch.empty(linear_activation_specs.N_ROWS, linear_activation_specs.N_OUT, dtype=x_dtype)
    bias = torch.empty(linear_activation_specs.N_OUT, dtype=bias_dtype)
    shipped = {(s.name, s.config): s for s in specs("linear_activation") if s.dtype == dtype}
    for chosen in config.CONFIGS[generation(arch, x_dtype.itemsize)]:
        for variant, n_in in (("training", 768), ("inference", 768), ("training, uneven", 784)):
            like = shipped.get((f"{variant}, gelu", chosen.label))
            if like is None:  # the block divides that inner dimension too
                assert n_in % chosen.block_k == 0
                continue
            x, weight = (
                torch.empty(len(out), n_in, dtype=x_dtype),
                torch.empty(len(bias), n_in, dtype=x_dtype),
            )
            pre = out if variant.startswith("training") else None
            linear_activation.forward(out, pre, x, weight, bias, "gelu", chosen)
            assert as_spec(*launches.pop(), like) == like
