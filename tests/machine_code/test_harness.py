"""pyaccel.inspect.compile sees what it must see: spills, widths, matrix instructions, limits, errors."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton.language as tl
import typer
from typer.testing import CliRunner

from pyaccel.cli.inspect import JSON_FIELDS, inspect
from pyaccel.inspect import compile as machine_code
from pyaccel.inspect.compile import CompilationError, MachineCode, compile_all, compile_spec
from pyaccel.inspect.gpus import GPU_SPECS
from pyaccel.inspect.spec import KernelSpec, kernel_spec
from pyaccel.inspect.specs.registry import BUILDERS, specs

ROOT = Path(__file__).resolve().parents[2]


def toy(name: str, arguments, constexprs, num_warps: int = 4, **kwargs) -> KernelSpec:
    fn = f"tests.machine_code.toy_kernels:{name}_kernel"
    labels = {"dtype": "toy", "config": "toy", "num_warps": num_warps}
    return kernel_spec("toy", name, fn, {**arguments, **constexprs}, **labels, **kwargs)


COPY = toy("copy", {"out_ptr": "*bf16", "x_ptr": "*bf16", "size": 4096}, {"BLOCK": 2048})
UNALIGNED = dataclasses.replace(COPY, name="unaligned copy", divisible=frozenset())
BF16_DOT = toy(
    "dot", {"out_ptr": "*fp32", "a_ptr": "*bf16", "b_ptr": "*bf16"}, {"BLOCK": 64, "ACC": tl.float32}
)
INT8_DOT = dataclasses.replace(
    BF16_DOT,
    name="int8 dot",
    signature={"out_ptr": "*i32", "a_ptr": "*i8", "b_ptr": "*i8"},
    constexprs={"BLOCK": 64, "ACC": tl.int32},
)
# 128 * 128 sums for the 32 threads of one warp: 512 registers each, where there are 255.
SPILLING = dataclasses.replace(
    BF16_DOT, name="spilling dot", constexprs={"BLOCK": 128, "ACC": tl.float32}, num_warps=1
)
ARCHS = ("sm_80", "sm_90", "gfx942")


@pytest.fixture(scope="module")
def codes() -> dict[tuple[str, str], MachineCode]:
    results = compile_all([COPY, UNALIGNED, BF16_DOT, INT8_DOT, SPILLING], ARCHS)
    return {(code.name, code.arch): code for code in results}


@pytest.mark.parametrize("arch", ARCHS)
def test_access_widths(codes, arch: str) -> None:
    aligned, unaligned = codes["copy", arch], codes["unaligned copy", arch]
    assert (aligned.load_bits, aligned.store_bits) == (128, 128)
    assert (unaligned.load_bits, unaligned.store_bits) == (16, 16)
    assert sum(unaligned.loads.values()) == 2048 // (4 * GPU_SPECS[arch].warp_size)


def test_matrix_instructions(codes) -> None:
    for name in ("dot", "int8 dot"):
        assert codes[name, "sm_80"].mma > 0
        assert codes[name, "sm_80"].wgmma == 0
        assert codes[name, "sm_90"].wgmma > 0
        assert codes[name, "gfx942"].mma > 0
    for arch in ARCHS:
        assert codes["copy", arch].wgmma == codes["copy", arch].mma == 0
        assert codes["dot", arch].shared_bytes >= 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_spills_are_seen(codes, arch: str) -> None:
    spilling, calm = codes["spilling dot", arch], codes["dot", arch]
    assert spilling.registers <= 255
    assert spilling.spill_bytes > 0
    assert spilling.stack_bytes > 0
    assert calm.spill_bytes == calm.stack_bytes == 0
    assert 16 < calm.registers < 255
    assert calm.instructions > 50


SASS = """
Resource usage:
 Function kernel:
  REG:40 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:656 TEXTURE:0 SURFACE:0 SAMPLER:0

        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000e300000000800 */
        /*0070*/                   LDG.E.64 R4, desc[UR14][R4.64] ;       /* 0x0000000e04047981 */
        /*0080*/              @!P0 LDG.E.128 R8, desc[UR14][R6.64] ;      /* 0x0000000e04047981 */
        /*0090*/             @!UPT LDG.E.U16.CONSTANT R8, [R6.64] ;       /* 0x0000000e04047981 */
        /*00a0*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64] ; /* 0x0000000e04047981 */
        /*00b0*/              @P1  STG.E.U8 desc[UR14][R6.64], R8 ;       /* 0x0000000e04047981 */
        /*00c0*/                   STL.64 [R1], R2 ;                      /* 0x0000000e04047981 */
        /*00d0*/                   STL [R1+0x8], R2 ;                     /* 0x0000000e04047981 */
        /*00e0*/                   LDL.64 R2, [R1] ;                      /* 0x0000000e04047981 */
        /*00f0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ; /* 0x0000000e04047981 */
        /*0100*/                   HMMA.16816.F32.BF16 R4, R4, R8, R12 ;  /* 0x0000000e04047981 */
        /*0110*/                   UTCHMMA gdesc[UR4], tmem[UR8] ;        /* 0x0000000e04047981 */
        /*0120*/                   EXIT ;                                 /* 0x000000000000794d */
