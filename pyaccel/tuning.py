"""What was measured on which machine: data for dispatch and for ``explain``.

A table is a JSON file named like an op, with the microseconds of each way to serve it at some sizes. Some ship in
``kernels/tuned/``; ``pyaccel tune`` measures a user's own machine into :func:`user_folder`, and those come first. Times
are of one run on one machine: their ratios are what counts.

They are hints. A file that can't be read or isn't a table, and a folder that isn't there, leave dispatch at its
defaults, with one warning; no call fails for them.

========================  ================================  ==================================================
op                        size                              names
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
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from pyaccel import machine
from pyaccel.tuning_tables import read

FOLDER = Path(__file__).parent / "kernels" / "tuned"

# Farther from every size that was measured (by the product of the ratios), nothing is said.
MAX_DISTANCE = 16.0
_INT = {int}
NOISE = 1.05


def user_folder() -> Path:
    """Where ``pyaccel tune`` writes: ``$PYACCEL_TUNED``, or ``pyaccel/tuned`` in the user's data directory.

    Raises:
        RuntimeError: there is no home directory, and neither variable is set.
    """
    given = os.environ.get("PYACCEL_TUNED")
    if given:
        return Path(given)
    data = os.environ.get("XDG_DATA_HOME")
    try:
        return (Path(data) if data else Path.home() / ".local" / "share") / "pyaccel" / "tuned"
    except (RuntimeError, KeyError, OSError) as error:
        raise RuntimeError(
            f"no folder for measurements ({error}): set PYACCEL_TUNED, XDG_DATA_HOME or HOME to one"
        ) from error


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
        names = [way for way in among if way in self.us]
        if not names:
            return None
        best = min(names, key=self.us.__getitem__)
        return names[0] if self.us[names[0]] <= NOISE * self.us[best] else best

    def __str__(self) -> str:
        times = ", ".join(f"{way} {us:.4g}" for way, us in sorted(self.us.items(), key=lambda pair: pair[1]))
        return f"{self.source} at {' x '.join(map(str, self.size))}: {times} us"


def timings(op: str, device: torch.device, dtype: torch.dtype) -> list[Timing]:
    """Every size that was measured on this kind of machine with inputs of ``dtype``; empty if none was."""
    if _ignored.get():
        return []
    return list(_measured(op, device, dtype))


def _measured(op: str, device: torch.device, dtype: torch.dtype) -> tuple[Timing, ...]:
    return _tables().get((op, machine.kind(device), dtype), ())


def nearest(op: str, device: torch.device, dtype: torch.dtype, size: tuple[int, ...]) -> Timing | None:
    """The nearest size that was measured, by the logarithms of its numbers; None if there is none near."""
    return None if _ignored.get() else _nearest(op, device, dtype, size)


@functools.lru_cache(maxsize=4096)
def _nearest(op: str, device: torch.device, dtype: torch.dtype, size: tuple[int, ...]) -> Timing | None:
    if not all(size):
        return None
    measured = _measured(op, device, dtype)
    if any(len(timing.size) != len(size) for timing in measured):
        _warn(f"measurements of {op} have sizes of other than {len(size)} numbers and are not used")
        return None

    def distance(timing: Timing) -> float:
        return sum(abs(math.log(a / b)) for a, b in zip(timing.size, size, strict=True))

    found = min(measured, key=distance, default=None)
    return found if found is not None and distance(found) <= math.log(MAX_DISTANCE) else None


def preferred(
    op: str, device: torch.device, dtype: torch.dtype, size: tuple[int, ...], names: tuple[str, ...]
) -> tuple[str | None, str]:
    """The implementation that was fastest at the nearest size, of those named, the usual one first, and the row of it.

    (None, "") where nothing near was measured, and in a traced graph, which serves many sizes.
    """
    if torch.compiler.is_compiling() or not _INT.issuperset(map(type, size)) or _ignored.get():
        return None, ""
    return _preferred(op, device, dtype, size, names)


def preferred_each(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sequence[tuple[int, ...]],
    names: tuple[str, ...],
) -> list[str | None]:
    """The implementation of each size that :func:`preferred` names, outside of traced graphs."""
    if _ignored.get():
        return [None] * len(sizes)
    return [_preferred(op, device, dtype, size, names)[0] for size in sizes]


@functools.lru_cache(maxsize=4096)
def _preferred(
    op: str, device: torch.device, dtype: torch.dtype, size: tuple[int, ...], names: tuple[str, ...]
) -> tuple[str | None, str]:
    timing = _nearest(op, device, dtype, size)
    if timing is None:
        return None, ""
    way = timing.fastest(names)
    if way is None:
        _warn(f"measurements of {op} are of {', '.join(timing.us)}, which are none of its implementations")
        return None, ""
    return way, str(timing)


# ---- launch configurations ----

Config = TypeVar("Config")
Result = TypeVar("Result")

# Kernels with measured configurations that could not be launched.
_refused: set[tuple[str, Any]] = set()

# Of this thread or asyncio task. Kernel -> the configuration to launch; kernel -> where to note what is launched.
_trying: ContextVar[dict[str, Any]] = ContextVar("pyaccel_trying", default={})  # noqa: B039  never written to
_asked: ContextVar[dict[str, list[tuple[tuple[int, ...], Any]]]] = ContextVar("pyaccel_asked", default={})  # noqa: B039
_ignored: ContextVar[bool] = ContextVar("pyaccel_ignored", default=False)
_overridden: ContextVar[bool] = ContextVar("pyaccel_overridden", default=False)  # one of the three is set


@contextmanager
def _override(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    tokens = [(variable, variable.set(value)), (_overridden, _overridden.set(True))]
    try:
        yield
    finally:
        for each, token in tokens:
            each.reset(token)


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
        tried: Config = trying[kernel]
        return tried
    found = None if _ignored.get() else _measured_launch(kernel, x.device, x.dtype, size, exactly)
    if found is None:
        return default
    config: Config = _measured_config(kernel, default, tuple(found.items()))
    return default if (kernel, config) in _refused else config


@functools.lru_cache(maxsize=4096)
def _measured_launch(
    kernel: str, device: torch.device, dtype: torch.dtype, size: tuple[int, ...], exactly: bool
) -> dict[str, Any] | None:
    """What was measured to be faster of a launch configuration's fields; None if nothing was."""
    found = _nearest(f"launch_{kernel}", device, dtype, size)
    return None if found is None or (exactly and found.size != size) else found.config or None


