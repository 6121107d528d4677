"""Models by name, with their weights, how they want their images and what their classes are."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from oodkernels._files import check_file
from oodkernels._optional import require
from oodkernels.data.arrays import PathLike
from oodkernels.data.images import OnRGB, Transform, class_folders
from oodkernels.nn import Weights, align_names, load_into, read_weights

__all__ = ["load_model", "model_classes", "read_class_names"]


def load_model(
    spec: str, weights: PathLike | None = None, columns: int | None = None
) -> tuple[nn.Module, Transform | None]:
    """A model in evaluation mode, and how it wants its images.

    Args:
        spec: A model of timm, with its pretrained weights; or ``package.module:callable`` without
            arguments, which gives an ``nn.Module`` or a pair of it and a transform from PIL image
            to tensor. The working directory counts as a place to import from.
        weights: A file to load instead, any that :func:`~oodkernels.nn.read_weights` takes.
        columns: Of the logits, for a model of timm; None for those of ``weights``, or those it was
            trained with.

    Returns:
        The model; the transform, None where it has none of its own.

    Raises:
        ValueError: There is no such callable or model, or the weights do not fit.
        TypeError: The callable gives something else.
        ImportError: A package is missing.
    """
    transform: Transform | None = None
    found = None if weights is None else read_weights(weights)
    if ":" in spec:
        made = _callable(spec)()
        if isinstance(made, tuple) and len(made) == 2:
            made, transform = made
        if not isinstance(made, nn.Module):
            raise TypeError(f"load_model: {spec} must give an nn.Module, got {type(made).__name__}")
        model = made
    else:
        timm = require("timm", "vision", f"load_model: {spec!r}, unless package.module:callable,")
        data = require("timm.data", "vision", f"load_model: {spec!r}")
        if not timm.is_model(spec.removeprefix("hf-hub:").partition(".")[0]) and not (
            spec.startswith("hf-hub:")
        ):
            raise ValueError(f"load_model: timm has no model {spec!r}")
        columns = columns if columns is not None or found is None else found.columns
        sized = {} if columns is None else {"num_classes": columns}
        model = timm.create_model(spec, pretrained=found is None, **sized)
        if columns is None and found is not None:
            _fit_classifier(model, found)
        wanted = data.resolve_model_data_config(model)
        transform = OnRGB(data.create_transform(**wanted, is_training=False))
    if found is not None:
        load_into(model, found.state, f"load_model: {weights} does not fit the model")
    return model.eval(), transform


def model_classes(model: nn.Module, weights: PathLike | None = None) -> tuple[str, ...] | None:
    """Names of a model's classes by class id; None where they are not known.

    They are those in the file of weights, as ``oodk train`` writes it; without one, the
    ``class_names`` of the model, or the WordNet ids of a model of timm that was trained on
    ImageNet.

    Args:
        model: What :func:`load_model` gave.
        weights: What it was given.
    """
    if weights is not None:
        names: Any = read_weights(weights).class_names
    else:
        names = getattr(model, "class_names", None)
        trained = getattr(model, "pretrained_cfg", None)
        if names is None and trained and trained.get("num_classes") == model.num_classes:
            data = require("timm.data", "vision", "model_classes")
            subset = data.infer_imagenet_subset(model)
            names = None if subset is None else data.ImageNetInfo(subset).label_names()
    return None if names is None else tuple(map(str, names))


def read_class_names(path: PathLike) -> tuple[str, ...]:
    """Names of classes by class id: a line each of a text file, or the folders a model learnt from.

    Raises:
        ValueError: There are none, or one is there twice.
        OSError: The file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        names = class_folders(path)
    else:
        text = check_file(str(path), path).read_text(encoding="utf-8-sig")
        names = [n for n in text.splitlines() if n.strip()]
    if not names or len(set(names)) < len(names):
        what = "a class twice" if names else "none"
        raise ValueError(f"read_class_names: {path} must have a name for each class, it has {what}")
    return tuple(names)


def _fit_classifier(model: Any, found: Weights) -> None:
    """Give a model of timm as many columns as the weights have."""
    classifier = model.pretrained_cfg.get("classifier")
    weight = align_names(found.state, model).get(f"{classifier}.weight")
    if weight is not None and len(weight) != model.num_classes:
        model.reset_classifier(len(weight))


def _callable(spec: str) -> Callable[[], Any]:
    module, _, name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise ValueError(f"load_model: there is no module {module!r}") from None
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ValueError(f"load_model: {module} has no callable {name!r}")
    return found
