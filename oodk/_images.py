"""Images on their way through a model."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from oodk._command import step

if TYPE_CHECKING:
    from torch import nn

    from oodkernels.nn import Weights

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
    shell: bool = False

    @cached_property
    def meaning(self) -> Weights | None:
        """What the file of weights says of its columns."""
        from oodkernels.nn import read_weights

        if self.weights is None:
            return None
        with step("read", self.weights):
            return read_weights(self.weights)

    @cached_property
    def _made(self) -> tuple[nn.Module, Any]:
        import torch

        from oodkernels.data import ToTensor, load_model, model_classes

        facts = self.meaning
        with step("make", self.model):
            network, transform = load_model(self.model, self.weights)
        # As heads say what their columns are.
        vars(network)["class_names"] = model_classes(network, self.weights)
        if facts is not None:
            vars(network).update(absent_column=facts.absent_column, groups=facts.groups)
        if self.device == "auto":
            gpus = torch.cuda.device_count()  # one a process, as torchrun counts them
            self.device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % gpus}" if gpus else "cpu"
        if self.size is not None or transform is None:
            transform = ToTensor(self.size or 224)
        return network.to(self.device), transform

    @property
    def network(self) -> nn.Module:
        """The model, in evaluation mode; it says its class names, absent column and groups."""
        return self._made[0]

    @property
    def transform(self) -> Any:
        """PIL image -> tensor."""
        return self._made[1]

    def open(self, source: str, root: Path | None = None) -> ImageBatches:
        """The images in a folder, a list or shards."""
        from oodkernels.data import open_images

        with step("read", source):
            images = open_images(source, self.transform, root, shell=self.shell)
            return ImageBatches(source, images, self)


@dataclass(frozen=True)
class ImageBatches:
    """Batches (images, labels) of a source; labels only where all images have one."""

    name: str
    images: Any
    how: Images

    @property
    def num_samples(self) -> int | None:
        """How many; None where only reading on tells it."""
        return len(self.images) if hasattr(self.images, "labels") else None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the labels 0, 1, ...; None where nothing says."""
        found: tuple[str, ...] | None = self.images.class_names
        return found

    def with_classes(self, names: Sequence[str]) -> ImageBatches:
        """The same images, with labels that count ``names``."""
        return replace(self, images=self.images.matched(names, self.name))

    def __iter__(self) -> Iterator[Any]:
        return self.share(0, 1)

    def share(self, rank: int, world: int) -> Iterator[Any]:
        """Every ``world``-th batch, from number ``rank`` on."""
        import torch
        from torch.utils.data import DataLoader

        def collate(samples: list[Any]) -> Any:
            images, labels = zip(*(sample[:2] for sample in samples), strict=True)
            return torch.stack(images), torch.tensor(labels)

        size, count = self.how.batch_size, self.num_samples
        loader: Any
        if count is None:  # shards are read by one process, and past what is others'
            whole = DataLoader(self.images, size, collate_fn=collate)
            loader = itertools.islice(whole, rank, None, world)
        else:
            starts = range(rank * size, count, world * size)
            batches = [list(range(start, min(start + size, count))) for start in starts]
            loader = DataLoader(
                self.images,
                batch_sampler=batches,
                num_workers=self.how.workers,
                collate_fn=collate,
            )
        labelled = count is not None and min(self.images.labels) >= 0
        for images, labels in loader:
            images = images.to(self.how.device)
            yield (images, labels) if labelled else images
