"""What all detectors have in common: one interface, one pass over the data, one file format."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from oodkernels._files import read_json, replacing
from oodkernels.detectors.model import Model, run, to_model
from oodkernels.groups import Groups
from oodkernels.metrics.ood import Scores
from oodkernels.metrics.threshold import Threshold
from oodkernels.ops import LogitScores, MOSPrediction, logit_scores, mos_predict

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")
Features: TypeAlias = Tensor | Mapping[str, Tensor]
"""(N, d), or by the name of the layer for a detector that reads several."""

__all__ = ["Batch", "NotFittedError", "OODDetector", "Prediction", "score_all"]

_FORMAT, _VERSION = "oodkernels.detector", 1


class NotFittedError(ValueError, AttributeError):
    """A detector was used before ``fit``, or asked to predict before ``calibrate``."""


class Prediction(NamedTuple):
    """What :meth:`OODDetector.predict` returns, each (N,)."""

    label: Tensor | None
    """Predicted class, int64, whether OOD or not; None where neither logits nor method tell."""
    group: Tensor | None
    """Group of the predicted class, int64; None for methods without groups."""
    score: Tensor
    """Higher = more in-distribution."""
    is_ood: Tensor
    """Bool: the score is below the threshold, or NaN."""


class Batch:
    """What detectors read of N inputs; what several of them need of it is computed once.

    Attributes:
        x: (N, ...) inputs, or None.
        logits: (N, C), or None.
        features: (N, d) penultimate features, or None.
        layers: Outputs (N, ...) of layers by name.
        confidence: (N,) logit of the confidence, or None.
    """

    def __init__(
        self,
        x: Tensor | None = None,
        logits: Tensor | None = None,
        features: Tensor | None = None,
        layers: Mapping[str, Tensor] | None = None,
        confidence: Tensor | None = None,
    ) -> None:
        self.x = x
        self.logits = logits
        self.features = features
        self.layers = layers or {}
        self.confidence = confidence
        self._known: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self.tensors()[0][1])

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Those that are there, by name."""
        fields = ("x", "logits", "features", "confidence")
        found = [(name, getattr(self, name)) for name in fields]
        return [(n, t) for n, t in found if t is not None] + list(self.layers.items())

    def rows(self, index: slice | Tensor) -> Batch:
        """The batch of some of the rows."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index]

        layers = {name: tensor[index] for name, tensor in self.layers.items()}
        return Batch(
            part(self.x), part(self.logits), part(self.features), layers, part(self.confidence)
        )

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What ``compute`` returned when ``key`` was first asked for."""
        if key not in self._known:
            self._known[key] = compute()
        value: T = self._known[key]
        return value

    def logit_scores(self, temperature: float = 1.0, columns: int | None = None) -> LogitScores:
        """:func:`oodkernels.logit_scores` of the first ``columns`` logits, all by default."""
        logits = _present(self.logits)[:, :columns]
        return self.once(
            ("logit_scores", temperature, logits.shape[1]),
            lambda: logit_scores(logits, temperature),
        )

    def mos_predict(self, groups: Groups) -> MOSPrediction:
        """:func:`oodkernels.mos_predict` of the logits."""
        logits = _present(self.logits)
        return self.once(("mos_predict", groups), lambda: mos_predict(logits, groups))


