"""The NumPy engine: it computes on the CPU, and is the oracle of the kernels."""
