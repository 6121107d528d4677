"""Models and layers that are trained here: a network for small images, heads."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["ConfidenceHead", "SmallConvNet", "zero_linear"]


class SmallConvNet(nn.Module):
    """Two convolutions and a hidden layer of 128 units, for 8 x 8 grey images.

    Args:
        head: Number of features -> last layer, (N, 128) -> (N, columns). A callable and not a
            module, so that the backbone is initialised first: under one seed it is the same below
            any head.
    """

    def __init__(self, head: Callable[[int], nn.Module]) -> None:
        super().__init__()
        num_features = 128
        self.backbone = nn.Sequential(
            *_conv_block(1, 32),
            *_conv_block(32, 64),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, num_features),
            nn.ReLU(),
        )
        self.head = head(num_features)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features: (N, 1, 8, 8) -> (N, 128)."""
        features: Tensor = self.backbone(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits: (N, 1, 8, 8) -> (N, columns)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _conv_block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU()


def zero_linear(in_features: int, columns: int) -> nn.Linear:
    """A linear head that starts at zero, as a MOS head does."""
    head = nn.Linear(in_features, columns)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class ConfidenceHead(nn.Linear):
    """A last layer with a confidence branch beside it (DeVries & Taylor, 2018).

    It takes the place of a model's linear layer, so that the model gives (logits, confidence logit)
    of shapes (..., num_classes) and (...,).

    Args:
        in_features: Width of the features.
        num_classes: Number of logits.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(in_features, num_classes)
        self.confidence = nn.Linear(in_features, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Logits, and the logit of the confidence."""
        return super().forward(features), self.confidence(features).squeeze(-1)
