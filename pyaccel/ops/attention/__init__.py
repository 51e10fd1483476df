"""Attention, padded and packed; the public functions are in :mod:`pyaccel.ops`."""
