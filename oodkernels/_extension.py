"""Loads the compiled modules, which registers ``torch.ops.oodk.*``."""

from __future__ import annotations

import importlib.util
import warnings
from types import ModuleType

import torch

from oodkernels import _C


def _load_cuda() -> ModuleType | None:
    if torch.version.cuda is None or importlib.util.find_spec("oodkernels._cuda") is None:
        return None
    try:
        from oodkernels import _cuda
    except ImportError as error:
        warnings.warn(
            f"oodkernels._cuda is installed but could not be loaded, so CUDA tensors are not "
            f"supported: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return _cuda


_cuda = _load_cuda()


def build_info() -> dict[str, object]:
    """What this installation is made of and runs on.

    Returns:
        A dict with ``version``, ``compiler``, ``torch_built`` and ``torch`` (the version built
        against and the one running), ``cpu_capability`` (whose kernels run) and
        ``cpu_capabilities`` (all this processor can run), ``cuda`` (CUDA compiler version, None
        where the CUDA ops are not loaded), ``cuda_architectures`` and ``threads``.
    """
    cuda = _cuda.build_info() if _cuda else {}
    return {
        **_C.build_info(),
        "torch": torch.__version__,
        "cpu_capability": _C.cpu_capability(),
        "cpu_capabilities": _C.available_cpu_capabilities(),
        "cuda": cuda.get("compiler"),
        "cuda_architectures": cuda.get("architectures", "").split(",") if cuda else [],
        "threads": torch.get_num_threads(),
    }
