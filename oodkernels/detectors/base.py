"""What all detectors have in common: one interface, one pass over the data, one file format."""

from __future__ import annotations

import copy
import inspect
import math
import os
import threading
import warnings
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from oodkernels._checks import check_class_ids, check_int
from oodkernels._digest import digest
from oodkernels._safetensors import read_tensors, write_tensors
from oodkernels.detectors.batch import (
    Batch,
    Features,
    Inputs,
    as_batch,
    check_axes,
    inputs_of,
    is_loader,
    joined,
    present,
    tensor_of,
)
from oodkernels.detectors.dense import is_dense, pixel_rows, pixels_of, without_void
from oodkernels.detectors.model import Model, Walk
from oodkernels.detectors.passes import complete, score_batch
from oodkernels.detectors.specs import FAMILIES, DetectorSpec
from oodkernels.groups import Groups
from oodkernels.metrics.ood import Scores
from oodkernels.metrics.threshold import Threshold, ThresholdSource, is_below

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

__all__ = [
    "DETECTORS",
    "NotFittedError",
    "OODDetector",
    "Prediction",
    "register",
    "score_all",
]

_FORMAT, _VERSION = "oodkernels.detector", 1
_FINISHING = threading.RLock()  # threads that share a detector finish its fit once


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
    trained_on: frozenset[str] = frozenset()
    """What ``fit`` reads, of {"x", "logits", "features", "labels"}; empty: there is no fit."""
    spec: ClassVar[DetectorSpec]
    """Its row in the registry."""
    _tensors: ClassVar[Mapping[str, str]] = {}
    # Attributes that fitting sets and files hold, and their axes: "d" and "C" are width and number
    # of classes, other letters any size.

    batch_size: int = 256
    layers: Sequence[str] = ()
    absent: int | None = None
    num_classes: int | None = None
    width: int | None = None
    threshold: Threshold | None = None
    _walk: Walk | None = None
    _status: str = "unfitted"  # then "pending", seen data but not finished; then "fitted"
    _verified: tuple[Threshold, Model | None, dict[str, Any]] | None = None
    _carried: ClassVar[frozenset[str]] = frozenset({"num_classes", "width", "statistics", "_new"})
    # What fitting sets, of what ``__init__`` sets too.
    _known: ClassVar[Mapping[Hashable, Any]] = {}  # what follows from what was fitted
    _loaded = False  # from a file
    _lent = False  # what was fitted is another's, too
    passes = 1
    """How many passes over the training data a fit takes."""
    _least: float = -math.inf  # no score is below it
    _finer: str = ""  # what to do where many have it

    def __init__(self, model: Model | None = None, absent: int | None = None) -> None:
        self.model = model
        self.absent = None if absent is None else check_int(type(self).__name__, "absent", absent)

    # --- fitting ------------------------------------------------------------------------------

    def fit(
        self,
        data: Iterable[Any] | Inputs | None = None,
        y: Inputs | None = None,
        *,
        logits: Inputs | None = None,
        features: Features | None = None,
        labels: Inputs | None = None,
        void: int | None = None,
    ) -> Self:
        """Learn from ID samples, forgetting what was learnt before and the threshold.

        Arrays are taken wherever tensors are.

        Args:
            data: Batches (x, labels), such as a ``DataLoader``, for the model to run on; in one
                pass unless the detector says otherwise. They may be dicts with "x" or
                "pixel_values", and "labels". With ``y`` all samples at once, (N, ...): inputs of
                the model, or without one the logits or features, whichever it is trained on.
            y: (N,) labels of ``data``.
            logits: (N, C), or (N, C, H, W) of pixels.
            features: (N, d), or (N, d, H, W) of pixels; a mapping from layer to (N, ...) for
                detectors of several layers.
            labels: (N,) integer class ids, of pixels (N, H, W); samples with label -1, OOD, are
                left out.
            void: Label of samples that are of no class and left out, such as 255 of pixels.

        Returns:
            The detector. One that needs no fit (:attr:`trained_on` is empty) reads nothing.

        Raises:
            ValueError: What the detector is trained on is missing, or has the wrong shape.
            TypeError: It has the wrong type.
        """
        if not self.trained_on:
            return self
        where = f"{type(self).__name__}.fit"
        if y is not None:
            data, logits, features, labels = self._all_at_once(where, data, y)
        self._reset()
        if data is None:
            for i in range(self.passes):
                if i:
                    self._next_pass(where)
                self._take(where, logits, features, labels, void)
        else:
            for i in range(self.passes):
                if i:
                    self._next_pass(where)
                for batch, y in self._training_batches(where, data):
                    self.fit_batch(batch, without_void(where, y, void), where=where)
                if self._status == "unfitted":
                    raise ValueError(f"{where}: data must give a batch, got none")
        self._ready(where)
        return self

    def partial_fit(
        self,
        *,
        logits: Inputs | None = None,
        features: Features | None = None,
        labels: Inputs | None = None,
        void: int | None = None,
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
            where = f"{type(self).__name__}.partial_fit"
            self._take(where, logits, features, labels, void)
        return self

    def _take(
        self,
        where: str,
        logits: Inputs | None,
        features: Features | None,
        labels: Inputs | None,
        void: int | None,
    ) -> None:
        """Learn from tensors, of samples or of pixels."""
        logits, features, labels = tensor_of(logits), tensor_of(features), tensor_of(labels)
        if pixels_of(where, logits, features) is None:
            batch = as_batch(where, None, logits, features)
            self.fit_batch(batch, without_void(where, labels, void), where=where)
            return
        assert not isinstance(features, Mapping)
        for batch, own in pixel_rows(where, logits, features, labels):
            self.fit_batch(batch, without_void(where, own, void), where=where)

    def fit_batch(
        self, batch: Batch, labels: Inputs | None = None, *, where: str = "fit_batch"
    ) -> None:
        """:meth:`partial_fit` to a batch.

        Args:
            batch: Its tensors are not looked at again.
            labels: As for :meth:`fit`.
            where: What errors start with.

        Raises:
            ValueError: As :meth:`fit`.
            TypeError: As :meth:`fit`.
        """
        if not self.trained_on:
            return
        missing = self._missing(batch, self.trained_on)
        if "labels" in self.trained_on and labels is None:
            missing.append("labels")
        if missing:
            raise ValueError(f"{where}: {', '.join(missing)} must be given")
        if labels is not None:
            labels = check_class_ids(where, tensor_of(labels), len(batch)).to(batch.device)
            ood = labels < 0
            if ood.any():
                batch, labels = batch.rows(~ood), labels[~ood]
        self._check(where, batch)
        if self._lent:
            own = {*self._tensors, *self._carried, "_sample", "_statistics"} & vars(self).keys()
            vars(self).update({name: copy.deepcopy(vars(self)[name]) for name in own})
            self._lent = False
        with torch.no_grad():
            self._update(where, batch, labels)
        self._status = "pending"
        self.threshold = None  # it was of other scores

    # --- scoring ------------------------------------------------------------------------------

    def score(
        self,
        x: Inputs | Iterable[Any] | None = None,
        *,
        logits: Inputs | None = None,
        features: Features | None = None,
        confidence: Inputs | None = None,
    ) -> Tensor:
        """Scores, higher = more ID; what is needed and not given is computed from ``x``.

        Args:
            x: (N, ...) inputs, for the model; sent through it :attr:`batch_size` at a time. Or
                batches of them, such as a ``DataLoader``, as for :meth:`fit`; labels are not read.
            logits: (N, C), or (N, C, H, W) of pixels, whatever their strides: they are read a
                block of pixels at a time and never copied as a whole.
            features: (N, d), or (N, d, H, W) of pixels; a mapping from layer to (N, ...) for
                detectors of several layers.
            confidence: (N,) or (N, 1), logit of the confidence.

        Returns:
            (N,), or (N, H, W) of pixels, on the device of the input.

        Raises:
            ValueError: Something needed is missing or has the wrong shape; ``x`` without a model.
            TypeError: A tensor is not floating-point.
            NotFittedError: ``fit`` has not been called.
        """
        where = f"{type(self).__name__}.score"
        if x is not None and is_loader(x):
            return torch.cat([self.score(part) for part in self._inputs(where, x)])
        if is_dense(logits) or is_dense(features):
            logits, features = tensor_of(logits), tensor_of(features)
            pixels_of(where, logits, features, x, confidence)
            return score_all({"": self}, logits=logits, features=features)[""]
        batch = as_batch(where, x, logits, features, confidence)
        if not torch.is_grad_enabled():
            return self._score_rows(where, batch)
        with torch.no_grad():
            return self._score_rows(where, batch)

    def _score_rows(self, where: str, batch: Batch) -> Tensor:
        if batch.x is not None and len(batch) > self.batch_size:
            parts = [self._score(part) for part in self._parts(where, batch)]
            return present(joined(parts, batch.device))
        score = self._score(complete(where, self, batch))
        device = batch.device
        return score if score.device == device else score.to(device)

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
        found = Threshold.calibrate(id_scores, tpr, confidence, source=self.source())
        if found.value <= self._least:
            warnings.warn(
                f"{type(self).__name__}.calibrate: no score can be below the threshold "
                f"{found.value:g}, so that nothing but NaN is OOD{self._finer}",
                stacklevel=2,
            )
        self.threshold = found
        self._verified = (found, self.model, self._plain_settings())
        return found

    def source(self) -> ThresholdSource:
        """Whose scores these are, with digests of the model's weights and of what was fitted.

        It is the ``source`` of thresholds from :meth:`calibrate`; :meth:`predict` refuses one of
        another detector, other settings, other groups or another model.
        """
        weights = dict(self._state()) if self._status == "fitted" else {}
        if isinstance(self.model, nn.Module):
            weights |= {f"model.{k}": v for k, v in self.model.state_dict().items()}
        groups: Groups | None = getattr(self, "groups", None)
        return ThresholdSource(
            self.name or type(self).__name__,
            self._plain_settings(),
            None if groups is None else digest(groups.to_json()),
            digest(weights) if weights else None,
        )

    def predict(
        self,
        x: Inputs | Iterable[Any] | None = None,
        *,
        logits: Inputs | None = None,
        features: Features | None = None,
        confidence: Inputs | None = None,
    ) -> Prediction:
        """Class, group, score and whether the score is below the threshold; as :meth:`score`.

        Returns:
            A :class:`Prediction`, on the device of the input.

        Raises:
            ValueError: As :meth:`score`, or the threshold is of other scores: see :meth:`source`.
            TypeError: As :meth:`score`.
            NotFittedError: ``calibrate`` (or ``fit``) has not been called.
        """
        where = f"{type(self).__name__}.predict"
        if x is not None and is_loader(x):
            parts = [self.predict(part) for part in self._inputs(where, x)]
            columns: Any = zip(*parts, strict=True)
            every: list[Any] = [joined(c, parts[0].score.device) for c in columns]
            return Prediction(*every)
        if self.threshold is None:
            raise NotFittedError(
                f"{where}: calibrate must come first: detector.calibrate(detector.score(...))"
            )
        self.check_threshold(self.threshold, where)
        if is_dense(logits) or is_dense(features):
            logits, features = tensor_of(logits), tensor_of(features)
            shape = present(pixels_of(where, logits, features, x, confidence))
            assert not isinstance(features, Mapping)
            rows = [
                self.predict(logits=part.logits, features=part.features)
                for part, _ in pixel_rows(where, logits, features)
            ]
            device = rows[0].score.device
            label, group, score, is_ood = (
                None if column is None else column.reshape(shape)
                for column in (joined(parts, device) for parts in zip(*rows, strict=True))
            )
            return Prediction(label, group, present(score), present(is_ood))
        batch = as_batch(where, x, logits, features, confidence)
        if not torch.is_grad_enabled():
            return self._predict_rows(where, batch, self.threshold.value)
        with torch.no_grad():
            return self._predict_rows(where, batch, self.threshold.value)

    def _predict_rows(self, where: str, batch: Batch, limit: float) -> Prediction:
        if batch.x is not None and len(batch) > self.batch_size:
            given = [(self._score(p), *self._label(p)) for p in self._parts(where, batch)]
        else:
            own = complete(where, self, batch)
            given = [(self._score(own), *self._label(own))]
        score, label, group = given[0]
        device = batch.device
        if len(given) > 1 or score.device != device:
            found, label, group = (joined(column, device) for column in zip(*given, strict=True))
            score = present(found)
        return Prediction(label, group, score, is_below(score, limit, where))

    def varied(self, **settings: Any) -> Self:
        """The detector with other settings, fitted to the same data, which are not read again.

        Args:
            **settings: Options by name; the others stay as they are.

        Returns:
            Another detector, without threshold; weights of layers are to be fitted anew.

        Raises:
            ValueError: An option is unknown or out of its range, or one that the pass over the
                training data depends on (:attr:`DetectorSpec.at_fit`), or the detector is from a
                file, in which there is no more of the data than its own settings need.
            TypeError: An option is of a wrong type.
        """
        where, spec = f"{type(self).__name__}.varied", self.spec
        if unknown := settings.keys() - spec.options.keys():
            raise ValueError(
                f"{where}: {self.name} has no option {min(unknown)!r}, only "
                f"{', '.join(spec.options) or None}"
            )
        mine = self._arguments()
        changed = {name for name, value in settings.items() if value != mine.get(name)}
        fitted = bool(self.trained_on) and self._status != "unfitted"
        if fitted and (bound := changed & spec.at_fit):
            raise ValueError(
                f"{where}: {min(bound)} must be {mine[min(bound)]!r}, as in the fit, which depends "
                f"on it: fit another detector"
            )
        if fitted and self._loaded and (bound := changed - spec.at_score):
            raise ValueError(
                f"{where}: {min(bound)} must be {mine[min(bound)]!r}, as in the file: fit the "
                f"detector again"
            )
        other = type(self)._from_settings({**self._settings(), **settings}, self.model)
        fresh = vars(other).keys() - self._carried
        vars(other).update({n: v for n, v in vars(self).items() if n not in fresh})
        other.threshold, other._status = None, self._status
        self._lent = other._lent = True
        if fitted and other.trained_on:
            other._settle(where, changed - spec.at_score)
        return other

    def check_threshold(self, threshold: Threshold, where: str = "check_threshold") -> None:
        """Refuse a threshold of other scores; one that says nothing of its own is the user's.

        Args:
            threshold: That scores of this detector are to be compared with.
            where: What errors start with.

        Raises:
            ValueError: It is of another detector, other settings, groups or another model.
        """
        if threshold.source is None:
            return
        key = (threshold, self.model, self._plain_settings())
        known = self._verified
        if known and known[0] is threshold and known[1] is self.model and known[2] == key[2]:
            return
        mine = self.source()
        if not isinstance(self.model, nn.Module):  # scores may come from anywhere
            mine = replace(mine, model=threshold.source.model)
        threshold.check_source(mine, where)
        self._verified = key

    # --- keeping ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that were fitted, by name.

        Raises:
            NotFittedError: ``fit`` has not been called.
        """
        self._ready(f"{type(self).__name__}.state_dict")
        return self._state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take in the tensors of a detector with the same settings, classes and width.

        Raises:
            ValueError: They are others, or not of the same shapes.
        """
        where = f"{type(self).__name__}.load_state_dict"
        self._ready(where)
        device = next((t.device for t in self._state().values()), None)
        try:
            self._load_state(dict(state))
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
        if device is not None:
            self.to(device)
        self.threshold = None  # it was of other scores

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
        where = f"{type(self).__name__}.save"
        self._ready(where)
        content = {
            "detector": self.name,
            "settings": self._settings(),
            "num_classes": self.num_classes,
            "width": self.width,
            "threshold": self.threshold and self.threshold.to_json(),
        }
        write_tensors(where, path, self._state(), _FORMAT, _VERSION, content)

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
        content, tensors = read_tensors(where, path, _FORMAT, _VERSION)
        try:
            known = {**DETECTORS, **COMPOUNDS} if cls is OODDetector else {cls.name: cls}
            if content["detector"] not in known:
                name = str(content["detector"])[:80]
                raise ValueError(f"detector must be one of {sorted(known)}, got {name!r}")
            kind: type[Any] = known[content["detector"]]
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
            detector._status = "fitted"
            if detector.trained_on:
                detector._loaded = True
            if detector.threshold is not None:
                detector.check_threshold(detector.threshold, "threshold")
        except KeyError as error:
            raise ValueError(f"{where}: {error} is missing") from None
        except (LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: {' '.join(str(error).split())[:2000]}") from error
        return detector

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self)).parameters
        changed = {k: v for k, v in self._arguments().items() if v != defaults[k].default}
        arguments = ", ".join(f"{k}={v!r}" for k, v in changed.items())
        return f"{type(self).__name__}({arguments})"

    # --- for subclasses -----------------------------------------------------------------------

    def _score(self, batch: Batch) -> Tensor:
        """(N,) scores of a batch that has what the detector needs, without gradients."""
        raise NotImplementedError

    def _announce(self, batch: Batch) -> None:
        """Tell a batch what it will be asked for, so that others that ask alike are served too."""

    def _label(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Predicted class and group, (N,) each, where there are any."""
        if batch.logits is None:
            return None, None
        return batch.logit_scores(absent=self.absent).label, None

    def _check(self, where: str, batch: Batch) -> None:
        """Raise ValueError, starting with ``where``, if a batch is not of the detector's shape."""
        if self.width is not None and batch.features is not None:
            found = batch.features.shape[1]
            if found != self.width:
                raise ValueError(f"{where}: features must have width {self.width}, got {found}")
        if self.absent is not None and batch.logits is not None:
            batch.absent_column(where, self.absent)

    def _settle(self, where: str, changed: Collection[str]) -> None:
        """Bring what was fitted in line with options that were changed; refuse what it cannot."""
        if changed:
            self._status = "pending"
            self._ready(where)

    def _every(self, option: str) -> Sequence[Any] | None:
        """All values that an option can have, after the fit; None where that means nothing."""
        return None

    def _scorer(
        self, where: str, settings: Sequence[Mapping[str, Any]]
    ) -> Callable[[Batch], Tensor]:
        """What gives the scores of a batch under each of several settings, (N, settings)."""
        variants = [self.varied(**one) for one in settings]
        for variant in variants:
            variant._ready(where)
        return lambda batch: torch.stack([variant._score(batch) for variant in variants], 1)

    def _once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What ``compute`` gave when ``key`` was first asked for since the state last changed."""
        found: T | None = self._known.get(key)
        if found is None:
            found = compute()
            if not torch.compiler.is_compiling():  # anew, as copies and other threads read it too
                vars(self)["_known"] = {**self._known, key: found}
        return found

    def _reset(self) -> None:
        """Forget what was learnt."""
        vars(self).pop("_known", None)
        self._status = "unfitted"
        self._loaded = self._lent = False
        self.num_classes = self.width = self.threshold = None
        for name in self._tensors:
            vars(self).pop(name, None)

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        """Learn from a batch, OOD samples left out; errors start with ``where``."""
        raise NotImplementedError

    def _next_pass(self, where: str) -> None:
        """Called between two passes over the training data."""

    def _finish(self, where: str) -> None:
        """Set the attributes in ``_tensors`` from all batches; errors start with ``where``."""

    def _state(self) -> dict[str, Tensor]:
        """The tensors to save."""
        return {name: getattr(self, name) for name in self._tensors}

    def _load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in what :meth:`_state` gave; ValueError if it is something else."""
        if tensors.keys() != self._tensors.keys():
            raise ValueError(f"tensors must be {sorted(self._tensors)}, got {sorted(tensors)}")
        check_axes(tensors, self._tensors, {"d": self.width, "C": self.num_classes})
        vars(self).pop("_known", None)
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
        names: tuple[str, ...] = _parameters(type(self))  # type: ignore[arg-type]
        return {name: getattr(self, name) for name in names}

    def _plain_settings(self) -> dict[str, Any]:
        """The settings without the groups, whose digest says as much."""
        return {k: v for k, v in self._arguments().items() if k != "groups"}

    def _ready(self, where: str) -> None:
        """Finish a fit that is pending; NotFittedError if there is none."""
        if self._status == "fitted":
            return
        if self._status == "unfitted" and self.trained_on:
            raise NotFittedError(f"{where}: fit must come first: {type(self).__name__}(...).fit")
        with _FINISHING:
            if self._status == "pending":
                vars(self).pop("_known", None)
                self._finish(where)
            self._status = "fitted"

    def _parts(self, where: str, batch: Batch) -> Iterator[Batch]:
        """The batch, ``batch_size`` rows of x at a time, with what the detector needs."""
        for part in batch.chunks(None if batch.x is None else self.batch_size):
            yield complete(where, self, part)

    def _missing(self, batch: Batch, wanted: Iterable[str]) -> list[str]:
        """What of ``wanted`` a batch lacks."""
        missing = []
        for name in wanted:
            if name == "features" and self.layers:
                missing += [f"features[{n!r}]" for n in self.layers if n not in batch.layers]
            elif name != "labels" and getattr(batch, name) is None:
                missing.append(name)
        return sorted(missing) if missing else missing

    def _inputs(self, where: str, data: Iterable[Any]) -> Iterator[Any]:
        """Inputs of the batches of a data set, at least one."""
        none = True
        for item in data:
            none = False
            yield inputs_of(where, item)[0]
        if none:
            raise ValueError(f"{where}: x must give a batch, got none")

    def _all_at_once(self, where: str, data: Any, y: Any) -> tuple[Any, Any, Any, Any]:
        """All samples with their labels, as batches for the model, or as logits or features."""
        if not isinstance(data, Tensor | np.ndarray):
            raise TypeError(
                f"{where}: with y, data must be a tensor or an array, got {type(data).__name__}"
            )
        if len(data) != len(y):
            raise ValueError(f"{where}: y must be one a sample, {len(data)}, got {len(y)}")
        if self.model is not None:
            begins = range(0, len(data), self.batch_size)
            parts = [slice(i, i + self.batch_size) for i in begins]
            return [(data[part], y[part]) for part in parts], None, None, None
        reads = sorted(self.trained_on & {"logits", "features"})
        if len(reads) != 1:
            raise ValueError(
                f"{where}: {self.name} is trained on {', '.join(sorted(self.trained_on))}: say "
                f"{', '.join(f'{name}=...' for name in sorted(self.trained_on))}"
            )
        given = {reads[0]: data}
        return None, given.get("logits"), given.get("features"), y

    def _training_batches(self, where: str, data: Iterable[Any]) -> Iterator[tuple[Batch, Tensor]]:
        """Batches of ``data`` with what the detector is trained on, and their labels."""
        if isinstance(data, Tensor) or not isinstance(data, Iterable):
            raise TypeError(
                f"{where}: data must be an iterable of batches (x, labels), "
                f"got {type(data).__name__}"
            )
        for item in data:
            if not isinstance(item, Mapping) and (not isinstance(item, Sequence) or len(item) != 2):
                raise TypeError(
                    f"{where}: data must give batches (x, labels), got {type(item).__name__}"
                )
            x, y = inputs_of(where, item)
            with torch.no_grad():
                batch = complete(where, self, as_batch(where, x), self.trained_on)
            yield batch, y


@cache
def _parameters(detector: type[OODDetector]) -> tuple[str, ...]:
    """Names of the constructor's arguments but for the model."""
    return tuple(name for name in inspect.signature(detector).parameters if name != "model")


def score_all(
    detectors: Mapping[str, OODDetector],
    *,
    x: Inputs | None = None,
    logits: Inputs | None = None,
    features: Features | None = None,
    confidence: Inputs | None = None,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """The scores of several detectors, from one pass over the data.

    Detectors with the same model share its forward pass. All that read MSP, maximum logit, energy
    or entropy at one temperature are served by one :func:`oodkernels.logit_scores`, all that read
    MOS scores of the same groups by one :func:`oodkernels.mos_predict`. Mahalanobis and RMDS, and
    their forms for normalised features, share whitening and the nearest mean, ViM and Residual the
    product with the null space, where they were fitted to the same data with the same settings.
    Scores have the same bits as alone.

    Args:
        detectors: By any name.
        x: As for :meth:`OODDetector.score`; what a detector needs and is not given is computed
            from it by the detector's model.
        logits: As there.
        features: As there.
        confidence: As there.
        chunk: Rows at a time. By default the least ``batch_size`` of the detectors where ``x`` is
            given, else all; of pixels a block that fits the cache, whatever it says.

    Returns:
        Name -> (N,) scores, or (N, H, W) of pixels, higher = more ID, on the device of the input.

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
    logits, features = tensor_of(logits), tensor_of(features)
    shape = pixels_of(where, logits, features, x, confidence)
    if shape is not None:
        assert not isinstance(features, Mapping)
        rows = pixel_rows(where, logits, features)
        found = [score_batch(detectors, part, where=where) for part, _ in rows]
        return {n: torch.cat([part[n] for part in found]).reshape(shape) for n in detectors}
    batch = as_batch(where, x, logits, features, confidence)
    return score_batch(detectors, batch, chunk, where=where)


# --- registry -------------------------------------------------------------------------------------

DETECTORS: dict[str, type[OODDetector]] = {}
"""Short name -> class, of all that were registered; ``DETECTORS[name].spec`` says more."""

COMPOUNDS: dict[str, type[OODDetector]] = {}
"""What is made of detectors, by the name that files give it."""

D = TypeVar("D", bound=OODDetector)


def register(
    name: str,
    family: str,
    paper: str,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    at_fit: Iterable[str] = (),
    at_score: Iterable[str] = (),
) -> Callable[[type[D]], type[D]]:
    """Put a detector's class into :data:`DETECTORS`, from which commands, files and docs take it.

    Example:
        >>> @register("msp", "A", "Hendrycks & Gimpel, ICLR 2017")
        ... class MSP(OODDetector): ...

    Args:
        name: The paper's short name in lower case; a variant's behind a hyphen.
        family: What it reads, a key of :data:`FAMILIES`.
        paper: Authors, venue and year.
        grid: Option -> values that :func:`sweep` tries where it is not told any: those that the
            authors choose from, as far as they say.
        at_fit: Options on which the pass over the training data depends; ``absent`` always is.
        at_score: Options that matter in scoring alone.

    Raises:
        ValueError: There is one of that name, or no such family.
    """
    if name in DETECTORS:
        raise ValueError(f"register: name must be a new one, got {name!r}")
    if family not in FAMILIES:
        raise ValueError(f"register: family must be one of {', '.join(FAMILIES)}, got {family!r}")

    def add(detector: type[D]) -> type[D]:
        detector.name = name
        bound = frozenset({"absent", *at_fit})
        detector.spec = DetectorSpec(
            name, detector, family, paper, dict(grid or {}), bound, frozenset(at_score)
        )
        DETECTORS[name] = detector
        return detector

    return add
