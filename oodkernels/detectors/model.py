"""What detectors read from a model: logits, penultimate features, named layers, confidence."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

Model: TypeAlias = Callable[[Tensor], Any]
"""A callable of a batch: an ``nn.Module``, or one that gives logits, a pair or ``Outputs``."""

__all__ = ["FeatureModel", "Model", "Outputs", "extract"]


class Outputs(NamedTuple):
    """What a model says about N inputs."""

    logits: Tensor
    """(N, C)."""
    features: Tensor | None = None
    """(N, d) penultimate features; None where there is no layer to read them from."""
    layers: dict[str, Tensor] = {}  # noqa: RUF012 (never changed)
    """Outputs of the layers asked for by name, of any shape (N, ...)."""
    confidence: Tensor | None = None
    """(N,) or (N, 1) logit of the confidence, where the model gives (logits, confidence)."""


class FeatureModel(nn.Module):
    """A classifier of which the features are read at a layer of your choice.

    Wherever a detector takes a model it takes this one. Calling it gives :class:`Outputs`.

    Args:
        model: x -> logits, or (logits, confidence).
        features: As for :func:`extract`.
    """

    def __init__(self, model: nn.Module, features: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.features: str | None = features

    def forward(self, x: Tensor, layers: Iterable[str] = ()) -> Outputs:
        """:func:`extract` of the model."""
        return extract(self.model, x, layers, self.features)


def extract(
    model: nn.Module,
    x: Tensor,
    layers: Iterable[str] = (),
    features: str | None = None,
    *,
    evaluate: bool = True,
) -> Outputs:
    """Logits, penultimate features and outputs of named layers, from one forward pass.

    The model runs in evaluation mode and is left in the mode it was in. Whether a graph is built
    is up to the caller (``torch.no_grad``). Layers are read by forward hooks and copied, so that a
    ReLU that works in place does not change them; of a layer that runs several times, the last run
    counts.

    Args:
        model: x -> logits, or (logits, confidence).
        x: A batch, on the device of the model.
        layers: Names of layers, as in ``model.named_modules()``, whose outputs are wanted.
        features: Name of the layer whose output are the features. By default they are what the
            classifier reads: the layer that ``model.get_classifier()`` gives (timm), else
            ``model.head``, ``model.fc`` or ``model.classifier`` if that is an ``nn.Linear``, else
            the model's last ``nn.Linear``. Features (N, d, ...) are averaged over the positions.
        evaluate: False to run the model in the mode it is in.

    Returns:
        :class:`Outputs`.

    Raises:
        ValueError: The model has no layer of that name, or it did not run.
        TypeError: ``model`` is not an ``nn.Module``, or what it gives is no logits.
    """
    where = "extract"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, FeatureModel):
        return extract(model.model, x, layers, features or model.features)
    layers = tuple(layers)
    named = dict(model.named_modules())
    for name in layers if features is None else (*layers, features):
        if name not in named:
            near = difflib.get_close_matches(name, named, n=5, cutoff=0.3)
            raise ValueError(
                f"{where}: {type(model).__name__} has no layer {name!r}; "
                f"near it are {near or [n for n in named if n][:5]}"
            )

    seen: dict[str | None, Tensor] = {}

    def keep(name: str | None, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{where}: layer {name!r} must give a tensor, got {type(output).__name__}"
            )
        seen[name] = output.clone()

    def keep_input(module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            seen[None] = args[0].clone()

    with ExitStack() as stack:
        if evaluate:
            stack.enter_context(_evaluating(model))
        for name in layers:
            stack.enter_context(named[name].register_forward_hook(partial(keep, name)))
        if features is not None:
            stack.enter_context(named[features].register_forward_hook(partial(keep, None)))
        elif (classifier := _classifier(model)) is not None:
            stack.enter_context(classifier.register_forward_pre_hook(keep_input))
        outputs = as_outputs(model(x))

    for name in layers:
        if name not in seen:
            raise ValueError(f"{where}: layer {name!r} did not run in the model's forward pass")
    if features is not None and None not in seen:
        raise ValueError(f"{where}: layer {features!r} did not run in the model's forward pass")
    found = seen.pop(None, None)
    if features is None and outputs.features is not None:
        found = outputs.features
    if found is not None and found.dim() > 2:
        found = found.flatten(2).mean(2)
    return outputs._replace(features=found, layers={name: seen[name] for name in layers})


def as_outputs(result: Any) -> Outputs:
    """What a model returned, as :class:`Outputs`.

    Raises:
        TypeError: It is neither logits, nor (logits, confidence), nor ``Outputs``.
    """
    if isinstance(result, Outputs):
        return result
    if isinstance(result, Tensor):
        return Outputs(result)
    if isinstance(result, Sequence) and [isinstance(r, Tensor) for r in result] == [True, True]:
        return Outputs(result[0], confidence=result[1])
    raise TypeError(
        f"extract: model must give logits, (logits, confidence) or Outputs, got "
        f"{type(result).__name__}"
    )


def run(model: Model, x: Tensor, layers: Sequence[str] = ()) -> Outputs:
    """What any :data:`Model` says about ``x``, which is brought to the model's device.

    Raises:
        ValueError: Layers are asked of a callable that does not give them.
        TypeError: As :func:`as_outputs`.
    """
    if isinstance(model, nn.Module):
        return extract(model, to_model(model, x), layers)
    outputs = as_outputs(model(x))
    missing = [name for name in layers if name not in outputs.layers]
    if missing:
        raise ValueError(
            f"extract: layers {missing} need a model that is an nn.Module, or that gives them"
        )
    return outputs


def to_model(model: Model, x: Tensor) -> Tensor:
    """``x`` on the device of the model's parameters."""
    if isinstance(model, nn.Module):
        first = next(chain(model.parameters(), model.buffers()), None)
        if first is not None:
            return x.to(first.device)
    return x


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _classifier(model: nn.Module) -> nn.Module | None:
    """The layer that maps features to logits."""
    get_classifier = getattr(model, "get_classifier", None)
    if callable(get_classifier):
        classifier = get_classifier()
        if isinstance(classifier, nn.Module) and not isinstance(classifier, nn.Identity):
            return classifier
    for name in ("head", "fc", "classifier"):
        if isinstance(layer := getattr(model, name, None), nn.Linear):
            return layer
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None
