"""Images on their way through a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from oodk._command import step

if TYPE_CHECKING:
    from torch import Tensor, nn

ModelOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Name of a timm model, such as resnet50.a1_in1k; or package.module:callable, called "
        "without arguments for an nn.Module, or a pair of it and a transform from PIL image to "
        "tensor.",
    ),
]
WeightsOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="State dict to load into the model: .pt or .safetensors.",
    ),
]
SizeOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Side of the images the model sees, where it has no transform of its own.  "
        "[default: 224]",
        show_default=False,
    ),
]
WorkersOption: TypeAlias = Annotated[int, typer.Option(min=0, help="Processes that read images.")]
DeviceOption: TypeAlias = Annotated[
    str, typer.Option(help="Where the model runs: cpu, cuda, ...; auto takes a GPU if any.")
]


@dataclass
class Images:
    """A model, and how images are made ready for it."""

    model: str
    weights: Path | None
    size: int | None
    batch_size: int
    workers: int
    device: str

    @cached_property
    def _made(self) -> tuple[nn.Module, Any]:
        import torch

        from oodkernels.data import ToTensor, load_model
        from oodkernels.nn.weights import read_weights

        facts = None
        if self.weights is not None:
            with step("read", self.weights):
                facts = read_weights(self.weights)
        with step("make", self.model):
            network, transform = load_model(
                self.model, self.weights, None if facts is None else facts.columns
            )
        if facts is not None:  # as a head has them
            known = {"absent_column": facts.absent, "groups": facts.groups}
            vars(network).update(known, class_names=facts.class_names)
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.size is not None or transform is None:
            transform = ToTensor(self.size or 224)
        return network.to(self.device), transform

    @property
    def network(self) -> nn.Module:
        """The model, in evaluation mode."""
        return self._made[0]

    @property
    def transform(self) -> Any:
        """PIL image -> tensor."""
        return self._made[1]

    def open(self, source: str, root: Path | None = None) -> ImageBatches:
        """The images in a folder, a list or shards."""
        from oodkernels.data import open_images

        with step("read", source):
            return ImageBatches(source, open_images(source, self.transform, root), self)


@dataclass(frozen=True)
class ImageBatches:
    """Batches (images, labels) of a source; labels only where all images have one."""

    name: str
    images: Any
    how: Images
    ids: Tensor | None = None

    @property
    def num_samples(self) -> int | None:
        """How many; None where only reading on tells it."""
        return len(self.images) if hasattr(self.images, "labels") else None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Of the labels 0, 1, ...; None where nothing says."""
        return tuple(self.images.classes) or None

    def with_classes(self, names: list[str]) -> ImageBatches:
        """The same images, with labels that count ``names``."""
        import torch

        from oodkernels.data.samples import match_classes

        ids = torch.tensor(match_classes(self.class_names or (), names, self.name))
        return replace(self, ids=ids)

    def __iter__(self) -> Iterator[Any]:
        import torch
        from torch.utils.data import DataLoader

        def collate(samples: list[Any]) -> Any:
            images, labels = zip(*(sample[:2] for sample in samples), strict=True)
            return torch.stack(images), torch.tensor(labels)

        labelled = min(getattr(self.images, "labels", [-1]), default=-1) >= 0
        loader = DataLoader(
            self.images,
            self.how.batch_size,
            num_workers=self.how.workers if self.num_samples is not None else 0,
            collate_fn=collate,
        )
        for images, labels in loader:
            images = images.to(self.how.device)
            if not labelled:
                yield images
            else:
                yield images, labels if self.ids is None else self.ids[labels]
