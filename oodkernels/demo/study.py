"""The demo: every method on thousands of real classes, as the MOS paper does it.

One backbone is trained flat. Its features of all sets go to files, and every method trains a head
on them. Each may try as many settings, and what is chosen is what tells the validation's OOD set
best, whose characters are in no test set.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oodkernels.data import open_samples, save_arrays
from oodkernels.data.glyphs import GROUPS, Glyphs, GlyphSets
from oodkernels.demo.models import GlyphNet
from oodkernels.detectors import DETECTORS, OODDetector, applicable
from oodkernels.evaluation import Evaluation, Sweep, combine, evaluate, fit_detectors
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
    "DETECTOR_OPTIONS",
    "METHODS",
    "Choice",
    "Method",
    "Settings",
    "Study",
    "StudyResult",
    "fit_head",
    "run",
]

Progress = Callable[[str, int, int], None]
FLAT = "flat"
TAXONOMY, FEATURES, RANDOM = "MOS taxonomy", "MOS features", "MOS random"


@dataclass(frozen=True)
class Method:
    """How a head is trained, and what is tried.

    Attributes:
        objective: Name in :data:`oodkernels.training.OBJECTIVES`.
        what: What is learned, with its source.
        tried: Settings of which one is chosen: the learning rate and options of the objective.
        groups: "taxonomy", "features" or "random"; None for a flat head.
    """

    objective: str
    what: str
    tried: Sequence[Mapping[str, Any]]
    groups: str | None = None

    @property
    def score(self) -> str:
        """The detector by which settings are chosen, the objective's own."""
        return "mos-log-odds" if self.groups else OBJECTIVES[self.objective].scores[0]

    @property
    def outliers(self) -> int:
        """Outliers read for each training sample; 0 for a method that sees none."""
        spec = OBJECTIVES[self.objective]
        return spec.per_sample if "outliers" in spec.needs else 0


def _rates(*rates: float, **options: Any) -> list[dict[str, Any]]:
    return [{"lr": rate, **options} for rate in rates]


_MARGINS = [
    {"lr": lr, "m_in": m_in, "m_out": m_out}
    for lr in (0.03, 0.1)
    for m_in, m_out in ((-15.0, -8.0), (-25.0, -12.0))
]
_MOS_RATES = _rates(0.01, 0.03, 0.1, 0.3)
_FLAT_RATES = _rates(0.03, 0.1, 0.3, 1.0)

METHODS: dict[str, Method] = {
    FLAT: Method("softmax", "cross entropy over all classes", _FLAT_RATES),
    TAXONOMY: Method(
        "mos",
        "group softmax with an “others” class in each group, a block of Unicode (Huang & Li, CVPR "
        "2021)",
        _MOS_RATES,
        "taxonomy",
    ),
    FEATURES: Method(
        "mos", "the same, in groups of classes whose features are close", _MOS_RATES, "features"
    ),
    RANDOM: Method("mos", "the same, in groups at random", _MOS_RATES, "random"),
    "OE": Method(
        "oe",
        "Outlier Exposure: uniform answers on outliers (Hendrycks et al., ICLR 2019)",
        _FLAT_RATES,
    ),
    "energy-bounded": Method(
        "energy",
        "energies of characters and outliers are kept apart by margins (Liu et al., NeurIPS 2020)",
        _MARGINS,
    ),
    "absent class": Method(
        "absent-class", "one class more, for outliers as they come", _FLAT_RATES
    ),
    "NTOM": Method(
        "ntom",
        "one class more, for the hardest outliers but for a quantile (Chen et al., ECML 2021)",
        _rates(*(0.03, 0.1, 0.3, 1.0), per_sample=1.0, candidates=4000),
    ),
    "POEM": Method(
        "poem",
        "energies kept apart, with outliers near a boundary drawn by Thompson sampling (Ming et "
        "al., ICML 2022)",
        [{**tried, "candidates": 4000} for tried in _MARGINS],
    ),
    "DOS": Method(
        "dos",
        "one class more, for diverse outliers: the hardest of each cluster of six candidates a "
        "sample (Jiang et al., ICLR 2024)",
        _FLAT_RATES,
    ),
}
"""The methods by the names of their models in the table."""

