"""`accelerate` and `restore`: which modules are swapped, how, and how that is undone.

A swap sets the class of an existing instance to a subclass of the same name. Hooks stay on the object,
transformers still finds it by `isinstance` and by name, and parameters stay the same objects. The class
of a PreTrainedModel is never changed: transformers derives `architectures`, the loss and the capturing of
outputs from it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pyaccel import dispatch
from pyaccel.errors import NotSupportedError
from pyaccel.hf import mlm_head
from pyaccel.hf.eligibility import ineligible_reason
from pyaccel.hf.executors.padded import run_layer
from pyaccel.hf.families import EAGER, FAMILIES, NAME, NAMES, Family, family_of, is_encoder, layers_of, stock
from pyaccel.hf.modules import subclass_for
from pyaccel.hf.plan import scope
from pyaccel.hf.report import Report
from pyaccel.hf.state import Acceleration, AccelerationState
from pyaccel.packing import layout
from pyaccel.quantization.changes import Changes
from pyaccel.quantization.convert import quantize_within, record


def accelerate(
    model: nn.Module,
    *,
    packing: bool = True,
    int8: str | None = None,
    backend: str = "auto",
    strict: bool = True,
    prepack: bool = False,
    cuda_graphs: bool | str = "auto",
    skip_logits: bool = False,
) -> Report:
    """See :func:`pyaccel.hf.accelerate`."""
    if backend != "auto" and backend not in dispatch.BACKENDS:
        raise ValueError(
            f"unknown backend {backend!r}: expected 'auto' or one of {', '.join(dispatch.BACKENDS)}"
        )
    if int8 not in (None, "dynamic", "weight_only"):
        raise ValueError(
            f"unknown int8 {int8!r}: expected None, 'dynamic' or 'weight_only'; with calibration it is "
            f"pyaccel.quantization.quantize(model, 'static', calibration=...)"
        )
    if prepack and (int8 is not None or not packing):
        raise ValueError(
            "prepack=True reorders floating weights for packed batches: it takes neither int8, whose layers keep "
            "codes, nor packing=False"
        )
    if cuda_graphs not in (True, False, "auto"):
        raise ValueError(f"unknown cuda_graphs {cuda_graphs!r}: expected True, False or 'auto'")
    if cuda_graphs is True and not torch.cuda.is_available():
        raise NotSupportedError(
            "cuda_graphs=True needs a CUDA or ROCm device, and torch sees none here: leave it out, or install a "
            "build of torch that sees your GPU"
        )
    asked: dict[str, Any] = {
        "packing": packing,
        "int8": int8,
        "backend": backend,
        "prepack": prepack,
        "cuda_graphs": cuda_graphs,
        "skip_logits": skip_logits,
    }
    acceleration = _present(model, **asked)
    if acceleration is None:
        report = Report(**{name: value for name, value in asked.items() if name != "int8"})
        acceleration = Acceleration(report=report, **asked)
    report = acceleration.report

    candidates: dict[str, tuple[Family, Any]] = {
        name: (family, module)
        for name, module in model.named_modules()
        if (family := family_of(module)) is not None and "_pyaccel" not in module.__dict__
    }
    reasons = {name: _not_swappable(*candidate) for name, candidate in candidates.items()}
    todo = [(name, *candidate) for name, candidate in candidates.items() if reasons[name] is None]
    swapped = {*swapped_in(model), *(module for _, _, module in todo)}
    attention_alone = _attention_alone(model, swapped) if backend == "auto" and int8 is None else {}
    not_swapped = {name: reason for name, reason in reasons.items() if reason is not None}
    if strict and not (todo or report.swapped or attention_alone or report.attention):
        why = "; ".join(f"{name or 'it'}: {reason}" for name, reason in not_swapped.items())
        known = ", ".join(family.title for family in FAMILIES)
        raise ValueError(
            f"pyaccel.accelerate: nothing in this {type(model).__name__} can be accelerated: "
            f"{why or f'it holds no encoder or layer of a known family ({known} of transformers)'}. "
            f"Pass strict=False to get a report instead."
        )
    heads, ineligible_heads = _masked_lm_heads(model, strict) if skip_logits else ([], {})
    if todo:
        # A backend that was asked for and can't serve must say so before anything is changed.
        _, family, module = todo[0]
        dry_run(family, layers_of(family, module)[0], acceleration)

    reads_padding = _read_in_the_padding(model)
    with Changes() as changes:  # an error, or Ctrl-C, leaves the model as it was
        changes.item(report.__dict__, "not_swapped", {**not_swapped, **ineligible_heads})
        for name, family, module in todo:
            config = _config(family, module)
            _set_attention(changes, acceleration, config)
            state = AccelerationState(
                acceleration, config, _executors(acceleration, module), reads_padding.get(module)
            )
            _set_class(changes, module, subclass_for(family, module), state)
            changes.item(report.swapped, name, type(module).__name__)
        for name, head, decoder in heads:
            _set_class(changes, decoder, mlm_head.Linear, AccelerationState(acceleration, head.config))
            if not mlm_head.is_attached(head):
                changes.make(partial(mlm_head.attach, head, acceleration), partial(mlm_head.detach, head))
            changes.item(report.swapped, name, "Linear")
        for name, part in attention_alone.items():
            _set_attention(changes, acceleration, part.config)
            changes.item(part.__dict__, "_pyaccel", AccelerationState(acceleration, part.config))
            changes.item(report.attention, name, type(part).__name__)
        if int8 is not None and todo:
            _make_int8(changes, model, acceleration, int8)
    return report


def _executors(acceleration: Acceleration, module: nn.Module) -> tuple[str, ...]:
    """Names of what a swapped module's calls are tried by, in order."""
    if not is_encoder(module):
        return ("padded",)
    graphs = acceleration.cuda_graphs is True or (
        acceleration.cuda_graphs == "auto" and torch.cuda.is_available()
    )
    return ("cuda_graph",) * graphs + ("packed",) * acceleration.packing


