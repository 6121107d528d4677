"""OOD metrics over a stream of scores, in memory that does not grow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from oodkernels._checks import check_device, plain
from oodkernels.metrics.ood import as_tensor, fpr_name, from_array
from oodkernels.metrics.streaming._bounds import Intervals
from oodkernels.metrics.streaming._metric import StreamMetric
from oodkernels.metrics.streaming._state import UNNAMED, StreamState
from oodkernels.metrics.threshold import CountedScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = dict[str, Any]


class ScoreLevels(NamedTuple):
    """The scores of ID samples and of one OOD set, in ascending intervals."""

    values: NDArray[np.float64]
    """(n,) the least score that each interval may stand for."""
    n_id: NDArray[np.int64]
    """(n,) ID scores in it."""
    n_ood: NDArray[np.int64]
    """(n,) OOD scores in it."""


_NOT_AVERAGED = ("threshold", "n_id", "n_ood")


class OODMetrics(StreamMetric):
    """AUROC, AUPR, FPR95 and more of a stream of scores, higher = more in-distribution (ID).

    With ``memory`` the state has a fixed size however long the stream is. The first 131,072 scores
    are kept as they are, so short streams are exact. Then scores are counted into bins that follow
    them, and every figure comes as an estimate with certain bounds, between which the figure of the
    whole stream lies whatever the stream was. Streams of bfloat16 or float16 values stay exact, and
    so do frequent values of any type; for float64 scores beyond float32's precision the bounds
    allow for the rounding. With ``exact=True`` all scores are kept instead.

    Figures by name, all by the rules of :func:`oodkernels.metrics.ood_metrics`: ``auroc``;
    ``aupr_in``, ``aupr_out``; ``fpr95`` and ``fpr95_out`` (named after ``tpr``); ``threshold``,
    ``threshold_out``; ``detection_error``; ``base_rate_in``, ``base_rate_out``; ``tie_fraction``;
    each with ``..._lower`` and ``..._upper``; and the counts ``n_id``, ``n_ood``.

    States merge (``merge_state``, or by themselves under ``torch.distributed``) without loss, in
    any order with the same result: scores counted in equal bins are added up, others are kept
    beside each other. A merged state is hence larger, at most the sum of its parts.

    Example:
        >>> metric = OODMetrics(memory="16MiB")
        >>> for batch in loader:
        ...     metric.update(score(batch.x), batch.labels)   # negative label = OOD
        >>> metric.compute()["fpr95"]
    """

    def __init__(
        self,
        *,
        exact: bool = False,
        memory: int | str = "16MiB",
        sets: int = 1,
        tpr: float = 0.95,
        **kwargs: Any,
    ) -> None:
        """Start without scores.

        Args:
            exact: Keep all scores, in memory that grows with the stream.
            memory: The most that the state may take, in bytes or as in ``"16MiB"``, ``"64 MB"``.
                2^27 bins are the most there are: 2.2 GiB for one set.
            sets: How many OOD sets share the memory. Each more takes as much again as one of them.
            tpr: 0 < tpr <= 1 of the FPR and the thresholds, read as the decimal it prints as.
            **kwargs: Of ``torchmetrics.Metric``.

        Raises:
            ValueError: ``memory`` is too little or not a size, ``tpr`` out of range, ``sets`` not
                in 1..254.
            TypeError: ``tpr`` is not a number, or ``exact`` not a bool.
        """
        super().__init__(exact=exact, memory=memory, sets=sets, tpr=tpr, **kwargs)

    # --- taking scores in ---------------------------------------------------------------------

    def update(
        self,
        scores: ArrayLike | Tensor,
        labels: Tensor | Sequence[Any] | np.ndarray[Any, Any] | bool,
        *,
        name: str | None = None,
    ) -> None:
        """Take in a batch.

        Args:
            scores: Any shape, float64, float32, bfloat16 or float16, higher = more ID; integers
                below 2**53 become float64. +-inf are ordered like other values, -0.0 equals 0.0.
            labels: Of the shape of ``scores``: bool, True for OOD; or integer, negative for OOD
                (so class labels with -1 for OOD, and not 0 and 1). Or one bool for all.
            name: Of the OOD set that the OOD scores belong to; None for the set without a name,
                beside which no other may be called ``"ood"``.

        Raises:
            ValueError: Shapes or devices differ; a score is NaN, with the number and the index of
                the first, and nothing is taken in (on CUDA, which is not waited for, ``compute``
                raises with the number); ``name`` is one that a set cannot have.
            TypeError: Scores are bool or complex, or labels floating-point.
        """
        where = "OODMetrics.update"
        scores = as_tensor(where, "scores", scores, self.device)
        flag = plain(labels)
        is_ood = None if isinstance(flag, bool) else self._is_ood(where, scores, flag)
        state = self._state()
        row = 0 if flag is False else _row(state, where, name)
        rows = row if is_ood is None else is_ood.reshape(-1).to(torch.uint8) * row
        self._add(state, scores.reshape(-1), rows, where)

    def update_id(self, scores: ArrayLike | Tensor) -> None:
        """Take in ID scores, as for :meth:`update`."""
        self.update(scores, False)

    def update_ood(self, name: str, scores: ArrayLike | Tensor) -> None:
        """Take in scores of the OOD set ``name``, as for :meth:`update`."""
        self.update(scores, True, name=name)

    def _is_ood(self, where: str, scores: Tensor, labels: Any) -> Tensor:
        if not isinstance(labels, (Tensor, np.ndarray, list, tuple)):
            raise TypeError(
                f"{where}: labels must be a bool or integer tensor, or a bool, got "
                f"{type(labels).__name__}"
            )
        if not isinstance(labels, Tensor):
            labels = from_array(where, "labels", labels).to(scores.device)
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(
                f"{where}: labels must be bool (True = OOD) or integer (negative = OOD), "
                f"got {labels.dtype}"
            )
        if labels.shape != scores.shape:
            raise ValueError(
                f"{where}: labels must have the shape of scores, {tuple(scores.shape)}, "
                f"got {tuple(labels.shape)}"
            )
        check_device(where, "labels", labels, "scores", scores)
        return labels if labels.dtype == torch.bool else labels < 0

    def _for_batch(self) -> OODMetrics:
        return OODMetrics(exact=True, tpr=self.tpr, **self._kwargs)

    # --- figures ------------------------------------------------------------------------------

    def compute(self) -> Result:
        """The figures of all scores so far.

        Returns:
            Figure -> float, where only the unnamed OOD set has been used; else OOD set -> those,
            with ``"average"`` holding the mean over the sets, and ``"ood"`` the unnamed set.

        Raises:
            ValueError: There are no ID or no OOD scores, or NaN was among them (see ``update``).
        """
        return self._result("OODMetrics.compute", allow_empty=False)

    def flat(self, prefix: str = "ood") -> dict[str, float]:
        """:meth:`compute` with one key a figure, for loggers: "ood/far/auroc", "ood/auroc".

        :func:`oodkernels.metrics.higher_is_better` says of a key which way is up.

        Args:
            prefix: What keys begin with.

        Raises:
            ValueError: As :meth:`compute`.
        """
        found: dict[str, float] = {}
        for name, value in self.compute().items():
            if isinstance(value, dict):
                found |= {f"{prefix}/{name}/{figure}": own for figure, own in value.items()}
            else:
                found[f"{prefix}/{name}"] = value
        return found

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the ROC curve of each OOD set (TPR = share of ID kept); needs matplotlib.

        The line is drawn over the band in which the true curve lies.

        Args:
            ax: Where; None for a new figure, which belongs to no global state.

        Returns:
            The figure and the axes.

        Raises:
            ValueError: As :meth:`compute`.
            ImportError: matplotlib is missing.
        """
        where = "OODMetrics.plot"
        with self._synced():
            return self._draw(where, self._used_sides(where, allow_empty=False), ax)

    def id_counts(self) -> CountedScores:
        """How many ID scores lie where, for :meth:`oodkernels.Threshold.from_metric`.

        Under ``torch.distributed`` every process must call it, and gets those of all.

        Raises:
            ValueError: NaN was among the scores (see ``update``).
        """
        with self._synced():
            _, side = next(iter(self._sides("OODMetrics.id_counts").values()))
            state = self._state()
            pending = state.pending()
        kept = pending is not None and not state.binned
        dtype = pending[0].dtype if kept and pending is not None else torch.float32
        return CountedScores(side.n_id, side.decode(side.low)[0], side.decode(side.high)[1], dtype)

    def levels(self) -> dict[str, ScoreLevels]:
        """The scores so far by OOD set, ``"ood"`` being the unnamed: what a histogram is made of.

        Raises:
            ValueError: As :meth:`compute`.
        """
        where = "OODMetrics.levels"
        result = {}
        with self._synced():
            for name, (_, side) in self._used_sides(where, allow_empty=False).items():
                order = np.argsort(side.low, kind="stable")
                values = side.decode(side.low[order])[0]
                result[name or "ood"] = ScoreLevels(values, side.n_id[order], side.n_ood[order])
        return result

    def _used_sides(self, where: str, *, allow_empty: bool) -> dict[str, tuple[int, Intervals]]:
        sides = self._sides(where)
        if len(sides) > 1 and UNNAMED in sides and not sides[UNNAMED][1].n_ood.any():
            del sides[UNNAMED]
        for name, (_, side) in sides.items():
            for kind, n in (("ID", side.n_id), ("OOD", side.n_ood)):
                if not allow_empty and not n.any():
                    of = f" of {name!r}" if name and kind == "OOD" else ""
                    raise ValueError(
                        f"{where}: there are no {kind} scores{of} yet: in labels, OOD is True, or "
                        "negative (0 and 1 are classes)"
                    )
        return sides

    def _result(self, where: str, *, allow_empty: bool) -> Result:
        fpr = fpr_name(self.tpr)
        names = {"fpr_at_tpr": fpr, "fpr_out_at_tpr": f"{fpr}_out"}
        results: dict[str, dict[str, float]] = {}
        sides = self._used_sides(where, allow_empty=allow_empty)
        for name, (row, side) in sides.items():
            result: dict[str, float] = {}
            for figure, bounded in self._figures(row, side).items():
                key = names.get(figure, figure)
                result[key] = bounded.estimate
                result[f"{key}_lower"] = bounded.lower
                result[f"{key}_upper"] = bounded.upper
            counts = {"n_id": int(side.n_id.sum()), "n_ood": int(side.n_ood.sum())}
            results[name or "ood"] = {**result, **counts}
        if self._state().set_names() in ([], [UNNAMED]):
            return results["ood"]
        keys = [k for k in next(iter(results.values())) if not k.startswith(_NOT_AVERAGED)]
        ordered = [results[name] for name in sorted(results)]
        average = {k: math.fsum(r[k] for r in ordered) / len(ordered) for k in keys}
        return {**results, "average": average}


def _row(state: StreamState, where: str, name: str | None) -> int:
    """The row of an OOD set by its name, made where there is none."""
    name = plain(name)
    if name is None:
        name = UNNAMED
    elif not isinstance(name, str) or name in ("", "average"):
        raise ValueError(f"{where}: an OOD set cannot be called {name!r}")
    if name not in (names := state.set_names()):
        state.add_sets([name], where)
        names = state.set_names()
    return names.index(name) + 1
