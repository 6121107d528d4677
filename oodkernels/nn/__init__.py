"""What one puts in a network: heads and losses, and the files of weights."""

from oodkernels.nn.gan import (
    Discriminator,
    Generator,
    JointGANLoss,
    discriminator_loss,
    generator_loss,
    joint_gan_loss,
)
from oodkernels.nn.heads import Head
from oodkernels.nn.losses import (
    AbsentClassLoss,
    ConfidenceLoss,
    EnergyBoundedLoss,
    LogitNormLoss,
    ObjectosphereLoss,
    OutlierExposureLoss,
    absent_class_loss,
    confidence_loss,
    energy_bounded_loss,
    logit_norm_loss,
    objectosphere_loss,
    outlier_exposure_loss,
)
from oodkernels.nn.mos import MOSHead, MOSLoss
from oodkernels.nn.weights import Weights, align_names, load_into, read_weights, save_weights

__all__ = [
    "AbsentClassLoss",
    "ConfidenceLoss",
    "Discriminator",
    "EnergyBoundedLoss",
    "Generator",
    "Head",
    "JointGANLoss",
    "LogitNormLoss",
    "MOSHead",
    "MOSLoss",
    "ObjectosphereLoss",
    "OutlierExposureLoss",
    "Weights",
    "absent_class_loss",
    "align_names",
    "confidence_loss",
    "discriminator_loss",
    "energy_bounded_loss",
    "generator_loss",
    "joint_gan_loss",
    "load_into",
    "logit_norm_loss",
    "objectosphere_loss",
    "outlier_exposure_loss",
    "read_weights",
    "save_weights",
]