class OODDetector:
    """Scores inputs, higher = more in-distribution (ID).

    A detector reads logits, features or whatever else :attr:`needs` names, from tensors given by
    keyword or from a model that is run on ``x``. Tensors of N samples in, (N,) scores out, on the
    device of the input, in float64 for float64 logits and features, else in float32; bfloat16 and
    float16 are read as such. A row that holds NaN has score NaN.

    To write a detector, set :attr:`name` and :attr:`needs`, define :meth:`_score`, and keep each
    argument of ``__init__`` in an attribute of its name. One that is fitted also sets
    :attr:`trained_on` and ``_tensors`` and defines :meth:`_update` and perhaps :meth:`_finish`.

    Args:
        model: What is run on ``x``: an ``nn.Module`` that gives logits or (logits, confidence), a
            :class:`FeatureModel`, or any callable that gives these or :class:`Outputs`. It runs in
            evaluation mode, without gradients, and is left in the mode it was in. None where only
            tensors by keyword are scored.

    Attributes:
        batch_size: Rows of ``x`` that are sent through the model at once.
        num_classes: Number C of classes; None where the detector does not depend on it.
        width: Number d of features; None where the detector does not depend on it.
        threshold: What :meth:`predict` compares scores with, or None.
    """

    name: ClassVar[str] = ""
    """Short name, in the registry and in files."""
    needs: frozenset[str] = frozenset()
    """What ``score`` reads, of {"x", "logits", "features", "confidence"}."""
    trained_on: ClassVar[frozenset[str]] = frozenset()
    """What ``fit`` reads, of {"x", "logits", "features", "labels"}; empty: there is no fit."""
    _tensors: ClassVar[tuple[str, ...]] = ()  # attributes that fitting sets and files hold

    batch_size: int = 256
    layers: Sequence[str] = ()
    num_classes: int | None = None
    width: int | None = None
    threshold: Threshold | None = None
    _status: str = "unfitted"  # then "pending", seen data but not finished; then "fitted"

    def __init__(self, model: Model | None = None) -> None:
        self.model = model

    # --- fitting ------------------------------------------------------------------------------

    def fit(
        self,
        data: Iterable[Sequence[Tensor]] | None = None,
        *,
        logits: Tensor | None = None,
        features: Features | None = None,
        labels: Tensor | None = None,
    ) -> Self:
        """Learn from ID samples, forgetting what was learnt before and the threshold.

        Args:
            data: Batches (x, labels), such as a ``DataLoader``, for the model to run on; in one
                pass unless the detector says otherwise.
            logits: (N, C).
            features: (N, d); a mapping from layer to (N, ...) for detectors of several layers.
            labels: (N,) integer class ids; samples with label -1, OOD, are left out.

        Returns:
            The detector. One that needs no fit (:attr:`trained_on` is empty) reads nothing.

        Raises:
            ValueError: What the detector is trained on is missing, or has the wrong shape.
            TypeError: It has the wrong type.
        """
        if not self.trained_on:
            return self
        self._reset()
        if data is None:
            self._learn("fit", self._batch("fit", None, logits, features, None), labels)
        else:
            for batch, y in self._training_batches(data):
                self._learn("fit", batch, y)
            if self._status == "unfitted":
                raise ValueError(f"{type(self).__name__}.fit: data must give a batch, got none")
        self._ready("fit")
        return self

    def partial_fit(
        self,
        *,
        logits: Tensor | None = None,
        features: Features | None = None,
        labels: Tensor | None = None,
    ) -> Self:
        """Learn from one more batch; arguments as for :meth:`fit`.

        Returns:
            The detector, without its threshold. What is computed from all batches is computed when
            first needed.

        Raises:
            ValueError: As :meth:`fit`.
            TypeError: As :meth:`fit`.
        """
        if self.trained_on:
            batch = self._batch("partial_fit", None, logits, features, None)
            self._learn("partial_fit", batch, labels)
        return self

    # --- scoring ------------------------------------------------------------------------------

    def score(
        self,
        x: Tensor | None = None,
        *,
        logits: Tensor | None = None,
        features: Features | None = None,
        confidence: Tensor | None = None,
    ) -> Tensor:
        """Scores, higher = more ID; what is needed and not given is computed from ``x``.

        Args:
            x: (N, ...) inputs, for the model; sent through it :attr:`batch_size` at a time.
            logits: (N, C).
            features: (N, d); a mapping from layer to (N, ...) for detectors of several layers.
            confidence: (N,) or (N, 1), logit of the confidence.

        Returns:
            (N,), on the device of the input.

        Raises:
            ValueError: Something needed is missing or has the wrong shape; ``x`` without a model.
            TypeError: A tensor is not floating-point.
            NotFittedError: ``fit`` has not been called.
        """
        batch = self._batch("score", x, logits, features, confidence)
        return _score_all(f"{type(self).__name__}.score", {"": self}, batch, None)[""]

    def calibrate(
        self, id_scores: Scores, tpr: float = 0.95, confidence: float = 0.95
    ) -> Threshold:
        """Set :attr:`threshold` by :meth:`oodkernels.Threshold.calibrate`, and return it.

        Args:
            id_scores: Scores of ID samples that the model was not trained on.
            tpr: Share of ID samples to keep.
            confidence: Of the threshold's interval.

        Raises:
            ValueError: As there.
            TypeError: As there.
        """
        self.threshold = Threshold.calibrate(id_scores, tpr, confidence)
        return self.threshold

    def predict(
        self,
        x: Tensor | None = None,
        *,
        logits: Tensor | None = None,
        features: Features | None = None,
        confidence: Tensor | None = None,
    ) -> Prediction:
        """Class, group, score and whether the score is below the threshold; as :meth:`score`.

        Returns:
            A :class:`Prediction`, on the device of the input.

        Raises:
            ValueError: As :meth:`score`.
            TypeError: As :meth:`score`.
            NotFittedError: ``calibrate`` (or ``fit``) has not been called.
        """
        where = f"{type(self).__name__}.predict"
        if self.threshold is None:
            raise NotFittedError(
                f"{where}: calibrate must come first: detector.calibrate(detector.score(...))"
            )
        batch = self._batch("predict", x, logits, features, confidence)
        parts = []
        with torch.no_grad():
            for whole in _chunks(batch, None if x is None else self.batch_size):
                part = _completed(where, [self], whole)[0]
                parts.append((self._score(part), *self._label(part)))
        device = batch.tensors()[0][1].device
        score, label, group = (_joined(p, device) for p in zip(*parts, strict=True))
        score = _present(score)
        return Prediction(label, group, score, self.threshold.predict(score))

    # --- keeping ------------------------------------------------------------------------------

    def to(self, device: torch.device | str | int) -> Self:
        """Move what was fitted; the model is left where it is."""
        for name in self._tensors:
            if isinstance(value := getattr(self, name, None), Tensor):
                setattr(self, name, value.to(device))
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the detector without its model to a safetensors file; extra "files".

        Settings, class count, width and threshold are JSON in the file's metadata. The file is
        replaced whole or not at all.

        Raises:
            NotFittedError: ``fit`` has not been called.
            ImportError: safetensors is missing.
            OSError: The file cannot be written.
        """
        self._ready("save")
        save_file = _safetensors("save").torch.save_file
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self._state().items()
        }
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "detector": self.name,
            "settings": self._settings(),
            "num_classes": self.num_classes,
            "width": self.width,
            "threshold": self.threshold and self.threshold.to_json(),
        }
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"oodkernels": json.dumps(content)})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Model | None = None,
        *,
        num_classes: int | None = None,
        width: int | None = None,
    ) -> Self:
        """The detector in a file that :meth:`save` wrote, on the CPU.

        ``OODDetector.load`` takes any detector of this package, a subclass its own.

        Args:
            path: The file.
            model: As for the constructor.
            num_classes: If given, the class count that the file must be of.
            width: If given, the number of features that the file must be of.

        Raises:
            ValueError: The file is none of these, of another version, another detector, another
                class count or width, or its content is not what it should be.
            ImportError: safetensors is missing.
            OSError: The file cannot be read.
        """
        where = f"{cls.__name__}.load: {os.fspath(path)}"
        text, tensors = _read(where, Path(path), cls.__name__)
        content = read_json(where, text, _FORMAT, _VERSION)
        try:
            kind = _class_of(cls, content["detector"])
            for name, wanted in (("num_classes", num_classes), ("width", width)):
                if wanted is not None and content[name] not in (None, wanted):
                    raise ValueError(f"{name} must be {wanted}, got {content[name]}")
            detector = kind._from_settings(content["settings"], model)
            if detector.num_classes not in (None, content["num_classes"]):
                raise ValueError(
                    f"num_classes must be {detector.num_classes}, got {content['num_classes']}"
                )
            detector.num_classes, detector.width = content["num_classes"], content["width"]
            if content["threshold"] is not None:
                detector.threshold = Threshold.from_json(content["threshold"])
            detector._load_state(tensors)
        except KeyError as error:
            raise ValueError(f"{where}: {error} is missing") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        detector._status = "fitted"
        return detector

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self._arguments().items())
        return f"{type(self).__name__}({arguments})"

    # --- for subclasses -----------------------------------------------------------------------

    def _score(self, batch: Batch) -> Tensor:
        """(N,) scores of a batch that has what the detector needs, without gradients."""
        raise NotImplementedError

    def _label(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Predicted class and group, (N,) each, where there are any."""
        return (None if batch.logits is None else batch.logit_scores().label), None

    def _check(self, where: str, batch: Batch) -> None:
        """Raise ValueError, starting with ``where``, if a batch is not of the detector's shape."""
        if self.width is not None and batch.features is not None:
            found = batch.features.shape[1]
            if found != self.width:
                raise ValueError(f"{where}: features must have width {self.width}, got {found}")

    def _reset(self) -> None:
        """Forget what was learnt."""
        self._status = "unfitted"
        self.num_classes = self.width = self.threshold = None
        for name in self._tensors:
            vars(self).pop(name, None)

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        """Learn from a batch, OOD samples left out; errors start with ``where``."""
        raise NotImplementedError

    def _finish(self, where: str) -> None:
        """Set the attributes in ``_tensors`` from all batches; errors start with ``where``."""

    def _state(self) -> dict[str, Tensor]:
        """The tensors to save."""
        return {name: getattr(self, name) for name in self._tensors}

    def _load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in what :meth:`_state` gave; ValueError if it is something else."""
        if tensors.keys() != set(self._tensors):
            raise ValueError(f"tensors must be {sorted(self._tensors)}, got {sorted(tensors)}")
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def _settings(self) -> dict[str, Any]:
        """The constructor's arguments, but for the model, as JSON can hold them."""
        return self._arguments()

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any], model: Model | None) -> Self:
        return cls(**settings, model=model)

    # --- shared -------------------------------------------------------------------------------

    def _arguments(self) -> dict[str, Any]:
        parameters = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in parameters if name != "model"}

    def _ready(self, method: str) -> None:
        """Finish a fit that is pending; NotFittedError if there is none."""
        where = f"{type(self).__name__}.{method}"
        if self._status == "unfitted" and self.trained_on:
            raise NotFittedError(f"{where}: fit must come first")
        if self._status == "pending":
            self._finish(where)
        self._status = "fitted"

    def _batch(
        self,
        method: str,
        x: Tensor | None,
        logits: Tensor | None,
        features: Features | None,
        confidence: Tensor | None,
    ) -> Batch:
        return _batch(f"{type(self).__name__}.{method}", x, logits, features, confidence)

    def _missing(self, batch: Batch, wanted: Iterable[str]) -> list[str]:
        """What of ``wanted`` a batch lacks."""
        missing = []
        for name in sorted(wanted):
            if name == "features" and self.layers:
                missing += [f"features[{n!r}]" for n in self.layers if n not in batch.layers]
            elif name != "labels" and getattr(batch, name) is None:
                missing.append(name)
        return missing

    def _training_batches(self, data: Iterable[Sequence[Tensor]]) -> Iterator[tuple[Batch, Tensor]]:
        """Batches of ``data`` with what the detector is trained on, and their labels."""
        where = f"{type(self).__name__}.fit"
        if isinstance(data, Tensor) or not isinstance(data, Iterable):
            raise TypeError(
                f"{where}: data must be an iterable of batches (x, labels), "
                f"got {type(data).__name__}"
            )
        for pair in data:
            if not isinstance(pair, Sequence) or len(pair) != 2:
                raise TypeError(
                    f"{where}: data must give batches (x, labels), got {type(pair).__name__}"
                )
            x, y = pair
            batch = _batch(where, x, None, None, None)
            with torch.no_grad():
                completed = _completed(where, [self], batch, self.trained_on)[0]
            yield completed, y

    def _learn(self, method: str, batch: Batch, labels: Tensor | None) -> None:
        where = f"{type(self).__name__}.{method}"
        missing = self._missing(batch, self.trained_on)
        if "labels" in self.trained_on and labels is None:
            missing.append("labels")
        if missing:
            raise ValueError(f"{where}: {', '.join(missing)} must be given")
        if labels is not None:
            labels = _checked_labels(where, labels, len(batch)).to(batch.tensors()[0][1].device)
            ood = labels < 0
            if ood.any():
                batch, labels = batch.rows(~ood), labels[~ood]
        self._check(where, batch)
        with torch.no_grad():
            self._update(where, batch, labels)
        self._status = "pending"
        self.threshold = None  # it was of other scores