DETECTOR_OPTIONS: Mapping[str, Mapping[str, Any]] = {"corp": {"m": 512}}
"""What detectors have otherwise than by default: a number of random features for 128, not 2,048."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on: on one machine, the same settings give the same numbers.

    Attributes:
        seed: Of held-out classes, distortions, initial weights, order, random groups, clustering.
        classes: ID classes; None: all.
        size: Side of the images in pixels, a multiple of 8.
        train: Training images of each class.
        test: Test images of each class, half as many to validate.
        ood: Images of each OOD set, at most.
        outliers: Outliers to train on, at most.
        epochs: Passes of the backbone over the training images.
        steps: Of each head, of ``batch`` samples.
        batch: See there.
        curve: Numbers of classes for the paper's curve, beside all of them.
        methods: Keys of :data:`METHODS`; the flat one is trained whether it is among them or not.
        jobs: Processes that train heads; the results do not depend on it.

    Raises:
        ValueError: A method is unknown.
    """

    seed: int = 0
    classes: int | None = None
    size: int = 32
    train: int = 36
    test: int = 6
    ood: int = 2000
    outliers: int = 8000
    epochs: int = 6
    steps: int = 500
    batch: int = 256
    curve: Sequence[int] = (50, 100, 200, 400, 800)
    methods: Sequence[str] = tuple(METHODS)
    jobs: int = field(default=1, compare=False)

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise ValueError(
                f"Settings: methods must be of {', '.join(METHODS)}, got {', '.join(unknown)}"
            )
        chosen = [name for name in METHODS if name in {FLAT, *self.methods}]
        object.__setattr__(self, "methods", chosen)

    @classmethod
    def quick(cls, **given: Any) -> Settings:
        """A study of 200 classes in a minute."""
        small = {"classes": 200, "train": 12, "ood": 500, "outliers": 2000, "epochs": 6}
        return cls(**{**small, "steps": 150, "curve": (50, 100), **given})


Features = Mapping[str, tuple[Tensor, Tensor]]
"""Set -> features (N, d) and labels (N,)."""


class Choice(NamedTuple):
    """A head, and what was tried for it."""

    head: Head
    setting: Mapping[str, Any]
    tried: list[dict[str, Any]]
    """Settings with AUROC and accuracy on the validation sets."""


@dataclass(frozen=True)
class StudyResult:
    """Everything that a run found out.

    Attributes:
        settings: What was run.
        data: Images and names.
        evaluation: Every detector of every head on every test set.
        choices: Model -> what was tried, and the setting that was chosen.
        taken: Model -> answers on each test set, and which of its samples are kept at 95 % of ID.
        curve: Figure -> how it goes with the number of classes.
    """

    settings: Settings
    data: GlyphSets
    evaluation: Evaluation
    choices: dict[str, Choice]
    taken: dict[str, dict[str, tuple[Tensor, Tensor]]]
    curve: dict[str, Sweep]


def run(
    settings: Settings, folder: Path, on_step: Progress = lambda what, done, total: None
) -> StudyResult:
    """Train and evaluate on the CPU; torch's global state is left as it was.

    Args:
        settings: What to run.
        folder: Where the backbone and features go. A backbone that is there, of the same settings,
            is used, and one that is half trained goes on.
        on_step: Told a part of the work, and how much of how much of it is done.
    """
    with reproducible(settings.seed):
        return Study(settings, folder, on_step).run()


