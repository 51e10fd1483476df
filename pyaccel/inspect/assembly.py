"""What the text of an assembly shows: registers, spills, matrix instructions, widths, and the inner loop."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Assembly:
    """What the text of an assembly shows; the fields are :class:`MachineCode`'s."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    static_shared_bytes: int
    wgmma: int
    mma: int
    tma: int
    instructions: int
    loop_instructions: int
    loads: Counter[int]
    stores: Counter[int]


# "        /*0070*/              @!P0 LDG.E.128 R4, desc[UR14][R4.64] ;      /* 0x... */"
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_SASS_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_SASS_WGMMA = re.compile(r"[HIQB]GMMA")
_SASS_MMA = re.compile(r"[HIQBDF]MMA|OMMA|UTC\w*MMA")


def _sass_bits(opcode: str) -> int:
    """Bits that one thread moves with a memory instruction, from its modifiers."""
    for modifier in opcode.split(".")[1:]:
        if modifier in ("64", "128", "256"):
            return int(modifier)
        if modifier in ("U8", "S8"):
            return 8
        if modifier in ("U16", "S16"):
            return 16
    return 32


def parse_sass(text: str) -> Assembly:
    """Read the output of ``cuobjdump -sass -res-usage`` for a cubin of one kernel."""
    usage = _SASS_USAGE.search(text)
    if usage is None:
        raise ValueError(f"cuobjdump printed no resource usage: {text[:200]!r}")
    registers, stack, shared = map(int, usage.groups())
    opcodes = _SASS.findall(text)
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    spill_bytes = wgmma = mma = tma = 0
    for opcode in opcodes:
        mnemonic = opcode.split(".")[0]
        if mnemonic in ("LDG", "LD", "LDGSTS"):
            loads[_sass_bits(opcode)] += 1
        elif mnemonic in ("STG", "ST"):
            stores[_sass_bits(opcode)] += 1
        elif mnemonic in ("UTMALDG", "UBLKCP"):
            loads[128] += 1  # the copy engine moves whole lines; no thread does
            tma += 1
        elif mnemonic == "UTMASTG":
            stores[128] += 1
            tma += 1
        elif mnemonic == "STL":
            spill_bytes += _sass_bits(opcode) // 8
        elif _SASS_WGMMA.fullmatch(mnemonic):
            wgmma += 1
        elif _SASS_MMA.fullmatch(mnemonic):
            mma += 1
    return Assembly(
        registers,
        spill_bytes,
        stack,
        shared,
        wgmma,
        mma,
        tma,
        len(opcodes),
        _loop_of_sass(text),
        loads,
        stores,
    )


# "        global_load_dwordx4 v[2:5], v0, s[2:3]"
_GCN = re.compile(r"^\s+([a-z]\w+)(?=\s)", re.MULTILINE)
_GCN_MEMORY = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?[us]?(dwordx[234]|dword|short|byte)")
_GCN_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}


def parse_amdgcn(text: str) -> Assembly:
    """Read AMD assembly with its metadata, as Triton keeps it beside the binary, for one kernel."""

    def metadata(key: str) -> int:
        found = re.search(rf"^\s*\.{key}:\s*(\d+)", text, re.MULTILINE)
        if found is None:
            raise ValueError(f"the AMD assembly has no .{key}")
        return int(found.group(1))

    code = text.split(".section\t.rodata")[0]
    opcodes = _GCN.findall(code)
    accesses: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for opcode in opcodes:
        access = _GCN_MEMORY.match(opcode)
        if access is not None:
            direction, width = access.groups()
            accesses[direction][_GCN_BITS[width]] += 1
    return Assembly(
        registers=metadata("vgpr_count"),
        spill_bytes=4 * metadata("vgpr_spill_count"),
        stack_bytes=metadata("private_segment_fixed_size"),
        static_shared_bytes=metadata("group_segment_fixed_size"),
        wgmma=0,
        mma=sum(opcode.startswith("v_mfma") for opcode in opcodes),
        tma=0,
        instructions=len(opcodes),
        loop_instructions=_loop_of_amdgcn(code),
        loads=accesses["load"],
        stores=accesses["store"],
    )


# "        /*0a10*/              @P0 BRA 0x6f0 ;", or BRA.U, or with a condition before the address
_SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)


def _loop_of_sass(text: str) -> int:
    matrix: list[bool] = []
    at: dict[int, int] = {}
    branches: list[tuple[int, int]] = []
    for address, opcode, operands in _SASS_LINE.findall(text):
        mnemonic = opcode.split(".")[0]
        at[int(address, 16)] = len(matrix)
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if mnemonic == "BRA" and target is not None and int(target.group(1), 16) < int(address, 16):
            branches.append((int(target.group(1), 16), len(matrix)))
        matrix.append(bool(_SASS_WGMMA.fullmatch(mnemonic) or _SASS_MMA.fullmatch(mnemonic)))
    return _inner_loop([(at[target], end) for target, end in branches if target in at], matrix)


_GCN_LINE = re.compile(r"^(?:(\.L\w+):|\s+([a-z]\w+)(?=\s)([^\n;]*))", re.MULTILINE)


def _loop_of_amdgcn(code: str) -> int:
    matrix: list[bool] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for label, opcode, operands in _GCN_LINE.findall(code):
        if label:
            labels[label] = len(matrix)
            continue
        if opcode.startswith(("s_cbranch", "s_branch")) and operands.strip() in labels:
            loops.append((labels[operands.strip()], len(matrix)))
        matrix.append(opcode.startswith("v_mfma"))
    return _inner_loop(loops, matrix)


def _inner_loop(loops: list[tuple[int, int]], matrix: list[bool]) -> int:
    """Instructions of the loop, among those without another one inside, with the most matrix instructions; then of the
    longest. 0 if there is none."""
    inner = [
        (start, end)
        for start, end in loops
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in loops)
    ]
    best = max(inner, key=lambda loop: (sum(matrix[loop[0] : loop[1] + 1]), loop[1] - loop[0]), default=None)
    return 0 if best is None else best[1] - best[0] + 1