def score_all(
    detectors: Mapping[str, OODDetector],
    *,
    x: Tensor | None = None,
    logits: Tensor | None = None,
    features: Features | None = None,
    confidence: Tensor | None = None,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """The scores of several detectors, from one pass over the data.

    Detectors with the same model share its forward pass. All that read MSP, maximum logit, energy
    or entropy at one temperature are served by one :func:`oodkernels.logit_scores`, all that read
    MOS scores of the same groups by one :func:`oodkernels.mos_predict`.

    Args:
        detectors: By any name.
        x: As for :meth:`OODDetector.score`; what a detector needs and is not given is computed
            from it by the detector's model.
        logits: As there.
        features: As there.
        confidence: As there.
        chunk: Rows at a time. By default the least ``batch_size`` of the detectors where ``x`` is
            given, else all.

    Returns:
        Name -> (N,) scores, higher = more ID, on the device of the input.

    Raises:
        ValueError: As :meth:`OODDetector.score`, or ``chunk`` is below 1.
        TypeError: As there, or a detector is none.
        NotFittedError: A detector that must be fitted is not.
    """
    where = "score_all"
    for name, detector in detectors.items():
        if not isinstance(detector, OODDetector):
            raise TypeError(
                f"{where}: detectors[{name!r}] must be an OODDetector, got "
                f"{type(detector).__name__}"
            )
    if chunk is not None and chunk < 1:
        raise ValueError(f"{where}: chunk must be >= 1, got {chunk}")
    batch = _batch(where, x, logits, features, confidence)
    return _score_all(where, detectors, batch, chunk)


def _score_all(
    where: str, detectors: Mapping[str, OODDetector], batch: Batch, chunk: int | None
) -> dict[str, Tensor]:
    used = list(detectors.values())
    device = batch.tensors()[0][1].device
    if chunk is None and batch.x is not None:
        chunk = min((d.batch_size for d in used), default=1)
    scores: list[list[Tensor]] = [[] for _ in used]
    with torch.no_grad():
        for part in _chunks(batch, chunk):
            for i, own in enumerate(_completed(where, used, part)):
                scores[i].append(used[i]._score(own))
    joined = [_present(_joined(parts, device)) for parts in scores]
    return dict(zip(detectors, joined, strict=True))


def _chunks(batch: Batch, chunk: int | None) -> Iterator[Batch]:
    n = len(batch)
    if chunk is None or n <= chunk:
        yield batch
        return
    for begin in range(0, n, chunk):
        yield batch.rows(slice(begin, begin + chunk))


def _completed(
    where: str,
    detectors: Sequence[OODDetector],
    batch: Batch,
    wanted: frozenset[str] | None = None,
) -> list[Batch]:
    """For each detector a checked batch that has what it needs; a model runs once at most."""
    ran: dict[int, Batch] = {}
    own = []
    for detector in detectors:
        if wanted is None:
            detector._ready(where.rpartition(".")[2])
        needs = detector.needs if wanted is None else wanted
        mine = batch
        if missing := detector._missing(batch, needs):
            if batch.x is None or "x" in missing:
                raise ValueError(f"{where}: {detector.name} needs {', '.join(missing)}, or x")
            if detector.model is None:
                raise ValueError(
                    f"{where}: x needs a model: {type(detector).__name__}(..., model=model)"
                )
            key = id(detector.model)
            if key not in ran:
                sharing = [d for d in detectors if d.model is detector.model]
                ran[key] = _run(detector.model, batch, sharing)
            mine = ran[key]
            if missing := detector._missing(mine, needs):
                raise ValueError(
                    f"{where}: the model must give {', '.join(missing)} for {detector.name}; "
                    f"see FeatureModel"
                )
        detector._check(where, mine)
        own.append(mine)
    return own


def _run(model: Model, batch: Batch, detectors: Sequence[OODDetector]) -> Batch:
    """The batch with what the model makes of its x; what was given is kept."""
    x = to_model(model, _present(batch.x))
    layers = tuple(dict.fromkeys(name for d in detectors for name in d.layers))
    found = run(model, x, layers)

    def given(mine: Tensor | None, computed: Tensor | None) -> Tensor | None:
        return computed if mine is None else mine

    return Batch(
        x,
        given(batch.logits, found.logits),
        given(batch.features, found.features),
        {**found.layers, **batch.layers},
        given(batch.confidence, found.confidence),
    )


def _batch(
    where: str,
    x: Tensor | None,
    logits: Tensor | None,
    features: Features | None,
    confidence: Tensor | None,
) -> Batch:
    """The checked arguments of ``score`` as a batch."""
    if isinstance(features, Mapping):
        batch = Batch(x, logits, None, features, confidence)
    else:
        batch = Batch(x, logits, features, None, confidence)
    shapes = {"logits": (2, "(N, C)"), "features": (2, "(N, d)")}
    tensors = batch.tensors()
    if not tensors:
        raise ValueError(f"{where}: x, logits, features or confidence must be given, got none")
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}: {name} must be a tensor, got {type(tensor).__name__}")
        if name != "x" and not tensor.is_floating_point():
            raise TypeError(f"{where}: {name} must be floating-point, got {tensor.dtype}")
        dim, shape = shapes.get(name, (None, "(N, ...)"))
        if tensor.dim() == 0 or dim not in (None, tensor.dim()):
            raise ValueError(f"{where}: {name} must be {shape}, got {tuple(tensor.shape)}")
        if len(tensor) != len(tensors[0][1]):
            raise ValueError(
                f"{where}: {tensors[0][0]} and {name} must be of the same samples, got "
                f"{len(tensors[0][1])} and {len(tensor)}"
            )
    if confidence is not None and confidence.numel() != len(confidence):
        raise ValueError(
            f"{where}: confidence must be (N,) or (N, 1), got {tuple(confidence.shape)}"
        )
    return batch


