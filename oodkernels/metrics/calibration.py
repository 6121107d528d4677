"""How far confidences are from the frequency of right answers: calibration error and its diagram.

A classifier is calibrated where, of the answers given with confidence p, a share p is right. The
expected calibration error (ECE) sorts n answers by confidence into M bins and is

    sum over bins B of |B| / n * |share of right answers in B - mean confidence in B|

with bins of one of two kinds, open below and closed above:

- ``"width"``: (0, 1/M], (1/M, 2/M], ..., and 0 in the first (Guo et al., On Calibration of Modern
  Neural Networks, ICML 2017, section 2).
- ``"mass"``: bins of equally many answers, also called adaptive (Nguyen & O'Connor, Posterior
  calibration and exploratory analysis for natural language processing models, EMNLP 2015). Bin i
  ends at the ceil(i n / M)-th lowest confidence. Equal confidences are never parted: all are in the
  first bin that ends at or above them, and bins that are left empty are not counted. Without ties
  the sizes differ by at most one.

Confidences are compared with the ends of the bins as float64, which holds those of all types.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from oodkernels.metrics.ood import as_tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torchmetrics import Metric
else:
    try:
        from torchmetrics import Metric
    except ImportError as error:
        _reason = str(error)

        class Metric:
            """Stands in for torchmetrics.Metric where that is missing."""

            def __init__(self, **_: Any) -> None:
                raise ImportError(
                    f"{type(self).__name__} is a torchmetrics.Metric, and torchmetrics could not "
                    f"be imported ({_reason}): pip install 'oodkernels[metrics]'"
                )


Binning: TypeAlias = Literal["width", "mass"]

__all__ = [
    "CalibrationBins",
    "CalibrationError",
    "calibration_bins",
    "expected_calibration_error",
    "reliability_diagram",
]


@dataclass(frozen=True, eq=False)
class CalibrationBins:
    """Answers by confidence: what :func:`calibration_bins` returns, M bins on the host.

    Attributes:
        edges: (M + 1,) float64, bin i being (edges[i], edges[i + 1]] and the first with its lower
            end; equal-mass bins that are empty for ties have equal ends.
        count: (M,) int64, number of answers.
        confidence: (M,) float64, their mean confidence; NaN where there are none.
        accuracy: (M,) float64, the share of them that is right; NaN where there are none.
    """

    edges: NDArray[np.float64]
    count: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def ece(self) -> float:
        """Expected calibration error: mean of |accuracy - confidence| over the answers."""
        used = self.count > 0
        gap = np.abs(self.accuracy - self.confidence)[used]
        return float(math.fsum(gap * self.count[used]) / self.count.sum())

    @property
    def mce(self) -> float:
        """Maximum calibration error: the largest |accuracy - confidence| of a bin (Guo et al.)."""
        return float(np.nanmax(np.abs(self.accuracy - self.confidence)))


def calibration_bins(
    confidence: ArrayLike | Tensor,
    correct: ArrayLike | Tensor,
    *,
    bins: int = 15,
    binning: Binning = "width",
) -> CalibrationBins:
    """Number, mean confidence and accuracy of the answers in each bin, see this module's head.

    Args:
        confidence: Probability of each answer to be right, in [0, 1], any shape and type of number.
        correct: Bool, of that shape and on that device: whether it is.
        bins: M >= 1.
        binning: ``"width"`` or ``"mass"``.

    Returns:
        A :class:`CalibrationBins`; sums are made in float64.

    Raises:
        ValueError: Confidences are empty, NaN or outside [0, 1], each with the number and the first
            index; shapes or devices differ; ``bins`` or ``binning`` is not one of the above.
        TypeError: ``confidence`` is bool or complex, or ``correct`` not bool.
    """
    return _bins("calibration_bins", confidence, correct, bins, binning)


def expected_calibration_error(
    confidence: ArrayLike | Tensor,
    correct: ArrayLike | Tensor,
    *,
    bins: int = 15,
    binning: Binning = "width",
) -> float:
    """Expected calibration error (ECE), by the definitions in this module's head.

    Args:
        confidence: As for :func:`calibration_bins`; the maximum softmax probability as a rule.
        correct: As for :func:`calibration_bins`.
        bins: M >= 1; 15 as in Guo et al.
        binning: ``"width"`` for bins of equal width, ``"mass"`` for bins of equal mass.

    Returns:
        The error in [0, 1], 0 = calibrated.

    Raises:
        ValueError: As :func:`calibration_bins`.
        TypeError: As :func:`calibration_bins`.
    """
    return _bins("expected_calibration_error", confidence, correct, bins, binning).ece


def reliability_diagram(
    confidence: ArrayLike | Tensor,
    correct: ArrayLike | Tensor,
    *,
    bins: int = 15,
    binning: Binning = "width",
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draw accuracy against confidence, bin by bin; a calibrated classifier is on the diagonal.

    A bar is as wide as its bin and as high as the accuracy in it; dots have the mean confidence,
    larger for bins with more answers, and the line from each to the diagonal is the bin's gap.

    Args:
        confidence: As for :func:`calibration_bins`.
        correct: As for :func:`calibration_bins`.
        bins: As for :func:`calibration_bins`.
        binning: As for :func:`calibration_bins`.
        ax: Where; None for a new figure, which belongs to no global state.

    Returns:
        The figure and the axes.

    Raises:
        ValueError: As :func:`calibration_bins`.
        TypeError: As :func:`calibration_bins`.
        ImportError: matplotlib is missing.
    """
    return _draw(
        "reliability_diagram", _bins("reliability_diagram", confidence, correct, bins, binning), ax
    )


