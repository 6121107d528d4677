"""What detectors read from a model: logits, penultimate features, named layers, confidence."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from oodkernels._checks import accumulate_type

Model: TypeAlias = Callable[[Tensor], Any]
"""A callable of a batch: an ``nn.Module``, or one that gives logits, a pair or ``Outputs``."""

__all__ = [
    "FeatureModel",
    "Model",
    "Outputs",
    "OutputsModule",
    "Walk",
    "extract",
    "positions_mean",
    "run",
    "to_model",
]


class Outputs(NamedTuple):
    """What a model says about N inputs."""

    logits: Tensor
    """(N, C), or (N, C + 1) with an absent column."""
    features: Tensor | None = None
    """(N, d) penultimate features; None where there is no layer to read them from."""
    layers: Mapping[str, Tensor] = {}
    """Outputs of the layers asked for by name, of any shape (N, ...)."""
    confidence: Tensor | None = None
    """(N,) or (N, 1) logit of the confidence, where the model gives (logits, confidence)."""
    axes: Mapping[str, int] = {}
    """Axis of the features in ``layers``, for those of which the module tells."""
    absent: int | None = None
    """Column of the logits that stands for no class: the model's ``absent_column``, if any."""


class OutputsModule(nn.Module):
    """A module that gives :class:`Outputs` by itself, with all layers and features one wants.

    It is in evaluation mode. Nothing of it is hooked.
    """


