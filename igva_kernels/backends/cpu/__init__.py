"""The CPU backend: C++ kernels for what moves memory, torch's GEMMs on row blocks for what computes.

Importing it never fails; where the compiled module is missing, ``why_not`` says so.
"""

from igva_kernels.backends.cpu.backend import CpuBackend

BACKEND = CpuBackend()
