"""Detectors behind pytorch-ood's interface, where a larger score means OOD."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oodkernels.detectors.base import OODDetector
from oodkernels.detectors.batch import Features

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PytorchOODDetector", "as_pytorch_ood"]


class PytorchOODDetector:
    """A detector with the methods of ``pytorch_ood.api.Detector`` (0.4): outlier scores.

    ``predict...`` gives (N,) scores, larger = more out-of-distribution: the detector's, negated.

    Attributes:
        detector: The :class:`OODDetector`.
        model: Its model.
        requires_fit: Whether it has to be fitted.
    """

    def __init__(self, detector: OODDetector) -> None:
        self.detector = detector

    @property
    def model(self) -> object:
        """The detector's model, or None."""
        return self.detector.model

    @property
    def requires_fit(self) -> bool:
        """Whether the detector has to be fitted."""
        return bool(self.detector.trained_on)

    def to(self, device: torch.device | str) -> Self:
        """Move what was fitted."""
        self.detector.to(device)
        return self

    def fit(self, data_loader: Iterable[Sequence[Tensor]]) -> Self:
        """Fit on batches (x, y); y < 0 marks OOD samples, which are left out."""
        self.detector.fit(data_loader)
        return self

    def fit_features(self, x: Tensor, y: Tensor) -> Self:
        """Fit on features (N, d) and labels (N,)."""
        self.detector.fit(features=x, labels=y)
        return self

    def fit_logits(self, logits: Tensor, y: Tensor) -> Self:
        """Fit on logits (N, C) and labels (N,)."""
        self.detector.fit(logits=logits, labels=y)
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Outlier scores of inputs, through the model."""
        return -self.detector.score(x)

    def predict_features(self, x: Features) -> Tensor:
        """Outlier scores of features (N, d)."""
        return -self.detector.score(features=x)

    def predict_logits(self, logits: Tensor) -> Tensor:
        """Outlier scores of logits (N, C)."""
        return -self.detector.score(logits=logits)

    __call__ = predict

    def __repr__(self) -> str:
        return f"as_pytorch_ood({self.detector!r})"


def as_pytorch_ood(detector: OODDetector) -> PytorchOODDetector:
    """The detector as pytorch-ood's code expects one: fit, predict, larger = OOD.

    Where pytorch-ood is installed it is an instance of its ``Detector``. There labels below 0 all
    mark OOD samples, here -1 does.

    Raises:
        TypeError: ``detector`` is not an :class:`OODDetector`.
    """
    if not isinstance(detector, OODDetector):
        raise TypeError(
            f"as_pytorch_ood: detector must be an OODDetector, got {type(detector).__name__}"
        )
    try:
        api = import_module("pytorch_ood.api")
    except ImportError:  # of it, or of what it needs: then nobody can ask
        return PytorchOODDetector(detector)
    api.Detector.register(PytorchOODDetector)
    return PytorchOODDetector(detector)