class FeatureModel(nn.Module):
    """A classifier of which the features are read at a layer of your choice.

    Wherever a detector takes a model it takes this one. Calling it gives :class:`Outputs`.

    Args:
        model: x -> logits, or (logits, confidence).
        features: As for :func:`extract`.
        axis: As for :func:`extract`.
    """

    def __init__(
        self, model: nn.Module, features: str | None = None, axis: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.features: str | None = features
        self.axis = axis

    def forward(self, x: Tensor, layers: Iterable[str] = ()) -> Outputs:
        """:func:`extract` of the model."""
        return extract(self.model, x, layers, self.features, self.axis)


def extract(
    model: nn.Module,
    x: Tensor,
    layers: Iterable[str] = (),
    features: str | bool | None = None,
    axis: int | None = None,
    *,
    evaluate: bool = True,
    walk: Walk | None = None,
) -> Outputs:
    """Logits, penultimate features and outputs of named layers, from one forward pass.

    The model runs in evaluation mode and is left in the mode it was in; BatchNorm's running
    statistics stay what they were. Whether a graph is built is up to the caller
    (``torch.no_grad``). Layers are read by forward hooks and copied, so that a ReLU that works in
    place does not change them; of a layer that runs several times, the last run counts.

    Threads may share a model: each reads what its own call computed. One in training mode is
    switched to evaluation mode for as long as any call of this function needs it; a thread that
    calls it by itself meanwhile, to train it, is refused.

    Args:
        model: x -> logits, or (logits, confidence).
        x: A batch, on the device of the model.
        layers: Names of layers, as in ``model.named_modules()``, whose outputs are wanted.
        features: Name of the layer whose output are the features. By default they are what the
            classifier reads: the layer that ``model.get_classifier()`` gives (timm), else
            ``model.head``, ``model.fc`` or ``model.classifier`` if that is an ``nn.Linear``, else
            the model's last ``nn.Linear``. False for none: nothing is hooked.
        axis: Axis of features that have more than two, which are averaged over the others but the
            first: 1 for (N, d, H, W), -1 for (N, T, d). None where the module tells: last for
            torch's own linear and layer normalisation layers, second for its convolutions, batch
            and group normalisation and pooling, and behind element-wise layers of an
            ``nn.Sequential`` that of the layer before.
        evaluate: False to run the model in the mode it is in.
        walk: Of the model, current: saves a walk over its modules.

    Returns:
        :class:`Outputs`.

    Raises:
        ValueError: The model has no layer of that name, or it did not run, or its features have
            more than two axes and neither ``axis`` nor the module says which is theirs.
        TypeError: ``model`` is not an ``nn.Module``, or what it gives is no logits.
        RuntimeError: Another thread runs the model by itself while it has to be in evaluation mode.
    """
    where = "extract"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, FeatureModel):
        if features is None:
            features = model.features
        axis = model.axis if axis is None else axis
        return extract(model.model, x, layers, features, axis, evaluate=evaluate, walk=walk)
    if walk is not None and walk.model is not model:
        walk = None
    if evaluate and walk is not None and walk.is_evaluating():
        evaluate = False
    if features is False and not layers and not evaluate:
        outputs = as_outputs(model(x))
        if outputs.absent is None and (absent := absent_column(model)) is not None:
            outputs = outputs._replace(absent=absent)
        return outputs._replace(layers={}, axes={}) if outputs.layers else outputs
    named = {name: _layer(model, name) for name in dict.fromkeys(layers)}
    thread = threading.get_ident()
    seen: dict[str | None, Tensor] = {}

    def keep(name: str | None, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != thread:  # the call of another
            return
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{where}: layer {name!r} must give a tensor, got {type(output).__name__}"
            )
        seen[name] = output.clone()

    def keep_input(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread and args and isinstance(args[0], Tensor):
            seen[None] = args[0].clone()

    source: nn.Module | None = None
    with ExitStack() as stack:
        if evaluate:
            stack.enter_context(_evaluating(model))
        for name, layer in named.items():
            stack.enter_context(layer.register_forward_hook(partial(keep, name)))
        if isinstance(features, str):
            source = _layer(model, features)
            stack.enter_context(source.register_forward_hook(partial(keep, None)))
        elif features is not False and (source := _classifier(model, walk)) is not None:
            stack.enter_context(source.register_forward_pre_hook(keep_input))
        outputs = as_outputs(model(x))

    for name in [*named, *([features] if isinstance(features, str) else [])]:
        if (name if name in named else None) not in seen:
            raise ValueError(f"{where}: layer {name!r} did not run in the model's forward pass")
    found = seen.pop(None, None)
    if not isinstance(features, str) and outputs.features is not None:
        found = outputs.features
    elif found is not None and source is not None:
        what = f"layer {features!r}" if isinstance(features, str) else "the classifier's input"
        axis = known_axis(source) if axis is None else axis
        found = positions_mean(where, what, found, axis)
    axes = {name: axis for name in named if (axis := known_axis(named[name])) is not None}
    absent = absent_column(model) if outputs.absent is None else outputs.absent
    layers = {name: seen[name] for name in named}
    return outputs._replace(features=found, layers=layers, axes=axes, absent=absent)


def positions_mean(where: str, what: str, features: Tensor, axis: int | None) -> Tensor:
    """Features (N, d) of a layer, averaged over the positions where there are more axes.

    Args:
        where: What errors start with.
        what: The layer, in errors.
        features: (N, d), or (N, ...) with the features on ``axis``.
        axis: Not the first; None where it is not known.

    Raises:
        ValueError: There are more than two axes, and ``axis`` is not known or none of them.
    """
    if features.dim() == 2:
        return features
    shape = tuple(features.shape)
    if axis is None:
        raise ValueError(
            f"{where}: {what} gives {shape}, of which nothing tells the axis of the features: say "
            f"axis=1 if it is the second, axis=-1 if the last"
        )
    if not -features.dim() < axis < features.dim() or axis == 0:
        raise ValueError(f"{where}: axis must be one but the first of {shape}, got {axis}")
    features = features.to(accumulate_type(features.dtype))
    return features.movedim(axis, 1).flatten(2).mean(2)


_AXES = {"linear": -1, "conv": 1, "batchnorm": 1, "instancenorm": 1, "pooling": 1}


def known_axis(module: nn.Module) -> int | None:
    """The axis of the features in what one of torch's own layers reads and gives, if it tells."""
    if type(module) is nn.Sequential:
        for child in reversed(module):
            if not _elementwise(child):
                return known_axis(child)
        return None
    kind = _kind(module)
    if _elementwise(module):
        return None
    if isinstance(module, nn.GroupNorm):
        return 1 if kind == "normalization" else None
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return -1 if kind == "normalization" and len(module.normalized_shape) == 1 else None
    return _AXES.get(kind)


def _kind(module: nn.Module) -> str:
    """The module of torch.nn.modules in which the layer's forward is written."""
    forward = getattr(module.forward, "__func__", None)
    package, _, name = str(getattr(forward, "__module__", "")).rpartition(".")
    return name if package == "torch.nn.modules" else ""


def _elementwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or _kind(module) in ("activation", "dropout")


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        names = [n for n, _ in model.named_modules() if n]
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.3)
        raise ValueError(
            f"extract: {type(model).__name__} has no layer {name!r}; near it are "
            f"{near or names[:5]}"
        ) from None


