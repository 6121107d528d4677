"""OOD metrics over a stream of scores, as a ``torchmetrics.Metric``, in memory that does not grow.

Needs the extra ``metrics``: ``pip install oodkernels[metrics]``.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from oodkernels.metrics.ood import FIGURES, fpr_name, ood_metrics
from oodkernels.metrics.streaming._bounds import Bounded, Floats, Intervals, Ints, curves, figures
from oodkernels.metrics.streaming._sketch import Cells, Layout, Sketch
from oodkernels.metrics.threshold import CountedScores
from oodkernels.ops.histogram import N_FACTS

try:
    from torchmetrics import Metric
    from torchmetrics.utilities.distributed import gather_all_tensors
except ImportError as error:
    raise ImportError(
        "OODMetrics is a torchmetrics.Metric, and torchmetrics could not be imported "
        f"({error}): pip install 'oodkernels[metrics]'"
    ) from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = dict[str, Any]

_PENDING = 1 << 17
_SKETCH = tuple(f.name for f in fields(Sketch))
_UNNAMED = ""
_NOT_AVERAGED = ("threshold", "n_id", "n_ood")


class OODMetrics(Metric):  # type: ignore[misc, unused-ignore]
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

    is_differentiable = False
    full_state_update = False

    names: Tensor
    counts: Tensor
    archive_codes: Tensor
    archive_counts: Tensor
    archive_facts: Tensor
    pending_scores: list[Tensor]
    pending_rows: list[Tensor]

    def __init__(
        self,
        *,
        exact: bool = False,
        memory: int | str = "16MiB",
        sets: int = 1,
        tpr: float = 0.95,
        **kwargs: Any,
    ) -> None:
        """Without scores.

        Args:
            exact: Keep all scores, in memory that grows with the stream.
            memory: Size of the state in bytes, or as in ``"16MiB"``, ``"64 MB"``.
            sets: How many OOD sets share the memory. Each more takes as much again as one of them.
            tpr: 0 < tpr <= 1 of the FPR and the thresholds, read as the decimal it prints as.
            **kwargs: Of ``torchmetrics.Metric``.

        Raises:
            ValueError: ``memory`` is too little or not a size, ``tpr`` out of range, ``sets`` < 1.
        """
        super().__init__(**kwargs)
        if not 0 < tpr <= 1:
            raise ValueError(f"OODMetrics: tpr must be in (0, 1], got {tpr}")
        if not 1 <= sets <= 254:
            raise ValueError(f"OODMetrics: sets must be in 1..254, got {sets}")
        self.exact = exact
        self.memory = _parse_bytes(memory)
        self.sets = sets
        self.tpr = tpr
        # Nine bytes a pending score: up to eight of its own, and its row.
        self._layout = None if exact else Layout.of(self.memory - 9 * _PENDING, sets + 1)
        self._kwargs = kwargs
        self._compacted, self._counted = 0, 0  # scores, where the host does not see the state
        self.add_state("names", torch.zeros(0, dtype=torch.uint8, device="cpu"))
        for name in (*_SKETCH, "archive_codes", "archive_counts", "archive_facts"):
            self.add_state(name, torch.zeros(0, dtype=torch.int64))
        for name in ("pending_scores", "pending_rows"):
            self.add_state(name, [])

    # --- taking scores in ---------------------------------------------------------------------

    def update(
        self, scores: ArrayLike | Tensor, labels: Tensor | bool, *, name: str | None = None
    ) -> None:
        """Take in a batch.

        Args:
            scores: Any shape, float64, float32, bfloat16 or float16, higher = more ID; integers
                become float64. +-inf are ordered like other values, -0.0 equals 0.0.
            labels: Of the shape of ``scores``: bool, True for OOD; or integer, negative for OOD
                (so class labels with -1 for OOD, and not 0 and 1). Or one bool for all.
            name: Of the OOD set that the OOD scores belong to.

        Raises:
            ValueError: Shapes or devices differ; a score is NaN, with the number and the index of
                the first, and nothing is taken in (on CUDA, which is not waited for, ``compute``
                raises with the number).
            TypeError: Scores are bool or complex, or labels floating-point.
        """
        scores = self._checked_scores(scores)
        n = scores.numel()
        rows: Tensor | int
        if isinstance(labels, Tensor):
            is_ood = self._checked_labels(scores, labels)
            rows = is_ood.reshape(-1).to(torch.uint8) * self._row(name)
        elif isinstance(labels, bool):
            rows = self._row(name) if labels else 0
        else:
            raise TypeError(
                "OODMetrics.update: labels must be a bool or integer tensor, or a bool, got "
                f"{type(labels).__name__}"
            )
        scores = scores.detach().reshape(-1)
        if n == 0:
            return
        if not self.exact and n >= _PENDING:
            self._flush()
            try:
                self._count(scores, rows)
            except ValueError as error:
                message = str(error).replace("roc_histogram_", "OODMetrics.update")
                raise ValueError(message) from None
            return
        if scores.is_cpu:
            nan = scores.isnan()
            if bool(nan.any()):
                raise ValueError(
                    f"OODMetrics.update: scores must not be NaN, got {int(nan.sum())} NaN, the "
                    f"first at index {int(nan.nonzero()[0])}"
                )
        if isinstance(rows, int):
            rows = torch.full((n,), rows, dtype=torch.uint8, device=scores.device)
        self.pending_scores.append(scores.clone())
        self.pending_rows.append(rows)
        if len(self.pending_scores) >= 256:
            self.pending_scores[:] = [torch.cat(self.pending_scores)]
            self.pending_rows[:] = [torch.cat(self.pending_rows)]
        if not self.exact and sum(t.numel() for t in self.pending_scores) >= _PENDING:
            self._flush()

    def update_id(self, scores: ArrayLike | Tensor) -> None:
        """Take in ID scores, as for :meth:`update`."""
        self.update(scores, False)

    def update_ood(self, name: str, scores: ArrayLike | Tensor) -> None:
        """Take in scores of the OOD set ``name``, as for :meth:`update`."""
        self.update(scores, True, name=name)

    def forward(self, *args: Any, **kwargs: Any) -> Result:
        """:meth:`update`, and the figures of this batch alone: NaN where it lacks a side."""
        if self._is_synced:
            raise RuntimeError("OODMetrics: forward of a synced metric; unsync it first")
        self.update(*args, **kwargs)
        batch = OODMetrics(exact=True, tpr=self.tpr, **self._kwargs).to(self.device)
        batch._to_sync = self.dist_sync_on_step
        batch.update(*args, **kwargs)
        with batch.sync_context(batch.dist_sync_fn, should_sync=batch._to_sync):
            result = batch._result(allow_empty=True)
        self._forward_cache: Any = result
        self._computed: Any = None
        return result

    def _checked_scores(self, scores: ArrayLike | Tensor) -> Tensor:
        if not isinstance(scores, Tensor):
            scores = torch.as_tensor(scores, device=self.device)
        if scores.dtype == torch.bool or scores.is_complex():
            raise TypeError(
                f"OODMetrics.update: scores must be floating-point or integer, got {scores.dtype}"
            )
        if not scores.is_floating_point():
            scores = scores.double()
        elif scores.itemsize < 2:
            scores = scores.float()
        if scores.device != self.device:
            raise ValueError(
                f"OODMetrics.update: scores are on {scores.device}, the metric on {self.device}: "
                "move it with metric.to(...)"
            )
        return scores

    def _checked_labels(self, scores: Tensor, labels: Tensor) -> Tensor:
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(
                f"OODMetrics.update: labels must be bool (True = OOD) or integer (negative = OOD), "
                f"got {labels.dtype}"
            )
        if labels.shape != scores.shape:
            raise ValueError(
                f"OODMetrics.update: labels must have the shape of scores, {tuple(scores.shape)}, "
                f"got {tuple(labels.shape)}"
            )
        if labels.device != scores.device:
            raise ValueError(
                f"OODMetrics.update: labels must be on the device of scores, {scores.device}, got "
                f"{labels.device}"
            )
        return labels if labels.dtype == torch.bool else labels < 0

    def _row(self, name: str | None) -> int:
        if name is not None and (not name or name == "average"):
            raise ValueError(f"OODMetrics: an OOD set cannot be called {name!r}")
        names = self._names()
        wanted = _UNNAMED if name is None else name
        if wanted not in names:
            if len(names) == 254:
                raise ValueError("OODMetrics: more than 254 OOD sets")
            self._set_names([*names, wanted])
            names = self._names()
        return names.index(wanted) + 1

    def _names(self) -> list[str]:
        names: list[str] = json.loads(self.names.numpy().tobytes() or b"[]")
        return names

    def _set_names(self, names: list[str]) -> None:
        self.names = torch.tensor(list(json.dumps(names).encode()), dtype=torch.uint8, device="cpu")

    def _apply(self, fn: Callable[..., Any], exclude_state: Any = ()) -> OODMetrics:
        # The names stay where reading them waits for no device.
        super()._apply(fn, exclude_state=(*exclude_state, "names"))
        return self

    def set_dtype(self, dst_type: str | torch.dtype) -> OODMetrics:
        """Do nothing: the state is made of integers."""
        return self

    # --- the bounded state --------------------------------------------------------------------

    def _sketch(self) -> Sketch | None:
        if not self.counts.numel():
            return None
        return Sketch(**{name: getattr(self, name) for name in _SKETCH})

    def _keep(self, sketch: Sketch) -> None:
        for name in _SKETCH:
            setattr(self, name, getattr(sketch, name))

    def _flush(self) -> None:
        if self.pending_scores:
            self._count(torch.cat(self.pending_scores), torch.cat(self.pending_rows))
            self.pending_scores.clear()
            self.pending_rows.clear()

    def _count(self, scores: Tensor, rows: Tensor | int) -> None:
        assert self._layout is not None
        n_rows = len(self._names()) + 1
        sketch = self._sketch()
        first = sketch is None
        if sketch is None:
            sketch = Sketch.empty(self._layout, max(n_rows, self.sets + 1), self.device)
        sketch.with_rows(n_rows)
        sketch.count(scores, rows, self._layout, first=first)
        if not scores.is_cpu:
            self._counted += scores.numel()
            if self._counted >= 2 * self._compacted:
                self._compacted = self._counted
                sketch.compact(self._layout)
        self._keep(sketch)

    @property
    def state_bytes(self) -> int:
        """Size of the state now."""
        total = 0
        for state in self.metric_state.values():
            total += sum(t.nbytes for t in state) if isinstance(state, list) else state.nbytes
        return total

    # --- merging ------------------------------------------------------------------------------

    def merge_state(self, incoming_state: Mapping[str, Any] | Metric) -> None:
        """Take in what another metric has seen: the metric, or its ``metric_state``.

        Raises:
            ValueError: It is neither, or keeps scores where this one does not or the reverse.
        """
        if isinstance(incoming_state, OODMetrics):
            if incoming_state.exact != self.exact:
                raise ValueError("OODMetrics: an exact metric merges with exact ones only")
            count, incoming_state = incoming_state._update_count, incoming_state.metric_state
        elif isinstance(incoming_state, Mapping):
            count = 1
        else:
            raise ValueError(
                "OODMetrics: a state must be an OODMetrics or a dict, got "
                f"{type(incoming_state).__name__}"
            )
        self._merge(incoming_state)
        self._update_count += count
        self._computed = None

    def _merge(self, state: Mapping[str, Any]) -> None:
        names: list[str] = json.loads(state["names"].cpu().numpy().tobytes() or b"[]")
        known = self._names()
        self._set_names(known + [name for name in names if name not in known])
        known = self._names()
        row_of = torch.tensor([0, *(known.index(name) + 1 for name in names)], device=self.device)

        def renumbered(table: Tensor, n_rows: int) -> Tensor:
            used = table[: len(row_of)].to(self.device)
            out = used.new_zeros((n_rows, *table.shape[1:]))
            out[row_of[: len(used)]] = used
            return out

        n_rows = len(known) + 1
        for scores, rows in zip(state["pending_scores"], state["pending_rows"], strict=True):
            self.pending_scores.append(scores.to(self.device, copy=True))
            self.pending_rows.append(row_of.to(torch.uint8)[rows.to(self.device).long()])
        if state["archive_codes"].numel():
            self._archive(
                state["archive_codes"].to(self.device),
                renumbered(state["archive_counts"], n_rows),
                renumbered(state["archive_facts"], n_rows),
            )
        if not state["counts"].numel():
            return
        other = Sketch(**{name: state[name].to(self.device) for name in _SKETCH})
        other.counts = renumbered(other.counts, max(n_rows, self.sets + 1))
        own = self._sketch()
        if own is None:
            other = Sketch(**{n: getattr(other, n).clone() for n in _SKETCH})
            self._keep(other)
        elif own.same_table(other):
            own.with_rows(other.counts.shape[0])
            other.with_rows(own.counts.shape[0])
            low_bits = own.facts[:, -1] | other.facts[:, -1]
            own.counts += other.counts
            own.facts[:, -1] = low_bits
            self._keep(own)
        else:
            cells = other.cells()
            self._archive(
                torch.from_numpy(cells.codes).to(self.device),
                torch.from_numpy(cells.counts).to(self.device),
                other.facts,
            )

    def _archive(self, codes: Tensor, counts: Tensor, facts: Tensor) -> None:
        """Put counts aside whose intervals the sketch does not have."""
        if not self.archive_codes.numel():
            self.archive_codes, self.archive_counts, self.archive_facts = codes, counts, facts
            return
        n_rows = max(len(counts), len(self.archive_counts))

        def padded(t: Tensor) -> Tensor:
            return torch.nn.functional.pad(t, (0, 0, 0, n_rows - len(t)))

        total = Cells.sum(
            [
                Cells.of_codes(self.archive_codes, padded(self.archive_counts)),
                Cells.of_codes(codes, padded(counts)),
            ]
        )
        own, other = padded(self.archive_facts), padded(facts)
        self.archive_codes = torch.from_numpy(total.codes).to(self.device)
        self.archive_counts = torch.from_numpy(total.counts).to(self.device)
        self.archive_facts = own + other
        self.archive_facts[:, -1] = own[:, -1] | other[:, -1]

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None
    ) -> None:
        buffer = io.BytesIO()
        torch.save(self.metric_state, buffer)
        packed = torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)
        gathered = dist_sync_fn(packed.to(self.device), group=process_group or self.process_group)
        for name, default in self._defaults.items():
            setattr(self, name, default.clone() if isinstance(default, Tensor) else [])
        for data in gathered:
            state = torch.load(
                io.BytesIO(data.cpu().numpy().tobytes()), map_location="cpu", weights_only=True
            )
            self._merge(state)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.names = self.names.cpu()
        self._computed = None
        if self.names.numel() or self.counts.numel() or self.pending_scores:
            self._update_count = max(1, self._update_count)

    def reset(self) -> None:
        """Forget all scores and the names of the sets."""
        super().reset()
        self._compacted, self._counted = 0, 0

    # --- figures ------------------------------------------------------------------------------

    def compute(self) -> Result:
        """The figures of all scores so far.

        Returns:
            Figure -> float, where only the unnamed OOD set has been used; else OOD set -> those,
            with ``"average"`` holding the mean over the sets, and ``"ood"`` the unnamed set.

        Raises:
            ValueError: There are no ID or no OOD scores, or NaN was among them (see ``update``).
        """
        return self._result(allow_empty=False)

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the ROC curve of each OOD set (TPR = share of ID kept); needs matplotlib.

        The line is drawn over the band in which the true curve lies.

        Args:
            ax: Where; None for a new figure.

        Returns:
            The figure and the axes.
        """
        from matplotlib import pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(5, 5), layout="constrained")
        with self._synced():
            sides = self._sides()
            for name, (row, side) in sides.items():
                auroc = self._figures(row, side)["auroc"]
                outer, middle, inner = curves(side)
                label = f"{name}: " if name != _UNNAMED else ""
                digits = f"{auroc.estimate:.4f}"
                if auroc.lower < auroc.upper:
                    digits += f" \N{PLUS-MINUS SIGN} {(auroc.upper - auroc.lower) / 2:.0e}"
                (line,) = ax.plot(*middle, lw=1.5, label=f"{label}AUROC {digits}")
                band = np.concatenate((outer, inner[:, ::-1]), 1)
                ax.fill(*band, color=line.get_color(), alpha=0.25, lw=0)
        ax.axhline(self.tpr, color="0.6", lw=0.8, ls=":")
        ax.plot([0, 1], [0, 1], color="0.6", lw=0.8, ls="--")
        ax.set(xlabel="FPR: share of OOD kept", ylabel="TPR: share of ID kept")
        ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        ax.legend(loc="lower right", frameon=False)
        figure = ax.get_figure(root=True)
        assert figure is not None
        return figure, ax

    def id_counts(self) -> CountedScores:
        """How many ID scores lie where, for :meth:`oodkernels.Threshold.from_metric`.

        Under ``torch.distributed`` every process must call it, and gets those of all.

        Raises:
            ValueError: NaN was among the scores (see ``update``).
        """
        with self._synced():
            _, side = next(iter(self._sides(allow_empty=True).values()))
            binned = bool(self.counts.numel() or self.archive_codes.numel())
            kept = [torch.empty(0, dtype=s.dtype) for s in self.pending_scores]
        dtype = torch.float32 if binned or not kept else torch.cat(kept).dtype
        return CountedScores(side.n_id, side.decode(side.low)[0], side.decode(side.high)[1], dtype)

    def _synced(self) -> Any:
        return self.sync_context(
            self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        )

    def _sides(self, *, allow_empty: bool = False) -> dict[str, tuple[int, Intervals]]:
        """Row and intervals, ID against OOD, of each OOD set by name."""
        names = self._names() or [_UNNAMED]
        n_rows = len(names) + 1
        facts, parts = np.zeros((n_rows, N_FACTS), np.int64), []
        if (sketch := self._sketch()) is not None:
            sketch.with_rows(n_rows)
            facts = _sum_facts(facts, sketch.facts)
            cells = sketch.cells()
            parts.append(Cells(cells.key, cells.shift, cells.counts[:n_rows]))
        if self.archive_codes.numel():
            facts = _sum_facts(facts, self.archive_facts)
            counts = torch.nn.functional.pad(
                self.archive_counts, (0, 0, 0, n_rows - len(self.archive_counts))
            )
            parts.append(Cells.of_codes(self.archive_codes, counts))
        scores = rows = None
        refused = int(facts[:, 1].sum())
        if self.pending_scores:
            scores, rows = torch.cat(self.pending_scores), torch.cat(self.pending_rows)
            refused += int(scores.isnan().sum())
        if refused:
            raise ValueError(f"OODMetrics.compute: scores must not be NaN, got {refused} NaN")

        make = self._kept(scores, rows, n_rows)
        if parts:
            if scores is not None and rows is not None:
                parts.append(Cells.of_scores(scores, rows, n_rows))
                bits = scores.float().cpu().view(torch.int32).numpy()
                facts[0, 2] += int((scores.float().to(scores.dtype) != scores).sum())
                facts[0, 3] |= int(np.bitwise_or.reduce(bits)) & 0xFFFF
            low_bits, rounded = int(np.bitwise_or.reduce(facts[:, 3])), bool(facts[:, 2].any())
            total = Cells.sum(parts)

            def make(row: int) -> Intervals:
                return total.intervals(row, low_bits, rounded)

        sides = {name: (row, make(row)) for row, name in enumerate(names, 1)}
        if len(sides) > 1 and _UNNAMED in sides and not sides[_UNNAMED][1].n_ood.any():
            del sides[_UNNAMED]
        for name, (_, side) in sides.items():
            for kind, n in (("ID", side.n_id), ("OOD", side.n_ood)):
                if not allow_empty and not n.any():
                    of = f" of {name!r}" if name and kind == "OOD" else ""
                    raise ValueError(f"OODMetrics.compute: there are no {kind} scores{of} yet")
        return sides

    def _kept(
        self, scores: Tensor | None, rows: Tensor | None, n_rows: int
    ) -> Callable[[int], Intervals]:
        """Intervals from nothing but scores that are kept as they are."""
        values, places = np.zeros(0), np.zeros(0, np.int64)
        counts = np.zeros((n_rows, 0), np.int64)
        if scores is not None and rows is not None:
            values, places = np.unique(scores.double().cpu().numpy(), return_inverse=True)
            counts = np.zeros((n_rows, values.size), np.int64)
            np.add.at(counts, (rows.cpu().numpy(), places), 1)
        point = np.arange(values.size)

        def decode(coordinates: Ints) -> tuple[Floats, Floats]:
            return values[coordinates], values[coordinates]

        return lambda row: Intervals(point, point, counts[0], counts[row], decode)

    def _figures(self, row: int, side: Intervals) -> dict[str, Bounded]:
        if not side.n_id.any() or not side.n_ood.any():
            return dict.fromkeys(FIGURES, Bounded(math.nan, math.nan, math.nan))
        if self.counts.numel() or self.archive_codes.numel():
            return figures(side, self.tpr)
        scores, rows = torch.cat(self.pending_scores), torch.cat(self.pending_rows)
        exact = ood_metrics(scores[rows == 0], scores[rows == row], tpr=self.tpr)
        return {name: Bounded(v, v, v) for name in FIGURES for v in [getattr(exact, name)]}

    def _result(self, *, allow_empty: bool) -> Result:
        fpr = fpr_name(self.tpr)
        names = {"fpr_at_tpr": fpr, "fpr_out_at_tpr": f"{fpr}_out"}
        results: dict[str, dict[str, float]] = {}
        for name, (row, side) in self._sides(allow_empty=allow_empty).items():
            result: dict[str, float] = {}
            for figure, bounded in self._figures(row, side).items():
                key = names.get(figure, figure)
                result[key] = bounded.estimate
                result[f"{key}_lower"] = bounded.lower
                result[f"{key}_upper"] = bounded.upper
            counts = {"n_id": int(side.n_id.sum()), "n_ood": int(side.n_ood.sum())}
            results[name or "ood"] = {**result, **counts}
        if list(results) == ["ood"] and self._names() in ([], [_UNNAMED]):
            return results["ood"]
        keys = [k for k in next(iter(results.values())) if not k.startswith(_NOT_AVERAGED)]
        ordered = [results[name] for name in sorted(results)]
        average = {k: math.fsum(r[k] for r in ordered) / len(ordered) for k in keys}
        return {**results, "average": average}


def _sum_facts(a: Ints, b: Tensor) -> Ints:
    other = b[: len(a)].cpu().numpy()
    padded = np.zeros_like(a)
    padded[: len(other)] = other
    total = a + padded
    total[:, 3] = a[:, 3] | padded[:, 3]
    return total


def _parse_bytes(memory: int | str) -> int:
    if isinstance(memory, int) and not isinstance(memory, bool):
        return memory
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)(i?)b?\s*", str(memory), re.IGNORECASE)
    if match is None:
        raise ValueError(f"OODMetrics: memory must be a size such as '16MiB', got {memory!r}")
    number, unit, binary = match.groups()
    power = " kmg".index(unit.lower()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)
