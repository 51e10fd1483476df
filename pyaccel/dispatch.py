"""Which backend serves a call, and why.

Every op of :mod:`pyaccel.ops` has up to three backends:

``"triton"``
    the fused kernels of :mod:`pyaccel.kernels`;
``"torch"``
    well-chosen stock PyTorch ops, on any device;
``"reference"``
    the plain definition in :mod:`pyaccel.reference`; never chosen unless it is asked for.

By default the fastest backend that can serve a call does. :func:`use_backend` asks for one by name, and then
it is used or :class:`NotSupportedError` says why it can't be. :func:`record` shows what was chosen.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

BACKENDS = ("triton", "torch", "reference")


class NotSupportedError(RuntimeError):
    """A backend that was asked for by name can't serve the call; the message names every reason."""


class InvalidArgumentError(ValueError, RuntimeError):
    """Arguments that no backend can make sense of; the message names every reason.

    A ``ValueError``, and a ``RuntimeError`` too: that is what PyTorch's own functions raise for bad input, and code
    that catches it from them must catch it from what replaces them one for one.
    """


@dataclass(frozen=True)
class Choice:
    """The backend that serves a call of ``op``, and why it and no other."""

    op: str
    backend: str
    reason: str


# Process-wide, as torch.backends' flags are: op name -> backend, and "" -> the backend of every other op.
_requested: dict[str, str] = {}
_recorder: list[Choice] | None = None


class use_backend:
    """Ask for one backend by name, at once and process-wide; as a context manager, until its end.

    Args:
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or ``"auto"`` for pyaccel's own choice.
        ops: names of the ops it is for, such as ``["residual_layernorm"]``; every op by default.

    A later request for every op replaces earlier ones for single ops.

    Example::

        with pyaccel.use_backend("reference"):
            expected = model(**batch)
    """

    def __init__(self, backend: str, *, ops: Iterable[str] | None = None) -> None:
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}: expected 'auto' or one of {', '.join(BACKENDS)}")
        if isinstance(ops, str):
            raise TypeError(f"ops must be a list of op names, not the string {ops!r}: write ops=[{ops!r}]")
        names = [""] if ops is None else list(ops)
        unknown = sorted(set(names) - {""} - set(op_names()))
        if unknown:
            raise ValueError(f"unknown ops {unknown}: expected some of {list(op_names())}")
        self._previous = dict(_requested)
        if ops is None:
            _requested.clear()
        _requested.update(dict.fromkeys(names, backend))

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc_info: object) -> None:
        _requested.clear()
        _requested.update(self._previous)


def requested(op: str) -> str:
    """The backend asked for by :func:`use_backend` for ``op``, or ``"auto"``."""
    return _requested.get(op, _requested.get("", "auto"))


def requests() -> tuple[tuple[str, str], ...]:
    """All that :func:`use_backend` asks for now: equal where the same is asked for."""
    return tuple(sorted(_requested.items()))


def is_recording() -> bool:
    """Whether somebody collects what is chosen, and why."""
    return _recorder is not None and not torch.compiler.is_compiling()


def nobody_asks(ops: Iterable[str]) -> bool:
    """Whether, on a CPU, each of these ops is served as by default, and nobody records by whom."""
    if _recorder is not None or interpreting():
        return False
    return not _requested or all(requested(op) in ("auto", "torch") for op in ops)


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
        preferred: the backend a measurement favours for this call, if any; it is used if it can serve.
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
                f"Change that, or let pyaccel choose: pyaccel.use_backend('auto')."
            )
        return _note(Choice(op, name, "asked for by use_backend"))
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
    if _recorder is not None and not torch.compiler.is_compiling():
        _recorder.append(choice)
    return choice


@contextmanager
def record() -> Iterator[list[Choice]]:
    """Collect the :class:`Choice` of every call made inside, in order."""
    global _recorder
    outer, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        if outer is not None:
            outer.extend(_recorder)
        _recorder = outer


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


_HAS_TRITON = importlib.util.find_spec("triton") is not None  # found without importing it


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_MODES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def on_host(x: torch.Tensor) -> bool:
    """Whether a value of ``x`` may be read: it costs no device sync, and nothing records or transforms the call.

    False in a graph (``torch.compile``, ``torch.export``, ``torch.jit.trace``, ``make_fx``), which would keep what the
    value was; under a ``torch.func`` transform, and for fake tensors and other subclasses, which may hold no value.
    """
    return x.is_cpu and not torch.compiler.is_compiling() and type(x) in _PLAIN and not _recorded()


def _recorded() -> bool:
    if torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in _MODES)


def has_triton() -> bool:
    """Whether triton is installed."""
    return _HAS_TRITON


def interpreting() -> bool:
    """Whether Triton kernels are to run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def triton_reasons(*tensors: torch.Tensor | None) -> list[str]:
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
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in given if t.dtype not in TRITON_DTYPES})
    if dtypes:
        reasons.append(f"the kernels take float32, float16 and bfloat16, not {', '.join(dtypes)}")
    return reasons


def invalid(op: str, reasons: Sequence[str]) -> None:
    """Raise one :class:`InvalidArgumentError` that names every reason why the arguments of ``op`` make no sense."""
    if reasons:
        raise InvalidArgumentError(f"pyaccel.ops.{op}: {'; '.join(reasons)}")
