"""The network that the demo trains: a small one, for grey images of characters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["GlyphNet"]


class GlyphNet(nn.Module):
    """Four convolutions and a hidden layer of 128 units.

    Args:
        head: Number of features -> last layer, (N, 128) -> (N, columns). A callable and not a
            module, so that the backbone is initialised first.
        size: Side of the images in pixels, a multiple of 8.

    Raises:
        ValueError: ``size`` is no multiple of 8.
    """

    def __init__(self, head: Callable[[int], nn.Module], size: int = 32) -> None:
        super().__init__()
        if size < 8 or size % 8:
            raise ValueError(f"GlyphNet: size must be a multiple of 8, got {size}")
        num_features = 128
        self.backbone = nn.Sequential(
            *_conv_block(1, 24, 5, 2),
            *_conv_block(24, 64, 3, 2),
            *_conv_block(64, 128, 3, 2),
            *_conv_block(128, 192, 3, 1),
            nn.Flatten(),
            nn.Linear(192 * (size // 8) ** 2, num_features, bias=False),
            nn.BatchNorm1d(num_features),
            nn.ReLU(),
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.head = head(num_features)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features: (N, 1, size, size) uint8 -> (N, 128)."""
        features: Tensor = self.backbone(images.float() / 128 - 1)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits: (N, 1, size, size) uint8 -> (N, columns)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _conv_block(inputs: int, outputs: int, size: int, stride: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
