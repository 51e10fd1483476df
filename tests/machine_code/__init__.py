"""Which architectures the tests compile for.

What another one proves is left out, unless PYACCEL_EVERY_ARCH=1 asks for it (``make machine-code``): sm_86 has the
registers, limits and instructions of sm_89 (every row kernel takes exactly as many registers on both), and so has
sm_80, with more shared memory, where a family's configurations are the same. Kernels of rows, which multiply no
matrices, are compiled for one NVIDIA architecture and one of AMD's: their registers differ by a few between those.
"""

import os

EVERY = os.environ.get("PYACCEL_EVERY_ARCH") == "1"

ARCHS = ("sm_80", *(("sm_86",) if EVERY else ()), "sm_89", "sm_90", "sm_100", "gfx942")
# Of a family with the same configurations on sm_80 and on sm_89.
DISTINCT_ARCHS = ARCHS if EVERY else tuple(arch for arch in ARCHS if arch != "sm_80")
# Of kernels of rows, in 16 bits and in fp32.
ROW_ARCHS = ARCHS if EVERY else ("sm_90", "gfx942")
ROW_FP32_ARCHS = ("sm_80", "sm_90") if EVERY else ("sm_90",)