def _set_class(changes: Changes, module: Any, kind: Any, state: AccelerationState) -> None:
    before = type(module)
    changes.item(module.__dict__, "_pyaccel", state)
    changes.make(partial(setattr, module, "__class__", kind), partial(setattr, module, "__class__", before))


def _set_attention(changes: Changes, acceleration: Acceleration, config: Any) -> None:
    before = config._attn_implementation
    if before not in NAMES:
        configs = acceleration.configs
        changes.item(acceleration.__dict__, "configs", [*configs, (config, before)])
        changes.make(
            partial(setattr, config, "_attn_implementation", EAGER if before == "eager" else NAME),
            partial(setattr, config, "_attn_implementation", before),
        )


def _attention_alone(model: nn.Module, swapped: set[Any]) -> dict[str, Any]:
    """Models in which no layer can be swapped, but whose attention goes through transformers' interface."""
    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, PreTrainedModel) and "_pyaccel" not in part.__dict__
        if part._supports_sdpa
        and part.config._attn_implementation == "sdpa"
        and not part.config.output_attentions
        if swapped.isdisjoint(part.modules())
        # The innermost one: heads around it share its config.
        if not any(isinstance(inner, PreTrainedModel) for inner in part.modules() if inner is not part)
    }


def _masked_lm_heads(model: nn.Module, strict: bool) -> tuple[list[tuple[str, Any, Any]], dict[str, str]]:
    """Heads whose logits can be skipped, as name of the decoder, head and decoder; and why the others' can't."""
    found, reasons = [], {}
    names = {module: name for name, module in model.named_modules()}
    for name, head in mlm_head.heads_of(model):
        decoder: Any = head.get_output_embeddings()
        reason = mlm_head.ineligible_reason(head)
        if reason is not None:
            reasons[name] = f"skip_logits: {reason}"
        elif "_pyaccel" not in decoder.__dict__:
            found.append((names[decoder], head, decoder))
    is_done = any("_pyaccel" in head.get_output_embeddings().__dict__ for _, head in mlm_head.heads_of(model))
    if strict and not found and not is_done:
        why = "; ".join(reasons.values()) or "it has no masked-language-model head of a known family"
        raise ValueError(
            f"pyaccel.accelerate: skip_logits=True has no effect on this {type(model).__name__}: {why}. "
            f"Leave it out, or pass strict=False to get a report instead."
        )
    return found, reasons


def _make_int8(changes: Changes, model: nn.Module, acceleration: Acceleration, method: Any) -> None:
    """Quantize, and keep what was there: `restore` puts the very same layers back."""
    before = {(parent, name): child for parent in model.modules() for name, child in parent.named_children()}
    kept = [(parent, name, child) for (parent, name), child in before.items() if type(child) is nn.Linear]
    changes.item(acceleration.__dict__, "floating", [*acceleration.floating, *kept])
    quantize_within(changes, model, method, progress=False)
    acceleration.floating = [entry for entry in acceleration.floating if getattr(*entry[:2]) is not entry[2]]


