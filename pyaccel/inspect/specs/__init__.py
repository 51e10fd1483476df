"""The kernels of each family with the arguments of real calls, to be compiled."""
