"""Dropout, residual sum and LayerNorm; the public functions are in :mod:`pyaccel.ops`."""
