"""Masked-language-model heads in training: the loss of masked tokens alone, where `skip_logits` asks for it.

transformers' heads multiply every token by the whole vocabulary, and their loss then drops all but the masked ones, an
eighth or so. Here a pre-forward hook on the model takes the labels out of a training call, the decoder computes the
loss in the place of the logits (:func:`pyaccel.ops.masked_lm_cross_entropy`), under the autocast that is around it, and
a forward hook puts the loss into the output, whose logits are None. A call that this can't serve as the stock forward
would keeps its labels and runs that; the report counts it with the reason.
"""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForMaskedLMLoss

from pyaccel import ops
from pyaccel.hf.eligibility import change_of, has_foreign_global_hooks, inside, is_foreign_hook, special
from pyaccel.hf.families import BY_FILE
from pyaccel.hf.plan import scope
from pyaccel.hf.state import Acceleration
from pyaccel.ops.common import autocast_dtype

# The label of a second loss, and the output it is of, for heads that add one to the masked tokens'.
_SECOND = {
    "BertForPreTraining": ("next_sentence_label", "seq_relationship_logits"),
    "ErnieForPreTraining": ("next_sentence_label", "seq_relationship_logits"),
    "AlbertForPreTraining": ("sentence_order_label", "sop_logits"),
}


@dataclass
class _Step:
    """One call of a head without logits."""

    decoder: nn.Module
    labels: Tensor
    second_label: Tensor | None
    upcast: bool  # whether the stock loss is of fp32 logits whatever their dtype
    ignore_index: int
    num_items: Any
    acceleration: Acceleration
    loss: Tensor | None = None


# The call that this thread is in. It is None again after each call, whatever happens in it.
_step: ContextVar[_Step | None] = ContextVar("pyaccel_mlm_step", default=None)


class Linear(nn.Linear):
    """The decoder of a head: gives no logits, and computes the loss, where a call skips them."""

    def forward(self, input: Tensor) -> Any:
        step = None if torch.compiler.is_compiling() else _step.get()
        if step is None or step.decoder is not self:
            return super().forward(input)
        with scope(step.acceleration):
            loss = ops.masked_lm_cross_entropy(
                input,
                self.weight,
                self.bias,
                step.labels,
                ignore_index=step.ignore_index,
                num_items=step.num_items,
            )
        # In the dtype of the stock loss: that of the logits, but where they are cast first.
        is_fp32 = step.upcast or autocast_dtype(input.device) is not None
        step.loss = loss if is_fp32 else loss.to(self.weight.dtype)
        return None


