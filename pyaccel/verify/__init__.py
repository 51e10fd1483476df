"""Proofs that users can run on their own machine: what machine code the kernels compile to."""
