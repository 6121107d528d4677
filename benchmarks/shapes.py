"""The shapes that are measured, and the groups and logits of a shape."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from oodkernels import Groups

QUICK = os.environ.get("OODK_BENCH_QUICK") == "1"

# rows, classes: detectors that read logits
DETECTOR_SHAPES = [(65536, 1000), (8192, 21841)]

# rows, classes, groups: a test set of ImageNet-1k and a batch of it, ImageNet-21k, CIFAR-100
MOS_SHAPES = [(65536, 1000, 8), (4096, 1000, 8), (1024, 21841, 38), (4096, 100, 10)]

# rows, classes: Outlier Exposure's own batch (128 ID, 256 OOD), a large one, ImageNet-21k
LOSS_SHAPES = [(384, 1000), (4096, 1000), (1024, 21841)]

# Scores of both sides together; 5e7 on request, where a peer takes a minute and 4 GB.
ROC_SIZES = [10**4, 10**6, 10**7]
if os.environ.get("OODK_BENCH_LARGE") == "1":
    ROC_SIZES.append(5 * 10**7)

if QUICK:
    ROC_SIZES = [2000]
    LOSS_SHAPES = [(48, 100)]
    MOS_SHAPES = [(64, 1000, 8), (64, 100, 10)]
    DETECTOR_SHAPES = [(64, 1000)]


def even_groups(classes: int, k: int) -> Groups:
    return Groups.from_sizes([classes // k + (i < classes % k) for i in range(k)])


def logits_of(
    rows: int, width: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, width, generator=generator, device=device).mul_(3).to(dtype)


class MosCase:
    """The inputs of one shape (rows, classes, groups), in the layout that each peer wants."""

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        rows, classes, k = shape
        self.groups = even_groups(classes, k)
        self.logits = logits_of(rows, self.groups.width, dtype, device)
        target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))
        slices = torch.as_tensor(self.groups.slices())
        self.slices = [tuple(s) for s in slices.tolist()]
        self.sizes = [end - start for start, end in self.slices]
        first = slices[:, 0].contiguous()
        column = first[:, None] + torch.arange(max(self.sizes))
        target_column = self.groups.to_column(target)
        inside = (target_column[:, None] >= slices[:, 0]) & (target_column[:, None] < slices[:, 1])
        group_labels = torch.where(inside, target_column[:, None] - first, 0)
        self.target = target.to(device)
        self.first = first.to(device)
        self.valid = (column < slices[:, 1:]).to(device)
        self.index = column.clamp(max=self.groups.width - 1).to(device)
        segment = torch.repeat_interleave(torch.arange(k), torch.tensor(self.sizes))
        self.segment = segment.to(device)
        self.group_labels = group_labels.to(device)
        self.columns = (first + group_labels).to(device)
        self.nbytes = self.logits.numel() * self.logits.element_size()


def roc_scores(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Half ID, half OOD."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size - size // 2, generator=generator) + 1.5
    return x.to(dtype), torch.randn(size // 2, generator=generator).to(dtype)