def as_outputs(result: Any) -> Outputs:
    """What a model returned, as :class:`Outputs`.

    Raises:
        TypeError: It is neither logits, nor (logits, confidence), nor a mapping with logits such as
            Hugging Face's ``ImageClassifierOutput``, nor ``Outputs``.
    """
    if isinstance(result, Tensor):
        return Outputs(result)
    if isinstance(result, Outputs):
        return result
    if isinstance(result, Mapping) and isinstance(result.get("logits"), Tensor):
        return Outputs(result["logits"])  # Hugging Face's ModelOutput, or a plain dict
    if isinstance(result, Sequence) and [isinstance(r, Tensor) for r in result] == [True, True]:
        return Outputs(result[0], confidence=result[1])
    raise TypeError(
        f"extract: model must give logits, (logits, confidence) or Outputs, got "
        f"{type(result).__name__}"
    )


def absent_column(model: Model | None) -> int | None:
    """Column of a model's logits that stands for no class, if its ``absent_column`` tells."""
    if isinstance(model, FeatureModel):
        return absent_column(model.model)
    kind = type(model)
    if (
        getattr(kind, "__getattr__", None) is nn.Module.__getattr__
        and "absent_column" not in vars(model)
        and not hasattr(kind, "absent_column")
    ):
        return None  # which nn.Module takes long to say
    column = getattr(model, "absent_column", None)
    return column if isinstance(column, int) and not isinstance(column, bool) else None


def run(
    model: Model,
    x: Tensor,
    layers: Sequence[str] = (),
    features: bool = True,
    walk: Walk | None = None,
) -> Outputs:
    """What any :data:`Model` says about ``x``, which is brought to the model's device.

    Args:
        model: The model.
        x: (N, ...).
        layers: As for :func:`extract`.
        features: Whether penultimate features are wanted. Without them and layers nothing is
            hooked.
        walk: As for :func:`extract`.

    Raises:
        ValueError: Layers are asked of a callable that does not give them.
        TypeError: As :func:`as_outputs`.
    """
    if isinstance(model, nn.Module):
        x = to_model(model, x, walk)
        if not isinstance(model, OutputsModule):
            return extract(model, x, layers, None if features else False, walk=walk)
    outputs = as_outputs(model(x))
    missing = [name for name in layers if name not in outputs.layers]
    if missing:
        raise ValueError(
            f"extract: layers {missing} need a model that is an nn.Module, or that gives them"
        )
    return outputs


def to_model(model: Model, x: Tensor, walk: Walk | None = None) -> Tensor:
    """``x`` on the device of the model's parameters."""
    if walk is not None:
        device = walk.device()
        return x if device is None or x.device == device else x.to(device)
    if isinstance(model, nn.Module):
        first = _first(model, "_parameters")
        first = _first(model, "_buffers") if first is None else first
        if first is not None:
            return x.to(first.device)
    return x


def _first(module: nn.Module, kind: str) -> Tensor | None:
    """Like ``next(model.parameters())``, in a tenth of the time."""
    for tensor in getattr(module, kind).values():
        if tensor is not None:
            return tensor
    for child in module._modules.values():
        if child is not None and (found := _first(child, kind)) is not None:
            return found
    return None


_SWITCH = threading.Lock()
_switched: dict[int, int] = {}  # id of a module -> calls that have it in evaluation mode
_inside: dict[int, int] = {}  # thread -> its calls under way on models that were switched
_switches = 0  # times that modules have been switched


