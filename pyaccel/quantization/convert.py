"""Linear layers of an encoder into int8 ones, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyaccel.nn import Int8Linear
from pyaccel.nn.int8_files import quantization_config
from pyaccel.nn.int8_linear import METHODS, Method
from pyaccel.quantization.calibrate import OBSERVERS, Calibration, Observer, calibrate, encoder_linears
from pyaccel.quantization.changes import Changes
from pyaccel.quantization.smooth import smooth_scales


@dataclass
class QuantizationReport:
    """What :func:`quantize` did.

    Attributes:
        method: "dynamic", "static" or "weight_only".
        quantized: names of the layers that are int8 now.
        skipped: name of each linear layer that was left -> why.
        smoothed: names of the layers whose input is smoothed.
        bytes_before, bytes_after: of the encoder layers' weights.
    """

    method: str
    quantized: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    smoothed: list[str] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        lines = [
            f"int8, {self.method}: {len(self.quantized)} linear layers, "
            f"{self.bytes_before / 2**20:.1f} MiB of weights are {self.bytes_after / 2**20:.1f} MiB now"
        ]
        if self.smoothed:
            lines.append(f"  smoothed: {len(self.smoothed)}")
        reasons = Counter(self.skipped.values())
        lines += [f"  left: {count} ({reason})" for reason, count in reasons.items()]
        return "\n".join(lines)


def quantize(
    model: nn.Module,
    method: Method = "dynamic",
    *,
    calibration: Calibration | Iterable[Any] | None = None,
    smooth: bool = False,
    alpha: float = 0.5,
    observer: Observer = "amax",
    percent: float = 99.99,
    skip: Sequence[str] = (),
    progress: bool = True,
) -> QuantizationReport:
    """Make the linear layers of ``model``'s encoder int8, in place; :func:`dequantize` goes back.

    Args:
        model: our BertModel or a Hugging Face encoder, accelerated or not.
        method: "dynamic": each token has its own scale, found as it comes; right without any data. "static": one scale
            for each layer's input, from ``calibration``; cheaper, and worse where channels have outliers, as BERT's do.
            "weight_only": inputs stay floating: the most accurate, and for few tokens, where a weight's bytes take the
            time.
        calibration: what :func:`calibrate` saw, or the data to calibrate with. "static" and ``smooth`` need it.
        smooth: SmoothQuant (arXiv:2211.10438): large input channels hand part of their size to the weight.
        alpha: how much of it, from 0 (none) to 1.
        observer: of static scales: "amax", or "percentile", which clamps what is beyond ``percent`` of all values.
        skip: names or patterns (``"*.output.dense"``) of layers to leave in floating point.
        progress: show a bar while calibrating.

    Returns:
        what was quantized and what not. Embeddings, poolers and heads stay floating and are named.

    Raises:
        ValueError: nothing to quantize, an unknown method or observer, a pattern that fits nothing, or no data where
            they are needed.

    An error, or Ctrl-C, leaves the model as it was: all layers are made before the first is put in its place.
    """
    with Changes() as changes:
        return quantize_within(
            changes,
            model,
            method,
            calibration=calibration,
            smooth=smooth,
            alpha=alpha,
            observer=observer,
            percent=percent,
            skip=skip,
            progress=progress,
        )


def quantize_within(
    changes: Changes,
    model: nn.Module,
    method: Method = "dynamic",
    *,
    calibration: Calibration | Iterable[Any] | None = None,
    smooth: bool = False,
    alpha: float = 0.5,
    observer: Observer = "amax",
    percent: float = 99.99,
    skip: Sequence[str] = (),
    progress: bool = True,
) -> QuantizationReport:
    """As :func:`quantize`, with what is to be undone after an error noted in ``changes``."""
    linears, report = _selected(model, method, skip)
    if method == "weight_only" and smooth:
        raise ValueError(
            "quantize: smooth=True is for quantized inputs, and 'weight_only' leaves them as they are"
        )
    if observer not in OBSERVERS:
        raise ValueError(f"quantize: unknown observer {observer!r}: expected one of {', '.join(OBSERVERS)}")
    if not 0 < percent <= 100 or not 0 <= alpha <= 1:
        raise ValueError(
            f"quantize: percent must be in (0, 100] and alpha in [0, 1], got {percent} and {alpha}"
        )
    seen = None
    if method == "static" or smooth:
        if calibration is None:
            what = "method 'static'" if method == "static" else "smooth=True"
            raise ValueError(
                f"quantize: {what} needs calibration=: a loader of real batches, or what calibrate() saw"
            )
        seen = (
            calibration
            if isinstance(calibration, Calibration)
            else calibrate(model, calibration, progress=progress)
        )
        missing = linears.keys() - seen.inputs.keys()
        if missing:
            raise ValueError(
                f"quantize: calibration saw nothing of {min(missing)}: calibrate this very model"
            )
    scales = smooth_scales(linears, seen, alpha) if smooth and seen is not None else {}
    made = {}
    for name, linear in linears.items():
        smoothing = scales.get(name)
        input_scale = None
        if method == "static" and seen is not None:
            input_scale = _static_scale(seen, name, observer, percent, smoothing)
        made[name] = _int8_layer(linear, method, input_scale, smoothing).freeze()
        report.quantized.append(name)
        if smoothing is not None:
            report.smoothed.append(name)
    for name, layer in made.items():
        changes.module(model, name, layer)
    _freeze(model, changes)
    report.bytes_after = _weight_bytes(model)
    return report


def prepare_qat(
    model: nn.Module, method: Literal["dynamic", "weight_only"] = "dynamic", *, skip: Sequence[str] = ()
) -> QuantizationReport:
    """Make the encoder's linear layers trainable Int8Linears with the very same Parameters.

    Train as before; :func:`freeze` then gives the int8 model that computed the last forward, bit for bit. Put it before
    the optimizer is made or after it: the Parameters are the same objects.
    """
    if method not in ("dynamic", "weight_only"):
        raise ValueError(
            f"prepare_qat: method must be 'dynamic' or 'weight_only', got {method!r}; a static scale would not "
            f"follow the training"
        )
    linears, report = _selected(model, method, skip)
    made = {name: _int8_layer(linear, method, None, None) for name, linear in linears.items()}
    with Changes() as changes:
        for name, layer in made.items():
            changes.module(model, name, layer)
    report.quantized = list(made)
    report.bytes_after = report.bytes_before
    return report


def freeze(model: nn.Module) -> nn.Module:
    """Put int8 codes in the place of every Int8Linear's weight. Raises ValueError if there is none."""
    with Changes() as changes:
        _freeze(model, changes)
    return model


