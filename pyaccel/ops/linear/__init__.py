"""Linear layers with what follows them; the public functions are in :mod:`pyaccel.ops`."""
