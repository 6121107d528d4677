"""Heads on frozen features: each method tries as many settings, and validation data choose."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oodkernels.data import open_samples
from oodkernels.demo.methods import DETECTOR_OPTIONS, METHODS, Settings
from oodkernels.detectors import DETECTORS, OODDetector
from oodkernels.groups import Groups
from oodkernels.metrics import ood_metrics
from oodkernels.nn import Head
from oodkernels.ops import mos_predict
from oodkernels.training import (
    OBJECTIVES,
    TrainConfig,
    Trainer,
    make_objective,
    reproducible,
    tensor_loader,
)

__all__ = [
    "Choice",
    "Features",
    "Task",
    "answers",
    "choose",
    "choose_each",
    "fit_head",
    "make_detector",
    "of_classes",
    "read_features",
]

Features = Mapping[str, tuple[Tensor, Tensor]]
"""Set -> features (N, d) and labels (N,)."""


class Choice(NamedTuple):
    """A head, and what was tried for it."""

    head: Head
    setting: Mapping[str, Any]
    tried: list[dict[str, Any]]
    """Settings with AUROC and accuracy on the validation sets."""


def fit_head(
    features: Features,
    settings: Settings,
    name: str,
    classes: Tensor,
    groups: Groups | None,
    setting: Mapping[str, Any],
) -> Head:
    """A head trained on features.

    Args:
        features: As :meth:`Study.features` has them.
        settings: Steps, batch and seed.
        name: Of the method.
        classes: Labels that it is trained on.
        groups: Of the classes; None for a flat head.
        setting: The learning rate, and options of the objective.
    """
    options = dict(setting)
    method, lr = METHODS[name], options.pop("lr")
    x, y = of_classes(features, "train", classes)
    objective = make_objective(method.objective, options)
    absent = "absent class" in OBJECTIVES[method.objective].needs
    columns = groups.width if groups is not None else len(classes) + absent
    head = Head(x.shape[1], columns, groups, absent=absent)
    config = TrainConfig(
        steps=settings.steps,
        lr=lr,
        warmup=settings.steps // 40,
        accelerator="cpu",
        seed=settings.seed,
        log_every=settings.steps,
    )
    load = partial(tensor_loader, shuffle=True, drop_last=True)
    size = min(settings.batch, len(x))
    outliers = features["outliers"][0]
    many = min(method.outliers * size, len(outliers))
    Trainer(head, objective, config).fit(
        load(x, y, batch_size=size), load(outliers, batch_size=many) if many else None
    )
    return head


class Task(NamedTuple):
    """A head to be had."""

    method: str
    """Key of :data:`METHODS`."""
    classes: Tensor
    """Labels that it is trained on, ascending."""
    groups: Groups | None
    """Those of the classes; None for a flat head."""
    tried: Sequence[Mapping[str, Any]]
    """Settings, each the learning rate and options of the objective."""


def choose(features: Features, settings: Settings, task: Task) -> Choice:
    """The best of the heads of several settings, by AUROC against the validation's OOD set."""
    name, classes, groups, tried = task
    best: tuple[float, Head, Mapping[str, Any]] | None = None
    record = []
    with reproducible(settings.seed), warnings.catch_warnings():
        # Of rates that are too large, which are tried on purpose.
        warnings.filterwarnings("ignore", "Trainer.fit: after an epoch the loss is")
        for setting in tried:
            head = fit_head(features, settings, name, classes, groups, setting)
            detector = make_detector(METHODS[name].score, head)
            x, y = of_classes(features, "validation", classes)
            with torch.no_grad():
                inside, outside = head(x), head(features["validation_ood"][0])
            found = ood_metrics(detector.score(logits=inside), detector.score(logits=outside))
            accuracy = float((answers(head, inside) == y).double().mean())
            record.append({**setting, "auroc": found.auroc, "accuracy": accuracy})
            if best is None or found.auroc > best[0]:
                best = found.auroc, head, setting
    assert best is not None
    return Choice(best[1], best[2], record)


def choose_each(
    folder: Path, settings: Settings, tasks: Sequence[Task], done: Callable[[int], None]
) -> Iterator[Choice]:
    """:func:`choose` for tasks, in several processes if the settings say so.

    Args:
        folder: Of the features.
        settings: Steps, batch, seed and processes.
        tasks: What for.
        done: Told the number of tasks done.
    """
    jobs = min(settings.jobs, len(tasks))
    done(0)
    if jobs > 1:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(jobs, context, _begin, (folder, settings))
        found: Iterable[Choice] = pool.map(_in_process, tasks)
    else:
        features, pool = read_features(folder), None
        found = (choose(features, settings, task) for task in tasks)
    try:
        for i, choice in enumerate(found):
            done(i + 1)
            yield choice
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


_here: tuple[Features, Settings] | None = None


def _begin(folder: Path, settings: Settings) -> None:
    global _here
    _here = read_features(folder), settings


def _in_process(task: Task) -> Choice:
    assert _here is not None
    return choose(*_here, task)


def read_features(folder: Path) -> Features:
    """The features in the files of a folder."""
    found = {path.stem: open_samples(path) for path in sorted(folder.glob("*.safetensors"))}
    return {name: (s.read("features"), s.read("labels")) for name, s in found.items()}


def of_classes(features: Features, name: str, classes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Samples of these classes alone, labelled from 0 on."""
    x, y = features[name]
    if classes is None or len(classes) == int(y.max()) + 1:
        return x, y
    rows = torch.isin(y, classes)
    return x[rows], torch.searchsorted(classes, y[rows])


def make_detector(name: str, head: Head) -> OODDetector:
    """A detector that reads what a head says."""
    found: OODDetector = DETECTORS[name].spec.make(
        "oodk demo", DETECTOR_OPTIONS.get(name), groups=head.groups, model=head
    )
    return found


def answers(head: Head, logits: Tensor) -> Tensor:
    """Predicted labels."""
    if head.groups is not None:
        return head.groups.to_class(mos_predict(logits, head.groups).label)
    return logits[:, : head.num_classes].argmax(1)
