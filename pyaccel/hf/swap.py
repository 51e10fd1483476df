"""`accelerate`, `restore` and `explain`: which modules are swapped, how, and how that is undone.

A swap sets the class of an existing instance to a subclass of the same name. Hooks stay on the object,
transformers still finds it by `isinstance` and by name, and parameters stay the same objects. The class
of a PreTrainedModel is never changed: transformers derives `architectures`, the loss and the capturing of
outputs from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyaccel import dispatch, tuned
from pyaccel.hf.attention import NAME, register
from pyaccel.hf.families import FAMILIES, Family, stock
from pyaccel.hf.fast_path import (
    Acceleration,
    Attached,
    family_of,
    is_encoder,
    layers_of,
    run_layer,
    subclass_for,
    subclasses,
)
from pyaccel.hf.guard import unfit
from pyaccel.hf.report import Explanation, Report
from pyaccel.models.bert import unshare_qkv_storage
from pyaccel.nn import Int8Linear
from pyaccel.packing import layout

__all__ = ["accelerate", "explain", "register", "restore"]


def accelerate(
    model: nn.Module, *, packing: bool = True, backend: str = "auto", strict: bool = True
) -> Report:
    """See :func:`pyaccel.hf.accelerate`."""
    if backend != "auto" and backend not in dispatch.BACKENDS:
        raise ValueError(
            f"unknown backend {backend!r}: expected 'auto' or one of {', '.join(dispatch.BACKENDS)}"
        )
    acceleration = _present(model, packing, backend)
    if acceleration is None:
        acceleration = Acceleration(packing, backend, Report(packing=packing, backend=backend))
    report = acceleration.report

    candidates: dict[str, tuple[Family, Any]] = {
        name: (family, module)
        for name, module in model.named_modules()
        if (family := family_of(module)) is not None and "_pyaccel" not in module.__dict__
    }
    reasons = {name: _not_swappable(*candidate) for name, candidate in candidates.items()}
    todo = [(name, *candidate) for name, candidate in candidates.items() if reasons[name] is None]
    report.not_swapped = {name: reason for name, reason in reasons.items() if reason is not None}
    if strict and not todo and not report.swapped:
        why = "; ".join(f"{name or 'it'}: {reason}" for name, reason in report.not_swapped.items())
        known = ", ".join(family.title for family in FAMILIES)
        raise ValueError(
            f"pyaccel.accelerate: nothing in this {type(model).__name__} can be accelerated: "
            f"{why or f'it holds no encoder or layer of a known family ({known} of transformers)'}. "
            f"Pass strict=False to get a report instead."
        )
    if todo:
        # A backend that was asked for and can't serve must say so before anything is changed.
        _, family, module = todo[0]
        _dry_run(family, layers_of(family, module)[0], acceleration)

    reads_padding = _read_in_the_padding(model)
    for name, family, module in todo:
        config = _config(family, module)
        if config._attn_implementation != NAME:
            acceleration.configs.append((config, config._attn_implementation))
            config._attn_implementation = NAME
        module.__class__ = subclass_for(family, module)
        module._pyaccel = Attached(acceleration, config, reads_padding.get(module))
        report.swapped[name] = type(module).__name__
    return report


def restore(model: nn.Module) -> nn.Module:
    """See :func:`pyaccel.hf.restore`."""
    accelerations, swapped = _accelerations(model), _swapped(model)
    for module in swapped:
        if type(module) not in subclasses(_family(module)):
            raise RuntimeError(
                f"pyaccel.restore: the class of an accelerated {type(module).__name__} was changed again, to "
                f"{type(module).__module__}.{type(module).__qualname__}; undo that first"
            )
    for module in swapped:
        del module._pyaccel
        module.__class__ = type(module).__mro__[1]
        if not is_encoder(module):
            unshare_qkv_storage(_family(module).view(module).attention.self)
    for acceleration in accelerations:
        for config, implementation in acceleration.configs:
            if config._attn_implementation == NAME:  # else it was set to something else since
                config._attn_implementation = implementation
    return model


def explain(model: nn.Module) -> Explanation:
    """See :func:`pyaccel.hf.explain`."""
    accelerations = _accelerations(model)
    if len(accelerations) > 1:
        raise ValueError(
            f"pyaccel.explain: {len(accelerations)} models accelerated apart are in this; pass one of them"
        )
    first = _swapped(model)[0]
    family = _family(first)
    layer = layers_of(family, first)[0]
    with dispatch.record() as choices:
        _dry_run(family, layer, accelerations[0])
    weight, summary = family.view(layer).output.LayerNorm.weight, dispatch.summary(choices)
    return Explanation(
        dtype=str(weight.dtype).removeprefix("torch."),
        device=str(weight.device),
        backends={op: choice.backend for op, choice in summary.items()},
        reasons={op: choice.reason for op, choice in summary.items()},
        report=accelerations[0].report,
        int8=_int8_speedups(layer, weight.dtype),
    )


def _int8_speedups(layer: Any, dtype: torch.dtype) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for module in layer.modules():
        if isinstance(module, Int8Linear) and module.method != "weight_only":
            n_in, n_out, device = module.in_features, module.out_features, module.weight.device
            for rows in sorted({timing.rows for timing in tuned.int8_timings(device, dtype)}):
                near = tuned.int8_timing(device, dtype, rows, n_in, n_out)
                if near is not None and near.rows == rows:
                    found.setdefault(f"{n_in} to {n_out}", {})[rows] = near.speedup
    return found


def _not_swappable(family: Family, module: nn.Module) -> str | None:
    if subclass_for(family, module) is None:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"it is a {kind}, only transformers' own class is known"
    layers = layers_of(family, module)
    if not layers:
        return "it has no layers"
    reason = unfit(stock(family), layers, around=module, loaded=False)
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
        if type(head).__name__.endswith("ForQuestionAnswering")
        for encoder in head.modules()
        if is_encoder(encoder)
    }


def _family(module: nn.Module) -> Family:
    family = family_of(module)
    assert family is not None  # it is swapped
    return family


def _config(family: Family, module: Any) -> Any:
    return family.view(layers_of(family, module)[0]).attention.self.config


def _swapped(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if "_pyaccel" in module.__dict__]


def _accelerations(model: nn.Module) -> list[Acceleration]:
    found = {id(module._pyaccel.acceleration): module._pyaccel.acceleration for module in _swapped(model)}
    if not found:
        raise ValueError(
            f"nothing in this {type(model).__name__} is accelerated; pyaccel.accelerate(model) does that"
        )
    return list(found.values())


def _present(model: nn.Module, packing: bool, backend: str) -> Acceleration | None:
    """The acceleration that is in `model` already, made with these arguments."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"pyaccel.accelerate: expected a torch.nn.Module, got {type(model).__name__}")
    if not _swapped(model):
        return None
    found = _accelerations(model)
    if len(found) > 1 or (found[0].packing, found[0].backend) != (packing, backend):
        before = ", ".join(f"packing={a.packing}, backend={a.backend!r}" for a in found)
        raise RuntimeError(
            f"pyaccel.accelerate: parts of this {type(model).__name__} are accelerated already ({before}); "
            f"pyaccel.restore(model) first"
        )
    return found[0]


def _dry_run(family: Family, layer: Any, acceleration: Acceleration) -> None:
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
        with torch.no_grad(), acceleration.use_backend():
            if acceleration.packing:
                run_layer(family, layer, hidden.flatten(0, 1), layout(mask))
            run_layer(family, layer, hidden, mask)
    finally:
        for part in training:
            part.training = True
