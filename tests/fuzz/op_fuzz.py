"""The lane of ops: each call on every backend, judged by the definition, by errors, by memory and by repetition."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import pyaccel
from pyaccel import ops
from pyaccel.errors import NotSupportedError
from pyaccel.ops.dropout import dropout_key
from pyaccel.verify.policy import MAX_EPS, MAX_RATIO, judge, judge_by_several, same_bits
from tests.fuzz import Tried
from tests.fuzz.draw import Draw
from tests.fuzz.op_cases import F64, OPS, Arguments, Call, Outputs
from tests.fuzz.op_errors import spoil

BACKENDS = ("torch", "triton", "reference")
# Of the cases: the interpreter takes a hundred times as long as the others.
BY_TRITON = 0.4
# Errors that the documentation names. RuntimeError alone isn't one: InvalidArgumentError is a ValueError too.
DOCUMENTED = (NotSupportedError, ValueError, TypeError, IndexError)
LOOKS = 12
DTYPES = {"codes": torch.int8, "scales": torch.float32}


@dataclass
class Ran:
    """What one backend made of a call: outputs and gradients by name, or an error."""

    outputs: Outputs = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    error: Exception | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        found = {f"the gradient of {n}": t for n, t in self.gradients.items() if t is not None}
        return self.outputs | found


def try_case(seed: int, case: int) -> Tried:
    draw = Draw("ops", seed, case)
    call = OPS[draw.pick(*OPS)][0](draw)
    if draw.chance(0.12):
        what = spoil(draw, call)
        tried = Tried(f"{call}, {what}")
        tried.wrong += errors_wrong(call, tried)
    else:
        tried = Tried(str(call))
        tried.wrong += Judged(draw, call, tried).wrong()
    tried.wrong += [f"{name} was modified, or the memory around it" for name in draw.modified()]
    return tried


def run(
    call: Call, backend: str, seed: int, upstream: dict[str, Tensor], tried: Tried, *, device: str = "cpu"
) -> Ran:
    given = dict(call.arguments)
    if device != "cpu":
        given = {n: on(device, v) for n, v in given.items()}
        upstream = {n: on(device, v) for n, v in upstream.items()}
    for name in call.wants:
        given[name] = given[name].detach().requires_grad_()
    torch.manual_seed(seed)
    tried.calls += 1
    try:
        with pyaccel.use_backend(backend):
            result = getattr(ops, call.op)(**given)
            outputs = OPS[call.op][2](call.arguments, result)
            gradients = {}
            if call.wants and upstream:
                found = [n for n in upstream if n in outputs]
                grads = torch.autograd.grad(
                    [outputs[n] for n in found],
                    [given[n] for n in call.wants],
                    [upstream[n] for n in found],
                    allow_unused=True,
                )
                gradients = dict(zip(call.wants, grads, strict=True))
    except Exception as error:  # whatever it is: what may come out is what is tried
        return Ran(error=error)
    return Ran(outputs, gradients)


def on(device: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def errors_wrong(call: Call, tried: Tried) -> list[str]:
    """A refused input is refused by all, with one kind of documented error; what one takes, all take."""
    wrong = []
    kinds: dict[str, str] = {}
    for backend in BACKENDS:
        ran = run(call, backend, 0, {}, tried)
        if ran.error is None:
            kinds[backend] = "taken"
        elif not isinstance(ran.error, DOCUMENTED):
            wrong.append(f"{backend}: {describe(ran.error)}, which isn't documented")
        elif not isinstance(ran.error, NotSupportedError):
            kinds[backend] = type(ran.error).__name__
            if len(str(ran.error)) < 10:
                wrong.append(f"{backend}: an error that says nothing: {describe(ran.error)}")
    if len(set(kinds.values())) > 1:
        wrong.append(f"backends don't agree on errors: {kinds}")
    return wrong


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


class Judged:
    """One valid call, and everything that must hold of it."""

    def __init__(self, draw: Draw, call: Call, tried: Tried) -> None:
        self.draw, self.call, self.tried = draw, call, tried
        self.seed = draw.random.getrandbits(40)
        self.backends = BACKENDS if draw.chance(BY_TRITON) else ("torch", "reference")
        self.key = None
        if call.dropout:
            torch.manual_seed(self.seed)
            self.key = dropout_key(torch.device("cpu"))
        self.naive = self.define(False, {})
        self.upstream = self.draw_upstream()
        self.naive |= self.define(False, self.upstream)
        self.truth = self.define(True, self.upstream)
        self.errors: list[dict[str, Tensor]] = []
        self.is_spoiled = not all(
            (value.isfinite() | (value == -math.inf if name == "attn_mask" else False)).all()
            for name, value in call.arguments.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        )

    def draw_upstream(self) -> dict[str, Tensor]:
        """Gradients of the floating outputs, in any strides; of one of two outputs, now and then, none."""
        if not self.call.wants:
            return {}
        names = [n for n in self.naive if n in ("output", "sum", "lse", "h")]
        if len(names) > 1 and self.draw.chance(0.3):
            names = [self.draw.pick(*names)]
        return {
            n: self.draw.tensor(f"the gradient of {n}", self.naive[n].shape, self.naive[n].dtype)
            for n in names
        }

    def define(self, upcast: bool, upstream: dict[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
        """Outputs and gradients by the definition, of floating inputs multiplied by ``factor``."""
        given: Arguments = dict(self.call.arguments)
        if factor != 1.0:
            for name, value in given.items():
                if isinstance(value, Tensor) and value.is_floating_point() and "scale" not in name:
                    given[name] = (value.detach() * factor).to(value.dtype)
        for name in self.call.wants:
            wide = given[name].double() if upcast else given[name].clone()
            given[name] = wide.detach().requires_grad_()
        outputs = OPS[self.call.op][1](given, upcast, self.key)
        found = [n for n in upstream if outputs[n].requires_grad]
        everything = {n: t.detach() for n, t in outputs.items()}
        if found:
            grads = torch.autograd.grad(
                [outputs[n] for n in found],
                [given[n] for n in self.call.wants],
                [upstream[n].to(outputs[n].dtype) for n in found],
                allow_unused=True,
            )
            for name, grad in zip(self.call.wants, grads, strict=True):
                everything[f"the gradient of {name}"] = (
                    torch.zeros_like(given[name]) if grad is None else grad
                )
        return everything

    def wrong(self) -> list[str]:
        faults: list[str] = []
        for backend in self.backends:
            ran = self.run(backend)
            if ran.error is not None:
                if not (backend == "triton" and isinstance(ran.error, NotSupportedError)):
                    faults.append(f"{backend}: {describe(ran.error)}")
                continue
            found = self.values_wrong(ran, backend) + memory_wrong(self.call, ran)
            if backend == "torch" or (backend == "triton" and self.draw.chance(0.3)):
                again = self.run(backend).tensors
                found += [
                    f"{n} differs in a second run"
                    for n, t in ran.tensors.items()
                    if not same_bits(t, again[n])
                ]
            if backend == "torch":
                found += self.meta_wrong(ran)
            faults += [f"{backend}: {what}" for what in found]
        return faults

    def run(self, backend: str, device: str = "cpu") -> Ran:
        return run(self.call, backend, self.seed, self.upstream, self.tried, device=device)

    def meta_wrong(self, ran: Ran) -> list[str]:
        meta = self.run("auto", device="meta")
        if meta.error is not None:
            return [f"on the meta device: {describe(meta.error)}"]
        found = []
        for name, tensor in ran.tensors.items():
            other = meta.tensors.get(name)
            if other is None:
                found.append(f"on the meta device {name} is missing")
            elif (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
                found.append(f"on the meta device {name} is {other.dtype} {tuple(other.shape)}")
        return found

    def values_wrong(self, ran: Ran, backend: str) -> list[str]:
        found = []
        given = {f"the gradient of {n}": self.call.arguments[n] for n in self.call.wants}
        random = self.call.dropout and backend == "torch" and self.call.arguments["dropout_p"] < 1.0
        for name, truth in self.truth.items():
            tensor = ran.tensors.get(name)
            naive = self.naive[name]
            if tensor is None:
                if name not in given or truth.any():
                    found.append(f"{name} is missing")
                continue
            dtype = given[name].dtype if name in given else DTYPES.get(name, naive.dtype)
            if tensor.shape != truth.shape or tensor.dtype != dtype:
                found.append(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {tuple(truth.shape)}"
                )
            elif random:
                plain = truth.isfinite().all() and naive.isfinite().all()
                if not tensor.isfinite().all() and plain and not self.is_spoiled:
                    found.append(f"{name} isn't finite")
            elif name.startswith("exact"):
                if not same_bits(one_nan(tensor), one_nan(naive)):
                    where = (tensor != naive).nonzero()[:1].tolist()
                    found.append(f"{name} doesn't have the definition's bits, first at {where}")
            elif name == "codes":
                found += codes_wrong(tensor, ran.outputs["scales"], truth, naive)
            elif not tensor.is_floating_point():
                found.append(f"{name} is {tensor.dtype}")
            elif what := self.value_wrong(name, tensor, truth, naive):
                found.append(f"{name}: {what}")
        return found

    def value_wrong(self, name: str, out: Tensor, truth: Tensor, naive: Tensor) -> str | None:
        out, naive = out.detach(), naive.to(out.dtype)
        if out.dtype == F64:  # the truth is fp64 itself, and rounded as much: judged as fp32 numbers
            out, naive = out.float(), naive.float()
        if self.may_be_nan():
            hidden = out.isnan()
            out, truth, naive = (t.masked_fill(hidden, 0.0) for t in (out, truth, naive))
        if what := classes_wrong(out, truth, naive):
            return what
        finite = truth.isfinite() & naive.isfinite() & out.isfinite()
        out, truth, naive = (t.masked_fill(~finite, 0.0) for t in (out, truth.double(), naive))
        verdict = judge(out, truth, naive)
        if verdict.passed:
            return None
        # One small result's error is one draw, and it may be 0 by luck: plain PyTorch's errors on like inputs count.
        naives = [naive]
        for look in range(LOOKS):
            error = self.error_of_like_inputs(look).get(name)
            if error is not None:
                naives.append((truth + error.masked_fill(~error.isfinite(), 0.0)).to(naive.dtype))
        verdict = judge_by_several(out, truth, naives)
        if verdict.passed:
            return None
        return f"{verdict}: got {out[verdict.worst].item():.9g}, truth {truth[verdict.worst].item():.9g}"

    def may_be_nan(self) -> bool:
        """Whether a result may show a NaN of the input that the definition hides, as PyTorch's own does.

        What was computed and then dropped: 0 * NaN is NaN. And in attention the NaN of a key that some query attends
        to, which the definition shows in that query's results: it reaches the others' too. What no query attends to
        shows nowhere in the definition, and must show nowhere.
        """
        if self.call.dropout or not self.is_spoiled:
            return self.is_spoiled
        return "attention" in self.call.op and any(t.isnan().any() for t in self.truth.values())

    def error_of_like_inputs(self, look: int) -> dict[str, Tensor]:
        """What plain PyTorch's results are off by, of the same call with all values scaled by one number."""
        if look == 0 and self.call.op in ("scaled_dot_product_attention", "varlen_attention"):
            return self.error_of_rounded_output()
        while len(self.errors) <= look:
            factor = 1.0 - 0.37 * self.draw.random.random()
            naive = self.define(False, self.upstream, factor)
            truth = self.define(True, self.upstream, factor)
            self.errors.append({n: naive[n].double() - truth[n].double() for n in truth})
        return self.errors[look]

    def error_of_rounded_output(self) -> dict[str, Tensor]:
        """What attention's gradients are off by where the backward reads the output that was rounded.

        So do flash-attention and PyTorch's own kernels: the sum over keys of ``p * dp`` is ``output @ dout``. An
        error in it acts as a gradient of the LSE does. Of a row with one key the exact gradient is 0, and so is
        plain PyTorch's.
        """
        if "output" not in self.upstream:
            return {}
        given = self.call.arguments
        dout, out = self.upstream["output"].double(), self.truth["output"].double()
        error = torch.finfo(self.upstream["output"].dtype).eps * (out * dout).abs().sum(-1)
        if self.call.op == "varlen_attention":
            error = error.T
        self.call.arguments = given | {"return_lse": True}
        try:
            return self.define(True, {"lse": error})
        finally:
            self.call.arguments = given


