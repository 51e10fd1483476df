"""Compiles card.cpp. Imports neither torch nor triton: PyTorch asks for what card.cpp registers as it is imported."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path


def missing() -> str | None:
    """What keeps the card from being built on this machine; None if nothing does."""
    if shutil.which("g++") is None:
        return "there is no g++: install a C++ compiler (Triton needs a C compiler on GPU machines too)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "there is no Python.h: install Python's headers (Triton needs them on GPU machines too)"
    if (_folder("torch") / "lib" / "libtorch_cuda.so").exists():
        return (
            "this torch is built for CUDA and registers its own operators for the card: install a CPU build"
        )
    return None


def _folder(package: str) -> Path:
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{package} isn't installed")
    return Path(found.origin).parent


def build(folder: Path) -> Path:
    """Compile card.cpp into ``folder/libcuda.so.1``."""
    root = _folder("torch")
    out = folder / "libcuda.so.1"
    command = [
        "g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1",
        f"-I{root / 'include'}", f"-I{_folder('triton') / 'backends/nvidia/include'}",
        "-o", str(out), str(Path(__file__).with_name("card.cpp")),
        f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"card.cpp doesn't compile:\n{done.stderr}")
    return out
