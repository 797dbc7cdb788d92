"""The benchmark suite: ``python -m benchmarks --help``. It is part of a checkout, not of the installed package."""