class AdditiveMetric(Metric):  # type: ignore[misc, unused-ignore]
    """A metric whose states are tensors that add up over batches, processes and metrics."""

    is_differentiable = False
    full_state_update = False

    def merge_state(self, incoming_state: Mapping[str, Any] | Metric) -> None:
        """Take in what another metric has seen: the metric, or its ``metric_state``.

        Raises:
            ValueError: It is neither, or its states have other shapes.
        """
        name = type(self).__name__
        own: dict[str, Any] = dict(self.metric_state)
        state: dict[str, Any]
        if isinstance(incoming_state, type(self)):
            state, updates = dict(incoming_state.metric_state), incoming_state._update_count
        elif isinstance(incoming_state, Mapping):
            state, updates = dict(incoming_state), 1
        else:
            raise ValueError(
                f"{name}.merge_state: incoming_state must be a {name} or a dict, got "
                f"{type(incoming_state).__name__}"
            )
        shapes = [{key: tuple(v.shape) for key, v in s.items()} for s in (own, state)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name}.merge_state: incoming_state must have the shapes {shapes[0]}, got "
                f"{shapes[1]}"
            )
        for key, value in state.items():
            setattr(self, key, own[key] + value.to(self.device))
        self._update_count += updates
        self._computed: Any = None

    def set_dtype(self, dst_type: str | torch.dtype) -> AdditiveMetric:
        """Do nothing: sums stay float64 and counts int64."""
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._update_count = max(1, self._update_count)
        self._computed = None


