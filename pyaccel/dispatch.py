"""Which backend serves a call, and why.

Every op of :mod:`pyaccel.ops` has up to three backends:

``"triton"``
    the fused kernels of :mod:`pyaccel.kernels`;
``"torch"``
    well-chosen stock PyTorch ops, on any device;
``"reference"``
    the plain definition in :mod:`pyaccel.reference`; never chosen unless it is asked for.

By default the fastest backend that can serve a call does. :func:`use_backend` asks for one by name in a ``with`` block
of this thread or asyncio task, :func:`set_backend` for the whole process; then it is used or :exc:`.NotSupportedError`
says why it can't be. :func:`record` shows what was chosen, :func:`observe` what the ops gave.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch

from pyaccel import triton_support
from pyaccel.errors import InvalidArgumentError, NotSupportedError

BACKENDS = ("triton", "torch", "reference")

Observer = Callable[[str, Any], object]
_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Choice:
    """The backend that serves a call of ``op``, and why it and no other."""

    op: str
    backend: str
    reason: str


# What `set_backend` asks for, process-wide: op name -> backend, and "" -> the backend of every other op.
_requested: dict[str, str] = {}
# The `use_backend` blocks that this thread or asyncio task is in, the innermost last.
_scopes: ContextVar[tuple[use_backend, ...]] = ContextVar("pyaccel_backend", default=())
_recorders: ContextVar[tuple[list[Choice], ...]] = ContextVar("pyaccel_recorders", default=())
_observers: ContextVar[tuple[Observer, ...]] = ContextVar("pyaccel_observers", default=())
# The `observe` blocks of all threads: while there is none, an op looks at this number and at nothing else.
_observing = 0
_lock = threading.Lock()

# TorchDynamo can't trace a ContextVar. Blocks entered in a function that it traces are noted here while it traces, and
# what is asked for around that function it reads as an attribute of this module, which `__getattr__` makes: so the
# compiled function is guarded by its value, and compiled again when another backend is asked for.
_traced: tuple[use_backend, ...] = ()
_this: Any = sys.modules[__name__]


def __getattr__(name: str) -> Any:
    if name == "_around_the_trace":
        return overrides()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class use_backend:
    """Ask for one backend by name inside a ``with`` block, in this thread or asyncio task alone.

    Blocks nest, and the innermost that names an op decides. Outside of a ``with`` statement this changes nothing:
    :func:`set_backend` is for the whole process.

    Args:
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or ``"auto"`` for pyaccel's own choice.
        ops: names of the ops it is for, such as ``["residual_layernorm"]``; every op by default.

    Raises:
        ValueError: an unknown backend or op.
        TypeError: ``ops`` is a string.

    Example::

        with pyaccel.use_backend("reference"):
            expected = model(**batch)
    """

    _unused = False

    def __init__(self, backend: str, *, ops: Iterable[str] | None = None) -> None:
        self.asked = _checked(backend, ops)
        self._unused = True

    def __enter__(self) -> use_backend:
        self._unused = False
        if torch.compiler.is_dynamo_compiling():
            global _traced
            _traced = (*_traced, self)
        else:
            _scopes.set((*_scopes.get(), self))
        return self

    def __exit__(self, *exc_info: object) -> None:
        if torch.compiler.is_dynamo_compiling():
            global _traced
            _traced = _traced[:-1]
        else:
            _scopes.set(_without(self, _scopes.get()))

    def __del__(self) -> None:
        if self._unused:
            warnings.warn(
                "a pyaccel.use_backend(...) was never entered and had no effect: write "
                "`with pyaccel.use_backend(...):`, or pyaccel.set_backend(...) for the whole process",
                stacklevel=2,
            )


def _without(scope: use_backend, scopes: tuple[use_backend, ...]) -> tuple[use_backend, ...]:
    """Its innermost entry removed, whichever blocks were entered since; none where it was entered elsewhere."""
    for i in reversed(range(len(scopes))):
        if scopes[i] is scope:
            return scopes[:i] + scopes[i + 1 :]
    return scopes


def set_backend(backend: str, *, ops: Iterable[str] | None = None) -> None:
    """Ask for one backend by name, for the whole process and until the next call; ``use_backend`` blocks override it.

    A request for every op replaces earlier ones for single ops. Arguments and errors are those of :func:`use_backend`.
    """
    global _requested
    asked = _checked(backend, ops)
    _requested = asked if ops is None else {**_requested, **asked}


def _checked(backend: str, ops: Iterable[str] | None) -> dict[str, str]:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: expected 'auto' or one of {', '.join(BACKENDS)}")
    if ops is None:
        return {"": backend}
    if isinstance(ops, str):
        raise TypeError(f"ops must be a list of op names, not the string {ops!r}: write ops=[{ops!r}]")
    names = list(ops)
    unknown = sorted(set(names) - set(op_names()))
    if unknown:
        raise ValueError(f"unknown ops {unknown}: expected some of {list(op_names())}")
    return dict.fromkeys(names, backend)


def requested(op: str) -> str:
    """The backend asked for by :func:`use_backend` or :func:`set_backend` for ``op``, or ``"auto"``."""
    rest: dict[str, str]
    if torch.compiler.is_dynamo_compiling():
        scopes, rest = _traced, dict(_this._around_the_trace)
    else:
        scopes, rest = _scopes.get(), _requested
    for scope in reversed(scopes):
        found = scope.asked.get(op, scope.asked.get(""))
        if found is not None:
            return found
    return rest.get(op) or rest.get("", "auto")


def overrides() -> tuple[tuple[str, str], ...]:
    """All that is asked for now, as sorted pairs of op and backend; "" stands for every other op.

    Equal where the same is asked for, and empty where nothing is. :class:`use_overrides` asks for the same elsewhere.
    """
    if torch.compiler.is_dynamo_compiling():
        scopes, asked = _traced, dict(_this._around_the_trace)
    else:
        scopes, asked = _scopes.get(), _requested
    for scope in scopes:
        asked = scope.asked if "" in scope.asked else {**asked, **scope.asked}
    rest = asked.get("", "auto")
    return tuple(sorted((op, name) for op, name in asked.items() if name != (rest if op else "auto")))


class use_overrides(use_backend):
    """Ask inside a ``with`` block for what :func:`overrides` gave, and for nothing else.

    For a backward: autograd runs it in another thread on a GPU, and perhaps long after the block around the forward
    has ended. ``ctx.overrides = dispatch.overrides()`` in the forward,
    ``with dispatch.use_overrides(ctx.overrides):`` in the backward.
    """

    def __init__(self, asked: Iterable[tuple[str, str]]) -> None:
        self.asked = {"": "auto", **dict(asked)}


def is_recording() -> bool:
    """Whether the choices of this thread or asyncio task are recorded, or its ops observed."""
    return not torch.compiler.is_compiling() and bool(_recorders.get() or (_observing and _observers.get()))


def is_default(ops: Iterable[str]) -> bool:
    """Whether, on a CPU, these ops are served as by default: no override, no recorder and no observer is active."""
    if is_recording() or triton_support.interpreting():
        return False
    if not _requested and not _scopes.get():
        return True
    return all(requested(op) in ("auto", "torch") for op in ops)


def op_names() -> tuple[str, ...]:
    """The names of the ops that dispatch."""
    return (
        "residual_layernorm",
        "linear_activation",
        "scaled_dot_product_attention",
        "varlen_attention",
        "attention_probs",
        "quantize_per_token",
        "quantize_per_token_with_offset",
        "quantize_per_channel",
        "quantize_per_tensor",
        "int8_matmul",
        "int8_weight_only_matmul",
        "bert_embeddings",
        "masked_lm_cross_entropy",
        "bias_gelu",
    )


def choose(
    op: str, reasons: Mapping[str, Sequence[str]], preferred: str | None = None, why: str = ""
) -> Choice:
    """Choose the backend of one call.

    Args:
        op: the op's name.
        reasons: for each backend that implements the op, why it can't serve this call; empty if it can.
        preferred: the backend a measurement favors for this call, if any; it is used if it can serve.
        why: that measurement, in words.

    Raises:
        NotSupportedError: the backend asked for can't serve the call, or no backend can.
    """
    name = requested(op)
    if name != "auto":
        if name not in reasons:
            raise NotSupportedError(
                f"pyaccel.ops.{op}: backend {name!r} was asked for, but this op has no {name} implementation; "
                f"it has {', '.join(reasons)}. Ask for one of these or 'auto' with "
                f"pyaccel.use_backend(..., ops=[{op!r}])."
            )
        if reasons[name]:
            raise NotSupportedError(
                f"pyaccel.ops.{op}: backend {name!r} was asked for, but {'; '.join(reasons[name])}. "
                f"Change that, or let pyaccel choose: `with pyaccel.use_backend('auto'):`."
            )
        return _note(Choice(op, name, "asked for by use_backend or set_backend"))
    if preferred is not None and preferred in reasons and not reasons[preferred]:
        return _note(Choice(op, preferred, why))
    passed_over = []
    for backend in ("triton", "torch"):
        if backend not in reasons:
            passed_over.append(f"{backend}: no implementation yet")
        elif reasons[backend]:
            passed_over.append(f"{backend}: {'; '.join(reasons[backend])}")
        else:
            return _note(Choice(op, backend, ", ".join(passed_over) or "the fastest that serves this call"))
    raise NotSupportedError(f"pyaccel.ops.{op}: no backend can serve this call: {'; '.join(passed_over)}")


def _note(choice: Choice) -> Choice:
    # A compiled graph chooses once, while it is traced; appending there would be a side effect in the graph.
    if not torch.compiler.is_compiling():
        for recorder in _recorders.get():
            recorder.append(choice)
    return choice


@contextmanager
def record() -> Iterator[list[Choice]]:
    """Collect the :class:`Choice` of every call made inside, in order, by this thread or asyncio task.

    A backward on a GPU runs in a thread of autograd's and is not recorded, nor is a compiled function.
    """
    choices: list[Choice] = []
    if torch.compiler.is_dynamo_compiling():
        yield choices
        return
    _recorders.set((*_recorders.get(), choices))
    try:
        yield choices
    finally:
        _recorders.set(tuple(each for each in _recorders.get() if each is not choices))


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Call ``observer(name, result)`` after every public op that this thread or asyncio task calls inside.

    Accelerated models also tell of ``"layout"``, the :class:`pyaccel.packing.PackedLayout` of a padded batch. They call
    public ops alone while they are observed. What a compiled function or a backward calls is not told.
    """
    global _observing
    if torch.compiler.is_dynamo_compiling():
        yield
        return
    entry = functools.partial(observer)  # of this block alone, where blocks of one observer nest
    with _lock:
        _observing += 1
    _observers.set((*_observers.get(), entry))
    try:
        yield
    finally:
        _observers.set(tuple(each for each in _observers.get() if each is not entry))
        with _lock:
            _observing -= 1


def tell(name: str, result: object) -> None:
    """Tell the observers of this thread or asyncio task, if there are any."""
    if _observing and not torch.compiler.is_compiling():
        for observer in _observers.get():
            observer(name, result)


def observable(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """A public op whose results :func:`observe` tells of."""

    @functools.wraps(function)
    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        result = function(*args, **kwargs)
        if _observing:
            tell(function.__name__, result)
        return result

    return call


def summary(choices: Iterable[Choice]) -> dict[str, Choice]:
    """One :class:`Choice` for each op; where calls of one op differ, their backends and reasons are all named."""
    by_op: dict[str, list[Choice]] = {}
    for choice in dict.fromkeys(choices):
        by_op.setdefault(choice.op, []).append(choice)
    return {
        op: Choice(
            op,
            ", ".join(dict.fromkeys(choice.backend for choice in same)),
            "; or ".join(dict.fromkeys(choice.reason for choice in same)),
        )
        for op, same in by_op.items()
    }


def invalid(op: str, reasons: Sequence[str]) -> None:
    """Raise one :class:`InvalidArgumentError` that names every reason why the arguments of ``op`` make no sense."""
    if reasons:
        raise InvalidArgumentError(f"pyaccel.ops.{op}: {'; '.join(reasons)}")
