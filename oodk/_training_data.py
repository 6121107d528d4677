"""What ``oodk train`` learns from, and the head or model that fits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from oodk._command import step

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

    from oodkernels import Groups
    from oodkernels.nn import Head


@dataclass
class TrainingData:
    """Loaders of training samples, validation samples and outliers.

    Attributes:
        sources: "train", and perhaps "val" and "outliers" -> file, folder, list or shards.
        sizes: The same -> samples in a batch.
        groups: Of a MOS head.
        absent: Whether there is a column more than classes.
        classes: Number of classes, if it was said.
        names: Of the classes, where they are known.
        loaders: As ``sources``, once a head or a model is made.
    """

    sources: dict[str, str]
    sizes: dict[str, int]
    groups: Groups | None
    absent: bool
    classes: int | None
    names: Sequence[str] | None = None
    loaders: dict[str, DataLoader[Any]] = field(default_factory=dict)

    @property
    def columns(self) -> int:
        """Logits that a model must give."""
        assert self.classes is not None
        return self.classes + self.absent if self.groups is None else self.groups.width

    def head(self, confidence: bool, hidden: Sequence[int], standardize: bool, seed: int) -> Head:
        """A head for features, which are read."""
        from oodkernels.nn import Head
        from oodkernels.training import reproducible, tensor_loader

        width = 0
        for key, path in self.sources.items():
            features, *labels = self._features(key, path)
            if key == "train":
                width = features.shape[1]
                self._count(path, int(labels[0].max()) + 1)
                with reproducible(seed):
                    head = Head(
                        width,
                        self.columns,
                        self.groups,
                        confidence,
                        absent=self.absent,
                        hidden=hidden,
                        class_names=self.names,
                    )
                if standardize:
                    head.standardize(features)
            if features.shape[1] != width:
                raise ValueError(
                    f"{path}: features must have width {width}, as those of --data, got "
                    f"{features.shape[1]}"
                )
            for label in labels:
                self._check(path, label)
            self.loaders[key] = tensor_loader(
                features, *labels, batch_size=self.sizes[key], shuffle=key != "val"
            )
        return head

    def _features(self, key: str, path: str) -> list[Tensor]:
        from oodkernels.data import open_samples

        if not Path(path).exists():
            option = "--data" if key == "train" else f"--{key}"
            raise typer.BadParameter(f"there is no {path!r}", param_hint=f"'{option}'")
        with step("read", path):
            samples = open_samples(path, kind="features")
            if key == "train":
                self.names = samples.class_names
            elif key == "val" and self.names is not None and samples.class_names is not None:
                samples = samples.with_classes(self.names)
            return [samples.read(r) for r in ("features", "labels")[: 1 + (key != "outliers")]]

    def model(
        self,
        spec: str,
        weights: Path | None,
        size: int,
        augment: bool,
        workers: int,
        unit_range: bool,
    ) -> nn.Module:
        """A model of images, for which loaders are made ready; ``unit_range``: of pixels."""
        from torch.utils.data import DataLoader

        from oodkernels.data import ImageFiles, Shards, ToTensor, augmented, load_model, open_images
        from oodkernels.detectors import run

        opened: dict[str, Any] = {}
        for key, source in self.sources.items():
            with step("read", source):
                known = self.names if key == "val" else None
                opened[key] = open_images(source, class_names=known)
            if key == "train":
                self.names = opened[key].class_names
            counted = key != "outliers" and isinstance(opened[key], ImageFiles)
            if counted and min(opened[key].labels) < 0:
                raise ValueError(f"{source}: images must have labels")
        train = opened["train"]
        if isinstance(train, ImageFiles):
            self._count(self.sources["train"], max(train.labels) + 1)
        elif self.classes is None and self.groups is None:
            raise typer.BadParameter("is needed with shards", param_hint="'--classes'")
        else:
            self._count(self.sources["train"], 0)
        with step("make", spec):
            network, transform = load_model(spec, weights, self.columns)
        if transform is None and unit_range:
            transform = ToTensor(size, mean=(0, 0, 0), std=(1, 1, 1))
        train.transform = transform = transform or ToTensor(size)
        first = next(iter(train)) if isinstance(train, Shards) else train[0]
        with step("run", spec):
            assert first.image is not None  # nothing is left out here
            given = run(network, first.image[None]).logits
        if given is None or given.shape[1] != self.columns:
            got = "none" if given is None else given.shape[1]
            raise ValueError(
                f"{spec}: the model must give {self.columns} logits for the {self.classes} classes "
                f"of {self.sources['train']}{' and one more' * self.absent}, got {got}: make it "
                "so, or say the number of its classes by --classes"
            )
        for key, images in opened.items():
            images.transform = (
                augmented(network, transform) if augment and key != "val" else transform
            )
            self.loaders[key] = DataLoader(
                images,
                self.sizes[key],
                shuffle=None if isinstance(images, Shards) else key != "val",
                num_workers=workers,
                collate_fn=_pairs,
            )
        return network

    def _count(self, source: str, labels: int) -> None:
        """How many classes there are: as was said, as groups have them, or as the data do."""
        own = len(self.names) if self.names is not None else labels
        if self.groups is not None:
            self.classes = self.groups.num_classes
            if self.names is not None and self.groups.class_names is not None:
                self.groups = self.groups.matched(self.names)
        elif self.classes is None:
            self.classes = own
        if self.names is not None and len(self.names) != self.classes:
            self.names = None  # of some of the classes

    def _check(self, path: str, labels: Tensor) -> None:
        assert self.classes is not None
        wrong = (labels < 0) | (labels >= self.classes)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"{path}: labels must be class ids 0..{self.classes - 1}, got "
                f"{int(labels[first])} for sample {first}"
            )


def _pairs(samples: Sequence[Any]) -> Any:
    """Images and labels of samples."""
    import torch

    images, labels, _ = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)
