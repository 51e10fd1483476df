"""What was measured on which machine: data for dispatch and for ``explain``.

A table is a JSON file named like an op, with the microseconds of each way to serve it at some sizes. Some ship in
``kernels/tuned/``; ``pyaccel tune`` measures a user's own machine into :func:`user_folder`, and those come first. Times
are of one run on one machine: their ratios are what counts.

========================  ================================  ==================================================
op                        size                              ways
========================  ================================  ==================================================
int8_matmul               rows, in_features, out_features   backends of int8, and ``floating``, the layer in
                                                            floating point
linear_activation         rows, in_features, out_features   backends on a GPU; on a CPU ``onednn``, its fused
                                                            product, and ``plain``, F.linear and the activation
varlen_attention          longest sequence, heads,          backends on a GPU; on a CPU ``matmul``, two products
                          head_dim                          and a softmax, and ``sdpa``, of each sequence
varlen_attention_         the same                          ``matmul`` and ``sdpa``, forward and backward of 1024
training                                                    tokens on a CPU
scaled_dot_product_       longest sequence, heads,          backends
attention                 head_dim
residual_layernorm,       rows, columns                     backends
bias_gelu,
bert_embeddings
masked_lm_cross_entropy   rows, columns, vocabulary         backends
launch_KERNEL             what its launch depends on        ``default`` and ``best``, whose fields are ``config``
========================  ================================  ==================================================
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

FOLDER = Path(__file__).parent / "kernels" / "tuned"
# Farther from every size that was measured (by the product of the ratios), nothing is said.
FARTHEST = 16.0
NOISE = 1.05


def user_folder() -> Path:
    """Where ``pyaccel tune`` writes: ``$PYACCEL_TUNED``, or ``pyaccel/tuned`` in the user's data directory."""
    given = os.environ.get("PYACCEL_TUNED")
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(given) if given else Path(data) / "pyaccel" / "tuned"


@dataclass(frozen=True)
class Timing:
    """One size of an op that was measured.

    Attributes:
        size: as the table above has it.
        us: way -> microseconds.
        source: "shipped" or "measured here".
        config: of a kernel's launch: the fields that the fastest one has.
    """

    size: tuple[int, ...]
    us: dict[str, float]
    source: str
    config: dict[str, Any] | None = None

    def fastest(self, among: Sequence[str]) -> str | None:
        """The way with the least time, of those named; None where none of them was measured.

        The first one named stays the choice where another is faster by no more than noise.
        """
        ways = [way for way in among if way in self.us]
        if not ways:
            return None
        best = min(ways, key=self.us.__getitem__)
        return ways[0] if self.us[ways[0]] <= NOISE * self.us[best] else best

    def __str__(self) -> str:
        times = ", ".join(f"{way} {us:.4g}" for way, us in sorted(self.us.items(), key=lambda pair: pair[1]))
        return f"{self.source} at {' x '.join(map(str, self.size))}: {times} us"


@functools.cache
def machine(device: torch.device) -> str:
    """The kind of machine that a measurement is good for: a GPU's name, or a CPU's instructions."""
    if device.type == "cuda":  # of fake tensors there may be no card
        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "cuda"
    vnni = "+VNNI" if device.type == "cpu" and torch.cpu._is_vnni_supported() else ""
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}{vnni}"


def timings(op: str, device: torch.device, dtype: torch.dtype) -> list[Timing]:
    """Every size that was measured on this kind of machine with inputs of ``dtype``; empty if none was."""
    if _ignored.get():
        return []
    return list(_measured(op, device, dtype))


def _measured(op: str, device: torch.device, dtype: torch.dtype) -> tuple[Timing, ...]:
    return _tables().get((op, machine(device), dtype), ())


def nearest(op: str, device: torch.device, dtype: torch.dtype, size: tuple[int, ...]) -> Timing | None:
    """The nearest size that was measured, by the logarithms of its numbers; None if there is none near."""
    return None if _ignored.get() else _nearest(op, device, dtype, size)


@functools.lru_cache(maxsize=4096)
def _nearest(op: str, device: torch.device, dtype: torch.dtype, size: tuple[int, ...]) -> Timing | None:
    if not all(size):
        return None

    def distance(timing: Timing) -> float:
        return sum(abs(math.log(a / b)) for a, b in zip(timing.size, size, strict=True))

    found = min(_measured(op, device, dtype), key=distance, default=None)
    return found if found is not None and distance(found) <= math.log(FARTHEST) else None


def preferred(
    op: str, device: torch.device, dtype: torch.dtype, size: tuple[int, ...], ways: tuple[str, ...]
) -> tuple[str | None, str]:
    """The way that was fastest at the nearest size, of those named, the usual one first, and the row that says so.

    (None, "") where nothing near was measured, and in a traced graph, which serves many sizes.
    """
    if torch.compiler.is_compiling() or any(type(n) is not int for n in size) or _ignored.get():
        return None, ""
    return _preferred(op, device, dtype, size, ways)


