"""The GPUs that kernels are compiled for, and what their data sheets say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuSpec:
    """The limits of a GPU architecture. "SM" stands for a compute unit on AMD, "warp" for a wave.

    Sources: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"; AMD's CDNA 3
    and CDNA 4 ISA guides; LLVM's AMDGPU usage guide.

    Attributes:
        backend, target: Triton's names for it.
        warp_size: threads a warp.
        warps_per_sm, blocks_per_sm: the most that an SM holds.
        shared_per_block, shared_per_sm: bytes of shared memory (LDS).
        shared_reserved: bytes that the system takes of each block's shared memory.
        registers_per_scheduler: 32-bit registers of one of the SM's four schedulers, for each lane of a warp.
        register_granule: a warp's registers a lane are rounded up to a multiple of this.
    """

    backend: str
    target: int | str
    warp_size: int
    warps_per_sm: int
    blocks_per_sm: int
    shared_per_block: int
    shared_per_sm: int
    shared_reserved: int
    registers_per_scheduler: int
    register_granule: int = 8

    def occupancy(self, registers: int, shared_bytes: int, num_warps: int) -> float:
        """Resident warps of an SM, as a fraction of the most that it holds; 0 for a block that doesn't fit."""
        granule = self.register_granule
        registers = max(-(-registers // granule), 1) * granule
        warps_by_registers = 4 * (self.registers_per_scheduler // registers)
        shared = shared_bytes + self.shared_reserved
        blocks = min(
            self.blocks_per_sm,
            self.warps_per_sm // num_warps,
            warps_by_registers // num_warps,
            self.shared_per_sm // shared if shared else self.blocks_per_sm,
        )
        return blocks * num_warps / self.warps_per_sm


def _nvidia(
    capability: int, *, warps: int, blocks: int, shared_per_block_kib: int, shared_per_sm_kib: int
) -> GpuSpec:
    # 64 Ki registers an SM, 16 Ki a scheduler: 512 for each of a warp's 32 lanes.
    return GpuSpec(
        "cuda",
        capability,
        32,
        warps,
        blocks,
        shared_per_block_kib * 1024,
        shared_per_sm_kib * 1024,
        1024,
        512,
    )


def _amd(target: str, *, shared_kib: int) -> GpuSpec:
    # 8 waves for each of the 4 SIMDs, which has 512 vector registers (VGPRs and AccVGPRs) a lane. A unit
    # takes 16 blocks of more than one wave.
    return GpuSpec("hip", target, 64, 32, 16, shared_kib * 1024, shared_kib * 1024, 0, 512)


GPU_SPECS: dict[str, GpuSpec] = {
    "sm_80": _nvidia(80, warps=64, blocks=32, shared_per_block_kib=163, shared_per_sm_kib=164),
    "sm_86": _nvidia(86, warps=48, blocks=16, shared_per_block_kib=99, shared_per_sm_kib=100),
    "sm_89": _nvidia(89, warps=48, blocks=24, shared_per_block_kib=99, shared_per_sm_kib=100),
    "sm_90": _nvidia(90, warps=64, blocks=32, shared_per_block_kib=227, shared_per_sm_kib=228),
    "sm_100": _nvidia(100, warps=64, blocks=32, shared_per_block_kib=227, shared_per_sm_kib=228),
    "gfx942": _amd("gfx942", shared_kib=64),
    "gfx950": _amd("gfx950", shared_kib=160),
}


def _check_arch(arch: str) -> GpuSpec:
    if arch not in GPU_SPECS:
        raise ValueError(f"unknown architecture {arch!r}: expected one of {', '.join(GPU_SPECS)}")
    return GPU_SPECS[arch]
