"""The backends: each executes the operator with its own kernels, and inherits the rest from ``base.Backend``."""
