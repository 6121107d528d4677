"""Packages of the extras, imported where they are needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def require(module: str, extra: str, why: str) -> Any:
    """Import a module that an extra of this package brings.

    Args:
        module: Its dotted name, of which the first part is taken for the package's name.
        extra: The extra of ``oodkernels`` that installs it.
        why: What needs it; the message begins with it.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: It is not installed; the message says what to install.
        ImportError: It is installed and fails to load; the message has the cause.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name in (package, module)
        kind = ModuleNotFoundError if missing else ImportError
        found = "is not installed" if missing else f"could not be loaded ({error})"
        raise kind(
            f"{why} needs {package}, which {found}: pip install 'oodkernels[{extra}]'",
            name=package,
        ) from error
