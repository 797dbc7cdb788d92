"""The backend for CUDA tensors: kernels in C++ around torch's GEMMs, and fused GEMMs on Hopper."""

from igva_kernels.backends.cuda.backend import CudaBackend

__all__ = ["BACKEND", "CudaBackend"]

BACKEND = CudaBackend()
