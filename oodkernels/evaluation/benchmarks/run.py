"""A benchmark's steps: extract, tune, fit, score. Each is done once, and kept in the run's folder.

Where ``torch.distributed`` is initialised, ranks share all of them: parts of sets are extracted,
detectors fitted and batches scored by one rank each, so that no figure depends on their number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oodkernels._digest import digest
from oodkernels._files import read_json, write_text
from oodkernels._ranks import gathered, on_first, ranks
from oodkernels.data import ExtractionPlan, Samples, extract_images, open_samples, save_arrays
from oodkernels.data.arrays import PathLike
from oodkernels.detectors import (
    DETECTORS,
    Batch,
    OODDetector,
    Tuning,
    fit_detectors,
    linear_head,
    sweep,
)
from oodkernels.evaluation.benchmarks.definition import OOD_KINDS, Benchmark
from oodkernels.evaluation.benchmarks.sources import OpenSet, identity_of
from oodkernels.evaluation.results import software
from oodkernels.evaluation.scoring import score_sets
from oodkernels.groups import Groups

__all__ = ["BenchmarkModel", "BenchmarkRun"]

FORMAT, VERSION = "oodkernels.benchmark", 1
RUN = "benchmark.json"
"""File of a run that says what it measures."""
PACKAGES = ("torch", "torchvision", "timm", "pillow")
"""What logits depend on beside this package."""


@dataclass(frozen=True)
class BenchmarkModel:
    """The model that a benchmark is run on.

    Attributes:
        spec: Its name, as for :func:`oodkernels.data.load_model`.
        network: It, in evaluation mode.
        transform: How its images are made ready, in words.
        layer: Layer whose output are the features; None for what the classifier reads.
        class_names: Of its columns, where they are known.
        absent_column: Of an absent class; None without one.
        groups: Of a MOS model.
        device: Where it runs.
        dtype: Of what is extracted.
    """

    spec: str
    network: nn.Module
    transform: str
    layer: str | None = None
    class_names: tuple[str, ...] | None = None
    absent_column: int | None = None
    groups: Groups | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def identity(self) -> dict[str, Any]:
        """What logits and features depend on."""
        return {
            "name": self.spec,
            "weights": digest(self.network.state_dict()),
            "layer": self.layer,
            "dtype": self.dtype,
            "absent_column": self.absent_column,
            "groups": None if self.groups is None else digest(self.groups.to_json()),
        }


class BenchmarkRun:
    """A benchmark under way in a folder.

    The caller keeps the folder for one writer (``oodkernels._files.locked``).

    Args:
        benchmark: Which.
        sets: As :func:`open_sets` gives them.
        folder: Of the run; made where missing.
        model: None where all sets hold logits, features or scores.
        head: What features of the sets are sent through; only without a model.

    Attributes:
        identity: What the figures are of: data, preprocessing, model and versions.
        samples: Key of a set -> what was extracted from it; after :meth:`extract`.
        tuning: What :meth:`tune` has chosen, if anything.
        left_out: Label of a detector that could not be fitted -> why; after :meth:`fit`.

    Raises:
        ValueError: The folder holds a run that measures something else (the message says what
            differs), or a set has images and there is no model.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        sets: Mapping[str, OpenSet],
        folder: PathLike,
        model: BenchmarkModel | None = None,
        head: nn.Module | None = None,
    ) -> None:
        self.benchmark, self.sets, self.folder = benchmark, sets, Path(folder)
        self.model, self.head = model, head
        images = [key for key, each in sets.items() if not isinstance(each.data, Samples)]
        if images and model is None:
            raise ValueError(f"{benchmark.name}: {images[0]} has images, and there is no model")
        self.identity: dict[str, Any] = {
            "benchmark": benchmark.name,
            "data": identity_of(sets),
            "preprocessing": None if model is None else model.transform,
            "model": None if model is None else model.identity(),
            "head": None if head is None else digest(head.state_dict()),
            "software": software(*PACKAGES),
        }
        on_first(self._begin)
        self.samples: dict[str, Samples] = {}
        self._keys: dict[str, str] = {}
        self._detectors: dict[str, OODDetector] = {}
        self.left_out: dict[str, str] = {}
        self.tuning: Tuning | None = None

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / RUN
        if path.exists():
            found = read_run(self.folder)
            if differing := differences(found, self.identity):
                raise ValueError(
                    f"{self.folder} holds a run that measures something else: "
                    + "; ".join(differing[:5])
                    + ": choose another folder"
                )
        record = {"format": FORMAT, "version": VERSION, **self.identity}
        write_text(path, json.dumps(record, indent=2) + "\n")
        missing = [f"{key}\t{name}\n" for key, s in self.sets.items() for name in s.missing]
        if missing:
            text = "".join(missing).encode("utf-8", "backslashreplace").decode()
            write_text(self.folder / "missing.txt", text)

    # --- steps --------------------------------------------------------------------------------

    def extract(
        self,
        *,
        batch_size: int = 64,
        part_size: int = 8192,
        workers: int = 0,
        on_batch: Callable[[str, int], None] = lambda key, done: None,
    ) -> None:
        """Logits and features of every set that has images, as :func:`extract_images`.

        Args:
            batch_size: As there.
            part_size: As there.
            workers: As there.
            on_batch: Told the set and the number of its images done.

        Raises:
            ValueError: An image cannot be read, or the model does not fit the benchmark.
        """
        for key, each in self.sets.items():
            if isinstance(each.data, Samples):
                self.samples[key] = each.data
                continue
            assert self.model is not None
            plan = ExtractionPlan(
                model=self.model.spec,
                weights=str(self.identity["model"]["weights"]),
                layer=self.model.layer,
                data=f"{self.benchmark.name} {key} {each.identity.digest} {each.identity.sizes}",
                transform=self.model.transform,
                dtype=self.model.dtype,
                model_classes=self.model.class_names or self._said,
                absent_column=self.model.absent_column,
                groups=None if self.model.groups is None else self.model.groups.to_json(),
            )
            out = self.folder / "sets" / key.replace("/", "-")
            extract_images(
                self.model.network,
                each.data,
                out,
                plan,
                batch_size=batch_size,
                part_size=part_size,
                workers=workers,
                device=self.model.device,
                on_batch=partial(on_batch, key),
            )
            self.samples[key] = open_samples(out)
        on_first(self._check)

    @property
    def _said(self) -> tuple[str, ...] | None:
        """The names of the columns as the benchmark has them, which labels of folders count."""
        names: tuple[str, ...] | None = self.sets["id/test"].data.class_names
        return names

    @property
    def skipped(self) -> dict[str, list[str]]:
        """Key of a set -> its images that could not be read."""
        found = {}
        for key in self.sets:
            path = self.folder / "sets" / key.replace("/", "-") / "skipped.txt"
            if path.exists():
                found[key] = path.read_text(encoding="utf-8").splitlines()
        return found

    @property
    def groups(self) -> Groups | None:
        """Those of a MOS model, head or file."""
        for holder in (self.model, self.head, self.samples.get("id/test")):
            if (found := getattr(holder, "groups", None)) is not None:
                return found
        return None

    def _check(self) -> None:
        """Logits have a column for each class, and labels are of these."""
        for key in ("id/train", "id/val", "id/test"):
            samples = self.samples.get(key)
            if samples is None or "logits" not in samples.arrays:
                continue
            width = samples["logits"].shape[1] or 0
            classes = width - (samples.absent_column is not None)
            if self.groups is not None:
                classes = self.groups.num_classes
            said = self.benchmark.classes
            number = len(said) if isinstance(said, tuple) else said
            if isinstance(number, int) and number != classes:
                raise ValueError(
                    f"{self.benchmark.name} has {number} classes, and the model gives logits of "
                    f"{classes}"
                )
            if "labels" in samples.arrays:
                labels = samples.read("labels")
                if int(labels.max()) >= classes or int(labels.min()) < 0:
                    wrong = int(labels.max() if int(labels.max()) >= classes else labels.min())
                    raise ValueError(
                        f"{self.benchmark.name}: labels of {key} must be class ids "
                        f"0..{classes - 1}, got {wrong}"
                    )

    def tune(
        self,
        names: Sequence[str],
        on_batch: Callable[[str, int], None] = lambda name, done: None,
    ) -> Tuning | None:
        """Choose detectors' settings on the validation sets of ID and OOD, from their own grids.

        Args:
            names: Of the detectors; those without a grid have nothing to choose.
            on_batch: As for :func:`oodkernels.detectors.sweep`.

        Returns:
            What was chosen, as it is in ``tuned/``; None where a validation set is missing, or no
            detector has a grid.

        Raises:
            ValueError: As :func:`oodkernels.detectors.sweep`.
        """
        chosen = [name for name in names if name in DETECTORS and DETECTORS[name].spec.grid]
        sets = [self.samples.get(key) for key in ("id/val", "ood/val")]
        inside, outside = sets
        if not chosen or inside is None or outside is None:
            return None
        path = self.folder / "tuned" / f"{digest(*self._base, *chosen)}.json"

        def find() -> Tuning:
            if path.exists():
                return Tuning.load(path)
            layer = None if self.model is None else linear_head(self.model.network)
            found = sweep(
                chosen,
                id=inside,
                ood_val={"ood/val": outside},
                train=self.samples.get("id/train"),
                model=self.head,
                head=layer,
                groups=self.groups,
                on_batch=on_batch,
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            found.save(path)
            return Tuning.load(path)

        self.tuning = on_first(find)
        return self.tuning

    @property
    def _base(self) -> list[str]:
        """What everything that is computed depends on."""
        return [json.dumps(self.identity, sort_keys=True), json.dumps(self.skipped)]

    def fit(
        self, detectors: Mapping[str, OODDetector], optional: Collection[str] = ()
    ) -> dict[str, OODDetector]:
        """Fit those that have to be, each by one rank; files of them are in ``detectors/``.

        Args:
            detectors: Label -> detector, not fitted.
            optional: Labels of those that are left out where they cannot be fitted to this data;
                :attr:`left_out` says why.

        Returns:
            Label -> detector as it is in its file, or as given where nothing is fitted.

        Raises:
            ValueError: There is no ID training set, or as :func:`fit_detectors`.
        """
        rank, world = ranks()
        train = self.samples.get("id/train")
        fitted = {label: d for label, d in detectors.items() if d.trained_on}
        if fitted and train is None:
            raise ValueError(
                f"{self.benchmark.name} has no id.train, which {', '.join(fitted)} must be fitted "
                "to"
            )
        self._keys = {label: digest(*self._base, label, repr(d)) for label, d in detectors.items()}
        mine = {
            label: d
            for i, (label, d) in enumerate(fitted.items())
            if i % world == rank and not (self._file(label).exists() or self._why(label).exists())
        }
        if mine and train is not None:
            fit_detectors(self.benchmark.name, mine.values(), train, self.head)
            self._file("x").parent.mkdir(parents=True, exist_ok=True)
            for label, detector in mine.items():
                try:
                    detector.save(self._file(label))
                except ValueError as error:
                    if label not in optional:
                        raise
                    write_text(self._why(label), " ".join(str(error).split()) + "\n")
        gathered(None)  # all files are there
        self.left_out = {
            label: self._why(label).read_text(encoding="utf-8").strip()
            for label in fitted
            if self._why(label).exists()
        }
        if needed := [label for label in self.left_out if label not in optional]:
            raise ValueError(f"{needed[0]} cannot be fitted: {self.left_out[needed[0]]}")
        self._detectors = {
            label: OODDetector.load(self._file(label), d.model) if label in fitted else d
            for label, d in detectors.items()
            if label not in self.left_out
        }
        return self._detectors

    def score(self, on_batch: Callable[[str, int], None] = lambda key, done: None) -> None:
        """Scores of every test set by every detector; ranks share the batches.

        Args:
            on_batch: Told the set and the number of its samples done.

        Raises:
            ValueError: As :func:`oodkernels.evaluation.score_sets`.
        """
        for key in self.tested:
            self._score(key, on_batch)
        gathered(None)  # all files are there

    @property
    def tested(self) -> list[str]:
        """Keys of the sets that figures are of, the ID test set first."""
        kinds = [each.key for each in self.benchmark.of("shifted", *OOD_KINDS)]
        return ["id/test", *kinds]

    @property
    def settings(self) -> dict[str, str]:
        """Label -> the detector in words."""
        return {label: repr(detector) for label, detector in self._detectors.items()}

    @property
    def files(self) -> dict[str, str]:
        """Label -> path of the scores in the folder, with "{set}" for the set."""
        keys = self._keys
        return {label: f"scores/{{set}}/{slug(label)}-{keys[label]}.npy" for label in self.settings}

    def scores(self, key: str) -> dict[str, Tensor]:
        """Label -> (N,) scores of a set."""
        return {
            label: open_samples(self._scores_file(key, label)).read("scores")
            for label in self._detectors
        }

    def predictions(self, key: str) -> Tensor | None:
        """(N,) class of each sample; None where there are no logits."""
        path = self._predictions_file(key)
        return open_samples(path, kind="labels").read("labels") if path.exists() else None

    def _score(self, key: str, on_batch: Callable[[str, int], None]) -> None:
        labels = on_first(
            lambda: [d for d in self._detectors if not self._scores_file(key, d).exists()]
        )
        missing = {label: self._detectors[label] for label in labels}
        if not missing:
            return
        kept: dict[str, list[Tensor]] = {}
        classes: list[Tensor] = []
        found = score_sets(
            self.benchmark.name,
            {key: self.samples[key]},
            missing,
            model=self.head,
            groups=self.groups,
            shared=True,
        )
        for part in found:
            for label in missing:
                kept.setdefault(label, []).append(part.scores[label])
            if part.batch.logits is not None:
                classes.append(predicted(part.batch, self.groups))
            on_batch(key, part.done)
        if ranks()[0]:
            return
        self._predictions_file(key).parent.mkdir(parents=True, exist_ok=True)
        if classes:
            save_arrays(self._predictions_file(key), {"labels": torch.cat(classes)})
        for label, parts in kept.items():
            save_arrays(self._scores_file(key, label), {"scores": torch.cat(parts)})

    # --- files --------------------------------------------------------------------------------

    def _file(self, label: str) -> Path:
        key = self._keys.get(label, "")
        return self.folder / "detectors" / f"{slug(label)}-{key}.safetensors"

    def _why(self, label: str) -> Path:
        return self._file(label).with_suffix(".txt")

    def _scores_file(self, key: str, label: str) -> Path:
        return self.folder / self.files[label].format(set=key.replace("/", "-"))

    def _predictions_file(self, key: str) -> Path:
        return self.folder / "scores" / key.replace("/", "-") / "predictions.npy"


def predicted(batch: Batch, groups: Groups | None) -> Tensor:
    """(N,) class of each row of logits, without the absent class's column, on the CPU."""
    if groups is not None:
        return groups.to_class(batch.mos_predict(groups).label).cpu()
    return batch.logit_scores().label.cpu()


def slug(label: str) -> str:
    """A label as part of a file's name."""
    return re.sub(r"[^\w.+-]", "_", label)[:80]


def read_run(folder: PathLike) -> dict[str, Any]:
    """The identity of a run in a folder.

    Raises:
        ValueError: The folder holds none, or it is damaged.
    """
    path = Path(folder) / RUN
    if not path.is_file():
        raise ValueError(f"{folder} holds no run of oodk benchmark: there is no {RUN}")
    return read_json(str(path), path.read_text(encoding="utf-8"), FORMAT, VERSION)


def differences(one: Mapping[str, Any], other: Mapping[str, Any], where: str = "") -> list[str]:
    """What differs between two identities, each as ``"what: one and other"``."""
    found: list[str] = []
    for key in dict.fromkeys([*one, *other]):
        a, b, name = one.get(key), other.get(key), f"{where}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name}: {_shown(a)} and {_shown(b)}")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "something"
    return "nothing" if value is None else f"{value}"[:60]
