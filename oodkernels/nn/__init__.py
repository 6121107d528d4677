"""What one puts in a network: heads and losses."""

from oodkernels.nn.heads import Head
from oodkernels.nn.losses import (
    AbsentClassLoss,
    ConfidenceLoss,
    Discriminator,
    EnergyBoundedLoss,
    Generator,
    JointGANLoss,
    OutlierExposureLoss,
    absent_class_loss,
    confidence_loss,
    discriminator_loss,
    energy_bounded_loss,
    generator_loss,
    joint_gan_loss,
    outlier_exposure_loss,
)
from oodkernels.nn.mos import MOSHead, MOSLoss

__all__ = [
    "AbsentClassLoss",
    "ConfidenceLoss",
    "Discriminator",
    "EnergyBoundedLoss",
    "Generator",
    "Head",
    "JointGANLoss",
    "MOSHead",
    "MOSLoss",
    "OutlierExposureLoss",
    "absent_class_loss",
    "confidence_loss",
    "discriminator_loss",
    "energy_bounded_loss",
    "generator_loss",
    "joint_gan_loss",
    "outlier_exposure_loss",
]
