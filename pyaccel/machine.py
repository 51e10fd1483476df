"""What machine this is: its kind, for tables of measurements; its name and versions, for readers; what it can do."""

from __future__ import annotations

import functools
import platform
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pyaccel import __version__
from pyaccel.dtypes import DTYPES
from pyaccel.errors import UserInputError

_ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def kind(device: torch.device) -> str:
    """The kind of machine that a measurement is good for: a GPU's name, or a CPU's instructions."""
    if device.type == "cuda":  # of fake tensors there may be no card
        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "cuda"
    vnni = "+VNNI" if device.type == "cpu" and torch.cpu._is_vnni_supported() else ""
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}{vnni}"


def name(device: torch.device) -> str:
    """A GPU's name, or a CPU's instructions and how many threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"cpu {platform.machine()} {capability}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of what figures depend on; torch's own names its build, which its package's metadata may not."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def provenance(device: torch.device) -> dict[str, str]:
    """Where and of what a figure is: device, versions, commit and date."""
    found = versions()
    return {
        "device": name(device),
        **{package: found[package] for package in ("torch", "triton", "python")},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    if not (_ROOT / ".git").exists():  # git would tell of whatever project this is installed in
        return f"release {__version__}"
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def resolve_device(name: str) -> torch.device:
    """``"auto"`` (a GPU if there is one), or a device that torch has."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserInputError(f"unknown device {name!r}: use cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise UserInputError(f"device {name!r} is not supported: use cpu or cuda")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserInputError(
            f"torch sees {count or 'no'} CUDA devices here, so not {name!r}: use --device cpu"
        )
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``fp32``, ``bf16`` or ``fp16``, if the device computes in it at speed."""
    dtype = {**DTYPES, **{str(each).removeprefix("torch."): each for each in DTYPES.values()}}.get(name)
    if dtype is None:
        raise UserInputError(f"unknown dtype {name!r}: use fp32, bf16 or fp16")
    if device.type == "cpu" and dtype != torch.float32:
        kind = "bf16" if dtype == torch.bfloat16 else "fp16"
        if not getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")():
            instructions = "avx512_bf16 or amx_bf16" if kind == "bf16" else "avx512_fp16 or amx_fp16"
            raise UserInputError(
                f"this CPU has no {kind} instructions ({instructions}), where {kind} is far slower than fp32: "
                f"use --dtype fp32, or a GPU with --device cuda"
            )
    return dtype


def resolve_dtypes(names: list[str] | None, device: torch.device) -> dict[str, torch.dtype]:
    """Name -> dtype of those given; by default fp32 and, if the device computes in it at speed, bf16."""
    if names:
        return {name: resolve_dtype(name, device) for name in names}
    found = {"fp32": resolve_dtype("fp32", device)}
    with suppress(UserInputError):
        found["bf16"] = resolve_dtype("bf16", device)
    return found