def run(
    kernel: str,
    x: torch.Tensor,
    size: tuple[int, ...],
    default: Config,
    call: Callable[[Config], Result],
    *,
    exactly: bool,
) -> Result:
    """``call`` with the configuration of :func:`launch`; with the default, after one warning, where it fails.

    A configuration can be in the range of each field and still ask for more shared memory or registers than the device
    has.
    """
    if not _overridden.get() and _measured_launch(kernel, x.device, x.dtype, size, exactly) is None:
        return call(default)
    config = launch(kernel, x, size, default, exactly=exactly)
    if config is default or kernel in _trying.get():  # who tries one wants to know that it fails
        return call(config)
    try:
        return call(config)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    result = call(default)  # an error of its own if it isn't the configuration that was wrong
    _refused.add((kernel, config))
    _warn(f"{kernel} couldn't be launched as measured, with {config} ({why})")
    return result


@functools.lru_cache(maxsize=4096)
def _measured_config(kernel: str, default: Any, changes: tuple[tuple[str, Any], ...]) -> Any:
    """The default with these fields changed, where that can't make a result wrong."""
    allowed = ranges(default)
    for name, value in changes:
        least, most = allowed.get(name, (1, 0))
        whole = type(value) is int and (name == "num_stages" or value.bit_count() == 1)
        if not (whole and least <= value <= most):
            _warn(f"{kernel} can't be launched with {name}={value!r}, as a measurement says")
            return default
    return replace(default, **dict(changes))


