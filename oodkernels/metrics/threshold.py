"""A threshold on scores, calibrated to keep a share of in-distribution (ID) samples."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodkernels._checks import FLOATS, check_confidence, check_tpr, plain
from oodkernels._files import check_file, read_json, write_text
from oodkernels.metrics.intervals import Interval, clopper_pearson
from oodkernels.metrics.ood import Scores, as_tensor
from oodkernels.ops.keys import scores_of_keys
from oodkernels.ops.roc import exact_ceil, sort_keys

PathLike: TypeAlias = str | os.PathLike[str]

__all__ = ["CountedScores", "Threshold", "ThresholdSource", "is_below"]

_FORMAT, _VERSION = "oodkernels.threshold", 1
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
_TENSOR_SIZE = 4096
_RANKS = 64


@dataclass(frozen=True)
class ThresholdSource:
    """Where the scores of a threshold come from: what scores must share to be judged by it.

    Attributes:
        detector: Name of the detector, as in :data:`oodkernels.DETECTORS`.
        settings: Its settings by name: numbers, text, bools, None, and lists and mappings of them.
            They are kept as JSON keeps them, so NumPy scalars become Python's, tuples lists, and
            infinities text.
        groups: Digest of the partition of the classes, where the detector has one.
        model: Digest of the weights that the scores depend on; None where they are not known.

    Raises:
        TypeError: A setting is something else, or another field is not text.
    """

    detector: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    groups: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        for name in ("detector", "groups", "model"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "detector"):
                raise TypeError(f"ThresholdSource: {name} must be text, got {value!r}")
        if not isinstance(self.settings, Mapping):
            raise TypeError(
                f"ThresholdSource: settings must be a mapping, got {type(self.settings).__name__}"
            )
        settings = {str(k): _to_json(f"settings[{k!r}]", v) for k, v in self.settings.items()}
        object.__setattr__(self, "settings", settings)

    def differences(self, other: ThresholdSource) -> list[str]:
        """What tells two sources apart, each as ``"what = mine, got theirs"``; [] if nothing."""
        if self.detector != other.detector:
            return [f"detector = {self.detector!r}, got {other.detector!r}"]
        found = []
        for name in sorted({*self.settings, *other.settings}):
            mine, theirs = (s.settings.get(name, "(not given)") for s in (self, other))
            if mine != theirs:
                found.append(f"{self.detector}'s {name} = {mine!r}, got {theirs!r}")
        for name in ("groups", "model"):
            mine, theirs = (getattr(s, name) or "(not known)" for s in (self, other))
            if mine != theirs:
                found.append(f"{name} = {mine}, got {theirs}")
        return found


class CountedScores(NamedTuple):
    """How many scores lie in each of some intervals, which may overlap."""

    counts: NDArray[np.int64]
    """(n,) scores in each interval."""
    least: NDArray[np.float64]
    """(n,) the least score that each may stand for."""
    most: NDArray[np.float64]
    """(n,) the largest."""
    dtype: torch.dtype
    """Type of the scores; float32 once they have been counted in bins."""


class _CountsScores(Protocol):
    """What :meth:`Threshold.from_metric` asks of a metric."""

    tpr: float

    def id_counts(self) -> CountedScores: ...


@dataclass(frozen=True)
class Threshold:
    """Scores below ``value`` are out-of-distribution (OOD); higher = more ID.

    Made by :meth:`calibrate` from ID scores or by :meth:`from_metric` from a stream of them. The
    interval is for what comes after: with probability ``confidence`` over the calibration sample,
    the share of all ID samples that this threshold keeps lies in it, for any distribution of
    independent scores, ties included.

    Its lower end is the (1 - confidence) / 2 quantile of Beta(k, n_id - k + 1), k being the least
    count that is a share ``tpr`` of n_id: the share of a continuous population at or above its
    k-th highest score of n_id has that distribution, and ties only add to it. Its upper end is the
    (1 + confidence) / 2 quantile of Beta(m + 1, n_id - m), m being the number of ID scores >=
    ``value``: the share strictly above the next score below. (Continuous scores would allow
    Beta(m, n_id - m + 1). Tied ones do not, nor m for k in the lower end.) These are the ends of
    Clopper and Pearson's intervals for k and m successes; order statistics as in David & Nagaraja,
    Order Statistics, 2003.

    Attributes:
        value: The threshold.
        dtype: Type of the scores it comes from.
        tpr: Share of ID asked for, 0 < tpr <= 1.
        confidence: Of ``interval``, in (0, 1).
        n_id: Number of ID scores it comes from.
        achieved_tpr: Share of these that are >= value, at least ``tpr``. From a stream in bounded
            memory, the least that it can be.
        achieved_tpr_bounds: What that share certainly lies between; equal where it is known.
        value_bounds: What the largest threshold that keeps a share ``tpr`` of the ID scores
            certainly lies between. ``value`` is the lower end; equal where it is known.
        interval: (low, high) of the share of the population that is kept, as above.
        source: Where the scores come from, or None where that was not said: what
            :meth:`check_source` compares.

    Raises:
        ValueError: A field is out of its range.
        TypeError: ``dtype`` is not float64, float32, bfloat16 or float16, or a field is not of
            its type.
    """

    value: float
    dtype: torch.dtype
    tpr: float
    confidence: float
    n_id: int
    achieved_tpr: float
    achieved_tpr_bounds: Interval
    value_bounds: Interval
    interval: Interval
    source: ThresholdSource | None = None

    def __post_init__(self) -> None:
        for name in ("value", "achieved_tpr"):
            object.__setattr__(self, name, float(plain(getattr(self, name))))
        for name in ("achieved_tpr_bounds", "value_bounds", "interval"):
            low, high = (float(plain(end)) for end in getattr(self, name))
            object.__setattr__(self, name, (low, high))
        object.__setattr__(self, "tpr", check_tpr("Threshold", self.tpr))
        object.__setattr__(self, "confidence", check_confidence("Threshold", self.confidence))
        object.__setattr__(self, "n_id", plain(self.n_id))
        if self.n_id < 1:
            raise ValueError(f"Threshold: n_id must be >= 1, got {self.n_id}")
        if not isinstance(self.source, ThresholdSource | None):
            raise TypeError(
                f"Threshold: source must be a ThresholdSource, got {type(self.source).__name__}"
            )
        if self.dtype not in _DTYPES.values():
            raise TypeError(
                f"Threshold: dtype must be one of {', '.join(_DTYPES)}, got {self.dtype}"
            )
        if math.isnan(self.value):
            raise ValueError("Threshold: value must not be NaN")
        for name in ("achieved_tpr_bounds", "interval"):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= 1:
                raise ValueError(f"Threshold: {name} must be ascending in [0, 1], got {low, high}")
        low, high = self.achieved_tpr_bounds
        if not low <= self.achieved_tpr <= high:
            raise ValueError(
                f"Threshold: achieved_tpr must be in achieved_tpr_bounds, {low, high}, got "
                f"{self.achieved_tpr}"
            )
        low, high = self.value_bounds
        if not low <= self.value <= high:
            raise ValueError(
                f"Threshold: value must be in value_bounds, {low, high}, got {self.value}"
            )

    @classmethod
    def calibrate(
        cls,
        id_scores: Scores,
        tpr: float = 0.95,
        confidence: float = 0.95,
        *,
        source: ThresholdSource | None = None,
    ) -> Threshold:
        """The largest threshold t at which a share >= ``tpr`` of the ID scores is >= t.

        Exact: by counts, in the type of the scores.

        Args:
            id_scores: Scores of ID samples, higher = more ID, as for
                :func:`oodkernels.metrics.ood_metrics`: any shape but a scalar's, float64, float32,
                bfloat16 or float16; integers become float64. Give scores of the type that will be
                predicted: rounding afterwards may move scores across the threshold.
            tpr: 0 < tpr <= 1, read as the decimal it prints as: 0.95 of 20 scores are 19.
            confidence: Of the interval, in (0, 1).
            source: Where the scores come from, for :meth:`check_source`.

        Returns:
            A :class:`Threshold` on the host.

        Raises:
            ValueError: Scores are empty or hold NaN (with the count and the first index), or
                ``tpr`` or ``confidence`` is out of range.
            TypeError: Scores are not of a type above.
        """
        where = "Threshold.calibrate"
        tpr, confidence = check_tpr(where, tpr), check_confidence(where, confidence)
        scores = as_tensor(where, "id_scores", id_scores)
        keys = sort_keys(scores, where, "id_scores")
        n = len(keys)
        k = exact_ceil(tpr, n)
        key = keys[n - k : n - k + 1]
        value = float(scores_of_keys(key, scores.dtype))
        kept = n - int(torch.searchsorted(keys, key))
        interval = clopper_pearson(k, n, confidence)[0], clopper_pearson(kept, n, confidence)[1]
        achieved = kept / n
        return cls(
            value=value,
            dtype=scores.dtype,
            tpr=tpr,
            confidence=confidence,
            n_id=n,
            achieved_tpr=achieved,
            achieved_tpr_bounds=(achieved, achieved),
            value_bounds=(value, value),
            interval=interval,
            source=source,
        )

    @classmethod
    def from_metric(
        cls,
        metric: _CountsScores,
        tpr: float | None = None,
        confidence: float = 0.95,
        *,
        source: ThresholdSource | None = None,
    ) -> Threshold:
        """The threshold of the ID scores that a metric has seen; OOD scores are not needed.

        Where the metric still knows the scores (``exact=True``, short streams, values it counts
        one by one) the same as :meth:`calibrate`. Else ``value`` is the certain lower bound of
        that threshold, so that it keeps a share >= ``tpr`` all the same, and since it may depend
        on the scores in any way, the upper end of ``interval`` is that of a fixed rank (Beta(m + 1,
        n_id - m) holds at once for every threshold that at most m scores reach), the ranks being
        k, k + 1, k + 2, k + 4, ..., each with 1/64 of that end's error probability.

        Under ``torch.distributed`` every process must call it, and gets the threshold of all.

        Args:
            metric: An :class:`oodkernels.metrics.streaming.OODMetrics`.
            tpr: 0 < tpr <= 1; None for the metric's.
            confidence: Of the interval, in (0, 1).
            source: Where the scores come from, for :meth:`check_source`.

        Returns:
            A :class:`Threshold`; ``dtype`` is float32 once scores have been counted in bins.

        Raises:
            ValueError: The metric has seen no ID scores or a NaN, or ``tpr`` or ``confidence`` is
                out of range.
            TypeError: ``metric`` is not an ``OODMetrics``.
        """
        where = "Threshold.from_metric"
        if not hasattr(metric, "id_counts"):
            raise TypeError(f"{where}: metric must be an OODMetrics, got {type(metric).__name__}")
        tpr = check_tpr(where, metric.tpr if tpr is None else tpr)
        confidence = check_confidence(where, confidence)
        counts, lowest, highest, dtype = metric.id_counts()
        n = int(counts.sum())
        if n == 0:
            raise ValueError(f"{where}: metric must have seen ID scores, got none")
        k = exact_ceil(tpr, n)

        def from_top(values: NDArray[np.float64]) -> float:
            order = np.argsort(-values, kind="stable")
            return float(values[order[np.searchsorted(np.cumsum(counts[order]), k)]]) + 0.0

        value, bound = from_top(lowest), from_top(highest)
        least = int(counts[lowest >= value].sum())
        most = int(counts[highest >= value].sum())
        if value == bound:
            high = clopper_pearson(most, n, confidence)[1]
        else:
            rank = min(n, k + (1 << (most - k - 1).bit_length() if most > k else 0))
            high = clopper_pearson(rank, n, 1 - (1 - confidence) / _RANKS)[1]
        return cls(
            value=value,
            dtype=dtype,
            tpr=tpr,
            confidence=confidence,
            n_id=n,
            achieved_tpr=least / n,
            achieved_tpr_bounds=(least / n, most / n),
            value_bounds=(value, bound),
            interval=(clopper_pearson(k, n, confidence)[0], high),
            source=source,
        )

    def check_source(self, source: ThresholdSource, where: str = "Threshold.check_source") -> None:
        """Refuse to judge scores that do not come from where this threshold's do.

        Args:
            source: Where the scores to be judged come from.
            where: Whom errors name.

        Raises:
            ValueError: The threshold does not know where its scores come from, or the detector, one
                of its settings, the groups or the model is another; the message names each.
        """
        if self.source is None:
            raise ValueError(
                f"{where}: threshold does not say what its scores come from: calibrate it anew "
                "with source=..., or compare the scores with threshold.predict(scores)"
            )
        if found := self.source.differences(source):
            raise ValueError(
                f"{where}: threshold is of other scores: its {'; its '.join(found)}: calibrate "
                "one on ID scores of the same detector, settings, groups and model"
            )

    def predict(self, scores: Scores) -> Tensor:
        """Which scores are OOD: those not >= ``value``, NaN among them.

        Numbers are compared as they are, none is rounded, whatever type the scores have. On CUDA
        the device is not waited for.

        Args:
            scores: Any shape and floating-point type, higher = more ID; integers become float64.

        Returns:
            Bool, of the shape and on the device of ``scores``; True = OOD.

        Raises:
            TypeError: Scores are not numbers.
        """
        return is_below(scores, self.value, "Threshold.predict")

    # --- keeping ------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The threshold as JSON, from which :meth:`from_json` makes an equal one."""
        content = asdict(self)
        content["dtype"] = str(self.dtype).removeprefix("torch.")
        content["value"] = _to_plain(self.value)
        content["value_bounds"] = [_to_plain(v) for v in self.value_bounds]
        content["source"] = self.source and {
            f.name: getattr(self.source, f.name) for f in fields(ThresholdSource)
        }
        return json.dumps({"format": _FORMAT, "version": _VERSION, **content}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Threshold:
        """A threshold from :meth:`to_json`.

        Raises:
            ValueError: ``text`` is not JSON, not of this format, of another version, or a field is
                missing, unknown, or not what it should be.
        """
        where = "Threshold.from_json"
        content = read_json(where, text, _FORMAT, _VERSION)
        names = {f.name for f in fields(cls)}
        if content.keys() != names:
            missing, unknown = sorted(names - content.keys()), sorted(content.keys() - names)
            raise ValueError(f"{where}: fields missing: {missing}, unknown: {unknown!s:.300}")
        read: dict[str, Any] = {}
        for name, value in content.items():
            try:
                read[name] = _READ[name](value)
            except (KeyError, OverflowError, RecursionError, TypeError, ValueError):
                raise ValueError(f"{where}: {name} cannot be {str(value)[:80]!r}") from None
        try:
            return cls(**read)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None

    def save(self, path: PathLike) -> None:
        """Write the threshold to a JSON file. The file is replaced whole or not at all."""
        write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: PathLike) -> Threshold:
        """The threshold in a file that :meth:`save` wrote.

        Raises:
            ValueError: As :meth:`from_json`, or the file is not text.
            OSError: The file cannot be read.
        """
        try:
            return cls.from_json(check_file("file", path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"Threshold.load: {os.fspath(path)}: {error}") from error

    def to_tensor(self) -> Tensor:
        """The threshold as a tensor, to be a buffer in the state dict of a model.

        Always uint8 of shape (4096,), JSON padded with spaces: it loads into the buffer of a model
        that has another threshold, or zeros, and neither ``half()`` nor ``to(dtype)`` rounds it.

        Example:
            >>> model.register_buffer("ood_threshold", threshold.to_tensor())
            >>> Threshold.from_tensor(model.ood_threshold).predict(scores)

        Raises:
            ValueError: The JSON is longer than that, for settings that are.
        """
        text = self.to_json().encode()
        if len(text) > _TENSOR_SIZE:
            raise ValueError(
                f"Threshold.to_tensor: the threshold must fit {_TENSOR_SIZE} bytes, got "
                f"{len(text)}: its source's settings are too long, keep it in a file (save)"
            )
        text = text.ljust(_TENSOR_SIZE)
        return torch.tensor(list(text), dtype=torch.uint8, device="cpu")

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> Threshold:
        """A threshold from :meth:`to_tensor`.

        Raises:
            ValueError: As :meth:`from_json`, or the shape is another.
            TypeError: ``tensor`` is not a uint8 tensor.
        """
        where = "Threshold.from_tensor: tensor must be uint8"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}, got {type(tensor).__name__}")
        if tensor.dtype != torch.uint8:
            raise TypeError(f"{where}, got {tensor.dtype}")
        if tensor.shape != (_TENSOR_SIZE,):
            raise ValueError(f"{where} of shape ({_TENSOR_SIZE},), got {tuple(tensor.shape)}")
        try:
            return cls.from_json(bytes(tensor.tolist()).decode())
        except ValueError as error:
            raise ValueError(f"Threshold.from_tensor: {error}") from None