@functools.lru_cache(maxsize=4096)
def _preferred(
    op: str, device: torch.device, dtype: torch.dtype, size: tuple[int, ...], ways: tuple[str, ...]
) -> tuple[str | None, str]:
    timing = _nearest(op, device, dtype, size)
    way = None if timing is None else timing.fastest(ways)
    return (None, "") if way is None else (way, str(timing))


# ---- launch configurations ----

Config = TypeVar("Config")

# Of this thread or asyncio task. Kernel -> the configuration to launch; kernel -> where to note what is launched.
_trying: ContextVar[dict[str, Any]] = ContextVar("pyaccel_trying", default={})  # noqa: B039  never written to
_asked: ContextVar[dict[str, list[tuple[tuple[int, ...], Any]]]] = ContextVar("pyaccel_asked", default={})  # noqa: B039
_ignored: ContextVar[bool] = ContextVar("pyaccel_ignored", default=False)


def launch(kernel: str, x: torch.Tensor, size: tuple[int, ...], default: Config, *, exactly: bool) -> Config:
    """The launch configuration of a kernel: ``default`` with what was measured to be faster on this kind of device.

    Args:
        kernel: its name; x: one of its inputs, for device and dtype.
        size: what the launch depends on.
        exactly: take measurements of this very size alone: a configuration for another one wouldn't be right.

    It is data, read once: two runs launch the same programs.
    """
    if kernel in (asked := _asked.get()):
        asked[kernel].append((size, default))
    if kernel in (trying := _trying.get()):
        return trying[kernel]
    found = nearest(f"launch_{kernel}", x.device, x.dtype, size)
    if found is None or not found.config or (exactly and found.size != size):
        return default
    return replace(default, **found.config)  # type: ignore[type-var]


@contextmanager
def trying(kernel: str, config: Any) -> Iterator[None]:
    """Launch the kernel with this configuration inside, in this thread."""
    token = _trying.set({**_trying.get(), kernel: config})
    try:
        yield
    finally:
        _trying.reset(token)


def asked(kernel: str, call: Callable[[], object]) -> tuple[tuple[int, ...], Any] | None:
    """The size and the default configuration with which ``call`` launches the kernel; None if it doesn't."""
    launches: list[tuple[tuple[int, ...], Any]] = []
    token = _asked.set({**_asked.get(), kernel: launches})
    try:
        call()
    finally:
        _asked.reset(token)
    return launches[-1] if launches else None


@contextmanager
def ignored() -> Iterator[None]:
    """Use no measurement inside, in this thread."""
    token = _ignored.set(True)
    try:
        yield
    finally:
        _ignored.reset(token)


@functools.cache
def _tables() -> dict[tuple[str, str, torch.dtype], tuple[Timing, ...]]:
    tables: dict[tuple[str, str, torch.dtype], tuple[Timing, ...]] = {}
    for folder, source in ((FOLDER, "shipped"), (user_folder(), "measured here")):
        for file in sorted(folder.glob("*.json")):
            for table in read(file):
                rows = tuple(
                    Timing(tuple(row["size"]), row["us"], source, row.get("config")) for row in table["rows"]
                )
                tables[file.stem, table["machine"], getattr(torch, table["dtype"])] = rows
    return tables


def read(file: Path) -> list[dict[str, Any]]:
    """The file's tables: ``machine``, ``dtype``, provenance, and ``rows`` of ``size`` and ``us``; none without a file.

    Raises:
        ValueError: it isn't such a file.
    """
    if not file.exists():
        return []
    try:
        tables: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["tables"]
        fine = all(
            isinstance(table["machine"], str)
            and isinstance(getattr(torch, table["dtype"]), torch.dtype)
            and all(_is_row(row) for row in table["rows"])
            and len({len(row["size"]) for row in table["rows"]}) <= 1
            for table in tables
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        fine = False
    if not fine:
        raise ValueError(f"{file} is no table of measurements: delete it, or run `pyaccel tune` anew")
    return tables


def _is_row(row: dict[str, Any]) -> bool:
    return (
        all(type(n) is int and n > 0 for n in row["size"])
        and len(row["us"]) > 0
        and all(isinstance(us, (int, float)) and us > 0 for us in row["us"].values())
    )


def write(file: Path, tables: Iterable[dict[str, Any]]) -> None:
    """Put tables into the file, each in the place of one of the same machine and dtype, and use them from now on."""
    new = {(table["machine"], table["dtype"]): table for table in tables}
    kept = [table for table in read(file) if (table["machine"], table["dtype"]) not in new]
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")  # whoever reads now sees the old file or the new one
    part.write_text(json.dumps({"tables": [*kept, *new.values()]}, indent=1) + "\n", encoding="utf-8")
    part.replace(file)
    forget()


def forget() -> None:
    """Read the files again at the next question."""
    for cached in (_tables, _nearest, _preferred):
        cached.cache_clear()
