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


def logits_of(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator).mul_(3).to(dtype)
