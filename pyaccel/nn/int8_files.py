"""How files say which layers are int8: ``quantization_config`` in ``config.json``.

``{"quant_method": "pyaccel_int8", "modules": {name: method}, "smoothed": [names]}``. Names are the encoder's own,
without the prefix ("bert.") that a model with a head puts before them: each model loads what another saved. The
weights' file holds ``weight`` int8, ``weight_scale`` fp32 and what else the layer's state dict has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pyaccel.nn.int8_linear import Int8Linear

QUANT_METHOD = "pyaccel_int8"


def quantization_config(model: nn.Module, prefix: str = "") -> dict[str, Any] | None:
    """The entry of ``config.json`` for ``model``; None if it has no Int8Linear.

    Args:
        prefix: what to take off layers' names where they begin with it.

    Raises:
        ValueError: a layer still trains.
    """
    found = {
        name.removeprefix(prefix): module
        for name, module in model.named_modules()
        if isinstance(module, Int8Linear)
    }
    if not found:
        return None
    if trainable := [name for name, module in found.items() if not module.is_frozen]:
        raise ValueError(f"{trainable[0]} still trains; pyaccel.quantization.freeze(model) first")
    smoothed = [name for name, module in found.items() if module.smooth_scale is not None]
    return {
        "quant_method": QUANT_METHOD,
        "modules": {name: module.method for name, module in found.items()},
        **({"smoothed": smoothed} if smoothed else {}),
    }


@torch.no_grad()
def make_int8(model: nn.Module, config: Any) -> None:
    """Put empty int8 layers, on the meta device, where ``config`` names linear layers of ``model``.

    Raises ValueError for another ``quant_method``, for names that are no linear layer, and for unknown methods.
    """
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if method != QUANT_METHOD:
        raise ValueError(
            f"a quantized checkpoint, by {method!r}: expected floating-point weights or {QUANT_METHOD!r}"
        )
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    modules, smoothed = config.get("modules") or {}, set(config.get("smoothed") or ())
    if unknown := [name for name in (*modules, *smoothed) if name not in linears or name not in modules]:
        raise ValueError(f"config.json's quantization_config names {unknown[0]!r}, which is no linear layer")
    for name, how in modules.items():
        linear = linears[name]
        try:
            module = Int8Linear(
                linear.in_features, linear.out_features, linear.bias is not None, method=how, device="meta"
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        module.bias = linear.bias
        codes = torch.empty(module.weight.shape, dtype=torch.int8, device="meta")
        module.weight = nn.Parameter(codes, requires_grad=False)
        module.weight_scale = torch.empty(linear.out_features, device="meta", dtype=torch.float32)
        if name in smoothed:
            module.smooth_scale = torch.empty(linear.in_features, device="meta", dtype=torch.float32)
        module.training = linear.training
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module)
