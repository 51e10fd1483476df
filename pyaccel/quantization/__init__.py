"""int8 encoders: calibration, conversion, training with int8 in the loop, and back.

    report = pyaccel.quantization.quantize(model)                          # dynamic: no data needed
    report = pyaccel.quantization.quantize(model, "static", calibration=loader, smooth=True)
    pyaccel.quantization.dequantize(model)

For our BertModel and Hugging Face encoders, before or after `pyaccel.accelerate`.
"""

from pyaccel.quantization.calibrate import Calibration, calibrate
from pyaccel.quantization.convert import QuantizationReport, dequantize, freeze, prepare_qat, quantize
from pyaccel.quantization.sensitivity import Sensitivity, sensitivity

__all__ = [
    "Calibration",
    "QuantizationReport",
    "Sensitivity",
    "calibrate",
    "dequantize",
    "freeze",
    "prepare_qat",
    "quantize",
    "sensitivity",
]
