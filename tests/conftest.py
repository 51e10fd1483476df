"""What every test shares: how kernels run here, and fixtures against luck (seeds) and stray memory accesses.

Kernels run in one of two ways, decided before anything imports triton:

* interpreted, on the CPU, where there is no CUDA (or ROCm) device: this file sets TRITON_INTERPRET=1 and
  corrects the interpreter's bfloat16 (:mod:`tests.interpreter`);
* compiled, on the device, where there is one; TRITON_INTERPRET=1 in the environment asks for the former.

A test takes its device from the ``device`` fixture and so serves both. Those that make sense in one of them
only are marked ``gpu`` or ``interpreter`` and are deselected in the other.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import random
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence

if platform.machine() in ("x86_64", "AMD64"):
    # The interpreter multiplies by numpy's BLAS, which sums in an order of each CPU's own: one order for all, so that
    # a test that passes on one passes on another. It has to be chosen before numpy is imported.
    os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

imported_early = sys.modules.get("triton")
os.environ.setdefault("TRITON_INTERPRET", "0" if HAS_GPU else "1")
INTERPRETED = os.environ["TRITON_INTERPRET"].lower() in ("1", "true", "yes", "on", "y")
COMPILED = HAS_GPU and not INTERPRETED
# Triton makes the choice as it is imported. tests/fork_server.py imports it early, with the same setting.
if (
    imported_early is not None
    and (type(imported_early.language.sum).__name__ == "InterpretedFunction") != INTERPRETED
):
    raise RuntimeError(
        "triton was imported before tests/conftest.py could choose between its interpreter and its compiler: "
        "find what imports it early (a pytest plugin, -p, PYTHONSTARTUP) and take that out"
    )
if COMPILED:
    # cuBLAS is deterministic, as the `poison` fixture demands, only with this set before its first call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if INTERPRETED and importlib.util.find_spec("triton") is not None:
    from tests import interpreter

    interpreter.install()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs kernels compiled and run on a GPU")
    config.addinivalue_line("markers", "interpreter: is about Triton's interpreter itself")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = set()
    if not COMPILED:
        unwanted.add("gpu")
    if not INTERPRETED:
        unwanted.add("interpreter")
    deselected = [item for item in items if any(item.get_closest_marker(name) for name in unwanted)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in set(deselected)]


def pytest_report_header() -> str:
    how = f"compiled, on {torch.cuda.get_device_name()}" if COMPILED else "interpreted, on the CPU"
    others = ", ".join(f"{name} {_version(name)}" for name in ("triton", "transformers", "numpy"))
    return f"kernels: {how}; torch {torch.__version__}, {others}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: the GPU if they are compiled, else the CPU."""
    return torch.device("cuda" if COMPILED else "cpu")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Every test starts from a seed made from its own name: it draws the same numbers alone or in company."""
    value = zlib.crc32(request.node.name.encode())
    random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture
def poison() -> Iterator[None]:
    """torch.empty returns NaN (or the largest integer): an element that a kernel forgot to write shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


class GuardedEmpty:
    """Allocates outputs between guard bands and finds out whether anything was stored there."""

    # A multiple of 16 bytes, so that the tensor is aligned as torch's own are; wider than any row block.
    GUARD_BYTES = 128 * 1024
    PATTERN = 0xA5

    def __init__(self) -> None:
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(
        self,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        row_gap: int = 0,
    ) -> torch.Tensor:
        """A tensor of `shape` filled with NaN (or the largest integer), guarded on both sides.

        `row_gap` elements after each row (a run along the last dimension) are guard too; the tensor is
        contiguous only without them.
        """
        shape = tuple(shape)
        itemsize = dtype.itemsize
        row_stride = shape[-1] + row_gap
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, (row_stride if len(strides) == 1 else size * strides[0]))
        rows = max(1, torch.Size(shape[:-1]).numel())
        guard = self.GUARD_BYTES // itemsize
        raw = torch.full(
            ((2 * guard + rows * row_stride) * itemsize,), self.PATTERN, dtype=torch.uint8, device=device
        )
        inside = torch.zeros(raw.numel() // itemsize, dtype=torch.bool, device=device)
        inside.as_strided(shape, strides, guard).fill_(True)
        self._buffers.append((raw, inside.repeat_interleave(itemsize)))
        out = raw.view(dtype).as_strided(shape, strides, guard)
        return out.fill_(float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max)

    def check(self) -> None:
        """Fail if a byte of any guard band changed. Runs by itself at the end of the test."""
        for raw, inside in self._buffers:
            changed = (raw != self.PATTERN) & ~inside
            assert not changed.any(), (
                f"{int(changed.sum())} bytes were stored outside an output tensor, the first of them at byte "
                f"{int(changed.nonzero()[0]) - self.GUARD_BYTES} from its start"
            )


@pytest.fixture
def guarded_empty() -> Iterator[Callable[..., torch.Tensor]]:
    """``guarded_empty(shape, dtype=..., device=..., row_gap=0)``: an output with checked surroundings."""
    allocator = GuardedEmpty()
    yield allocator
    allocator.check()