class TakeLabels:
    """Pre-forward hook of a head."""

    def __init__(self, acceleration: Acceleration) -> None:
        self.acceleration = acceleration

    def __call__(self, head: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return None
        _step.set(None)
        if not (head.training and torch.is_grad_enabled()):
            return None
        given = _given(head, args, kwargs)
        report = self.acceleration.report
        if reason := _why_not(head, given):
            report.refused["masked_lm_loss"][reason] += 1
            return None
        loss_kwargs = kwargs if _loss_of(head.__class__) == "loss_function" else {}
        second, _ = _SECOND.get(_name(head), ("", ""))
        _step.set(
            _Step(
                decoder=head.get_output_embeddings(),
                labels=given["labels"],
                second_label=given.get(second),
                upcast=_loss_of(head.__class__) == "loss_function",
                ignore_index=loss_kwargs.get("ignore_index", -100),
                num_items=loss_kwargs.get("num_items_in_batch"),
                acceleration=self.acceleration,
            )
        )
        report.served["masked_lm_loss"] += 1
        at = _parameters(head.__class__).index("labels")
        if at < len(args):
            return (*args[:at], None, *args[at + 1 :]), kwargs
        return args, {**kwargs, "labels": None}


class GiveLoss:
    """Forward hook of a head, called after errors too."""

    def __call__(self, head: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        step = _step.get()
        _step.set(None)
        if step is None or step.loss is None or output is None:
            return None
        loss = step.loss
        is_tuple = isinstance(output, tuple)
        if step.second_label is not None:
            scores = output[0] if is_tuple else output[_SECOND[_name(head)][1]]
            loss = loss + F.cross_entropy(scores.view(-1, 2), step.second_label.view(-1))
        # A new output, because the order of its fields is that of a tuple made of it.
        return (loss, *output) if is_tuple else type(output)(**{"loss": loss, **output})


# What pickles say: names that stay wherever this file goes.
PICKLED = {f"mlm_{kind.__name__}": kind for kind in (Linear, TakeLabels, GiveLoss)}
for _qualified, _pickled in PICKLED.items():
    _pickled.__module__, _pickled.__qualname__ = "pyaccel.hf", _qualified


def heads_of(model: nn.Module) -> list[tuple[str, Any]]:
    """The masked-language-model heads in ``model`` whose loss is known here, and their names."""
    return [
        (name, part)
        for name, part in model.named_modules()
        if isinstance(part, PreTrainedModel) and _name(part)
    ]


def attach(head: Any, acceleration: Acceleration) -> None:
    """Hook ``head``; its decoder's class is set by the caller. Our hooks are next to its forward."""
    head.register_forward_pre_hook(TakeLabels(acceleration), with_kwargs=True)
    head.register_forward_hook(GiveLoss(), with_kwargs=True, always_call=True, prepend=True)


def detach(model: nn.Module) -> None:
    """Remove our hooks from every head in ``model``."""
    for part in model.modules():
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, TakeLabels | GiveLoss)]:
                hooks.pop(key, None)
                part._forward_pre_hooks_with_kwargs.pop(key, None)
                part._forward_hooks_with_kwargs.pop(key, None)
                part._forward_hooks_always_called.pop(key, None)


def is_attached(head: Any) -> bool:
    """Whether the logits of ``head`` may be skipped."""
    return any(isinstance(hook, TakeLabels) for hook in head._forward_pre_hooks.values())


def ineligible_reason(head: Any) -> str | None:
    """Why no call of ``head`` can skip its logits, whatever it is called with; None if some can."""
    decoder = head.get_output_embeddings()
    if type(decoder) not in (nn.Linear, Linear):
        return f"its decoder is a {type(decoder).__module__}.{type(decoder).__qualname__}, not a Linear"
    if _loss_of(head.__class__) is None:
        return f"the loss of {type(head).__name__} is computed in an unknown place"
    return _watched(head, decoder)


# ---- what is asked about a call ----


def _why_not(head: Any, given: dict[str, Any]) -> str | None:
    labels = given.get("labels")
    if labels is None:
        return "no labels were given"
    if reason := inside():
        return reason
    if reason := ineligible_reason(head):
        return reason
    decoder = head.get_output_embeddings()
    if type(decoder) is not Linear:
        return "its decoder was replaced: call pyaccel.accelerate with the same arguments again"
    if reason := special(decoder.weight):
        return f"its decoder's weight is {reason}"
    if decoder.weight.shape[0] != head.config.vocab_size:
        return f"config.vocab_size is {head.config.vocab_size}, and the decoder's {decoder.weight.shape[0]}"
    if type(labels) is not Tensor:
        return f"labels are a {type(labels).__name__}"
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    expected = ids.shape if ids is not None else embeds.shape[:-1] if embeds is not None else None
    if labels.dtype != torch.int64 or labels.device != decoder.weight.device or labels.shape != expected:
        return "labels are not an int64 tensor of the input's shape on the decoder's device"
    second, _ = _SECOND.get(_name(head), ("", ""))
    if second and given.get(second) is None:
        return f"no {second} was given: without it this head has no loss"
    if _loss_of(head.__class__) == "mlm_loss_fct" and not _is_plain(head.mlm_loss_fct):
        return "model.mlm_loss_fct was replaced"
    if _loss_of(head.__class__) == "loss_function" and head.loss_function is not ForMaskedLMLoss:
        return "model.loss_function was replaced"
    return None


