"""Training mode for what is trained, and each module's own mode afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def own_modes(model: nn.Module) -> Iterator[None]:
    """On leaving, each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def train(model: nn.Module) -> None:
    """Put a model into training mode, but for parts that are not to be trained.

    Where it is in training mode itself, parts that are in evaluation mode stay there. Where it is
    in evaluation mode as a whole, the parts that stay there are those whose parameters are frozen.
    """
    if not model.training:
        _train(model)


def _train(module: nn.Module) -> None:
    frozen = [not parameter.requires_grad for parameter in module.parameters()]
    if frozen and all(frozen):
        return
    module.training = True
    for child in module.children():
        _train(child)