class Study:
    """The parts of :func:`run`.

    Args:
        settings: As there.
        folder: As there.
        on_step: As there.
    """

    def __init__(self, settings: Settings, folder: Path, on_step: Progress) -> None:
        self.settings, self.on_step = settings, on_step
        name = f"{settings.size}px-{settings.epochs}epochs-seed{settings.seed}"
        count = "all" if settings.classes is None else settings.classes
        self.folder = Path(folder, f"glyphs-{count}x{settings.train}-{name}")
        on_step("draw characters", 0, 1)
        self.glyphs = Glyphs(seed=settings.seed)
        sizes = {k: getattr(settings, k) for k in ("classes", "train", "test", "ood", "outliers")}
        self.data = self.glyphs.sets(**sizes, size=settings.size, seed=settings.seed)
        on_step("draw characters", 1, 1)

    def run(self) -> StudyResult:
        """Everything, in order."""
        features = self.features(self.backbone())
        names = list(self.settings.methods)
        choices = dict(zip(names, self.heads(names, features), strict=True))
        found, taken = [], {}
        for i, (name, choice) in enumerate(choices.items()):
            self.on_step("evaluate", i, len(choices))
            found.append(self.evaluate(name, choice.head, features))
            taken[name] = self.taken(name, choice.head, features)
        self.on_step("evaluate", len(choices), len(choices))
        curve = self.curve(choices, features)
        evaluation = combine(*found)
        return StudyResult(self.settings, self.data, evaluation, choices, taken, curve)

    def backbone(self) -> GlyphNet:
        """The trained network; from its checkpoint, where there is one."""
        settings, data = self.settings, self.data
        columns = data.groups.num_classes
        with reproducible(settings.seed):
            model = GlyphNet(partial(Head, columns=columns), settings.size)
        config = TrainConfig(
            epochs=settings.epochs, lr=0.1, warmup=100, accelerator="cpu", seed=settings.seed
        )

        def told(epoch: int) -> None:
            self.on_step("train the backbone", epoch, settings.epochs)

        folder = self.folder / "backbone"
        trainer = Trainer(model, config=config, folder=folder, on_epoch=told)
        loader = tensor_loader(*data.train, batch_size=64, shuffle=True, drop_last=True)
        told(0)
        trainer.fit(loader, resume=True)
        told(settings.epochs)
        return model

    @torch.no_grad()
    def features(self, model: GlyphNet) -> Features:
        """Features of all sets, which are written to files too."""
        data = self.data
        sets = {"train": data.train, "validation": data.validation, "test": data.test}
        sets |= {"validation_ood": data.validation_ood, "outliers": data.outliers, **data.ood}
        folder = self.folder / "features"
        folder.mkdir(parents=True, exist_ok=True)
        for i, (name, (images, labels)) in enumerate(sets.items()):
            self.on_step("extract features", i, len(sets))
            found = torch.cat([model.features(part) for part in images.split(512)])
            save_arrays(folder / f"{name}.safetensors", {"features": found, "labels": labels})
        self.on_step("extract features", len(sets), len(sets))
        return _read(folder)

    def groups(self, kind: str | None, features: Features, classes: Tensor) -> Groups | None:
        """Groups of a kind of these classes, as many as the taxonomy has."""
        k, seed = len(GROUPS), self.settings.seed
        if kind == "taxonomy":
            counts = torch.bincount(self.data.groups.class_to_group[classes], minlength=k)
            return Groups.from_sizes(counts.tolist(), names=GROUPS)
        if kind == "random":
            return Groups.random(len(classes), k, seed=seed)
        if kind == "features":
            x, y = features["train"]
            means = torch.stack([x[y == c].mean(0) for c in classes.tolist()])
            return Groups.from_features(means, k, seed=seed)
        return None

    def heads(self, names: Sequence[str], features: Features) -> list[Choice]:
        """Every method's best head."""
        everything = torch.arange(self.data.groups.num_classes)
        tasks = []
        for name in names:
            method = METHODS[name]
            groups = self.groups(method.groups, features, everything)
            tasks.append((name, everything, groups, method.tried))
        return list(self._each("train heads", tasks, features))

    def curve(self, choices: Mapping[str, Choice], features: Features) -> dict[str, Sweep]:
        """FPR95 and AUROC, averages over the OOD sets, against the number of classes."""
        names = [n for n in choices if n == FLAT or METHODS[n].objective == "mos"]
        total = self.data.groups.num_classes
        chosen = self.glyphs.subset(self.settings.classes)
        tasks: list[Any] = []
        for n in self.settings.curve:
            rows = torch.isin(chosen, self.glyphs.subset(n)).nonzero()[:, 0] if n < total else None
            for name in names if rows is not None else ():
                groups = self.groups(METHODS[name].groups, features, rows)
                tasks.append((name, rows, groups, [choices[name].setting]))
        points: list[tuple[Head, Tensor, str]] = [
            (head, classes, task[0])
            for (head, *_), task in zip(
                self._each("fewer classes", tasks, features), tasks, strict=True
            )
            for classes in [task[1]]
        ]
        points += [(choices[name].head, torch.arange(total), name) for name in names]
        found: dict[str, dict[str, list[tuple[float, float]]]] = {"fpr95": {}, "auroc": {}}
        for head, classes, name in points:
            for method in self.evaluate(name, head, features, classes, curve=True).methods:
                label = f"{name}: {method.score}" if name == FLAT else name
                average = method.figures["average"]
                for figure, series in found.items():
                    series.setdefault(label, []).append((len(classes), average[figure]))
        y = {"fpr95": "FPR95", "auroc": "AUROC"}
        return {figure: Sweep(series, y=y[figure]) for figure, series in found.items()}

    def _each(self, what: str, tasks: Sequence[Any], features: Features) -> Iterator[Choice]:
        """Heads of tasks (method, classes, groups, settings to try), in several processes."""
        settings, jobs = self.settings, min(self.settings.jobs, len(tasks))
        pool = None
        found: Iterable[Choice]
        if jobs > 1:
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(jobs, context, _begin, (self.folder / "features", settings))
            found = pool.map(_fit_in_process, tasks)
        else:
            found = (_choose(features, settings, *task) for task in tasks)
        try:
            self.on_step(what, 0, len(tasks))
            for i, choice in enumerate(found):
                self.on_step(what, i + 1, len(tasks))
                yield choice
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def evaluate(
        self,
        name: str,
        head: Head,
        features: Features,
        classes: Tensor | None = None,
        curve: bool = False,
    ) -> Evaluation:
        """One pass over the test sets for all detectors of a head."""
        inside = _of_classes(features, "test", classes)
        if curve:
            names = ["msp", "energy"] if name == FLAT else [METHODS[name].score]
        elif name == FLAT or head.groups is not None:
            everything = {"logits", "features"}
            names = applicable(
                everything,
                trained_on={*everything, "labels"},
                groups=head.groups,
                head=head.groups is None,
            )
        else:
            names = list(OBJECTIVES[METHODS[name].objective].scores)
        if head.groups is not None:  # those that read features alone are the flat model's
            names = [n for n in names if "logits" in DETECTORS[n].needs]
        detectors = {n: _detector(n, head) for n in names}
        fit_detectors("oodk demo", detectors.values(), _batches(features["train"]), head)
        refused = []
        for n, detector in list(detectors.items()):
            try:  # what training data there were is looked at when the first sample is scored
                x = inside[0][:1]
                detector.score(features=x, logits=head(x).detach())
            except ValueError as error:
                refused.append(f"{n} is left out: {error}.")
                del detectors[n]
        ood = {n: _batches(features[n]) for n in self.data.ood}
        found = evaluate(head, _batches(inside), ood, detectors, model_name=name)
        return replace(found, notes={name: [*found.notes[name], *refused]})

    @torch.no_grad()
    def taken(self, name: str, head: Head, features: Features) -> dict[str, tuple[Tensor, Tensor]]:
        """Answers on the test sets, and which samples are kept at 95 % of ID."""
        detector = _detector(METHODS[name].score, head)
        scores, labels = {}, {}
        for set_name in ("test", *self.data.ood):
            logits = head(features[set_name][0])
            scores[set_name] = detector.score(logits=logits)
            labels[set_name] = _answers(head, logits)
        threshold = ood_metrics(scores["test"], scores["test"][:1]).threshold
        return {n: (labels[n], scores[n] >= threshold) for n in scores}


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
    x, y = _of_classes(features, "train", classes)
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


