"""transformers' own way to int8: ``from_pretrained(..., quantization_config=PyaccelInt8Config())``, and reloading.

Importing this module registers both classes under "pyaccel_int8". A floating checkpoint is loaded as it is and
quantized in place afterwards, by :func:`pyaccel.quantization.quantize`: what that function makes of a model and what
``from_pretrained`` makes of its folder are the same bits, and nothing depends on how a release of transformers
converts weights while it reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyaccel.nn.int8_files import QUANT_METHOD, make_int8
from pyaccel.quantization import dequantize, freeze, quantize


@register_quantization_config(QUANT_METHOD)
class PyaccelInt8Config(QuantizationConfigMixin):
    """int8 linear layers in the encoder of a model that ``from_pretrained`` loads.

    Args:
        method: "dynamic" or "weight_only", as of :func:`pyaccel.quantization.quantize`. Static scales and SmoothQuant
            need data: quantize a loaded model with that function and save it; the folder loads without arguments.
        skip: names or patterns of layers to leave in floating point, as of that function.
        modules: of a quantized folder: the encoder's int8 layers, name -> method. Not to be given by hand.
        smoothed: of a quantized folder: those of them whose input is smoothed.

    Raises:
        ValueError: another method, or arguments that are unknown.
    """

    def __init__(
        self,
        method: str = "dynamic",
        skip: Sequence[str] = (),
        *,
        modules: Mapping[str, str] | None = None,
        smoothed: Sequence[str] = (),
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(f"PyaccelInt8Config: unknown arguments {', '.join(sorted(unknown))}")
        if quant_method != QUANT_METHOD:
            raise ValueError(f"PyaccelInt8Config: of {QUANT_METHOD!r}, got {quant_method!r}")
        if isinstance(skip, str):
            raise ValueError(
                f"PyaccelInt8Config: skip must be a list of names or patterns: write skip=[{skip!r}]"
            )
        if modules is None and method not in ("dynamic", "weight_only"):
            hint = (
                "quantize a loaded model with pyaccel.quantization.quantize(model, 'static', calibration=...)"
            )
            raise ValueError(
                f"PyaccelInt8Config: method must be 'dynamic' or 'weight_only', got {method!r}"
                + (f"; static scales need data: {hint}" if method == "static" else "")
            )
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.method = method
        self.skip = list(skip)
        self.modules = None if modules is None else dict(modules)
        self.smoothed = list(smoothed)

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` gets."""
        values: dict[str, Any] = {"quant_method": self.quant_method}
        if self.modules is None:
            values |= {"method": self.method, "skip": self.skip}
        else:
            values["modules"] = self.modules
        return values | ({"smoothed": self.smoothed} if self.smoothed else {})

    def to_diff_dict(self) -> dict[str, Any]:
        """As :meth:`to_dict`, which leaves defaults out already."""
        return self.to_dict()


@register_quantizer(QUANT_METHOD)
class PyaccelInt8Quantizer(HfQuantizer):
    """What transformers calls while it loads a model; users have :class:`PyaccelInt8Config`."""

    requires_calibration = False
    quantization_config: PyaccelInt8Config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            make_int8(model.base_model, self.quantization_config.to_dict())
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            freeze(model)
        else:
            config = self.quantization_config
            quantize(model, config.method, skip=config.skip, progress=False)  # type: ignore[arg-type]
            self.quantization_config = model.config.quantization_config = PyaccelInt8Config(
                **model.config.quantization_config
            )
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return dequantize(model).to(dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        # Gradients pass through int8 layers to adapters; their own weights stay.
        return True

    @property
    def is_compileable(self) -> bool:
        return True
