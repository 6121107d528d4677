"""Fast, exact out-of-distribution detection: C++/CUDA kernels for PyTorch."""

from oodkernels._extension import build_info

__all__ = ["build_info"]