def restore(model: nn.Module) -> nn.Module:
    """See :func:`pyaccel.hf.restore`.

    Interrupted, it can be called again: what says that a module is accelerated is removed last.
    """
    accelerations = accelerations_of(model)
    swapped = swapped_in(model)
    for module in swapped:
        if not isinstance(module, PreTrainedModel) and _base_of(module) is None:
            raise RuntimeError(
                f"pyaccel.restore: the class of an accelerated {type(module).__name__} was changed again, to "
                f"{type(module).__module__}.{type(module).__qualname__}; undo that first"
            )
    for acceleration in accelerations:
        for parent, name, child in acceleration.floating:
            here: Any = getattr(parent, name)  # the model may have been moved or cast since
            if here is not child:
                like = child.weight if here.bias is None else here.bias
                setattr(parent, name, child.to(here.weight.device, like.dtype).train(here.training))
        if acceleration.floating:
            record(model, Changes())
        for config, implementation in acceleration.configs:
            if config._attn_implementation in NAMES:  # else it was set to something else since
                config._attn_implementation = implementation
    mlm_head.detach(model)
    for module in swapped:
        if type(module).__module__ == _OURS:
            module.__class__ = _base_of(module)
    for module in swapped:
        del module._pyaccel
    return model


_OURS = "pyaccel.hf"


def _base_of(module: nn.Module) -> type[nn.Module] | None:
    """The class that an accelerated module had; None if it was changed since to one that isn't known."""
    kind = type(module)
    if kind.__module__ == _OURS:
        return kind.__mro__[1]
    family = family_of(module)  # of a `restore` that was interrupted
    known = (nn.Linear,) if family is None else (stock(family).encoder, stock(family).layer)
    return kind if kind in known else None


def _not_swappable(family: Family, module: nn.Module) -> str | None:
    if subclass_for(family, module) is None:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"it is a {kind}, only transformers' own class is known"
    layers = layers_of(family, module)
    if not layers:
        return "it has no layers"
    reason = ineligible_reason(stock(family), layers, around=module, loaded=False)
    if reason is None and _config(family, module).output_attentions:
        # transformers allows this with its eager attention alone, and won't save a config that says
        # otherwise.
        return "config.output_attentions is set: every call needs the stock modules"
    return reason


def _read_in_the_padding(model: nn.Module) -> dict[nn.Module, str]:
    """Encoders whose padding positions are read, and by which head: they keep their padding."""
    return {
        encoder: f"{type(head).__name__} reads every position, padding too"
        for head in model.modules()
        # Its loss, and the best answer, are over the logits of all positions.
        if any(kind.__name__.endswith("ForQuestionAnswering") for kind in type(head).__mro__)
        or isinstance(getattr(head, "qa_outputs", None), nn.Module)
        for encoder in head.modules()
        if is_encoder(encoder)
    }


def _config(family: Family, module: Any) -> Any:
    return family.view(layers_of(family, module)[0]).attention.self.config


def swapped_in(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if "_pyaccel" in module.__dict__]


def accelerations_of(model: nn.Module) -> list[Acceleration]:
    found = {id(module._pyaccel.acceleration): module._pyaccel.acceleration for module in swapped_in(model)}
    if not found:
        raise ValueError(
            f"nothing in this {type(model).__name__} is accelerated; pyaccel.accelerate(model) does that"
        )
    return list(found.values())


def _present(model: nn.Module, **asked: Any) -> Acceleration | None:
    """The acceleration that is in `model` already, made with these arguments."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"pyaccel.accelerate: expected a torch.nn.Module, got {type(model).__name__}")
    if not swapped_in(model):
        return None
    found = accelerations_of(model)
    if len(found) > 1 or any(getattr(found[0], name) != value for name, value in asked.items()):
        before = ", ".join(f"{name}={getattr(a, name)!r}" for a in found for name in asked)
        raise RuntimeError(
            f"pyaccel.accelerate: parts of this {type(model).__name__} are accelerated already ({before}); "
            f"pyaccel.restore(model) first"
        )
    return found[0]


def dry_run(family: Family, layer: Any, acceleration: Acceleration) -> None:
    """One layer in evaluation on 16 tokens of zeros, for the choices of backends that it makes."""
    weight = family.view(layer).output.LayerNorm.weight
    if weight.is_meta:
        return
    mask = torch.ones(2, 8, dtype=torch.bool, device=weight.device)
    hidden = weight.new_zeros(2, 8, len(weight))
    training = [part for part in layer.modules() if part.training]
    try:
        for part in training:
            part.training = False
        with torch.no_grad(), scope(acceleration):
            if acceleration.packing:
                run_layer(family, layer, hidden.flatten(0, 1), layout(mask))
            run_layer(family, layer, hidden, mask)
    finally:
        for part in training:
            part.training = True
