"""Machine code of the attention family: every launch configuration that ships, for real GPUs.

What is compiled: in bf16, which is what users run, every configuration for sm_90, with the calls and the head dimension
that take most registers; for the other architectures, and in fp32 for sm_80, head dimension 64 and the calls with
dropout or a mask alone. PYACCEL_EVERY_ARCH=1 adds every configuration for each architecture and in fp32, by every head
dimension that has it, and on sm_90 every kind of call. fp16 is left out: it is bf16 with another conversion
instruction.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from pyaccel import dispatch, ops
from pyaccel.inspect.compile import MachineCode, compile_tasks, tasks
from pyaccel.inspect.spec import KernelSpec
from pyaccel.inspect.specs import attention as attention_specs
from pyaccel.inspect.specs.registry import specs
from pyaccel.kernels.attention import config
from pyaccel.kernels.attention import params as attention_call
from pyaccel.kernels.common.device import DeviceInfo, generation
from tests.machine_code import DISTINCT_ARCHS, EVERY
from tests.machine_code.budgets import (
    Check,
    Compiled,
    compile_specs,
    hopper_multiplies_with_wgmma_alone,
    no_spills_and_no_stack,
    parametrize,
    products_are_matrix_instructions,
    shared_memory_fits,
    violations,
    wide_bits,
)

FULL = {("bf16", "sm_90")} if EVERY else set()
COMPLETE = {(arch, "bf16") for arch in DISTINCT_ARCHS} | {("sm_80", "fp32")} if EVERY else {("sm_90", "bf16")}
HARDEST = {*(("bf16", arch) for arch in DISTINCT_ARCHS), ("fp32", "sm_80")}


def asks_most(spec: KernelSpec, arch: str) -> bool:
    """Whether its call is the one of its configuration that takes most registers."""
    plain = attention_specs.PLAIN[-1:] if EVERY or arch == "sm_90" else ()
    return spec.name.endswith((*plain, *attention_specs.EXTRAS))


def hardest(chosen: list[tuple[KernelSpec, str]]) -> list[tuple[KernelSpec, str]]:
    """Without those that another one with the same blocks and warps outdoes, in registers too.

    It has a larger head dimension; or one as large, and dropout or a mask beside.
    """
    kept: dict[tuple[str, ...], tuple[KernelSpec, str]] = {}
    for spec, arch in sorted(chosen, key=lambda task: dims(task[0])):
        label, has = re.fullmatch(r"(.*)head dim \d+, (.*)", spec.name).groups()  # type: ignore[union-attr]
        key = (label, spec.config, spec.dtype, arch)
        plain = (*key, attention_specs.PLAIN[-1])
        if has in attention_specs.EXTRAS and plain in kept and dims(kept[plain][0]) <= dims(spec):
            del kept[plain]
        kept[(*key, has)] = (spec, arch)
    return list(kept.values())


def dims(spec: KernelSpec) -> int:
    return int(spec.constexprs["HEAD_DIM"])


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """Every kernel of the matrix with its machine code."""
    wanted = [
        (spec, arch)
        for spec, arch in tasks(specs("attention"), sorted({arch for _, arch in HARDEST}))
        if (spec.dtype, arch) in FULL or ((spec.dtype, arch) in HARDEST and asks_most(spec, arch))
        if (arch, spec.dtype) in COMPLETE or "head dim 64," in spec.name
    ]
    wanted = wanted if EVERY else hardest(wanted)
    return compile_specs(wanted)


def test_every_configuration_is_there(compiled: Compiled) -> None:
    there = {(code.arch, spec.dtype, spec.config) for spec, code in compiled}
    missing = []
    for (_, part), tables in config._ATTENTION.items():
        for arch, dtype in sorted(COMPLETE):
            if generation(arch, 2 if dtype == "bf16" else 4) != part:
                continue
            for tiles in {t for table in tables for t in table.values()}:
                labels = {config.AttentionConfig(*tiles, tiles=n).label for n in (0, 1, 4)}
                missing += [(arch, dtype, labels)] * (
                    not any((arch, dtype, label) in there for label in labels)
                )
    assert missing == []


def rows_move_512_bytes_a_warp(spec: KernelSpec, code: MachineCode) -> str:
    # A tile of scores at head dimension 256 has 16 columns: 8 bytes of each of a warp's rows.
    of_scores = spec.name.startswith(("weights", "dmask"))
    narrow = code.load_bits < wide_bits(code) or code.store_bits < wide_bits(code) // (1 + of_scores)
    return f"loads {code.loads}, stores {code.stores}" * narrow


@parametrize(
    no_spills_and_no_stack,
    shared_memory_fits,
    hopper_multiplies_with_wgmma_alone,
    products_are_matrix_instructions,
    rows_move_512_bytes_a_warp,
)
def test_machine_code(compiled: Compiled, check: Check) -> None:
    assert violations(compiled, check) == []


def test_keys_come_through_the_copy_engine_where_the_configuration_says_so() -> None:
    call = attention_specs.make_call(torch.bfloat16, 64, 512, "packed")
    spec = next(
        s for s in specs("attention") if s.name == "forward, head dim 64, packed" and s.dtype == "bf16"
    )
    with_tma = dataclasses.replace(spec, constexprs={**spec.constexprs, "TMA": True})
    assert call.packed
    plain, tma = (code for code in compile_tasks([(spec, "sm_90"), (with_tma, "sm_90")]))
    assert (plain.tma > 0, tma.tma > 0) == (False, True)
    assert (tma.spill_bytes, tma.mma) == (0, 0)
    assert tma.wgmma > 0


# What is compiled above must be what is launched: the same kernels with the same constants and options.


@pytest.mark.interpreter
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("seq", [24, 96, 200])
def test_what_is_launched_is_what_ships(
    seq: int,
    dim: int,
    dropout_p: float,
    arch: str,
    launches: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_call, "device_info", lambda device: DeviceInfo("a card", arch, 100))
    q, k, v = (torch.randn(2, 4, seq, dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = torch.randn(1, 1, seq, seq, dtype=torch.bfloat16, requires_grad=True)
    with dispatch.use_backend("triton"):
        for attn_mask in (None, mask):
            out, lse = ops.scaled_dot_product_attention(
                q, k, v, attn_mask, dropout_p=dropout_p, is_causal=True, return_lse=True
            )
            out.sum().backward()
        ops.attention_probs(q.detach(), k.detach(), lse.detach(), mask.detach())
    shipped = {
        identity(s.fn, {**s.constexprs, **options(s)}) for s in specs("attention") if arch in (s.archs or ())
    }
    given = [(f"{kernel.fn.__module__}:{kernel.__name__}", named) for kernel, named in launches]
    assert given
    assert [name for name, named in given if identity(name, named) not in shipped] == []


def options(spec: KernelSpec) -> dict[str, Any]:
    return {"num_warps": spec.num_warps, "num_stages": spec.num_stages}


def identity(fn: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
    names = ("HEAD_DIM", "BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_V", "num_warps", "num_stages")
    return (fn, *(arguments[name] for name in names))
