"""The demo: flat softmax against MOS on small real images, from training to table.

Three models share data, backbone, initial weights, recipe and order of the images, and differ in
head and loss: flat softmax, MOS with random groups, and MOS with groups found by clustering the
flat model's features (Huang & Li, CVPR 2021). The OOD sets are seen at test time only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from oodkernels import data
from oodkernels.detectors import MOS, MSP, Energy, MaxLogit, MOSLogOdds, OODDetector
from oodkernels.evaluation import Evaluation, combine, evaluate
from oodkernels.groups import Groups
from oodkernels.models import SmallConvNet, zero_linear
from oodkernels.nn import MOSHead
from oodkernels.objectives import MOSObjective, Objective, SoftmaxObjective
from oodkernels.training import TrainConfig, Trainer, reproducible, tensor_loader

ID_SET = "digits"
NUM_CLASSES = 10
FLAT, MOS_RANDOM, MOS_FEATURES = "flat", "MOS random", "MOS features"
STAGES = (FLAT, MOS_RANDOM, MOS_FEATURES)

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Settings:
    """What a run depends on: on one machine, the same settings give the same numbers.

    Attributes:
        seed: Of the train/test split, the initial weights, the order of training images, the
            random groups and the clustering; 0 or more.
        num_groups: Groups of the two MOS models, 2 to 10.
        recipe: Training, the same for all three models but for objective and seed.
        batch_size: Images a step; what is left over at the end of an epoch is skipped.
    """

    seed: int = 0
    num_groups: int = 3
    recipe: TrainConfig = field(default_factory=lambda: TrainConfig(accelerator="cpu"))
    batch_size: int = 64


@dataclass(frozen=True)
class DemoResult:
    """Everything a run found out, and the test images for the report to show.

    Attributes:
        settings: What was run.
        num_train: Number of training images.
        images: Test set -> (N, 8, 8) grey values in [0, 1]; the ID set comes first.
        evaluation: Every method's scores of every image, and the table.
    """

    settings: Settings
    num_train: int
    images: dict[str, NDArray[Any]]
    evaluation: Evaluation


def run(
    settings: Settings | None = None, on_epoch: Progress = lambda stage, epoch: None
) -> DemoResult:
    """Train and evaluate on the CPU, in one thread; leave torch's global state as it was.

    Args:
        settings: What to run.
        on_epoch: Called after each epoch with the model (one of ``STAGES``) and the number of
            epochs done.
    """
    settings = settings or Settings()
    with reproducible(settings.seed):
        return _run(settings, on_epoch)


def _run(settings: Settings, on_epoch: Progress) -> DemoResult:
    seed, k = settings.seed, settings.num_groups
    digits = data.digits(seed)
    sets = {ID_SET: digits.test_images, **data.ood_sets()}

    loader = tensor_loader(
        digits.train_images,
        digits.train_labels,
        batch_size=settings.batch_size,
        shuffle=True,
        drop_last=True,
    )

    def fit(stage: str, head: Callable[[int], nn.Module], objective: Objective) -> SmallConvNet:
        with reproducible(seed):
            model = SmallConvNet(head)
        recipe = replace(settings.recipe, seed=seed)
        Trainer(model, objective, recipe, on_epoch=partial(on_epoch, stage)).fit(loader)
        return model

    def evaluated(stage: str, model: nn.Module, detectors: Mapping[str, OODDetector]) -> Evaluation:
        batch = (sets[ID_SET], digits.test_labels)
        ood = {name: images for name, images in sets.items() if name != ID_SET}
        return evaluate(model, [batch], ood, detectors, model_name=stage)

    flat = fit(FLAT, lambda features: zero_linear(features, NUM_CLASSES), SoftmaxObjective())
    detectors = {"MSP": MSP(), "max logit": MaxLogit(), "energy": Energy()}
    found = [evaluated(FLAT, flat, detectors)]
    with torch.no_grad():
        features = flat.features(digits.train_images)
    means = [features[digits.train_labels == c].mean(0) for c in range(NUM_CLASSES)]
    for stage, groups in (
        (MOS_RANDOM, Groups.random(NUM_CLASSES, k, seed=seed)),
        (MOS_FEATURES, Groups.from_features(torch.stack(means), k, seed=seed)),
    ):
        model = fit(stage, partial(MOSHead, groups=groups), MOSObjective(groups))
        found.append(evaluated(stage, model, {"MOS": MOS(groups), "log-odds": MOSLogOdds(groups)}))

    return DemoResult(
        settings=settings,
        num_train=len(digits.train_labels),
        images={name: x[:, 0].numpy() for name, x in sets.items()},
        evaluation=combine(*found),
    )
