"""OOD detectors: one interface, higher = more in-distribution.

``DETECTORS`` has them all by their short names.
"""

from oodkernels.detectors.adapter import PytorchOODDetector, as_pytorch_ood
from oodkernels.detectors.base import Batch, NotFittedError, OODDetector, Prediction, score_all
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
        MOS,
        MOSLogOdds,
        AbsentClass,
        ConfidenceBranch,
    )
}
"""Short name -> class."""

__all__ = [
    "DETECTORS",
    "MOS",
    "MSP",
    "ODIN",
    "AbsentClass",
    "Batch",
    "ConfidenceBranch",
    "Energy",
    "Entropy",
    "FeatureModel",
    "MOSLogOdds",
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
