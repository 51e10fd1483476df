"""The loss of masked-language models; the public functions are in :mod:`pyaccel.ops`."""