def classes_wrong(out: Tensor, truth: Tensor, naive: Tensor) -> str | None:
    """NaN, the infinities and finite numbers are where the truth has them, or plain PyTorch in this dtype."""
    expected, plain, found = classes(truth.to(out.dtype)), classes(naive), classes(out)
    wrong = (found != expected) & (found != plain)
    if not wrong.any():
        return None
    at = tuple(wrong.nonzero()[0].tolist())
    got = f"first {out[at].item()} at {at} for {truth[at].item()}"
    return f"{int(wrong.sum())} of {wrong.numel()} values aren't of their kind, {got}"


def one_nan(x: Tensor) -> Tensor:
    """x with the same bits in every NaN: whose sign an operation gives is its own affair."""
    return x.masked_fill(x.isnan(), math.nan) if x.is_floating_point() else x


def classes(x: Tensor) -> Tensor:
    kinds = x.isnan().to(torch.int8)
    return kinds + 2 * (x == math.inf).to(torch.int8) + 3 * (x == -math.inf).to(torch.int8)


def codes_wrong(found: Tensor, scales: Tensor, truth: Tensor, naive: Tensor) -> list[str]:
    """int8 codes are what their scales say, within half a step and what the policy allows the values."""
    if found.dtype != torch.int8:
        return [f"codes are {found.dtype}"]
    if not found.numel():
        return []
    step = scales.double().unsqueeze(-1)
    eps = torch.finfo(torch.float32).eps
    error = (naive.double() - truth).abs().amax(-1, keepdim=True)
    allowed = 0.501 * step + MAX_RATIO * error + MAX_EPS * eps * truth.abs().amax(-1, keepdim=True)
    off = (found.double() * step - truth).abs() - allowed
    if (off > 0).any():  # never of NaN: what can't be quantized has a scale that says so
        return [f"codes are off by {(off / step).max().item():.3g} more than allowed"]
    return []


def memory_wrong(call: Call, ran: Ran) -> list[str]:
    """No result lies in an input's memory or in another result's, or overlaps itself."""
    found = []
    owners: dict[int, str] = {}
    for name, value in call.arguments.items():
        if isinstance(value, Tensor) and value.numel():
            owners[value.untyped_storage().data_ptr()] = name
    for name, tensor in ran.tensors.items():
        if not tensor.numel():
            continue
        overlaps = (
            stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        )
        if name in ran.outputs and any(overlaps):
            found.append(f"{name} is expanded: strides {tuple(tensor.stride())}")
        address = tensor.untyped_storage().data_ptr()
        if address in owners:
            found.append(f"{name} shares its memory with {owners[address]}")
        owners[address] = name
    return found