def ranges(config: Any) -> dict[str, tuple[int, int]]:
    """The least and the most of each field of a launch configuration that is measured; powers of two but the stages."""
    found = {
        "block_rows": (1, 64), "block_m": (16, 256), "block_n": (16, 256), "block_k": (32, 256),
        "num_warps": (1, 16), "num_stages": (1, 6), "programs_per_sm": (1, 16),
    }  # fmt: skip
    if hasattr(config, "block_rows"):
        del found["block_n"]  # a row's width, which is what it is
    return {name: limits for name, limits in found.items() if getattr(config, name, 0)}


@contextmanager
def override_config(kernel: str, config: Any) -> Iterator[None]:
    """Launch the kernel with this configuration inside, in this thread."""
    with _override(_trying, {**_trying.get(), kernel: config}):
        yield


def launches_of(kernel: str, call: Callable[[], object]) -> tuple[tuple[int, ...], Any] | None:
    """The size and the default configuration with which ``call`` launches the kernel; None if it doesn't."""
    launches: list[tuple[tuple[int, ...], Any]] = []
    with _override(_asked, {**_asked.get(), kernel: launches}):
        call()
    return launches[-1] if launches else None


@contextmanager
def disabled() -> Iterator[None]:
    """Use no measurement inside, in this thread."""
    with _override(_ignored, True):
        yield


_Tables = dict[tuple[str, str, torch.dtype], tuple[Timing, ...]]
_loaded: _Tables | None = None
_warned: set[str] = set()
_lock = threading.Lock()


def _tables() -> _Tables:
    global _loaded
    tables = _loaded
    if tables is not None:
        return tables
    with _lock:  # one thread reads, and warns
        if _loaded is not None:
            return _loaded
        tables, problems = _load()
        _loaded = tables  # before the warning, which may be an error: then of the first call alone
    if problems:
        _warn("; ".join(problems))
    return tables


def _load() -> tuple[_Tables, list[str]]:
    tables: _Tables = {}
    problems = []
    for folder, source in ((lambda: FOLDER, "shipped"), (user_folder, "measured here")):
        try:
            files = sorted(file for file in folder().iterdir() if file.suffix == ".json")
        except FileNotFoundError:
            continue  # nothing was measured
        except (OSError, RuntimeError) as error:
            problems.append(str(error))
            continue
        for file in files:
            try:
                for table in read(file):
                    key = file.stem, table["machine"], getattr(torch, table["dtype"])
                    tables[key] = tuple(
                        Timing(tuple(row["size"]), row["us"], source, row.get("config"))
                        for row in table["rows"]
                    )
            except (OSError, ValueError, MemoryError) as error:
                problems.append(str(error) or f"{file}: {type(error).__name__}")
    return tables, problems


def _warn(problem: str) -> None:
    """Warn of each problem once in a process, or since :func:`forget`."""
    if problem not in _warned:
        _warned.add(problem)
        warnings.warn(f"pyaccel goes on without these measurements: {problem}", stacklevel=2)


def write(file: Path, tables: Iterable[dict[str, Any]]) -> None:
    """Put tables into the file, each in the place of one of the same machine and dtype, and use them from now on.

    A file that isn't a table is kept beside it, under a name that ends in ``.broken``, with a warning: minutes of
    measuring aren't lost for it.

    Raises:
        OSError: it can't be written.
    """
    new = {(table["machine"], table["dtype"]): table for table in tables}
    try:
        kept = [table for table in read(file) if (table["machine"], table["dtype"]) not in new]
    except ValueError as error:
        broken = file.with_name(f"{file.name}.broken")
        file.replace(broken)
        warnings.warn(f"{error}. It is now {broken.name}, and a new table takes its place", stacklevel=2)
        kept = []
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")  # whoever reads now sees the old file or the new one
    try:
        part.write_text(json.dumps({"tables": [*kept, *new.values()]}, indent=1) + "\n", encoding="utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    forget()


def forget() -> None:
    """Read the files again at the next question."""
    global _loaded
    with _lock:
        _loaded = None
        _warned.clear()
        _refused.clear()
    for cached in (_nearest, _preferred, _measured_launch, _measured_config):
        cached.cache_clear()
