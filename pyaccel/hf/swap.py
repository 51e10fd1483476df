"""`accelerate`, `restore` and `explain`: which modules are swapped, how, and how that is undone.

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
from transformers.models.bert import modeling_bert as stock

from pyaccel import dispatch, tuned
from pyaccel.hf.attention import NAME, register
from pyaccel.hf.bert import SUBCLASSES, Acceleration, Attached, padded_attention, unfit
from pyaccel.hf.report import Explanation, Report
from pyaccel.models.bert import encoder_layer, packed_attention, share_qkv_storage, unshare_qkv_storage
from pyaccel.nn import Int8Linear
from pyaccel.packing import layout

__all__ = ["accelerate", "explain", "register", "restore"]

_OURS = tuple(SUBCLASSES.values())
_STOCK = tuple(SUBCLASSES)


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

    candidates: dict[str, Any] = {
        n: m for n, m in model.named_modules() if isinstance(m, _STOCK) and not isinstance(m, _OURS)
    }
    reasons = {name: _not_swappable(module) for name, module in candidates.items()}
    todo = [(name, module) for name, module in candidates.items() if reasons[name] is None]
    report.not_swapped = {name: reason for name, reason in reasons.items() if reason is not None}
    if strict and not todo and not report.swapped:
        why = "; ".join(f"{name or 'it'}: {reason}" for name, reason in report.not_swapped.items())
        known = ", ".join(kind.__name__ for kind in _STOCK)
        raise ValueError(
            f"pyaccel.accelerate: nothing in this {type(model).__name__} can be accelerated: "
            f"{why or f'it holds no module of a known class ({known} of transformers)'}. "
            f"Pass strict=False to get a report instead."
        )
    if todo:
        # A backend that was asked for and can't serve must say so before anything is changed.
        _dry_run(_layers(todo[0][1])[0], acceleration)

    for name, module in todo:
        config = _config(module)
        if config._attn_implementation != NAME:
            acceleration.configs.append((config, config._attn_implementation))
            config._attn_implementation = NAME
        if isinstance(module, stock.BertLayer):
            heads = module.attention.self
            if heads.query.weight.dtype == heads.key.weight.dtype == heads.value.weight.dtype:
                share_qkv_storage(heads)
        module.__class__ = SUBCLASSES[type(module)]
        module._pyaccel = Attached(acceleration, config)
        report.swapped[name] = type(module).__name__
    return report


def restore(model: nn.Module) -> nn.Module:
    """See :func:`pyaccel.hf.restore`."""
    accelerations, swapped = _accelerations(model), _swapped(model)
    for module in swapped:
        if type(module) not in _OURS:
            raise RuntimeError(
                f"pyaccel.restore: the class of an accelerated {type(module).__name__} was changed again, to "
                f"{type(module).__module__}.{type(module).__qualname__}; undo that first"
            )
    for module in swapped:
        del module._pyaccel
        module.__class__ = type(module).__mro__[1]
        if isinstance(module, stock.BertLayer):
            unshare_qkv_storage(module.attention.self)
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
    layer = _layers(_swapped(model)[0])[0]
    with dispatch.record() as choices:
        _dry_run(layer, accelerations[0])
    weight, summary = layer.output.LayerNorm.weight, dispatch.summary(choices)
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


def _not_swappable(module: nn.Module) -> str | None:
    if type(module) not in SUBCLASSES:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"it is a {kind}, only transformers' own class is known"
    if not _layers(module):
        return "it has no layers"
    reason = unfit(_layers(module), around=module)
    if reason is None and _config(module).output_attentions:
        # transformers allows this with its eager attention alone, and won't save a config that says
        # otherwise.
        return "config.output_attentions is set: every call needs the stock modules"
    return reason


def _layers(module: Any) -> list[Any]:
    return list(module.layer) if isinstance(module, stock.BertEncoder) else [module]


def _config(module: Any) -> Any:
    return module.config if isinstance(module, stock.BertEncoder) else module.attention.self.config


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


def _dry_run(layer: Any, acceleration: Acceleration) -> None:
    """One layer in evaluation on 16 tokens of zeros, for the choices of backends that it makes."""
    weight = layer.output.LayerNorm.weight
    mask = torch.ones(2, 8, dtype=torch.bool, device=weight.device)
    hidden = weight.new_zeros(2, 8, len(weight))
    training = [part for part in layer.modules() if part.training]
    try:
        for part in training:
            part.training = False
        with torch.no_grad(), acceleration.use_backend():
            if acceleration.packing:
                encoder_layer(layer, hidden.flatten(0, 1), partial(packed_attention, tokens=layout(mask)))
            encoder_layer(layer, hidden, partial(padded_attention, mask))
    finally:
        for part in training:
            part.training = True
