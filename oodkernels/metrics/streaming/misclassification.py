"""Misclassification detection over a stream, OOD samples allowed, in memory that does not grow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torchmetrics import Metric

from oodkernels._checks import check_device, check_integers, check_number
from oodkernels.metrics.calibration import check_answers
from oodkernels.metrics.ood import fpr_name, from_array
from oodkernels.metrics.streaming._metric import StreamMetric
from oodkernels.metrics.threshold import Threshold, is_below

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result: TypeAlias = dict[str, float]

_RIGHT, _WRONG, _OOD = range(3)
_SUMS = ("confidence", "count", "accepted")
_CURVES = {
    "wrong": {"auroc": "auroc", "aupr_in": "aupr_succ", "aupr_out": "aupr_err"},
    "ood": {name: f"{name}_ood" for name in ("auroc", "aupr_in", "aupr_out")},
}
"""What figures of right answers against each set are called."""


class MisclassificationMetrics(StreamMetric):
    """Misclassification detection over a stream, OOD samples allowed, from one pass.

    ``compute`` returns a dict of floats, by the definitions of
    :mod:`oodkernels.metrics.misclassification`:

    - ``auroc``, ``aupr_succ``, ``aupr_err``, ``fpr95`` (named after ``tpr``) and its ``threshold``,
      right against wrong, each with ``..._lower`` and ``..._upper`` between which it surely lies;
    - ``auroc_ood``, ``aupr_in_ood``, ``aupr_out_ood``, ``fpr95_ood``, likewise bounded: right
      answers against OOD samples, which is how Hendrycks & Gimpel evaluate OOD detection;
    - ``accuracy``, which is also ``base_rate_right``, and ``base_rate_wrong``: of the ID samples;
    - ``mean_confidence_right``, ``..._wrong``, ``..._ood``: mean predicted probability of each;
    - with ``threshold``: ``open_set_accuracy``, the share of all samples that are ID, classified
      right and accepted (confidence >= threshold), or OOD and rejected;
    - ``n_right``, ``n_wrong``, ``n_ood``.

    A figure of a kind of sample that was not seen is NaN. Needs the extra ``metrics``.

    Example:
        >>> metric = MisclassificationMetrics(memory="16MiB")
        >>> for batch in loader:
        ...     scores = logit_scores(model(batch.x))
        ...     metric.update(scores.msp, scores.label, batch.labels)   # negative label = OOD
        >>> metric.compute()["aupr_err"]
    """

    argument = "confidence"

    confidence: Tensor
    count: Tensor
    accepted: Tensor

    def __init__(
        self,
        *,
        exact: bool = False,
        memory: int | str = "16MiB",
        tpr: float = 0.95,
        threshold: Threshold | float | None = None,
        **kwargs: Any,
    ) -> None:
        """Start without answers.

        Args:
            exact: Keep all confidences, in memory that grows with the stream.
            memory: Size of the state, as for :class:`oodkernels.metrics.streaming.OODMetrics`.
            tpr: 0 < tpr <= 1 of the FPR, read as the decimal it prints as.
            threshold: Of the open-set accuracy: a :class:`oodkernels.metrics.Threshold`, a
                number, or None for no such figure.
            **kwargs: Of ``torchmetrics.Metric``.

        Raises:
            ValueError: ``memory`` or ``tpr`` as for ``OODMetrics``, or ``threshold`` is NaN.
            TypeError: ``tpr`` or ``threshold`` is not a number, or ``exact`` not a bool.
        """
        value = threshold.value if isinstance(threshold, Threshold) else threshold
        if value is not None:
            value = check_number("MisclassificationMetrics", "threshold", value)
        super().__init__(
            exact=exact,
            memory=memory,
            sets=2,
            tpr=tpr,
            names=("wrong", "ood"),
            settings={"threshold": value},
            **kwargs,
        )
        self._value = value
        # Of right, wrong and OOD: sum of confidence, number, and number accepted.
        self.add_state("confidence", torch.zeros(3, dtype=torch.float64), "sum")
        self.add_state("count", torch.zeros(3, dtype=torch.int64), "sum")
        self.add_state("accepted", torch.zeros(3, dtype=torch.int64), "sum")

    def update(
        self,
        confidence: ArrayLike | Tensor,
        answer: ArrayLike | Tensor,
        label: ArrayLike | Tensor | None = None,
    ) -> None:
        """Take in a batch.

        Args:
            confidence: Of each answer, higher = more likely right, any shape: float64, float32,
                bfloat16 or float16. It need not be a probability.
            answer: Of that shape: bool, whether the answer is right; with ``label``, an integer,
                the predicted class.
            label: Of that shape: the class, an integer, negative for an OOD sample.

        Raises:
            ValueError: Shapes or devices differ; a confidence is NaN, with the number and the index
                of the first, and nothing is taken in (on CUDA, which is not waited for, ``compute``
                raises with the number).
            TypeError: ``confidence`` is bool or complex, ``answer`` is not bool without
                ``label``, or one of both is not an integer with it.
        """
        where = "MisclassificationMetrics.update"
        answer = self._given(where, "answer", answer)
        is_ood: Tensor | None = None
        if label is None:
            if answer.dtype != torch.bool:
                raise TypeError(
                    f"{where}: answer must be bool where there is no label, got {answer.dtype}"
                )
            correct = answer
        else:
            label = self._given(where, "label", label)
            for name, given in (("answer", answer), ("label", label)):
                check_integers(where, name, given, " where there is a label")
            if label.shape != answer.shape:
                raise ValueError(
                    f"{where}: label must have the shape of answer, {tuple(answer.shape)}, got "
                    f"{tuple(label.shape)}"
                )
            check_device(where, "label", label, "answer", answer)
            correct, is_ood = answer == label, (label < 0).reshape(-1)
        confidence, correct = check_answers(where, confidence, correct, self.device)
        rows = torch.where(correct, _RIGHT, _WRONG).to(torch.uint8)
        if is_ood is not None:
            rows = torch.where(is_ood, _OOD, rows).to(torch.uint8)
        self._add(self._state(), confidence, rows, where)
        accepted = torch.ones_like(correct)
        if self._value is not None:
            accepted = ~is_below(confidence, self._value, where)
        value = confidence.double()
        masks = [rows == row for row in range(3)]
        self.confidence = self.confidence + torch.stack(
            [torch.where(mask, value, 0).sum() for mask in masks]
        )
        self.count = self.count + torch.stack([mask.sum() for mask in masks])
        self.accepted = self.accepted + torch.stack([(mask & accepted).sum() for mask in masks])

    def _given(self, where: str, name: str, values: ArrayLike | Tensor) -> Tensor:
        if isinstance(values, Tensor):
            return values
        return from_array(where, name, values).to(self.device)

    def _for_batch(self) -> MisclassificationMetrics:
        return MisclassificationMetrics(
            exact=True, tpr=self.tpr, threshold=self._value, **self._kwargs
        )

    def compute(self) -> Result:
        """The figures of all answers so far, see the class.

        Raises:
            ValueError: There are no answers, or NaN was among the confidences (see ``update``).
        """
        return self._result("MisclassificationMetrics.compute", allow_empty=False)

    def _result(self, where: str, *, allow_empty: bool) -> Result:
        confidence, count, accepted = (getattr(self, name).tolist() for name in _SUMS)
        total, n_id = sum(count), count[_RIGHT] + count[_WRONG]
        if total == 0 and not allow_empty:
            raise ValueError(f"{where}: there are no answers yet")
        sides, fpr = self._sides(where), fpr_name(self.tpr)
        result: Result = {}
        for set_name, names in _CURVES.items():
            ours = {**names, "fpr_at_tpr": fpr, "threshold": "threshold"}
            if set_name == "ood":
                ours = {**names, "fpr_at_tpr": f"{fpr}_ood"}
            figures = self._figures(*sides[set_name])
            for figure, name in ours.items():
                bounded = figures[figure]
                result[name] = bounded.estimate
                result[f"{name}_lower"] = bounded.lower
                result[f"{name}_upper"] = bounded.upper

        def ratio(part: float, whole: int) -> float:
            return part / whole if whole else math.nan

        result["accuracy"] = result["base_rate_right"] = ratio(count[_RIGHT], n_id)
        result["base_rate_wrong"] = ratio(count[_WRONG], n_id)
        for row, name in enumerate(("right", "wrong", "ood")):
            result[f"mean_confidence_{name}"] = ratio(confidence[row], count[row])
            result[f"n_{name}"] = count[row]
        if self._value is not None:
            hits = accepted[_RIGHT] + count[_OOD] - accepted[_OOD]
            result["open_set_accuracy"] = ratio(hits, total)
        return result

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the ROC curves of right answers against wrong ones and against OOD samples.

        Args:
            ax: Where; None for a new figure.

        Returns:
            The figure and the axes.

        Raises:
            ValueError: There are no right answers, or none of the others.
            ImportError: matplotlib is missing.
        """
        where = "MisclassificationMetrics.plot"
        with self._synced():
            sides = self._sides(where)
            sides = {n: s for n, s in sides.items() if s[1].n_id.any() and s[1].n_ood.any()}
            if not sides:
                raise ValueError(
                    f"{where}: there must be right answers, and wrong ones or OOD samples"
                )
            figure, ax = self._draw(where, sides, ax)
        ax.set(xlabel="FPR: share of wrong answers, or of OOD, kept")
        ax.set(ylabel="TPR: share of right answers kept")
        return figure, ax

    def merge_state(self, incoming_state: Mapping[str, Any] | Metric) -> None:
        """Take in what another ``MisclassificationMetrics`` has seen.

        Raises:
            ValueError: It is something else, has another threshold, or keeps confidences where this
                one does not or the reverse.
        """
        where = "MisclassificationMetrics.merge_state: incoming_state"
        if not isinstance(incoming_state, MisclassificationMetrics):
            raise ValueError(
                f"{where} must be a MisclassificationMetrics, got {type(incoming_state).__name__}"
            )
        super().merge_state(incoming_state)

    def _merge(self, state: Mapping[str, Any]) -> None:
        super()._merge(state)
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + state[name].to(self.device))
