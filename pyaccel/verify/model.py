"""``verify(model, batch)``: is the fast path right on this model, with this batch, on this machine?

Three models are compared: the stock one in fp64, which is the truth; the stock one in the dtype asked for, which shows
the error that plain PyTorch makes; and an accelerated one in that dtype. All have the same weights, rounded to it. The
policy is :mod:`pyaccel.verify.policy`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyaccel import dispatch, machine, triton_support
from pyaccel.dtypes import DTYPES
from pyaccel.hf.report import Report
from pyaccel.verify.op_checks import check_ops
from pyaccel.verify.policy import RunningMoments, judge_random, same_bits
from pyaccel.verify.report import ERROR, FAILED, PASSED, Check, VerifyReport, compare
from pyaccel.verify.trace import SITES, Trace, layout_reason, trace_accelerated, trace_stock
from pyaccel.verify.truth import Trained, Truth, joined, views_of, without_dropout

DROPOUT_RUNS = 32


DROPOUT_SLOTS = 1024  # of batch and sequence, in each of these runs


DROPOUT_TOKENS = 128  # whose values are kept; of a shorter batch, copies are run until there are as many


DROPOUT_COPIES = 8 * DROPOUT_SLOTS  # slots of such copies at most


DROPOUT_LEAST = 64  # of fewer tokens, means and spread differ by more than allowed by chance


OnCheck = Callable[[Check], None]


def able_backends(device: torch.device) -> list[str]:
    """The backends that can serve a whole model on ``device``: Triton's interpreter can't in any useful time."""
    triton = device.type == "cuda" and triton_support.has_triton()
    return ["triton", "torch", "reference"] if triton else ["torch", "reference"]


def verify(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    dtypes: Sequence[str] = ("fp32",),
    backends: Sequence[str] | None = None,
    compiled: bool = True,
    ops: bool = True,
    on_check: OnCheck | None = None,
) -> VerifyReport:
    """Compare an accelerated copy of a Hugging Face model with the model itself; ``model`` is left as it is.

    Checked are, for each dtype and backend: every op on inputs that break careless code; the packed layout; every part
    of every layer, in the order in which they run; every output, the loss and every parameter's gradient, packed,
    padded and compiled; the mean of every part of every layer under dropout; and that two runs give the same bits.

    Args:
        model: a stock model that :func:`pyaccel.accelerate` takes, on any device.
        batch: what it is called with, on its device: padded ``[batch, seq]`` tensors. With ``labels`` there is a loss,
            whose gradients are compared; without, those of a weighted sum of the outputs.
        dtypes: of ``"fp32"``, ``"bf16"`` and ``"fp16"``: the weights are cast to each in turn.
        backends: of ``"triton"``, ``"torch"`` and ``"reference"``; by default all that can serve the model here.
        compiled: also under ``torch.compile(fullgraph=True)``, which takes a minute or so for each dtype on a CPU.
        ops: also every op by itself, on small inputs.
        on_check: called with each check as it is done.

    Raises:
        ValueError: unknown dtypes or backends, a batch without tokens, or a model that is accelerated or can't be.
        ImportError: transformers isn't installed.
        pyaccel.errors.NotSupportedError: a backend that was asked for can't serve the model here.
    """
    unknown = [name for name in dtypes if name not in DTYPES]
    if unknown or not dtypes:
        raise ValueError(f"unknown dtypes {unknown}: give some of {', '.join(DTYPES)}")
    mask = _real_tokens(batch)
    device = mask.device
    if any("_pyaccel" in module.__dict__ for module in model.modules()):
        raise ValueError(
            "the model is accelerated: give the stock one (pyaccel.restore), verify makes its own copy"
        )
    backends = able_backends(device) if backends is None else backends
    wrong = [name for name in backends if name not in dispatch.BACKENDS]
    if wrong or not backends:
        raise ValueError(f"unknown backends {wrong}: give some of {', '.join(dispatch.BACKENDS)}")

    report = VerifyReport(
        f"{type(model).__name__}, batch {list(mask.shape)}",
        {"device": machine.kind(device), **machine.versions()},
    )
    report.notes += _backend_notes(backends, device)

    def add(checks: Iterable[Check]) -> None:
        for check in checks:
            report.checks.append(check)
            if on_check is not None:
                on_check(check)

    for dtype in dtypes:
        if ops:
            for backend in dict.fromkeys([*backends, *_interpreted(backends, device)]):
                add(check_ops(DTYPES[dtype], backend, device, dtype, report.notes))
        truth = Truth(model, dict(batch), mask, dtype)
        for backend in backends:
            add(_Verification(truth, backend, report.notes).checks(compiled=compiled))
    return report


def _interpreted(backends: Sequence[str], device: torch.device) -> list[str]:
    """Triton, for the ops alone, where its interpreter is on."""
    return (
        ["triton"]
        if device.type == "cpu" and triton_support.interpreting() and triton_support.has_triton()
        else []
    )


def _backend_notes(backends: Sequence[str], device: torch.device) -> list[str]:
    if "triton" in backends or _interpreted(backends, device):
        return []
    why = (
        "triton isn't installed"
        if not triton_support.has_triton()
        else f"the model is on {device.type}, not on a GPU"
    )
    return [f"the Triton kernels were not run: {why}"]


def _real_tokens(batch: Mapping[str, Any]) -> Tensor:
    """bool ``[batch, seq]``: where the attention mask is nonzero."""
    inputs = batch.get("input_ids", batch.get("inputs_embeds"))
    if not isinstance(inputs, Tensor) or "cu_seq_lens_q" in batch:
        raise ValueError("the batch must have input_ids (or inputs_embeds) as padded [batch, seq] tensors")
    shape = inputs.shape[:-1] if "input_ids" not in batch else inputs.shape
    mask = batch.get("attention_mask")
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=inputs.device)
    if mask.shape != shape:
        raise ValueError(f"attention_mask must be {tuple(shape)}, as the input is, got {tuple(mask.shape)}")
    mask = mask.reshape(-1, shape[-1]).bool()  # multiple choice has [batch, choices, seq]
    if not mask.any():
        raise ValueError("the batch has no token: every entry of attention_mask is 0")
    return mask


class _Verification:
    """All checks of one dtype and backend."""

    def __init__(self, truth: Truth, backend: str, notes: list[str]) -> None:
        self.truth, self.backend, self.notes = truth, backend, notes

    def checks(self, *, compiled: bool) -> Iterable[Check]:
        for mode in ("packed", "padded"):
            model, calls = self._accelerated(packing=mode == "packed")
            yield from self._inside(model, mode)
            yield from self._outside(model, mode)
            yield from self._dropout(model, mode)
            for reason, count in calls.refused[
                "padded"
            ].items():  # right, and yet not what was to be verified
                self.notes.append(
                    f"{self.truth.dtype}, {self.backend}, {mode}: {count} layer calls ran the stock layer: {reason}"
                )
            for reason in calls.refused["packed"] if mode == "packed" else ():
                self.notes.append(f"{self.truth.dtype}, {self.backend}: padding was kept: {reason}")
        if compiled and self.backend != "reference":
            yield from self._compiled()

    def _accelerated(self, *, packing: bool = True) -> tuple[Any, Report]:
        """An accelerated copy of the model, and what counts its calls."""
        from pyaccel.hf import accelerate

        model = copy.deepcopy(self.truth.stock)
        return model, accelerate(model, packing=packing, backend=self.backend)

    def _names(self, kind: str, where: str, mode: str, op: str = "") -> dict[str, Any]:
        truth = self.truth
        return {
            "kind": kind,
            "where": where,
            "op": op,
            "dtype": truth.dtype,
            "backend": self.backend,
            "mode": mode,
        }

    def _inside(self, model: Any, mode: str) -> Iterable[Check]:
        """Layer by layer and part by part, in the order in which they run."""
        truth = self.truth
        with trace_accelerated(truth.mask) as trace:
            truth.evaluate(model)
        for tokens in trace.layouts[:1]:
            reason = layout_reason(tokens, truth.mask)
            yield Check(
                **self._names("packing", "the packed layout", mode, "packing"),
                status=PASSED if reason is None else FAILED,
                detail=reason or "",
            )
        if [list(layer) for layer in trace.layers] != [list(layer) for layer in truth.trace.layers]:
            self.notes.append(
                f"{truth.dtype}, {self.backend}, {mode}: layers could not be compared part by part, because they run "
                "other ops than BERT's five parts; outputs and gradients were"
            )
            return
        for i, layer in enumerate(trace.layers):
            for site in SITES:
                yield compare(
                    layer[site],
                    truth.trace.layers[i][site],
                    truth.naive_trace.layers[i][site],
                    **self._names("layer", f"{i}: {site}", mode, trace.ops[i][site]),
                )

    def _outside(
        self, model: Any, mode: str, call: Callable[..., Any] | None = None, *, twice: bool = True
    ) -> Iterable[Check]:
        """Outputs, loss and gradients, and that they come out the same twice."""
        truth = self.truth
        outputs, trained = truth.evaluate(model, call), truth.train(model, call)
        if outputs.keys() != truth.outputs.keys():
            detail = f"{sorted(outputs)}, not {sorted(truth.outputs)}"
            yield Check(**self._names("output", "names of outputs", mode), status=FAILED, detail=detail)
            return
        for name, value in outputs.items():
            naive = truth.naive_outputs[name]
            yield compare(
                value.to(naive.dtype), truth.outputs[name], naive, **self._names("output", name, mode)
            )
        yield from self._loss(trained, mode)
        for group, members in truth.together.items():
            yield from self._gradient(
                group, [name for name in members if name in truth.trainable], trained, mode
            )
        if twice:
            again, trained_again = truth.evaluate(model, call), truth.train(model, call)
            same = _same(outputs, again) and _same(trained.gradients, trained_again.gradients)
            yield Check(
                **self._names("bits", "two runs", mode),
                status=PASSED if same else FAILED,
                detail="" if same else "two runs differ in their bits",
            )

    def _loss(self, trained: Trained, mode: str) -> Iterable[Check]:
        """The loss in training, which may go another way than in evaluation; beside the first output, as there."""
        truth = self.truth
        naive = truth.naive_trained[0].loss
        if trained.loss is None or truth.trained.loss is None or naive is None:
            return
        name = next(iter(name for name in truth.outputs if name != "loss"), None)
        if name is None:
            return
        plain, exact = truth.naive_outputs[name].flatten(), truth.outputs[name].flatten()
        yield compare(
            joined(trained.loss, plain),
            joined(truth.trained.loss, exact),
            joined(naive, plain),
            **self._names("output", "loss in training", mode),
        )

    def _gradient(self, group: str, members: list[str], trained: Trained, mode: str) -> Iterable[Check]:
        given, exact, *naives = (
            [one.gradients[name] for name in members]
            for one in (trained, self.truth.trained, *self.truth.naive_trained)
        )
        names = self._names("gradient", group, mode)
        if [x is None for x in given] != [x is None for x in exact]:
            detail = "it is there where the stock model has none, or the other way round"
            yield Check(**names, status=FAILED, detail=detail)
        elif any(x is not None for x in given):
            yield compare(_flat(given), _flat(exact), *map(_flat, naives), **names)

    def _compiled(self) -> Iterable[Check]:
        model, _ = self._accelerated()
        torch.compiler.reset()
        try:
            call = torch.compile(model, fullgraph=True, dynamic=False)
            yield from self._outside(model, "compiled", call, twice=False)
        except Exception as error:  # inductor's own errors have no common class; what it says is the finding
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            detail = (
                f"torch.compile failed: {type(error).__name__}: {first}; leave it out with compiled=False"
            )
            yield Check(**self._names("output", "torch.compile", "compiled"), status=ERROR, detail=detail)
        finally:
            torch.compiler.reset()

    def _dropout(self, model: Any, mode: str) -> Iterable[Check]:
        """Means and spread of many runs under dropout: they show a mask that isn't rescaled or drops too often."""
        truth = self.truth
        if not any(module.p > 0 for module in model.modules() if isinstance(module, nn.Dropout)):
            note = "dropout was not checked: the model has none"
            if note not in self.notes:
                self.notes.append(note)
            return
        rows: int | None = max(1, DROPOUT_SLOTS // truth.mask.shape[1] // _choices(truth))
        mask = truth.mask[: (rows or 1) * _choices(truth)]
        if not mask.any():
            mask, rows = truth.mask, None
        tokens = int(mask.sum())
        copies = max(1, min(-(-DROPOUT_TOKENS // tokens), DROPOUT_COPIES // mask.numel()))
        if copies * tokens < DROPOUT_LEAST:
            note = f"dropout was not checked: {tokens} tokens are too few to judge it, give a longer text"
            if note not in self.notes:
                self.notes.append(note)
            return
        mask = mask.repeat(copies, 1)
        stock = copy.deepcopy(truth.stock)
        inputs = truth.inputs(stock, rows, copies)
        views = views_of(stock), views_of(model)
        for name, dropout_of in _DROPOUTS.items():
            if not any(dropout_of(view).p > 0 for view in views[0]):
                continue
            ours, theirs = _Moments(), _Moments()
            with (
                torch.random.fork_rng(devices=[mask.device] if mask.is_cuda else []),
                torch.no_grad(),
                without_dropout(stock, but=map(dropout_of, views[0])),
                without_dropout(model, but=map(dropout_of, views[1])),
            ):
                torch.manual_seed(0)
                for _ in range(DROPOUT_RUNS):
                    with trace_stock(views[0], mask) as trace:
                        stock(**inputs)
                    theirs.add(trace)
                    with trace_accelerated(mask) as trace:
                        model(**inputs)
                    ours.add(trace)
            for key, moments in ours.of.items():
                if key not in theirs.of:
                    continue
                ratio, allowed = judge_random(moments, theirs.of[key])
                right = ratio <= allowed
                yield Check(
                    **self._names(
                        "dropout", f"{key[0]}: {key[1]}, under dropout of {name}", mode, ours.ops[key]
                    ),
                    status=PASSED if right else FAILED,
                    error=ratio,
                    allowed=allowed,
                    detail=""
                    if right
                    else f"means or spread are {ratio:.3g} times as far apart as by chance",
                )


# One at a time: what another one adds to the spread would hide a small difference.
_DROPOUTS: dict[str, Callable[[Any], nn.Dropout]] = {
    "attention": lambda view: view.attention.self.dropout,
    "attention.output": lambda view: view.attention.output.dropout,
    "output": lambda view: view.output.dropout,
}


def _choices(truth: Truth) -> int:
    shape: torch.Size = next(v for n, v in truth.batch.items() if n in ("input_ids", "inputs_embeds")).shape
    return max(1, truth.mask.shape[0] // shape[0])


class _Moments:
    """Mean and variance of each part of each layer over runs."""

    def __init__(self) -> None:
        self.of: dict[tuple[int, str], RunningMoments] = {}
        self.ops: dict[tuple[int, str], str] = {}

    def add(self, trace: Trace) -> None:
        for i, layer in enumerate(trace.layers):
            for site, value in layer.items():
                step = max(1, value.shape[0] // DROPOUT_TOKENS)
                self.of.setdefault((i, site), RunningMoments()).add(value[::step])
                self.ops[i, site] = trace.ops[i][site] if trace.ops else ""


def _flat(gradients: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([x.flatten() for x in gradients if x is not None])


def _same(a: Mapping[str, Tensor | None], b: Mapping[str, Tensor | None]) -> bool:
    pairs = [(x, b[name]) for name, x in a.items()]
    return all(x is y if x is None or y is None else same_bits(x, y) for x, y in pairs)
