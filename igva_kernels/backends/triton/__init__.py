"""The Triton backend: the GPU path that needs no compiler on the user's machine.

Importing it never fails and touches no driver; where Triton is missing, ``why_not`` says so.
"""

from igva_kernels.backends.triton.backend import TritonBackend

BACKEND = TritonBackend()
