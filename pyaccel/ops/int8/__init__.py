"""int8: quantizing, products and linear layers; the public functions are in :mod:`pyaccel.ops`."""
