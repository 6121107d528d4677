"""OOD detectors: one interface, higher = more in-distribution.

``DETECTORS`` has them all by their short names.
"""

from oodkernels.detectors.abnormality import AbnormalityModule
from oodkernels.detectors.adapter import PytorchOODDetector, as_pytorch_ood
from oodkernels.detectors.base import Batch, NotFittedError, OODDetector, Prediction, score_all
from oodkernels.detectors.knn import KNN
from oodkernels.detectors.logits import (
    MOS,
    MSP,
    AbsentClass,
    ConfidenceBranch,
    Energy,
    Entropy,
    MaxLogit,
    MOSLogOdds,
)
from oodkernels.detectors.mahalanobis import Mahalanobis
from oodkernels.detectors.model import FeatureModel, Outputs, extract
from oodkernels.detectors.odin import ODIN

DETECTORS: dict[str, type[OODDetector]] = {
    detector.name: detector
    for detector in (
        MSP,
        MaxLogit,
        Energy,
        Entropy,
        ODIN,
        Mahalanobis,
        MOS,
        MOSLogOdds,
        AbsentClass,
        ConfidenceBranch,
        AbnormalityModule,
        KNN,
    )
}
"""Short name -> class."""

__all__ = [
    "DETECTORS",
    "KNN",
    "MOS",
    "MSP",
    "ODIN",
    "AbnormalityModule",
    "AbsentClass",
    "Batch",
    "ConfidenceBranch",
    "Energy",
    "Entropy",
    "FeatureModel",
    "MOSLogOdds",
    "Mahalanobis",
    "MaxLogit",
    "NotFittedError",
    "OODDetector",
    "Outputs",
    "Prediction",
    "PytorchOODDetector",
    "as_pytorch_ood",
    "extract",
    "score_all",
]