def _checked_labels(where: str, labels: Any, n: int) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{where}: labels must be a tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{where}: labels must be integers, got {labels.dtype}")
    if labels.shape != (n,):
        raise ValueError(f"{where}: labels must be ({n},), got {tuple(labels.shape)}")
    if n and (low := int(labels.min())) < -1:
        raise ValueError(f"{where}: labels must be class ids or -1 for OOD, got {low}")
    return labels.long()


def _joined(parts: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    if not tensors:
        return None
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).to(device)


def _present(value: T | None) -> T:
    assert value is not None
    return value


# --- files ----------------------------------------------------------------------------------------


def _safetensors(where: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{where}: a detector's file needs safetensors: pip install 'oodkernels[files]'"
        ) from error
    return safetensors


def _read(where: str, path: Path, cls: str) -> tuple[str, dict[str, Tensor]]:
    """What a file says of itself, "{}" where it says nothing, and its tensors."""
    package = _safetensors(f"{cls}.load")
    try:
        with package.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return (file.metadata() or {}).get("oodkernels", "{}"), tensors
    except package.SafetensorError as error:
        raise ValueError(f"{where}: must be a safetensors file: {error}") from None


def _class_of(cls: type[OODDetector], name: str) -> type[Any]:
    """The class to load a file of detector ``name`` into."""
    from oodkernels.detectors import DETECTORS

    known = DETECTORS if cls is OODDetector else {cls.name: cls}
    if name not in known:
        raise ValueError(f"detector must be one of {sorted(known)}, got {str(name)[:80]!r}")
    return known[name]
