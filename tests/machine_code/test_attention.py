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
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyaccel import dispatch, ops
from pyaccel.inspect.compile import MachineCode, compile_tasks, tasks
from pyaccel.inspect.gpus import PARTS
from pyaccel.inspect.spec import KernelSpec
from pyaccel.inspect.specs import attention as attention_specs
from pyaccel.inspect.specs.registry import specs
from pyaccel.kernels.attention import config
from pyaccel.kernels.attention import dkv as attention_dkey_dvalue
from pyaccel.kernels.attention import dq as attention_dquery
from pyaccel.kernels.attention import forward as attention
from pyaccel.kernels.attention import params as attention_call
from pyaccel.kernels.attention import scores as attention_scores
from pyaccel.kernels.attention import short as attention_short
from pyaccel.kernels.common.device import DeviceInfo, generation
from tests.machine_code import DISTINCT_ARCHS, EVERY

FULL = {("bf16", "sm_90")} if EVERY else set()
COMPLETE = {(arch, "bf16") for arch in DISTINCT_ARCHS} | {("sm_80", "fp32")} if EVERY else {("sm_90", "bf16")}
HARDEST = {*(("bf16", arch) for arch in DISTINCT_ARCHS), ("fp32", "sm_80")}

Compiled = list[tuple[KernelSpec, MachineCode]]


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
    return [(spec, code) for (spec, _), code in zip(wanted, compile_tasks(wanted), strict=True)]


def violations(compiled: Compiled, broken: Callable[[KernelSpec, MachineCode], Any]) -> list[str]:
    """The kernels for which `broken` returns what is wrong with them."""
    found = ((code, broken(spec, code)) for spec, code in compiled)
    return [f"{code}: {problem}" for code, problem in found if problem]


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


def test_no_spills_and_no_stack(compiled: Compiled) -> None:
    def broken(_: KernelSpec, code: MachineCode) -> str:
        spilled = code.spill_bytes > 0 or code.stack_bytes > 0
        return f"spills {code.spill_bytes} B, stack {code.stack_bytes} B" * spilled

    assert violations(compiled, broken) == []


def test_shared_memory_fits(compiled: Compiled) -> None:
    def broken(_: KernelSpec, code: MachineCode) -> str:
        return f"{code.shared_bytes} B" * (code.shared_bytes > PARTS[code.arch].shared_per_block)

    assert violations(compiled, broken) == []


def test_hopper_multiplies_with_wgmma_alone(compiled: Compiled) -> None:
    def broken(spec: KernelSpec, code: MachineCode) -> str:
        if code.arch != "sm_90" or spec.dtype == "fp32":
            return ""
        return f"{code.wgmma} wgmma, {code.mma} other" * (code.wgmma == 0 or code.mma > 0)

    assert violations(compiled, broken) == []


def test_16_bit_products_are_matrix_instructions(compiled: Compiled) -> None:
    def broken(spec: KernelSpec, code: MachineCode) -> bool:
        return spec.dtype != "fp32" and code.wgmma + code.mma == 0

    assert violations(compiled, broken) == []


def test_fp32_is_not_rounded_to_tf32(compiled: Compiled) -> None:
    nvidia = [(spec, code) for spec, code in compiled if spec.dtype == "fp32"]
    assert violations(nvidia, lambda _, code: code.wgmma + code.mma) == []


def test_rows_are_accessed_128_bits_at_a_time(compiled: Compiled) -> None:
    """512 bytes a warp: 128 bits for each of 32 lanes, half of it for each of AMD's 64 (as in the row kernels)."""

    def broken(spec: KernelSpec, code: MachineCode) -> str:
        wide = 512 * 8 // PARTS[code.arch].warp_size
        # A tile of scores at head dimension 256 has 16 columns: 8 bytes of each of a warp's rows.
        of_scores = spec.name.startswith(("weights", "dmask"))
        narrow = code.load_bits < wide or code.store_bits < (wide // 2 if of_scores else wide)
        return f"loads {code.loads}, stores {code.stores}" * narrow

    assert violations(compiled, broken) == []


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
    seq: int, dim: int, dropout_p: float, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[str, dict[str, Any]]] = []
    kernels = {
        kernel: f"{module.__name__}:{kernel.__name__}"
        for module, kernel in (
            (attention, attention.forward_kernel),
            (attention_short, attention_short.forward_short_kernel),
            (attention_short, attention_short.backward_short_kernel),
            (attention_dquery, attention_dquery.dquery_kernel),
            (attention_dkey_dvalue, attention_dkey_dvalue.dkey_dvalue_kernel),
            (attention_scores, attention_scores.probs_kernel),
            (attention_scores, attention_scores.dmask_kernel),
        )
    }

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launched.append((kernels[self], kwargs))

    for kernel_class in {type(kernel) for kernel in kernels}:
        monkeypatch.setattr(kernel_class, "run", run)
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
    assert launched
    assert [name for name, kwargs in launched if identity(name, kwargs) not in shipped] == []


def options(spec: KernelSpec) -> dict[str, Any]:
    return {"num_warps": spec.num_warps, "num_stages": spec.num_stages}


def identity(fn: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
    names = ("HEAD_DIM", "BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_V", "num_warps", "num_stages")
    return (fn, *(arguments[name] for name in names))
