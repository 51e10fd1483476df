"""What machine this is: its kind, for tables of measurements; its name and versions, for whoever reads figures."""

from __future__ import annotations

import functools
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pyaccel import __version__

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
