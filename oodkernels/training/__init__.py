"""Training with an objective, and the mining of outliers."""

from oodkernels.training._batches import tensor_loader
from oodkernels.training._random import reproducible
from oodkernels.training.base import Context, Objective, ObjectiveSpec, register
from oodkernels.training.checkpoint import load_checkpoint, load_weights
from oodkernels.training.config import TrainConfig
from oodkernels.training.mining import (
    MINERS,
    DOSMiner,
    MiningLog,
    NTOMMiner,
    OutlierMiner,
    POEMMiner,
    ScoreHistogram,
    UniformMiner,
)
from oodkernels.training.objectives import (
    OBJECTIVES,
    AbnormalityObjective,
    AbsentClassObjective,
    ConfidenceObjective,
    DOSObjective,
    EnergyBoundedObjective,
    MOSObjective,
    MOSOutlierObjective,
    NTOMObjective,
    OutlierExposureObjective,
    OutlierObjective,
    POEMObjective,
    PoolObjective,
    SoftmaxObjective,
    SyntheticObjective,
    make_objective,
)
from oodkernels.training.open_set import (
    EntropicOpenSetObjective,
    LogitNormObjective,
    ObjectosphereObjective,
    VOSObjective,
)
from oodkernels.training.trainer import FitResult, Trainer

__all__ = [
    "MINERS",
    "OBJECTIVES",
    "AbnormalityObjective",
    "AbsentClassObjective",
    "ConfidenceObjective",
    "Context",
    "DOSMiner",
    "DOSObjective",
    "EnergyBoundedObjective",
    "EntropicOpenSetObjective",
    "FitResult",
    "LogitNormObjective",
    "MOSObjective",
    "MOSOutlierObjective",
    "MiningLog",
    "NTOMMiner",
    "NTOMObjective",
    "Objective",
    "ObjectiveSpec",
    "ObjectosphereObjective",
    "OutlierExposureObjective",
    "OutlierMiner",
    "OutlierObjective",
    "POEMMiner",
    "POEMObjective",
    "PoolObjective",
    "ScoreHistogram",
    "SoftmaxObjective",
    "SyntheticObjective",
    "TrainConfig",
    "Trainer",
    "UniformMiner",
    "VOSObjective",
    "load_checkpoint",
    "load_weights",
    "make_objective",
    "register",
    "reproducible",
    "tensor_loader",
]