def is_below(scores: Scores, value: float, function: str) -> Tensor:
    """Where scores are not >= ``value`` as real numbers, NaN included; see ``Threshold.predict``.

    Args:
        scores: Any shape.
        value: Not NaN.
        function: Whom errors name.

    Returns:
        Bool, of the shape and on the device of ``scores``.

    Raises:
        TypeError: Scores are not numbers.
    """
    if not isinstance(scores, Tensor) or scores.dtype not in FLOATS:
        scores = as_tensor(function, "scores", scores)
    return torch.ge(scores, _edge(value, scores.dtype)).logical_not_()


@lru_cache(maxsize=256)
def _edge(value: float, dtype: torch.dtype) -> float:
    """The least number of a type that is not below ``value``: it parts scores as that does."""
    with torch.inference_mode(False):
        edge = torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype)
        if float(edge) < value:
            edge = scores_of_keys(sort_keys(edge.reshape(1)) + 1, dtype)[0]
        return float(edge)


def _to_json(name: str, value: Any) -> Any:
    """A setting as what JSON gives back for it."""
    value = plain(value)
    if isinstance(value, float):
        return _to_plain(value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _to_json(f"{name}[{k!r}]", v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_to_json(f"{name}[{i}]", v) for i, v in enumerate(value)]
    raise TypeError(
        f"ThresholdSource: {name} must be a number, text, bool, None, or a list or mapping of "
        f"these, got {type(value).__name__}"
    )


def _to_plain(value: float) -> float | str:
    """What JSON, which has no infinities, can hold."""
    return value if math.isfinite(value) else str(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or value in ("inf", "-inf")):
        raise ValueError
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError
    return value


def _pair(values: Any) -> Interval:
    low, high = values
    return _number(low), _number(high)


def _source(content: Any) -> ThresholdSource | None:
    return None if content is None else ThresholdSource(**content)


_READ = {
    "value": _number,
    "dtype": _DTYPES.__getitem__,
    "tpr": _number,
    "confidence": _number,
    "n_id": _count,
    "achieved_tpr": _number,
    "achieved_tpr_bounds": _pair,
    "value_bounds": _pair,
    "interval": _pair,
    "source": _source,
}
