"""pytorch-ood's modules, without what its package as a whole imports (torchvision and more)."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest


def root() -> types.ModuleType:
    """``pytorch_ood`` without its content; skips the test where it is not installed."""
    if "pytorch_ood" not in sys.modules:
        found = importlib.util.find_spec("pytorch_ood")
        if found is None or not found.submodule_search_locations:
            pytest.skip("needs pytorch-ood")
        package = types.ModuleType("pytorch_ood")
        package.__path__ = list(found.submodule_search_locations)
        package.__spec__ = found
        sys.modules["pytorch_ood"] = package
    return sys.modules["pytorch_ood"]


def pytorch_ood(module: str) -> types.ModuleType:
    """``pytorch_ood.<module>``; skips the test where it is not installed."""
    root()
    return pytest.importorskip(f"pytorch_ood.{module}", exc_type=ImportError)
