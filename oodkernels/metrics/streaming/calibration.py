"""Calibration error over a stream, in fixed memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torchmetrics import Metric

from oodkernels._checks import check_count
from oodkernels.metrics.calibration import (
    CalibrationBins,
    bins_of_sums,
    check_answers,
    check_probabilities,
    draw_reliability,
    even_edges,
    places,
)
from oodkernels.metrics.plots import new_axes
from oodkernels.metrics.streaming._metric import SyncedMetric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class CalibrationError(SyncedMetric):
    """Expected calibration error of a stream in bins of equal width, in fixed memory.

    Three numbers a bin: nothing is lost against
    :func:`oodkernels.metrics.expected_calibration_error`. States add up, by ``merge_state`` or
    under ``torch.distributed``. Needs the extra ``metrics``.

    Example:
        >>> metric = CalibrationError()
        >>> for batch in loader:
        ...     scores = logit_scores(model(batch.x))
        ...     metric.update(scores.msp, scores.label == batch.labels)
        >>> metric.compute()
    """

    higher_is_better = False

    confidence: Tensor
    count: Tensor
    right: Tensor
    refused: Tensor

    def __init__(self, *, bins: int = 15, **kwargs: Any) -> None:
        """Start without answers.

        Args:
            bins: M >= 1.
            **kwargs: Of ``torchmetrics.Metric``.

        Raises:
            ValueError: ``bins`` is not an int, or < 1.
        """
        super().__init__(**kwargs)
        self.bins = n = check_count("CalibrationError", "bins", bins)
        self.add_state("confidence", torch.zeros(n, dtype=torch.float64), "sum")
        self.add_state("count", torch.zeros(n, dtype=torch.int64), "sum")
        self.add_state("right", torch.zeros(n, dtype=torch.int64), "sum")
        self.add_state("refused", torch.zeros((), dtype=torch.int64), "sum")

    def update(self, confidence: ArrayLike | Tensor, correct: ArrayLike | Tensor) -> None:
        """Take in a batch.

        Args:
            confidence: In [0, 1], any shape and type of number, on the metric's device.
            correct: Bool, of that shape and on that device.

        Raises:
            ValueError: Confidences are NaN or outside [0, 1], with the number and the first index,
                and nothing is taken in (on CUDA, which is not waited for, ``compute`` raises with
                the number); shapes or devices differ.
            TypeError: ``confidence`` is bool or complex, or ``correct`` not bool.
        """
        where = "CalibrationError.update"
        confidence, correct = check_answers(where, confidence, correct, self.device)
        wrong = ~((confidence >= 0) & (confidence <= 1))
        if confidence.is_cpu:
            check_probabilities(where, confidence)
        place = places(confidence, even_edges(self.bins, confidence.device))
        place = torch.where(wrong, 0, place)
        taken = (~wrong).long()
        value = torch.where(wrong, 0, confidence.double())
        self.confidence = self.confidence.index_add(0, place, value)
        self.count = self.count.index_add(0, place, taken)
        self.right = self.right.index_add(0, place, taken * correct)
        self.refused = self.refused + wrong.sum()

    def compute(self) -> Tensor:
        """The error of all answers so far, a float64 scalar.

        Raises:
            ValueError: There are no answers, or a confidence was refused (see ``update``).
        """
        ece = self._totals("CalibrationError.compute").ece
        return torch.tensor(ece, dtype=torch.float64, device=self.device)

    def calibration_bins(self) -> CalibrationBins:
        """The answers so far by confidence, of all processes.

        Raises:
            ValueError: As :meth:`compute`.
        """
        return self._synced_totals("CalibrationError.calibration_bins")

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the answers so far as :func:`oodkernels.metrics.reliability_diagram` does.

        Args:
            ax: Where; None for a new figure.

        Returns:
            The figure and the axes.

        Raises:
            ValueError: As :meth:`compute`.
            ImportError: matplotlib is missing.
        """
        where = "CalibrationError.plot"
        return draw_reliability(self._synced_totals(where), new_axes(where) if ax is None else ax)

    def _synced_totals(self, where: str) -> CalibrationBins:
        with self._synced():
            return self._totals(where)

    def _totals(self, where: str) -> CalibrationBins:
        if refused := int(self.refused):
            raise ValueError(
                f"{where}: confidence must be in [0, 1], got {refused} NaN or outside of it"
            )
        if not bool(self.count.any()):
            raise ValueError(f"{where}: there are no answers yet")
        edges = even_edges(self.bins, torch.device("cpu"))
        return bins_of_sums(edges, self.count, self.right, self.confidence)

    def merge_state(self, incoming_state: Mapping[str, Any] | Metric) -> None:
        """Take in what another metric has seen: the metric, or its ``metric_state``.

        Raises:
            ValueError: It is neither, or its states have other shapes.
        """
        where = "CalibrationError.merge_state: incoming_state"
        own: dict[str, Any] = dict(self.metric_state)
        state: dict[str, Any]
        if isinstance(incoming_state, type(self)):
            state, updates = dict(incoming_state.metric_state), incoming_state._update_count
        elif isinstance(incoming_state, Mapping):
            state, updates = dict(incoming_state), 1
        else:
            raise ValueError(
                f"{where} must be a CalibrationError or a dict, got {type(incoming_state).__name__}"
            )
        shapes = [{key: tuple(v.shape) for key, v in s.items()} for s in (own, state)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{where} must have the shapes {shapes[0]}, got {shapes[1]}")
        for key, value in state.items():
            setattr(self, key, own[key] + value.to(self.device))
        self._update_count += updates
        self._computed: Any = None

    def set_dtype(self, dst_type: str | torch.dtype) -> CalibrationError:
        """Do nothing: sums stay float64 and counts int64."""
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._update_count = max(1, self._update_count)
        self._computed = None
