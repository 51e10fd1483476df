"""Modules that keep the parameter names of what they replace."""

from pyaccel.nn.int8_linear import Int8Linear
from pyaccel.nn.observed_linear import ObservedLinear
from pyaccel.nn.residual_layernorm import ResidualLayerNorm

__all__ = ["Int8Linear", "ObservedLinear", "ResidualLayerNorm"]