def _choose(
    features: Features,
    settings: Settings,
    name: str,
    classes: Tensor,
    groups: Groups | None,
    tried: Sequence[Mapping[str, Any]],
) -> Choice:
    """The best of the heads of several settings, by AUROC against the validation's OOD set."""
    best: tuple[float, Head, Mapping[str, Any]] | None = None
    record = []
    with reproducible(settings.seed):
        for setting in tried:
            head = fit_head(features, settings, name, classes, groups, setting)
            detector = _detector(METHODS[name].score, head)
            x, y = _of_classes(features, "validation", classes)
            with torch.no_grad():
                inside, outside = head(x), head(features["validation_ood"][0])
            found = ood_metrics(detector.score(logits=inside), detector.score(logits=outside))
            accuracy = float((_answers(head, inside) == y).double().mean())
            record.append({**setting, "auroc": found.auroc, "accuracy": accuracy})
            if best is None or found.auroc > best[0]:
                best = found.auroc, head, setting
    assert best is not None
    return Choice(best[1], best[2], record)


_here: tuple[Features, Settings] | None = None


def _begin(folder: Path, settings: Settings) -> None:
    global _here
    torch.set_num_threads(1)
    _here = _read(folder), settings


def _fit_in_process(task: tuple[Any, ...]) -> Choice:
    assert _here is not None
    return _choose(*_here, *task)


def _read(folder: Path) -> Features:
    found = {path.stem: open_samples(path) for path in sorted(folder.glob("*.safetensors"))}
    return {name: (s.read("features"), s.read("labels")) for name, s in found.items()}


def _of_classes(features: Features, name: str, classes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Samples of these classes alone, labelled from 0 on."""
    x, y = features[name]
    if classes is None or len(classes) == int(y.max()) + 1:
        return x, y
    rows = torch.isin(y, classes)
    return x[rows], torch.searchsorted(classes, y[rows])


def _detector(name: str, head: Head) -> OODDetector:
    found: OODDetector = DETECTORS[name].spec.make(
        "oodk demo", DETECTOR_OPTIONS.get(name), groups=head.groups, model=head
    )
    return found


def _answers(head: Head, logits: Tensor) -> Tensor:
    if head.groups is not None:
        return head.groups.to_class(mos_predict(logits, head.groups).label)
    return logits[:, : head.num_classes].argmax(1)


def _batches(samples: tuple[Tensor, Tensor], size: int = 1024) -> list[dict[str, Tensor]]:
    parts = zip(*(tensor.split(size) for tensor in samples), strict=True)
    return [{"features": x, "labels": y} for x, y in parts]
