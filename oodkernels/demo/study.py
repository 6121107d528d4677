"""The demo: every method on thousands of real classes, as the MOS paper does it.

One backbone is trained flat. Its features of all sets go to files, and every method trains a head
on them. Each may try as many settings, and what is chosen is what tells the validation's OOD set
best, whose characters are in no test set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from oodkernels.data import save_arrays
from oodkernels.data.glyphs import GROUPS, Glyphs, GlyphSets
from oodkernels.demo.heads import (
    Choice,
    Features,
    Task,
    answers,
    choose_each,
    make_detector,
    of_classes,
    read_features,
)
from oodkernels.demo.methods import FLAT, METHODS, Settings
from oodkernels.demo.models import GlyphNet
from oodkernels.detectors import DETECTORS, OODDetector, applicable, fit_detectors
from oodkernels.evaluation import Evaluation, Sweep, combine, evaluate
from oodkernels.groups import Groups
from oodkernels.metrics import ood_metrics
from oodkernels.nn import Head
from oodkernels.training import OBJECTIVES, TrainConfig, Trainer, reproducible, tensor_loader

__all__ = ["Study", "StudyResult", "run"]

Progress = Callable[[str, int, int], None]
_BATCH = 64


@dataclass(frozen=True)
class StudyResult:
    """Everything that a run found out.

    Attributes:
        settings: What was run.
        data: Images and names.
        evaluation: Every detector of every head on every test set.
        choices: Model -> what was tried, and the setting that was chosen.
        siblings: (N,) the group that each sample of "nearest" was held out of.
        validation: Model -> detector -> AUROC on the validation sets.
        taken: Model -> answers on each test set, and which of its samples are kept at 95 % of ID.
        curve: Figure -> how it goes with the number of classes.
    """

    settings: Settings
    data: GlyphSets
    siblings: Tensor
    evaluation: Evaluation
    choices: dict[str, Choice]
    validation: dict[str, dict[str, float]]
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
        found, validation, taken = [], {}, {}
        for i, (name, choice) in enumerate(choices.items()):
            self.on_step("evaluate", i, len(choices))
            evaluation, validation[name] = self.evaluate(name, choice.head, features)
            found.append(evaluation)
            taken[name] = self.taken(name, choice.head, features)
        self.on_step("evaluate", len(choices), len(choices))
        return StudyResult(
            settings=self.settings,
            data=self.data,
            siblings=self.siblings(),
            evaluation=combine(*found),
            choices=choices,
            validation=validation,
            taken=taken,
            curve=self.curve(choices, features),
        )

    def siblings(self) -> Tensor:
        """Group of each sample of the set "nearest", whose classes were held out of it."""
        blocks = torch.tensor([GROUPS.index(c.block) for c in self.glyphs.nearest])
        return blocks.repeat_interleave(len(self.data.ood["nearest"].labels) // len(blocks))

    def backbone(self) -> GlyphNet:
        """The trained network; from its checkpoint, where there is one."""
        settings, data = self.settings, self.data
        columns = data.groups.num_classes
        with reproducible(settings.seed):
            model = GlyphNet(partial(Head, columns=columns), settings.size)
        steps = settings.epochs * (len(data.train.labels) // _BATCH)
        config = TrainConfig(
            epochs=settings.epochs,
            lr=0.1,
            warmup=min(100, steps // 10),
            accelerator="cpu",
            seed=settings.seed,
        )

        def told(epoch: int) -> None:
            self.on_step("train the backbone", epoch, settings.epochs)

        folder = self.folder / "backbone"
        trainer = Trainer(model, config=config, folder=folder, on_epoch=told)
        loader = tensor_loader(*data.train, batch_size=_BATCH, shuffle=True, drop_last=True)
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
        return read_features(folder)

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
            groups = self.groups(METHODS[name].groups, features, everything)
            tasks.append(Task(name, everything, groups, METHODS[name].tried))
        return self._heads("train heads", tasks)

    def curve(self, choices: Mapping[str, Choice], features: Features) -> dict[str, Sweep]:
        """FPR95 and AUROC, averages over the OOD sets, against the number of classes."""
        names = [n for n in choices if n == FLAT or METHODS[n].objective == "mos"]
        labels = self.glyphs.subset(self.settings.classes)
        tasks = []
        for n in self.settings.curve:
            classes = torch.isin(labels, self.glyphs.subset(n)).nonzero()[:, 0]
            for name in names if n < len(labels) else ():
                groups = self.groups(METHODS[name].groups, features, classes)
                tasks.append(Task(name, classes, groups, [choices[name].setting]))
        points = [
            (task.method, task.classes, choice.head)
            for task, choice in zip(tasks, self._heads("fewer classes", tasks), strict=True)
        ]
        points += [(name, torch.arange(len(labels)), choices[name].head) for name in names]
        found: dict[str, dict[str, list[tuple[float, float]]]] = {"FPR95": {}, "AUROC": {}}
        for name, classes, head in points:
            scores = ("msp", "energy") if name == FLAT else (METHODS[name].score,)
            inside = _batches(of_classes(features, "test", classes))
            ood = {n: _batches(features[n]) for n in self.data.ood}
            detectors = {n: make_detector(n, head) for n in scores}
            for method in evaluate(head, inside, ood, detectors).methods:
                label = f"{name}: {method.score}" if name == FLAT else name
                average = method.figures["average"]
                for figure, series in found.items():
                    series.setdefault(label, []).append((len(classes), average[figure.lower()]))
        return {figure: Sweep(series, y=figure) for figure, series in found.items()}

    def _heads(self, what: str, tasks: Sequence[Task]) -> list[Choice]:
        def done(n: int) -> None:
            self.on_step(what, n, len(tasks))

        return list(choose_each(self.folder / "features", self.settings, tasks, done))

    def detectors(
        self, name: str, head: Head, features: Features
    ) -> tuple[dict[str, OODDetector], list[str]]:
        """All detectors that can score what a head says, fitted, and why some cannot."""
        names = list(OBJECTIVES[METHODS[name].objective].scores)
        if name == FLAT or head.groups is not None:
            both = {"logits", "features"}
            names = applicable(
                both, trained_on={*both, "labels"}, groups=head.groups, head=head.groups is None
            )
        if head.groups is not None:  # those that read features alone are the flat model's
            names = [n for n in names if "logits" in DETECTORS[n].needs]
        found = {n: make_detector(n, head) for n in names}
        fit_detectors("oodk demo", found.values(), _batches(features["train"]), head)
        refused = []
        x = features["train"][0][:1]
        for n in names:
            try:  # what training data there were is looked at when the first sample is scored
                found[n].score(features=x, logits=head(x).detach())
            except ValueError as error:
                refused.append(f"{n} is left out: {error}.")
                del found[n]
        return found, refused

    def evaluate(
        self, name: str, head: Head, features: Features
    ) -> tuple[Evaluation, dict[str, float]]:
        """A head's detectors on the test sets, and their AUROC on the validation sets."""
        detectors, refused = self.detectors(name, head, features)

        def over(inside: str, outside: Iterable[str]) -> Evaluation:
            ood = {n: _batches(features[n]) for n in outside}
            return evaluate(head, _batches(features[inside]), ood, detectors, model_name=name)

        found = over("test", self.data.ood)
        found = replace(found, notes={name: [*found.notes[name], *refused]})
        seen = over("validation", ["validation_ood"])
        return found, {m.score: m.figures["validation_ood"]["auroc"] for m in seen.methods}

    @torch.no_grad()
    def taken(self, name: str, head: Head, features: Features) -> dict[str, tuple[Tensor, Tensor]]:
        """Answers on the test sets, and which samples are kept at 95 % of ID."""
        detector = make_detector(METHODS[name].score, head)
        scores, labels = {}, {}
        for set_name in ("test", *self.data.ood):
            logits = head(features[set_name][0])
            scores[set_name] = detector.score(logits=logits)
            labels[set_name] = answers(head, logits)
        threshold = ood_metrics(scores["test"], scores["test"][:1]).threshold
        return {n: (labels[n], scores[n] >= threshold) for n in scores}


def _batches(samples: tuple[Tensor, Tensor], size: int = 1024) -> list[dict[str, Tensor]]:
    parts = zip(*(tensor.split(size) for tensor in samples), strict=True)
    return [{"features": x, "labels": y} for x, y in parts]
