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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from oodkernels._checks import check_count, check_device, check_no_nan
from oodkernels.metrics.ood import as_tensor, from_array
from oodkernels.metrics.plots import figure_of, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Binning: TypeAlias = Literal["width", "mass"]

__all__ = [
    "CalibrationBins",
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
    where = "reliability_diagram"
    found = _bins(where, confidence, correct, bins, binning)
    return draw_reliability(found, new_axes(where) if ax is None else ax)


def draw_reliability(bins: CalibrationBins, axes: Axes) -> tuple[Figure, Axes]:
    """Draw bins on axes as :func:`reliability_diagram` does.

    Returns:
        The figure and the axes.
    """
    used = bins.count > 0
    left, width = bins.edges[:-1][used], np.diff(bins.edges)[used]
    confidence, accuracy = bins.confidence[used], bins.accuracy[used]
    share = bins.count[used] / bins.count.sum()
    axes.bar(left, accuracy, width, align="edge", color="#c6d7ea", edgecolor="white", lw=0.8)
    axes.plot([0, 1], [0, 1], color="0.6", lw=0.8, ls="--")
    axes.vlines(confidence, confidence, accuracy, color="#b5442e", lw=1.5)
    axes.scatter(
        confidence, accuracy, 12 + 150 * share, color="#1f4e79", lw=0, zorder=3, clip_on=False
    )
    behind = {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1.5}
    axes.text(0.04, 0.95, f"ECE {bins.ece:.4f}", va="top", transform=axes.transAxes, bbox=behind)
    axes.set(xlabel="confidence", ylabel="share of answers that are right")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    return figure_of(axes), axes


def check_answers(
    function: str,
    confidence: ArrayLike | Tensor,
    correct: ArrayLike | Tensor,
    device: torch.device | None = None,
    name: str = "confidence",
) -> tuple[Tensor, Tensor]:
    """Confidences and whether each answer is right, flat, on one device.

    Args:
        function: Whom errors name.
        confidence: Any shape; integers become float64.
        correct: Of that shape, bool.
        device: Where both must be, and where arrays are put; None for wherever ``confidence`` is.
        name: What errors call the confidences.

    Returns:
        Both, (N,), detached.

    Raises:
        ValueError: Shapes or devices differ.
        TypeError: Types are others.
    """
    confidence = as_tensor(function, name, confidence, device)
    if not isinstance(correct, Tensor):
        correct = from_array(function, "correct", correct).to(confidence.device)
    if correct.dtype != torch.bool:
        raise TypeError(f"{function}: correct must be bool, got {correct.dtype}")
    if correct.shape != confidence.shape:
        raise ValueError(
            f"{function}: correct must have the shape of {name}, {tuple(confidence.shape)}, got "
            f"{tuple(correct.shape)}"
        )
    check_device(function, "correct", correct, name, confidence)
    return confidence.reshape(-1), correct.reshape(-1)


def check_probabilities(function: str, confidence: Tensor) -> None:
    """Refuse confidences, (N,), that are NaN or outside [0, 1].

    Raises:
        ValueError: With their number and the first index.
    """
    check_no_nan(function, "confidence", confidence)
    outside = (confidence < 0) | (confidence > 1)
    if bool(outside.any()):
        raise ValueError(
            f"{function}: confidence must be in [0, 1], got {int(outside.sum())} outside of it, "
            f"the first at index {int(outside.nonzero()[0])}"
        )


def even_edges(bins: int, device: torch.device) -> Tensor:
    """(bins + 1,) float64 ends of bins of equal width."""
    return torch.arange(bins + 1, dtype=torch.float64, device=device) / bins


def places(confidence: Tensor, edges: Tensor) -> Tensor:
    """The bin (edges[i], edges[i + 1]] of each confidence; for NaN the last."""
    return torch.bucketize(confidence.double(), edges[1:]).clamp(max=len(edges) - 2)


def _bins(
    function: str,
    confidence: ArrayLike | Tensor,
    correct: ArrayLike | Tensor,
    bins: int,
    binning: Binning,
) -> CalibrationBins:
    bins = check_count(function, "bins", bins)
    if binning not in ("width", "mass"):
        raise ValueError(f"{function}: binning must be 'width' or 'mass', got {binning!r}")
    confidence, correct = check_answers(function, confidence, correct)
    n = confidence.numel()
    if n == 0:
        raise ValueError(f"{function}: confidence must not be empty")
    check_probabilities(function, confidence)
    if binning == "width":
        edges = even_edges(bins, confidence.device)
    else:
        ranks = torch.tensor([1, *(-(-i * n // bins) for i in range(1, bins + 1))]).clamp(min=1)
        edges = confidence.double().sort().values[ranks.to(confidence.device) - 1]
    place = places(confidence, edges)
    return bins_of_sums(
        edges,
        torch.bincount(place, minlength=bins),
        torch.bincount(place[correct], minlength=bins),
        torch.bincount(place, weights=confidence.double(), minlength=bins),
    )


def bins_of_sums(
    edges: Tensor, count: Tensor, right: Tensor, confidence: Tensor
) -> CalibrationBins:
    """Make bins of their ends, and of each the answers, the right ones, the sum of confidence."""
    n = count.cpu().numpy()
    with np.errstate(invalid="ignore"):
        return CalibrationBins(
            edges.cpu().numpy(), n, confidence.cpu().numpy() / n, right.cpu().numpy() / n
        )
