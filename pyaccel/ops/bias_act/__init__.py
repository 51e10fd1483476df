"""Bias and activation; the public functions are in :mod:`pyaccel.ops`."""
