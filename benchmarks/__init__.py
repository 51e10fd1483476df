"""Measurements: cases x variants, each checked for correctness in the run that times it."""