class Walk:
    """What a walk over a model's modules found, for as long as the model has the same.

    :meth:`current` looks whether it has, in a tenth of the time of a walk.

    Args:
        model: The model; of a :class:`FeatureModel` the one within.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.model if isinstance(model, FeatureModel) else model
        self._go()

    def _go(self) -> None:
        modules = _modules(self.model)
        self._states = [vars(module) for module in modules]
        held = [module._modules for module in modules]
        # Those of TorchScript are no dicts.
        self._plain = all(isinstance(h, dict) for h in held) and all(
            "training" in state for state in self._states
        )
        self._inner = [h for h in held if h]
        self._leaves = [h for h in held if not h]
        self._found = [dict(h) for h in self._inner] if self._plain else []
        self.classifier = _known_classifier(self.model)
        self._tensor: tuple[dict[str, Any], str] | None = None
        for kind in ("_parameters", "_buffers"):
            for module in modules if self._tensor is None else ():
                names = [k for k, tensor in getattr(module, kind).items() if tensor is not None]
                if names:
                    self._tensor = getattr(module, kind), names[0]
                    break

    def is_of(self, model: Model) -> bool:
        """Whether it is a walk over this model."""
        return self.model is (model.model if isinstance(model, FeatureModel) else model)

    def current(self) -> Walk | None:
        """The walk, gone again where modules are others than before; None for TorchScript's."""
        if self._plain and (any(self._leaves) or self._inner != self._found):
            self._go()
        return self if self._plain else None

    def is_evaluating(self) -> bool:
        """Whether all modules are in evaluation mode, and none was put there for a call."""
        before = _switches
        if _switched or any(map(_TRAINING, self._states)):
            return False
        return before == _switches

    def device(self) -> torch.device | None:
        """That of the first parameter, or buffer; None without any."""
        if self._tensor is not None and self._tensor[0].get(self._tensor[1]) is None:
            self._go()
        return None if self._tensor is None else self._tensor[0][self._tensor[1]].device

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # it is of the model that was copied

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


_TRAINING = itemgetter("training")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode until the last of the calls that have it so is over."""
    global _switches
    thread = threading.get_ident()
    with _SWITCH:
        own = [m for m in _modules(model) if m.training or id(m) in _switched]
        _switches += bool(own)
        for module in own:
            _switched[id(module)] = _switched.get(id(module), 0) + 1
            module.training = False
    if not own:
        yield
        return

    def refuse_others(module: nn.Module, args: Any) -> None:
        if threading.get_ident() not in _inside:
            raise RuntimeError(
                f"{type(module).__name__} is in evaluation mode while another thread reads it: "
                f"call model.eval() before threads share it, or train a copy"
            )

    with _SWITCH:
        _inside[thread] = _inside.get(thread, 0) + 1
    scripted = isinstance(model, torch.jit.ScriptModule)  # takes no hooks from Python
    guard = None if scripted else model.register_forward_pre_hook(refuse_others, prepend=True)
    try:
        yield
    finally:
        if guard is not None:
            guard.remove()
        with _SWITCH:
            for module in own:
                if _switched[id(module)] == 1:
                    module.training = True
            for counts, keys in ((_switched, [id(m) for m in own]), (_inside, [thread])):
                for key in keys:
                    counts[key] -= 1
                    if not counts[key]:
                        del counts[key]


def _modules(model: nn.Module) -> list[nn.Module]:
    """Like ``model.modules()``, in a third of the time; a shared layer may come twice."""
    found, seen, waiting = [model], {id(model)}, [model]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is None or id(child) in seen:
                continue
            found.append(child)
            if child._modules:
                seen.add(id(child))
                waiting.append(child)
    return found


def _classifier(model: nn.Module, walk: Walk | None = None) -> nn.Module | None:
    """The layer that maps features to logits."""
    get_classifier = getattr(model, "get_classifier", None)
    if callable(get_classifier):
        classifier = get_classifier()
        if isinstance(classifier, nn.Module) and not isinstance(classifier, nn.Identity):
            return classifier
    return _known_classifier(model) if walk is None else walk.classifier


def _known_classifier(model: nn.Module) -> nn.Module | None:
    """The layer that maps features to logits, where the model does not say it itself."""
    for name in ("head", "fc", "classifier"):
        if isinstance(layer := getattr(model, name, None), nn.Linear):
            return layer
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None