"""

GCN = """
kernel:                                 ; @kernel
; %bb.0:
	s_load_dwordx4 s[4:7], s[0:1], 0x8
	global_load_dwordx4 v[2:5], v0, s[2:3]
	global_load_ushort v1, v0, s[2:3]
	buffer_load_dword v6, v1, s[4:7], 0 offen
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]
	scratch_store_dword off, v1, s32
	global_store_short_d16_hi v0, v1, s[2:3]
	s_endpgm
	.section	.rodata,"a",@progbits
    .group_segment_fixed_size: 512
    .private_segment_fixed_size: 12
    .vgpr_count:     96
    .vgpr_spill_count: 3
"""


def test_parse_sass() -> None:
    code = machine_code.parse_sass(SASS)
    assert (code.registers, code.stack_bytes, code.spill_bytes) == (40, 16, 12)
    assert code.loads == {64: 1, 128: 2, 16: 1}
    assert code.stores == {8: 1}
    assert (code.wgmma, code.mma, code.instructions) == (1, 2, 13)
    with pytest.raises(ValueError, match="no resource usage"):
        machine_code.parse_sass("nothing")


def test_parse_amdgcn() -> None:
    code = machine_code.parse_amdgcn(GCN)
    assert (code.registers, code.stack_bytes, code.spill_bytes) == (96, 12, 12)
    assert code.static_shared_bytes == 512
    assert code.loads == {128: 1, 32: 1, 16: 1}
    assert code.stores == {16: 1}
    assert (code.wgmma, code.mma, code.instructions) == (0, 1, 8)
    with pytest.raises(ValueError, match="vgpr_count"):
        machine_code.parse_amdgcn("s_endpgm")


@pytest.mark.parametrize(
    ("arch", "registers", "shared_kib", "warps", "expected"),
    [
        ("sm_90", 32, 0, 4, 1.0),  # 512 / 32 = 16 warps a scheduler: all 64
        ("sm_90", 33, 0, 4, 48 / 64),  # 33 take 40: 12 a scheduler
        ("sm_90", 255, 0, 8, 8 / 64),  # 2 a scheduler
        ("sm_90", 168, 0, 8, 8 / 64),  # 3 a scheduler, 12 in all: one block of 8 and no other
        ("sm_90", 32, 100, 8, 16 / 64),  # (100 + 1) KiB twice in 228 KiB
        ("sm_80", 32, 163, 4, 4 / 64),  # the most one block may have
        ("sm_80", 32, 164, 4, 0.0),  # does not fit
        ("sm_86", 32, 0, 1, 16 / 48),  # 16 blocks a multiprocessor
        ("sm_89", 40, 0, 4, 1.0),  # 12 a scheduler: all 48
        ("gfx942", 64, 0, 4, 1.0),  # 512 / 64 = 8 waves a SIMD
        ("gfx942", 128, 0, 4, 0.5),
        ("gfx942", 64, 64, 4, 4 / 32),
    ],
)
def test_occupancy(arch: str, registers: int, shared_kib: int, warps: int, expected: float) -> None:
    assert GPU_SPECS[arch].occupancy(registers, shared_kib * 1024, warps) == pytest.approx(expected)


def test_arguments_are_specialized_as_the_jit_does_it() -> None:
    arguments = {
        "p": "*bf16",
        "none": None,
        "one": 1,
        "even": 48,
        "odd": 47,
        "wide": 2**31,
        "zero": 0,
        "real": 1.0,
        "free": 1,
        "free16": 16,
    }
    spec = toy("copy", arguments, {"BLOCK": 8}, do_not_specialize=["free", "free16"])
    assert spec.constexprs == {"BLOCK": 8, "none": None, "one": 1}
    assert spec.signature == {
        "p": "*bf16",
        "even": "i32",
        "odd": "i32",
        "wide": "i64",
        "zero": "i32",
        "real": "fp32",
        "free": "i32",
        "free16": "i32",
    }
    assert spec.divisible == {"p", "even", "wide", "zero"}


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown architecture 'sm_42': expected one of sm_80"):
        compile_all([COPY], ["sm_42"])
    with pytest.raises(ValueError, match=r"no kernels are known for op 'fft'"):
        specs("fft")


@pytest.mark.interpreter
def test_interpreted_kernels_are_refused() -> None:
    with pytest.raises(CompilationError, match="use compile_all"):
        compile_spec(COPY, "sm_90")


def test_errors_come_back_from_the_workers() -> None:
    refused = toy("refused", {"out_ptr": "*fp32"}, {"BLOCK": 16})
    with pytest.raises(CompilationError, match=r"(?s)toy refused .* sm_90: .*this kernel never compiles"):
        list(compile_all([refused], ["sm_90"], workers=1))
    misfit = toy("copy", {"out_ptr": "*bf16", "y_ptr": "*bf16", "size": 4096}, {"BLOCK": 1024})
    with pytest.raises(CompilationError, match=r"missing \['x_ptr'\], unknown \['y_ptr'\]"):
        list(compile_all([misfit], ["sm_90"], workers=1))


# --- pyaccel inspect ----------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(BUILDERS, "toy", lambda: [COPY, dataclasses.replace(BF16_DOT, dtype="other")])
    app = typer.Typer()
    app.command()(inspect)
    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_inspect_prints_json(run) -> None:
    result = run("--op", "toy", "--arch", "sm_90", "--arch", "sm_80", "--dtype", "toy", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["arch"] for row in rows] == ["sm_90", "sm_80"]
    assert all(list(row) == list(JSON_FIELDS) for row in rows)
    assert {(row["op"], row["load_bits"], row["spill_bytes"]) for row in rows} == {("toy", 128, 0)}


def test_inspect_prints_a_table(run) -> None:
    result = run("--op", "toy")
    assert result.exit_code == 0, result.output
    assert "sm_90" in result.stdout
    assert "dot" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "fft"], "no kernels are known for op 'fft'"),
        (["--op", "toy", "--arch", "sm_42"], "unknown architecture 'sm_42'"),
        (["--op", "toy", "--dtype", "fp3"], "unknown dtype fp3: expected one of toy, other"),
    ],
)
def test_inspect_refuses_bad_options(run, arguments, message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"pyaccel inspect: {message}")
    assert result.stderr.count("\n") == 1


def test_inspect_without_triton(run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    result = run("--op", "toy")
    assert result.exit_code == 2
    assert result.stderr.startswith("pyaccel inspect: triton isn't installed: pip install triton")
    assert result.stderr.count("\n") == 1


def test_inspect_reports_what_does_not_compile(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILDERS, "toy", lambda: [toy("refused", {"out_ptr": "*fp32"}, {"BLOCK": 16})])
    result = run("--op", "toy")
    assert result.exit_code == 1
    assert "this kernel never compiles" in result.stderr


def test_the_inner_loop_is_found(codes) -> None:
    assert codes["copy", "sm_90"].loop_instructions == 0
    looping = next(s for s in specs("attention") if s.dtype == "bf16" and "up to" not in s.name)
    for code in compile_all([looping], ["sm_90", "gfx942"]):
        assert 20 < code.loop_instructions < code.instructions


@pytest.mark.parametrize(("kind", "word"), [("--sass", "EXIT"), ("--ptx", ".visible .entry")])
def test_listings(run, kind: str, word: str) -> None:
    options = ["--op", "bias_gelu", "--dtype", "bf16", "--name", "^forward, gelu .*512", kind]
    done = run(*options)
    assert done.exit_code == 0, done.output
    assert word in done.stdout
    assert done.stdout.count("// bias_gelu forward") >= 1
    done = run(*options, "--arch", "gfx942")
    assert done.exit_code == (2 if kind == "--ptx" else 0)
    assert ("has no PTX" in done.output) == (kind == "--ptx")


def test_two_revisions_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A checkout of its own, whose last revision has another number of warps in one kernel's configuration.
    tree = tmp_path / "tree"
    for name in ("kernels", "pyaccel"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(tree), "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "before"]):
        subprocess.run([*git, *command], check=True)
    heuristics = tree / "kernels" / "mlm_loss" / "config.py"
    text = heuristics.read_text()
    changed = text.replace("num_warps=block_n // 256,", "num_warps=block_n // 256 if block_n > 1024 else 8,")
    assert changed != text
    heuristics.write_text(changed)
    # An op of few kernels: those of the earlier revision are compiled whatever their name.
    options = ["--op", "masked_lm_cross_entropy", "--dtype", "bf16", "--name", "scaled"]
    env = {**os.environ, "PYTHONPATH": str(tree)}

    def run(revision: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pyaccel", "inspect", *options, "--diff", revision]
        return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)

    done = run("HEAD")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^gone: .*scaled .*1024.* on sm_90$", done.stdout, re.MULTILINE)
    assert re.search(r"^new: .*scaled .*1024.* on sm_90$", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("2 differ from HEAD, 1 are the same\n")
    done = run("no-such-revision")
    assert (done.returncode, "no-such-revision" in done.stderr) == (2, True)
