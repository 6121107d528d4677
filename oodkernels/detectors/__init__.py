"""OOD detectors: one interface, higher = more in-distribution.

``DETECTORS`` has them all by their short names.
"""

from oodkernels.detectors.abnormality import AbnormalityModule
from oodkernels.detectors.activations import (
    FDBD,
    LTS,
    NCI,
    PNML,
    SCALE,
    SHE,
    CADRef,
    GradNorm,
)
from oodkernels.detectors.adapter import PytorchOODDetector, as_pytorch_ood
from oodkernels.detectors.bank import KNN, MCM, NNGuide, Relation
from oodkernels.detectors.base import (
    DETECTORS,
    NotFittedError,
    OODDetector,
    Prediction,
    register,
    score_all,
)
from oodkernels.detectors.batch import Batch
from oodkernels.detectors.choice import applicable
from oodkernels.detectors.covariance import Mahalanobis
from oodkernels.detectors.gaussians import RMDS, MahalanobisPlusPlus, RMDSPlusPlus
from oodkernels.detectors.gradients import ODIN
from oodkernels.detectors.head import Head, HeadDetector, linear_head
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
from oodkernels.detectors.model import FeatureModel, Model, Outputs, extract, run
from oodkernels.detectors.mos import MOSClass
from oodkernels.detectors.passes import score_batch
from oodkernels.detectors.probabilities import (
    GEN,
    KLMatching,
    OpenMax,
    TemperatureScaling,
    WeightedEnergy,
)
from oodkernels.detectors.shaping import ASHB, ASHP, ASHS, DICE, VRA, OptFS, ReAct
from oodkernels.detectors.specs import FAMILIES, DetectorSpec, Option
from oodkernels.detectors.statistics import ClassStatistics
from oodkernels.detectors.subspaces import NECO, CoP, CoRP, Residual, ViM

__all__ = [
    "ASHB",
    "ASHP",
    "ASHS",
    "DETECTORS",
    "DICE",
    "FAMILIES",
    "FDBD",
    "GEN",
    "KNN",
    "LTS",
    "MCM",
    "MOS",
    "MSP",
    "NCI",
    "NECO",
    "ODIN",
    "PNML",
    "RMDS",
    "SCALE",
    "SHE",
    "VRA",
    "AbnormalityModule",
    "AbsentClass",
    "Batch",
    "CADRef",
    "ClassStatistics",
    "CoP",
    "CoRP",
    "ConfidenceBranch",
    "DetectorSpec",
    "Energy",
    "Entropy",
    "FeatureModel",
    "GradNorm",
    "Head",
    "HeadDetector",
    "KLMatching",
    "MOSClass",
    "MOSLogOdds",
    "Mahalanobis",
    "MahalanobisPlusPlus",
    "MaxLogit",
    "Model",
    "NNGuide",
    "NotFittedError",
    "OODDetector",
    "OpenMax",
    "OptFS",
    "Option",
    "Outputs",
    "Prediction",
    "PytorchOODDetector",
    "RMDSPlusPlus",
    "ReAct",
    "Relation",
    "Residual",
    "TemperatureScaling",
    "ViM",
    "WeightedEnergy",
    "applicable",
    "as_pytorch_ood",
    "extract",
    "linear_head",
    "register",
    "run",
    "score_all",
    "score_batch",
]
