"""What attention's public functions share: autocast, errors, and the choice of a backend."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from pyaccel import dispatch, tuning
from pyaccel.ops.attention import triton as triton_backend
from pyaccel.ops.attention import varlen as torch_backend
from pyaccel.ops.common import autocast_dtype

SERVE_ALL: dict[str, list[str]] = {"triton": [], "torch": [], "reference": []}
Attention = TypeVar("Attention", bound=Callable[..., Any])
Result = TypeVar("Result", Tensor, "Tensor | tuple[Tensor, Tensor]")


def cast_under_autocast(*names: str) -> Callable[[Attention], Attention]:
    """Call the function with its first arguments, of these names, in autocast's dtype, and with autocast off."""

    def decorator(function: Attention) -> Attention:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            query = args[0] if args else kwargs.get("query")
            device = query.device if isinstance(query, Tensor) else torch.device("cpu")
            dtype = autocast_dtype(device)
            if dtype is None:
                return function(*args, **kwargs)
            count = len(names)
            args = (*(_to_autocast(x, dtype) for x in args[:count]), *args[count:])
            kwargs = {name: _to_autocast(x, dtype) if name in names else x for name, x in kwargs.items()}
            with torch.autocast(device.type, enabled=False):
                return function(*args, **kwargs)

        return cast(Attention, wrapper)

    return decorator


def _to_autocast(x: Any, dtype: torch.dtype) -> Any:
    narrows = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(dtype) if narrows else x


def refuse(op: str, reasons: list[str], query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise for ``reasons``, and for those of the Triton kernels beside them if they were asked for."""
    if dispatch.requested(op) == "triton" and all(isinstance(t, Tensor) for t in (query, key, value)):
        reasons = list(dict.fromkeys([*reasons, *triton_backend.not_supported_reasons(query, key, value)]))
    dispatch.invalid(op, reasons)


def choose(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    more_reasons: list[str] | None = None,
    *,
    seqlen: int | None = None,
    dropout_p: float = 0.0,
) -> str:
    """The backend.

    ``more_reasons`` are those for which Triton can't serve this very call; ``seqlen`` is the longest sequence's where
    a measurement may decide, as on a CPU ``dropout_p`` does.
    """
    on_cpu = query.device.type == "cpu"
    if on_cpu and dispatch.requested(op) != "triton":  # the reasons of the kernels are not needed
        why = "on the CPU"
        if op == "varlen_attention" and seqlen and dispatch.is_recording():
            training = torch_backend.records(query, key, value)
            how = torch_backend.why_on_host(query, seqlen, training=training, dropout_p=dropout_p)
            why = f"on the CPU, {how}"
        return dispatch.choose(op, SERVE_ALL, "torch", why).backend
    triton = triton_backend.not_supported_reasons(query, key, value) + (more_reasons or [])
    slow = triton_backend.slow_reason(query, value)
    measured: tuple[str | None, str] = ("torch", slow) if slow else (None, "")
    if seqlen and not slow:
        size = (seqlen, query.shape[1], query.shape[-1])
        measured = tuning.preferred(op, query.device, query.dtype, size, ("triton", "torch"))
    return dispatch.choose(op, {**SERVE_ALL, "triton": triton}, *measured).backend


def without_leading(result: Result, dims: int) -> Result:
    """The result without the leading dimensions of size 1 that query, key and value came without."""
    if not dims:
        return result
    first = (0,) * dims
    return (result[0][first], result[1][first]) if isinstance(result, tuple) else result[first]


def lengths_of(name: str, cu_seqlens: Tensor, total: int, max_seqlen: int) -> list[int]:
    """Sequence lengths, from offsets that are checked on the way."""
    offsets = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(offsets)]
    longest = max(lengths, default=0)
    reasons = []
    if offsets[0] != 0 or min(lengths, default=0) < 0 or offsets[-1] > total:
        reasons.append(
            f"cu_seqlens_{name} must rise from 0 to at most the {total} tokens there are, got {offsets}"
        )
    if longest > max_seqlen:
        reasons.append(f"max_seqlen_{name} is {max_seqlen}, but a sequence has {longest} tokens")
    dispatch.invalid("varlen_attention", reasons)
    return lengths
