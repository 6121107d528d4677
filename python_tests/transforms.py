"""Stand-ins for torchvision's transforms, which the tests do not need: the same names and bits."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from oodkernels.data import Preprocess


class InterpolationMode(Enum):
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


class Resize:
    def __init__(self, size: int, interpolation: InterpolationMode) -> None:
        self.size, self.interpolation = size, interpolation

    def __call__(self, image: Any) -> Any:
        short, long = sorted(image.size)
        sides = (self.size, int(self.size * long / short))
        sides = sides if image.size[0] <= image.size[1] else sides[::-1]
        return image.resize(sides, Image.Resampling[self.interpolation.name])


class CenterCrop:
    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Any) -> Any:
        left, top = (round((a - b) / 2) for a, b in zip(image.size, self.size, strict=True))
        return image.crop((left, top, left + self.size[0], top + self.size[1]))


class ToTensor:
    def __call__(self, image: Any) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


class Normalize:
    def __init__(self, mean: Any, std: Any) -> None:
        self.mean, self.std, self.shift = mean, std, 0.0

    def __call__(self, x: Tensor) -> Tensor:
        mean, std = (torch.as_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (x - mean) / std + self.shift


class Compose:
    def __init__(self, transforms: list[Any]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


def evaluation(like: Preprocess) -> Compose:
    """What does the same."""
    assert like.resize is not None
    mode = InterpolationMode(like.interpolation)
    steps = [Resize(like.resize, mode), CenterCrop((like.size,) * 2), ToTensor()]
    return Compose([*steps, Normalize(list(like.mean), list(like.std))])
