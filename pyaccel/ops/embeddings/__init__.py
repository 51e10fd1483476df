"""BERT's embeddings: lookups, LayerNorm and dropout; the public functions are in :mod:`pyaccel.ops`."""
