"""Misclassification detection: does the confidence tell right answers from wrong ones.

Figures as in Hendrycks & Gimpel, A Baseline for Detecting Misclassified and Out-of-Distribution
Examples in Neural Networks, ICLR 2017. Confidence is higher = more likely right, such as the
maximum softmax probability (:func:`oodkernels.ops.logit_scores`); right is the positive class:

- ``auroc``: probability that a right answer has more confidence than a wrong one, ties 1/2;
- ``aupr_succ``: average precision, positive = right, score = confidence;
- ``aupr_err``: average precision, positive = wrong, score = -confidence;
- ``fpr95``: share of wrong answers kept at the largest threshold that keeps 95 % of the right;
- base rates, which are the AUPRs of a useless score, and mean confidences beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from oodkernels.metrics.calibration import AdditiveMetric, check_answers, new_axes
from oodkernels.metrics.ood import fpr_name, ood_metrics
from oodkernels.metrics.streaming._bounds import Intervals
from oodkernels.metrics.threshold import Threshold, is_below

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torchmetrics import Metric
    from torchmetrics.wrappers.abstract import WrapperMetric

    from oodkernels.metrics.streaming.ood import OODMetrics
else:
    try:
        from torchmetrics.wrappers.abstract import WrapperMetric

        from oodkernels.metrics.streaming.ood import OODMetrics
    except ImportError:
        from oodkernels.metrics.calibration import Metric

        OODMetrics = WrapperMetric = Metric

Result: TypeAlias = dict[str, float]

__all__ = ["MisclassificationMetrics", "MisclassificationResult", "misclassification_metrics"]

_RIGHT, _WRONG, _OOD = range(3)
_SETS = ["wrong", "ood"]


@dataclass(frozen=True)
class MisclassificationResult:
    """How well confidence tells right from wrong; see :func:`misclassification_metrics`.

    Figures that need both kinds of answers are NaN where there is only one, and so is the mean
    confidence of none.

    Attributes:
        auroc: Ties counted half.
        aupr_succ: Average precision, positive = right.
        aupr_err: Average precision, positive = wrong, confidence negated.
        fpr_at_tpr: Share of wrong answers with confidence >= ``threshold``.
        threshold: The largest at which a share >= ``tpr`` of the right answers is kept.
        mean_confidence: Of all answers.
        mean_confidence_right: Of the right answers.
        mean_confidence_wrong: Of the wrong answers.
        base_rate_right: Share of right answers: the accuracy.
        base_rate_wrong: Share of wrong answers.
        tpr: The TPR asked for.
        n_right: Number of right answers.
        n_wrong: Number of wrong answers.
    """

    auroc: float
    aupr_succ: float
    aupr_err: float
    fpr_at_tpr: float
    threshold: float
    mean_confidence: float
    mean_confidence_right: float
    mean_confidence_wrong: float
    base_rate_right: float
    base_rate_wrong: float
    tpr: float
    n_right: int
    n_wrong: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.base_rate_right


def misclassification_metrics(
    confidence: ArrayLike | Tensor, correct: ArrayLike | Tensor, *, tpr: float = 0.95
) -> MisclassificationResult:
    """How well the confidence of answers tells right ones from wrong ones, exactly.

    By the rules of :func:`oodkernels.metrics.ood_metrics` with right for ID and wrong for OOD.

    Args:
        confidence: Of each answer, higher = more likely right: any shape, float64, float32,
            bfloat16 or float16. It need not be a probability.
        correct: Bool, of that shape and on that device: whether the answer is right.
        tpr: 0 < tpr <= 1, read as the decimal it prints as.

    Returns:
        A :class:`MisclassificationResult`; sums are made in float64.

    Raises:
        ValueError: There are no answers, a confidence is NaN (with the number and the first index),
            shapes or devices differ, or ``tpr`` is out of range.
        TypeError: ``confidence`` is not of a type above, or ``correct`` not bool.
    """
    where = "misclassification_metrics"
    if not 0 < tpr <= 1:
        raise ValueError(f"{where}: tpr must be in (0, 1], got {tpr}")
    confidence, correct = check_answers(where, confidence, correct)
    n = confidence.numel()
    if n == 0:
        raise ValueError(f"{where}: confidence must not be empty")
    nan = confidence.isnan()
    if bool(nan.any()):
        raise ValueError(
            f"{where}: confidence must not be NaN, got {int(nan.sum())} NaN, the first at index "
            f"{int(nan.nonzero()[0])}"
        )
    right, wrong = confidence[correct], confidence[~correct]
    figures = dict.fromkeys(("auroc", "aupr_in", "aupr_out", "fpr_at_tpr", "threshold"), math.nan)
    if right.numel() and wrong.numel():
        result = ood_metrics(right, wrong, tpr=tpr)
        figures = {name: getattr(result, name) for name in figures}

    def mean(values: Tensor) -> float:
        return float(values.mean(dtype=torch.float64))

    return MisclassificationResult(
        auroc=figures["auroc"],
        aupr_succ=figures["aupr_in"],
        aupr_err=figures["aupr_out"],
        fpr_at_tpr=figures["fpr_at_tpr"],
        threshold=figures["threshold"],
        mean_confidence=mean(confidence),
        mean_confidence_right=mean(right),
        mean_confidence_wrong=mean(wrong),
        base_rate_right=right.numel() / n,
        base_rate_wrong=wrong.numel() / n,
        tpr=tpr,
        n_right=right.numel(),
        n_wrong=wrong.numel(),
    )


class _Curves(OODMetrics):
    """Right answers as the ID scores, wrong ones and OOD samples as two sets against them."""

    def _checked_labels(self, scores: Tensor, labels: Tensor) -> Tensor:
        return labels  # the row of each score

    def _row(self, name: str | None) -> int:
        if not self._names():
            self._set_names(_SETS)
        return 1

    def compute(self) -> dict[str, Any]:
        """The figures of both sets, NaN where one is empty."""
        return self._result(allow_empty=True)

    def _sides(self, *, allow_empty: bool = False) -> dict[str, tuple[int, Intervals]]:
        sides = super()._sides(allow_empty=True)
        if allow_empty:
            return sides
        sides = {n: side for n, side in sides.items() if side[1].n_id.any() and side[1].n_ood.any()}
        if not sides:
            raise ValueError(
                "OODMetrics.plot: there must be right answers, and wrong ones or OOD samples"
            )
        return sides


class _Sums(AdditiveMetric):
    """Number, sum of confidence, and number accepted, of right, wrong and OOD."""

    confidence: Tensor
    count: Tensor
    accepted: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("confidence", torch.zeros(3, dtype=torch.float64), "sum")
        self.add_state("count", torch.zeros(3, dtype=torch.int64), "sum")
        self.add_state("accepted", torch.zeros(3, dtype=torch.int64), "sum")

    def update(self, confidence: Tensor, rows: Tensor, accepted: Tensor) -> None:
        """Take in a batch, flat."""
        value = confidence.double()
        masks = [rows == row for row in range(3)]
        self.confidence = self.confidence + torch.stack(
            [torch.where(mask, value, 0).sum() for mask in masks]
        )
        self.count = self.count + torch.stack([mask.sum() for mask in masks])
        self.accepted = self.accepted + torch.stack([(mask & accepted).sum() for mask in masks])

    def compute(self) -> tuple[list[float], list[int], list[int]]:
        """The sums, on the host."""
        return self.confidence.tolist(), self.count.tolist(), self.accepted.tolist()


class MisclassificationMetrics(WrapperMetric):  # type: ignore[misc, unused-ignore]
    """Misclassification detection over a stream, OOD samples allowed, from one pass.

    ``compute`` returns a dict of floats, by the definitions in this module's head:

    - ``auroc``, ``aupr_succ``, ``aupr_err``, ``fpr95`` (named after ``tpr``) and its ``threshold``,
      right against wrong, each with ``..._lower`` and ``..._upper`` between which it certainly lies
      (:class:`oodkernels.metrics.streaming.OODMetrics` has the state);
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

    is_differentiable = False
    full_state_update = False

    def __init__(
        self,
        *,
        exact: bool = False,
        memory: int | str = "16MiB",
        tpr: float = 0.95,
        threshold: Threshold | float | None = None,
        **kwargs: Any,
    ) -> None:
        """Without answers.

        Args:
            exact: Keep all confidences, in memory that grows with the stream.
            memory: Size of the state, as for :class:`oodkernels.metrics.streaming.OODMetrics`.
            tpr: 0 < tpr <= 1 of the FPR, read as the decimal it prints as.
            threshold: Of the open-set accuracy: a :class:`oodkernels.metrics.Threshold`, a
                number, or None for no such figure.
            **kwargs: Of ``torchmetrics.Metric``.

        Raises:
            ValueError: ``memory`` or ``tpr`` as for ``OODMetrics``, or ``threshold`` is NaN.
            ImportError: torchmetrics is missing.
        """
        super().__init__(**kwargs)
        value = threshold.value if isinstance(threshold, Threshold) else threshold
        if value is not None and math.isnan(value):
            raise ValueError("MisclassificationMetrics: threshold must not be NaN")
        self.tpr = tpr
        self._value = None if value is None else float(value)
        self._kwargs = kwargs
        try:
            self._curves = _Curves(exact=exact, memory=memory, sets=2, tpr=tpr, **kwargs)
        except ValueError as error:
            raise ValueError(_renamed(error)) from None
        self._sums = _Sums(**kwargs)

    @property
    def exact(self) -> bool:
        """Whether all confidences are kept."""
        return self._curves.exact

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
        device = self._curves.device
        is_ood: Tensor | None = None
        if label is None:
            if isinstance(answer, Tensor) and answer.dtype != torch.bool:
                raise TypeError(
                    f"{where}: answer must be bool where there is no label, got {answer.dtype}"
                )
            correct = answer
        else:
            answer, label = _classes(where, answer, label, device)
            correct, is_ood = answer == label, (label < 0).reshape(-1)
        confidence, correct = check_answers(where, confidence, correct, device)
        rows = torch.where(correct, _RIGHT, _WRONG).to(torch.uint8)
        if is_ood is not None:
            rows = torch.where(is_ood, _OOD, rows).to(torch.uint8)
        try:
            self._curves.update(confidence, rows)
        except ValueError as error:
            raise ValueError(_renamed(error)) from None
        accepted = torch.ones_like(correct)
        if self._value is not None:
            accepted = ~is_below(confidence, self._value, where)
        self._sums.update(confidence, rows, accepted)

    def forward(self, *args: Any, **kwargs: Any) -> Result:
        """:meth:`update`, and the figures of this batch alone."""
        self.update(*args, **kwargs)
        batch = MisclassificationMetrics(
            exact=True, tpr=self.tpr, threshold=self._value, **self._kwargs
        ).to(self._curves.device)
        for part in (batch._curves, batch._sums):
            part._to_sync = self.dist_sync_on_step
        batch.update(*args, **kwargs)
        return batch.compute()

    def compute(self) -> Result:
        """The figures of all answers so far, see the class.

        Raises:
            ValueError: There are no answers, or NaN was among the confidences (see ``update``).
        """
        confidence, count, accepted = self._sums.compute()
        total, n_id = sum(count), count[_RIGHT] + count[_WRONG]
        if total == 0:
            raise ValueError("MisclassificationMetrics.compute: there are no answers yet")
        try:
            curves = self._curves.compute()
        except ValueError as error:
            raise ValueError(_renamed(error)) from None

        fpr = fpr_name(self.tpr)
        result: Result = {}
        for set_name, names in (
            (
                "wrong",
                {
                    "auroc": "auroc",
                    "aupr_in": "aupr_succ",
                    "aupr_out": "aupr_err",
                    fpr: fpr,
                    "threshold": "threshold",
                },
            ),
            ("ood", {name: f"{name}_ood" for name in ("auroc", "aupr_in", "aupr_out", fpr)}),
        ):
            for name, called in names.items():
                for end in ("", "_lower", "_upper"):
                    result[called + end] = curves[set_name][name + end]

        def ratio(part: float, whole: int) -> float:
            return part / whole if whole else math.nan

        result["accuracy"] = result["base_rate_right"] = ratio(count[_RIGHT], n_id)
        result["base_rate_wrong"] = ratio(count[_WRONG], n_id)
        for row, name in enumerate(("right", "wrong", "ood")):
            result[f"mean_confidence_{name}"] = ratio(confidence[row], count[row])
            result[f"n_{name}"] = count[row]
        if self._value is not None:
            hits = accepted[_RIGHT] + count[_OOD] - accepted[_OOD]
            result["open_set_accuracy"] = hits / total
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
        if ax is None:
            ax = new_axes("MisclassificationMetrics.plot")
        try:
            figure, ax = self._curves.plot(ax)
        except ValueError as error:
            raise ValueError(_renamed(error)) from None
        ax.set(xlabel="FPR: share of wrong answers, or of OOD, kept")
        ax.set(ylabel="TPR: share of right answers kept")
        return figure, ax

    # --- both parts as one ----------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all answers."""
        super().reset()
        self._curves.reset()
        self._sums.reset()

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
        if incoming_state._value != self._value:
            raise ValueError(
                f"{where} must have the threshold {self._value}, got {incoming_state._value}"
            )
        try:
            self._curves.merge_state(incoming_state._curves)
        except ValueError as error:
            raise ValueError(_renamed(error)) from None
        self._sums.merge_state(incoming_state._sums)

    def persistent(self, mode: bool = False) -> None:
        """Whether the state dict holds the state."""
        self._curves.persistent(mode)
        self._sums.persistent(mode)

    @property
    def state_bytes(self) -> int:
        """Size of the state now."""
        return self._curves.state_bytes + sum(
            getattr(self._sums, name).nbytes for name in ("confidence", "count", "accepted")
        )


def _renamed(error: ValueError) -> str:
    message = str(error).replace("OODMetrics", "MisclassificationMetrics")
    return message.replace(": scores", ": confidence")


def _classes(
    where: str, answer: ArrayLike | Tensor, label: ArrayLike | Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Predicted and true classes, integers of one shape on one device."""
    pair = [
        x if isinstance(x, Tensor) else torch.as_tensor(x, device=device) for x in (answer, label)
    ]
    for name, classes in zip(("answer", "label"), pair, strict=True):
        if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
            raise TypeError(
                f"{where}: {name} must be integers where there is a label, got {classes.dtype}"
            )
    if pair[0].shape != pair[1].shape:
        raise ValueError(
            f"{where}: label must have the shape of answer, {tuple(pair[0].shape)}, got "
            f"{tuple(pair[1].shape)}"
        )
    if pair[0].device != pair[1].device:
        raise ValueError(
            f"{where}: label must be on the device of answer, {pair[0].device}, got "
            f"{pair[1].device}"
        )
    return pair[0], pair[1]
