"""Every op by itself, on inputs that break careless code: values, gradients and bits, beside its reference.

An :class:`OpCase` is one op with one kind of input; :func:`cases` has them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyaccel import dispatch
from pyaccel.errors import NotSupportedError
from pyaccel.verify.op_case import OpCase, Tensors
from pyaccel.verify.op_cases import cases
from pyaccel.verify.policy import same_bits
from pyaccel.verify.report import ERROR, FAILED, PASSED, Check, compare


def check_ops(
    dtype: torch.dtype, backend: str, device: torch.device, dtype_name: str, notes: list[str]
) -> Iterator[Check]:
    """Every op by ``backend``: output and gradients by the policy (int8: bits), and the same bits twice.

    What that backend can't serve is left out, and said in ``notes``.
    """
    for case in cases():
        try:
            yield check_op(case, dtype, backend, device, dtype_name)
        except NotSupportedError as error:
            notes.append(f"{dtype_name}, {backend}: not checked: {case.op}: {case.kind}: {error}")


def check_op(case: OpCase, dtype: torch.dtype, backend: str, device: torch.device, dtype_name: str) -> Check:
    """One case: its output or the gradient that is worst, by the policy.

    Raises :class:`pyaccel.errors.NotSupportedError` where the backend can't serve it.
    """
    names: dict[str, Any] = {
        "kind": "op",
        "where": f"{case.op}: {case.kind}",
        "op": case.op,
        "dtype": dtype_name,
        "backend": backend,
        "mode": "",
    }
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        inputs = {name: _cast(x, dtype, device) for name, x in case.inputs().items()}
        gradient = None
        if not case.bits:
            gradient = case.gradient(case.expected(inputs, upcast=False))
    try:
        with dispatch.use_backend(backend):
            if gradient is None:
                return _check_bits(case, inputs, names)
            result, again = (_run(case.call, inputs, gradient) for _ in range(2))
    except NotSupportedError:
        raise
    except Exception as error:  # whatever an op raises on valid input is the finding
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Check(**names, status=ERROR, detail=f"{type(error).__name__}: {first}")
    doubles = {name: x.double() for name, x in inputs.items()}
    truth = _run(partial(case.expected, upcast=True), doubles, gradient)
    naive = _run(partial(case.expected, upcast=False), inputs, gradient)
    checks = []
    for name, out in result.items():
        if not same_bits(out, again[name]):
            return Check(**names, status=FAILED, detail=f"{name}: two runs differ in their bits")
        check = compare(out, truth[name], naive[name], **names)
        if check.status == FAILED:
            return replace(check, detail=f"{name}: {check.detail}")
        checks.append(check)
    return max(checks, key=lambda check: check.share)


def _cast(x: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``x`` in another dtype and with the same strides, gaps and all."""
    given = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device)
    return given.copy_(x)


def _run(call: Callable[[Tensors], Tensor], inputs: Tensors, gradient: Tensor) -> Tensors:
    """Output and gradients of all inputs; ``gradient`` is of the output."""
    leaves = {name: x.detach().requires_grad_(True) for name, x in inputs.items()}
    out = call(leaves)
    found = torch.autograd.grad(out, list(leaves.values()), gradient.to(out.dtype), allow_unused=True)
    gradients = {
        f"gradient of {name}": torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }
    return {"output": out.detach(), **gradients}


def _check_bits(case: OpCase, inputs: Tensors, names: dict[str, Any]) -> Check:
    given, again, expected = case.call(inputs), case.call(inputs), case.expected(inputs)
    for i, (out, twice, right) in enumerate(zip(given, again, expected, strict=True)):
        if not same_bits(out, right):
            return Check(**names, status=FAILED, detail=f"output {i}: its bits are not the reference's")
        if not same_bits(out, twice):
            return Check(**names, status=FAILED, detail=f"output {i}: two runs differ in their bits")
    return Check(**names, status=PASSED)
