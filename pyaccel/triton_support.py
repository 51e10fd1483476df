"""Whether Triton's kernels can run here, and on these tensors."""

from __future__ import annotations

import importlib.util
import os

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # found without importing it


def has_triton() -> bool:
    """Whether triton is installed."""
    return _HAS_TRITON


def interpreting() -> bool:
    """Whether Triton kernels are to run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def unsupported_reasons(*tensors: torch.Tensor | None) -> list[str]:
    """Why Triton kernels can't run on these floating-point tensors here; empty if they can."""
    given = [t for t in tensors if t is not None]
    reasons = []
    if not has_triton():
        reasons.append("triton is not installed (pip install 'pyaccel-bert[triton]')")
    devices = sorted({t.device.type for t in given})
    if devices == ["cpu"]:
        if not interpreting():
            reasons.append("the tensors are on the CPU")
    elif devices not in (["cuda"], ["meta"]):  # shapes and dtypes alone stand for a GPU's tensors
        reasons.append(f"the tensors are on {', '.join(devices)}, and Triton runs on one CUDA or ROCm device")
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in given if t.dtype not in DTYPES})
    if dtypes:
        reasons.append(f"the kernels take float32, float16 and bfloat16, not {', '.join(dtypes)}")
    return reasons