def _freeze(model: nn.Module, changes: Changes) -> None:
    found = [module for module in model.modules() if isinstance(module, Int8Linear)]
    if not found:
        raise ValueError(
            f"freeze: there is no Int8Linear in this {type(model).__name__}; quantize or prepare_qat first"
        )
    for layer in found:
        if not layer.is_frozen:
            changes.make(layer.freeze, partial(_thaw, layer, layer.weight, layer._float))
    record(model, changes)


def _thaw(layer: Int8Linear, weight: nn.Parameter, dtype: torch.dtype | None) -> None:
    layer.weight, layer.weight_scale, layer._float = weight, None, dtype


def dequantize(model: nn.Module) -> nn.Module:
    """Make every Int8Linear an nn.Linear again, with what its codes stand for. Raises ValueError if there is none.

    An error, or Ctrl-C, leaves the model as it was.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    if not found:
        raise ValueError(f"dequantize: there is no Int8Linear in this {type(model).__name__}")
    made = {name: layer.to_linear() for name, layer in found.items()}
    with Changes() as changes:
        for name, linear in made.items():
            changes.module(model, name, linear)
        record(model, changes)
    return model


def record(model: nn.Module, changes: Changes) -> None:
    """Have the ``save_pretrained`` of transformers' models in ``model`` write what is int8 now into config.json."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if not hasattr(module, "base_model_prefix") or config is None:
            continue  # no PreTrainedModel of transformers
        entry = quantization_config(module, prefix=f"{module.base_model_prefix}.")
        quantizer = getattr(module, "hf_quantizer", None)
        if entry is not None:
            changes.item(config.__dict__, "quantization_config", entry)
        elif quantizer is not None:  # from_pretrained made it int8, and knows what else says so
            for owner in (config, module, quantizer):
                for name in _OF_QUANTIZERS & owner.__dict__.keys():
                    changes.item(owner.__dict__, name, owner.__dict__[name])  # so that it is put back
            quantizer.remove_quantization_config(module)
        elif hasattr(config, "quantization_config"):
            changes.item(config.__dict__, "quantization_config", Changes.DELETED)


# What transformers' `HfQuantizer.remove_quantization_config` deletes of a model and its config.
_OF_QUANTIZERS = {
    "hf_quantizer",
    "quantization_config",
    "_pre_quantization_dtype",
    "quantization_method",
    "is_quantized",
}


def _selected(
    model: nn.Module, method: str, skip: Sequence[str]
) -> tuple[dict[str, nn.Linear], QuantizationReport]:
    if method not in METHODS:
        raise ValueError(f"quantize: unknown method {method!r}: expected one of {', '.join(METHODS)}")
    if isinstance(skip, str):
        raise ValueError(f"quantize: skip must be a list of names or patterns: write skip=[{skip!r}]")
    encoder = encoder_linears(model)
    unused = [pattern for pattern in skip if not any(fnmatchcase(name, pattern) for name in encoder)]
    if unused:
        raise ValueError(
            f"quantize: no linear layer of the encoder fits {unused[0]!r}; there are {sorted(encoder)[:3]} ..."
        )
    report = QuantizationReport(method, bytes_before=_weight_bytes(model))
    chosen: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if name in encoder and not isinstance(module, Int8Linear):
            if any(fnmatchcase(name, pattern) for pattern in skip):
                report.skipped[name] = "skip"
            else:
                assert isinstance(module, nn.Linear)
                chosen[name] = module
        elif isinstance(module, nn.Linear | nn.Embedding):
            report.skipped[name] = "not in an encoder layer"
    if not chosen:
        already = any(isinstance(module, Int8Linear) for module in model.modules())
        why = "it is quantized already" if already else "it has no nn.Linear inside a ModuleList of layers"
        raise ValueError(f"quantize: there is nothing to quantize in this {type(model).__name__}: {why}")
    return chosen, report


def _static_scale(
    seen: Calibration, name: str, observer: Observer, percent: float, smoothing: Tensor | None
) -> float:
    if smoothing is None:
        return seen.input_scale(name, observer, percent)
    # The histogram is of the input before smoothing: only the channels' largest values are known after it.
    return (seen.inputs[name].channel_amax * smoothing).max().item() / 127 or 1.0


@torch.no_grad()
def _int8_layer(
    linear: nn.Linear, method: Method, input_scale: float | None, smoothing: Tensor | None
) -> Int8Linear:
    module = Int8Linear.from_linear(linear, method=method, input_scale=input_scale)
    if smoothing is not None:
        module.smooth_scale = smoothing
        weight = linear.weight
        module.weight = nn.Parameter((weight.float() / smoothing).to(weight.dtype), weight.requires_grad)
    return module


def _weight_bytes(model: nn.Module) -> int:
    total = 0
    for module in encoder_linears(model).values():
        tensors = [getattr(module, name, None) for name in ("weight", "weight_scale", "smooth_scale")]
        total += sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return total
