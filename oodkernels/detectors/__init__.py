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
from oodkernels.detectors.adascale import AdaSCALEA, AdaSCALEL
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
from oodkernels.detectors.compose import Composed
from oodkernels.detectors.covariance import Mahalanobis
from oodkernels.detectors.coverage import NAC, MCDropout
from oodkernels.detectors.ensembles import Ensemble, LayerEnsemble
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
from oodkernels.detectors.magnitude import Objectosphere
from oodkernels.detectors.maps import Gram, RankFeat
from oodkernels.detectors.mixtures import GMM
from oodkernels.detectors.model import (
    FeatureModel,
    Model,
    Outputs,
    OutputsModule,
    Walk,
    extract,
    run,
)
from oodkernels.detectors.mos import MOSClass
from oodkernels.detectors.passes import predict_batch, score_batch
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
from oodkernels.detectors.sweeps import sweep
from oodkernels.detectors.tuning import Figures, SweptDetector, Tuning
from oodkernels.detectors.walk import fit_detectors

__all__ = [
    "ASHB",
    "ASHP",
    "ASHS",
    "DETECTORS",
    "DICE",
    "FAMILIES",
    "FDBD",
    "GEN",
    "GMM",
    "KNN",
    "LTS",
    "MCM",
    "MOS",
    "MSP",
    "NAC",
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
    "AdaSCALEA",
    "AdaSCALEL",
    "Batch",
    "CADRef",
    "ClassStatistics",
    "CoP",
    "CoRP",
    "Composed",
    "ConfidenceBranch",
    "DetectorSpec",
    "Energy",
    "Ensemble",
    "Entropy",
    "FeatureModel",
    "Figures",
    "GradNorm",
    "Gram",
    "Head",
    "HeadDetector",
    "KLMatching",
    "LayerEnsemble",
    "MCDropout",
    "MOSClass",
    "MOSLogOdds",
    "Mahalanobis",
    "MahalanobisPlusPlus",
    "MaxLogit",
    "Model",
    "NNGuide",
    "NotFittedError",
    "OODDetector",
    "Objectosphere",
    "OpenMax",
    "OptFS",
    "Option",
    "Outputs",
    "OutputsModule",
    "Prediction",
    "PytorchOODDetector",
    "RMDSPlusPlus",
    "RankFeat",
    "ReAct",
    "Relation",
    "Residual",
    "SweptDetector",
    "TemperatureScaling",
    "Tuning",
    "ViM",
    "Walk",
    "WeightedEnergy",
    "applicable",
    "as_pytorch_ood",
    "extract",
    "fit_detectors",
    "linear_head",
    "predict_batch",
    "register",
    "run",
    "score_all",
    "score_batch",
    "sweep",
]
