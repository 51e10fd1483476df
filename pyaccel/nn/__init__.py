"""Modules that keep the parameter names of what they replace."""

from pyaccel.nn.residual_layernorm import ResidualLayerNorm

__all__ = ["ResidualLayerNorm"]