def _watched(head: Any, decoder: nn.Module) -> str | None:
    """Who would notice that the decoder gives nothing, or that the forward sees no labels."""
    before = [hook for hook in head._forward_pre_hooks.values() if _counts(hook)]
    after = [hook for hook in head._forward_hooks.values() if _counts(hook)]
    if before and (not isinstance(before[-1], TakeLabels) and any(isinstance(h, TakeLabels) for h in before)):
        return "the model has a pre-forward hook after pyaccel's"
    if after and not isinstance(after[0], GiveLoss) and any(isinstance(h, GiveLoss) for h in after):
        return "the model has a forward hook before pyaccel's"
    if head._backward_hooks or head._backward_pre_hooks or has_foreign_global_hooks():
        return "the model has backward hooks, or all modules have hooks"
    if not _is_stock(head):
        return "the model's forward is not transformers' own"
    for name, part in _path_to(head, decoder):
        if reason := change_of(part):
            return f"{name} {reason}"
        if part is not decoder and not type(part).__module__.startswith("transformers."):
            return f"{name} is a {type(part).__module__}.{type(part).__qualname__}"
        if getattr(part, "parametrizations", None):
            return f"{name} is parametrized"
    return None


def _counts(hook: Any) -> bool:
    return isinstance(hook, TakeLabels | GiveLoss) or is_foreign_hook(hook)


def _path_to(head: nn.Module, decoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules from the head to its decoder, without the head."""
    name = next((name for name, part in head.named_modules() if part is decoder), None)
    if name is None:
        return []
    names = name.split(".")
    paths = [".".join(names[:end]) for end in range(1, len(names) + 1)]
    return [(path, head.get_submodule(path)) for path in paths]


def _is_stock(head: Any) -> bool:
    """Whether calling it comes to its class's own forward, past wrappers that only cast: autocast and accelerate's."""
    function = head.forward
    while function is not None:
        if hasattr(function, "model_forward"):  # accelerate's ConvertOutputsToFp32
            function = function.model_forward
            continue
        function = getattr(function, "__func__", function)
        where = getattr(function, "__globals__", {}).get("__name__", "")
        if where in BY_FILE:
            return function is inspect.unwrap(function)
        if not where.startswith(("transformers.", "accelerate.utils.operations", "torch.amp.")):
            return False
        function = getattr(function, "__wrapped__", None)
    return False


def _is_plain(loss: Any) -> bool:
    return (
        type(loss) is nn.CrossEntropyLoss
        and loss.weight is None
        and loss.ignore_index == -100
        and loss.reduction == "mean"
        and loss.label_smoothing == 0.0
    )


# ---- what is known of a class ----


@functools.cache
def _class_of(kind: Any) -> Any:
    """transformers' own class of a head that is known here, of which ``kind`` may be a subclass."""
    for each in kind.__mro__:
        if each.__module__ in BY_FILE and (each.__name__.endswith("ForMaskedLM") or each.__name__ in _SECOND):
            return each
    return None


def _name(head: Any) -> str:
    known = _class_of(head.__class__)
    return "" if known is None else known.__name__


@functools.cache
def _parameters(kind: Any) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)[1:]


def _given(head: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_parameters(head.__class__), args, strict=False)), **kwargs}


@functools.cache
def _loss_of(kind: Any) -> str | None:
    """What the forward takes its loss from: a plain CrossEntropyLoss (the first two), or one that knows num_items."""
    known = _class_of(kind)
    names = () if known is None else inspect.unwrap(known.forward).__code__.co_names
    found = [name for name in ("CrossEntropyLoss", "mlm_loss_fct", "loss_function") if name in names]
    return found[0] if len(found) == 1 else None