class CalibrationError(AdditiveMetric):
    """Expected calibration error of a stream in bins of equal width, in fixed memory.

    Three numbers a bin: nothing is lost against :func:`expected_calibration_error`. States add up,
    by ``merge_state`` or under ``torch.distributed``. Needs the extra ``metrics``.

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
        """Without answers.

        Args:
            bins: M >= 1.
            **kwargs: Of ``torchmetrics.Metric``.

        Raises:
            ValueError: ``bins`` is < 1.
            ImportError: torchmetrics is missing.
        """
        super().__init__(**kwargs)
        self.bins = _check_bins("CalibrationError", bins)
        self.add_state("confidence", torch.zeros(bins, dtype=torch.float64), "sum")
        self.add_state("count", torch.zeros(bins, dtype=torch.int64), "sum")
        self.add_state("right", torch.zeros(bins, dtype=torch.int64), "sum")
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
            _check_probabilities(where, confidence)
        place = _place(confidence, _even_edges(self.bins, confidence.device))
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

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the answers so far as :func:`reliability_diagram` does; needs matplotlib.

        Args:
            ax: Where; None for a new figure.

        Returns:
            The figure and the axes.

        Raises:
            ValueError: As :meth:`compute`.
            ImportError: matplotlib is missing.
        """
        where = "CalibrationError.plot"
        with self.sync_context(
            self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            totals = self._totals(where)
        return _draw(where, totals, ax)

    def _totals(self, where: str) -> CalibrationBins:
        if refused := int(self.refused):
            raise ValueError(
                f"{where}: confidence must be in [0, 1], got {refused} NaN or outside of it"
            )
        if not bool(self.count.any()):
            raise ValueError(f"{where}: there are no answers yet")
        edges = _even_edges(self.bins, torch.device("cpu"))
        return _of_sums(edges, self.count, self.right, self.confidence)


def check_answers(
    function: str,
    confidence: ArrayLike | Tensor,
    correct: ArrayLike | Tensor,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Confidences and whether each answer is right, flat, on one device.

    Args:
        function: Whom errors name.
        confidence: Any shape; integers become float64.
        correct: Of that shape, bool.
        device: Where both must be, and where arrays are put; None for wherever ``confidence`` is.

    Returns:
        Both, (N,), detached.

    Raises:
        ValueError: Shapes or devices differ.
        TypeError: Types are others.
    """
    given = isinstance(confidence, Tensor)
    confidence = as_tensor(function, "confidence", confidence)
    if device is not None and not given:
        confidence = confidence.to(device)
    if not isinstance(correct, Tensor):
        correct = torch.as_tensor(np.asarray(correct), device=confidence.device)
    if correct.dtype != torch.bool:
        raise TypeError(f"{function}: correct must be bool, got {correct.dtype}")
    if correct.shape != confidence.shape:
        raise ValueError(
            f"{function}: correct must have the shape of confidence, {tuple(confidence.shape)}, "
            f"got {tuple(correct.shape)}"
        )
    if device is not None and confidence.device != device:
        raise ValueError(
            f"{function}: confidence is on {confidence.device}, the metric on {device}: move it "
            "with metric.to(...)"
        )
    if correct.device != confidence.device:
        raise ValueError(
            f"{function}: correct must be on the device of confidence, {confidence.device}, got "
            f"{correct.device}"
        )
    return confidence.detach().reshape(-1), correct.reshape(-1)


def _check_bins(function: str, bins: int) -> int:
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"{function}: bins must be an int >= 1, got {bins!r}")
    return bins


def _check_probabilities(function: str, confidence: Tensor) -> None:
    nan = confidence.isnan()
    outside = (confidence < 0) | (confidence > 1)
    for wrong, rule, what in (
        (nan, "not be NaN", "NaN"),
        (outside, "be in [0, 1]", "outside of it"),
    ):
        if bool(wrong.any()):
            raise ValueError(
                f"{function}: confidence must {rule}, got {int(wrong.sum())} {what}, the first at "
                f"index {int(wrong.nonzero()[0])}"
            )


def _even_edges(bins: int, device: torch.device) -> Tensor:
    return torch.arange(bins + 1, dtype=torch.float64, device=device) / bins


def _place(confidence: Tensor, edges: Tensor) -> Tensor:
    """The bin (edges[i], edges[i + 1]] of each; for NaN the last."""
    return torch.bucketize(confidence.double(), edges[1:]).clamp(max=len(edges) - 2)


def _bins(
    function: str,
    confidence: ArrayLike | Tensor,
    correct: ArrayLike | Tensor,
    bins: int,
    binning: Binning,
) -> CalibrationBins:
    bins = _check_bins(function, bins)
    if binning not in ("width", "mass"):
        raise ValueError(f"{function}: binning must be 'width' or 'mass', got {binning!r}")
    confidence, correct = check_answers(function, confidence, correct)
    n = confidence.numel()
    if n == 0:
        raise ValueError(f"{function}: confidence must not be empty")
    _check_probabilities(function, confidence)
    if binning == "width":
        edges = _even_edges(bins, confidence.device)
    else:
        ranks = torch.tensor([1, *(-(-i * n // bins) for i in range(1, bins + 1))]).clamp(min=1)
        edges = confidence.double().sort().values[ranks.to(confidence.device) - 1]
    place = _place(confidence, edges)
    return _of_sums(
        edges,
        torch.bincount(place, minlength=bins),
        torch.bincount(place[correct], minlength=bins),
        torch.bincount(place, weights=confidence.double(), minlength=bins),
    )


def _of_sums(edges: Tensor, count: Tensor, right: Tensor, confidence: Tensor) -> CalibrationBins:
    n = count.cpu().numpy()
    with np.errstate(invalid="ignore"):
        return CalibrationBins(
            edges.cpu().numpy(), n, confidence.cpu().numpy() / n, right.cpu().numpy() / n
        )


def new_axes(function: str) -> Axes:
    """Axes on a figure of their own, outside pyplot's state; errors name ``function``."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{function} needs matplotlib, which could not be imported ({error}): "
            "pip install 'oodkernels[demo]'"
        ) from error
    return Figure(figsize=(5, 5), layout="constrained").subplots()


def _draw(where: str, bins: CalibrationBins, ax: Axes | None) -> tuple[Figure, Axes]:
    if ax is None:
        ax = new_axes(where)
    used = bins.count > 0
    left, width = bins.edges[:-1][used], np.diff(bins.edges)[used]
    confidence, accuracy = bins.confidence[used], bins.accuracy[used]
    share = bins.count[used] / bins.count.sum()
    ax.bar(left, accuracy, width, align="edge", color="#c6d7ea", edgecolor="white", lw=0.8)
    ax.plot([0, 1], [0, 1], color="0.6", lw=0.8, ls="--")
    ax.vlines(confidence, confidence, accuracy, color="#b5442e", lw=1.5)
    ax.scatter(
        confidence, accuracy, 12 + 150 * share, color="#1f4e79", lw=0, zorder=3, clip_on=False
    )
    behind = {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1.5}
    ax.text(0.04, 0.95, f"ECE {bins.ece:.4f}", va="top", transform=ax.transAxes, bbox=behind)
    ax.set(xlabel="confidence", ylabel="share of answers that are right")
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure, ax
