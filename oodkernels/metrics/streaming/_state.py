"""The state of a stream of scores: what is kept as it is, what is counted, what was merged in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from oodkernels._checks import check_no_nan
from oodkernels.metrics.streaming._bounds import Floats, Intervals, Ints
from oodkernels.metrics.streaming._sketch import Cells, Layout, Sketch
from oodkernels.ops.histogram import N_FACTS

PENDING = 1 << 17
"""Scores that are kept as they are before they are counted."""
UNNAMED = ""
"""Name of the OOD set that has none."""
MOST_SETS = 254
MOST_SCORES = 1 << 62
"""Sums over pairs of scores are exact in 64 bits, or in two limbs of 31, below it."""

_SKETCH = tuple(f.name for f in fields(Sketch))
_LOW_HALF = (1 << 31) - 1


@dataclass
class Pace:
    """Scores counted on an accelerator, whose state the host does not see, and when compacted."""

    counted: int = 0
    compacted: int = 0


def no_integers() -> Tensor:
    """An empty state."""
    return torch.zeros(0, dtype=torch.int64)


@dataclass
class StreamState:
    """Scores by row: row 0 holds those of ID samples, each other row those of an OOD set.

    The first scores are kept as they are (``pending``). When there are many, a sketch counts them.
    Merging adds up sketches with equal bins, and puts other counts aside (``archive``).

    Attributes:
        layout: How the memory of a sketch is divided; None to keep all scores as they are.
        sets: OOD sets that memory was planned for.
        pace: Of counting, on an accelerator.
        names: JSON of the OOD sets' names, uint8 on the host.
        counts: With ``blocks`` to ``adapted``, the fields of a :class:`Sketch`; empty for none.
        archive_codes: (n,) int64 intervals of the archive, see :attr:`Cells.codes`.
        archive_counts: (R, n) int64.
        archive_facts: (R, 4) int64.
        pending_scores: Scores, (n,) each.
        pending_rows: Their rows, (n,) uint8 each.
    """

    layout: Layout | None
    sets: int
    pace: Pace = field(default_factory=Pace)
    names: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.uint8, device="cpu"))
    counts: Tensor = field(default_factory=no_integers)
    blocks: Tensor = field(default_factory=no_integers)
    table: Tensor = field(default_factory=no_integers)
    atoms: Tensor = field(default_factory=no_integers)
    used: Tensor = field(default_factory=no_integers)
    scale: Tensor = field(default_factory=no_integers)
    adapted: Tensor = field(default_factory=no_integers)
    archive_codes: Tensor = field(default_factory=no_integers)
    archive_counts: Tensor = field(default_factory=no_integers)
    archive_facts: Tensor = field(default_factory=no_integers)
    pending_scores: list[Tensor] = field(default_factory=list)
    pending_rows: list[Tensor] = field(default_factory=list)

    @property
    def binned(self) -> bool:
        """Whether scores have been counted."""
        return bool(self.counts.numel() or self.archive_codes.numel())

    # --- sets by name -------------------------------------------------------------------------

    def set_names(self) -> list[str]:
        """Names of the OOD sets, in the order of their rows, which begin at 1."""
        names: list[str] = json.loads(self.names.cpu().numpy().tobytes() or b"[]")
        return names

    def add_sets(self, names: list[str], where: str) -> None:
        """Give rows to those of the sets that have none.

        Raises:
            ValueError: There would be more than 254, or one called ``"ood"`` beside the unnamed.
        """
        known = self.set_names()
        known += [name for name in names if name not in known]
        if len(known) > MOST_SETS:
            raise ValueError(f"{where}: there must be at most {MOST_SETS} OOD sets")
        if UNNAMED in known and "ood" in known:
            raise ValueError(
                f"{where}: OOD sets must have names when one is called 'ood', which is where the "
                "figures of scores without a name go: give them one by name=..."
            )
        self.names = encoded(known)

    # --- taking scores in ---------------------------------------------------------------------

    def add(self, scores: Tensor, rows: Tensor | int, where: str, argument: str) -> None:
        """Take in scores of one device.

        Args:
            scores: (n,) floating-point.
            rows: The row of all, or of each, (n,) uint8.
            where: Whom errors name.
            argument: What errors call the scores.

        Raises:
            ValueError: On CPU, a score is NaN; none is taken in then.
        """
        n = scores.numel()
        if n == 0:
            return
        if self.layout is not None and n >= PENDING:
            self.flush()
            try:
                self._count(scores, rows, self.layout)
            except ValueError:
                check_no_nan(where, argument, scores)
                raise
            return
        # A sum with NaN in it is NaN, and is had at once; one of both infinities is, too.
        if scores.is_cpu and math.isnan(scores.sum()):
            check_no_nan(where, argument, scores)
        if isinstance(rows, int):
            rows = torch.full((n,), rows, dtype=torch.uint8, device=scores.device)
        self.pending_scores.append(scores.clone())
        self.pending_rows.append(rows)
        if len(self.pending_scores) >= (256 if self.layout is None else 32):
            self.pending_scores[:] = [torch.cat(self.pending_scores)]
            self.pending_rows[:] = [torch.cat(self.pending_rows)]
        if self.layout is not None and sum(map(Tensor.numel, self.pending_scores)) >= PENDING:
            self.flush()

    def flush(self) -> None:
        """Count what is pending, unless all scores are to be kept."""
        if self.layout is not None and self.pending_scores:
            self._count(torch.cat(self.pending_scores), torch.cat(self.pending_rows), self.layout)
            self.pending_scores.clear()
            self.pending_rows.clear()

    def _sketch(self) -> Sketch | None:
        if not self.counts.numel():
            return None
        return Sketch(**{name: getattr(self, name) for name in _SKETCH})

    def _keep(self, sketch: Sketch) -> None:
        for name in _SKETCH:
            setattr(self, name, getattr(sketch, name))

    def _count(self, scores: Tensor, rows: Tensor | int, layout: Layout) -> None:
        n_rows = len(self.set_names()) + 1
        sketch, counted = self._sketch(), False
        first = sketch is None
        if sketch is None:
            sketch = Sketch.empty(layout, max(n_rows, self.sets + 1), scores.device)
        try:
            sketch.with_rows(n_rows)
            sketch.count(scores, rows, layout, first=first)
            counted = True
            if not scores.is_cpu:
                self.pace.counted += scores.numel()
                if self.pace.counted >= 2 * self.pace.compacted:
                    self.pace.compacted = self.pace.counted
                    sketch.compact(layout)
        finally:
            # Scores that are refused may have moved its bins, and what these hold with them.
            if counted or not first:
                self._keep(sketch)

    # --- merging ------------------------------------------------------------------------------

    def total(self) -> int:
        """Number of scores, whatever their row."""
        n = sum(t.numel() for t in self.pending_scores)
        for counts in (
            self.counts[:, :-N_FACTS] if self.counts.numel() else self.counts,
            self.archive_counts,
        ):
            n += (int((counts >> 31).sum()) << 31) + int((counts & _LOW_HALF).sum())
        return n

    def check_total(self, where: str, more: int = 0) -> None:
        """Refuse 2^62 scores and more, with which sums over pairs would overflow."""
        if (n := self.total() + more) >= MOST_SCORES:
            raise ValueError(f"{where}: there must be fewer than 2**62 scores, got {n}")

    def merge(self, other: StreamState, where: str) -> None:
        """Take in what another state holds, which is left as it is and may be this one.

        Raises:
            ValueError: The scores, or the names of the sets, are too many, see :meth:`add_sets`.
        """
        self.check_total(where, other.total())
        names, device = other.set_names(), self.counts.device
        self.add_sets(names, where)
        known = self.set_names()
        n_rows = len(known) + 1
        row_of = torch.tensor([0, *(known.index(name) + 1 for name in names)], device=device)

        def renumbered(table: Tensor, n_rows: int = n_rows) -> Tensor:
            used = table[: len(row_of)].to(device)
            out = used.new_zeros((n_rows, *table.shape[1:]))
            out[row_of[: len(used)]] = used
            return out

        pending = list(zip(other.pending_scores, other.pending_rows, strict=True))
        for scores, rows in pending:
            self.pending_scores.append(scores.to(device, copy=True))
            self.pending_rows.append(row_of.to(torch.uint8)[rows.to(device).long()])
        if other.archive_codes.numel():
            self._archive(
                other.archive_codes.to(device),
                renumbered(other.archive_counts),
                renumbered(other.archive_facts),
            )
        theirs = other._sketch()
        if theirs is None:
            return
        theirs = Sketch(**{name: getattr(theirs, name).to(device) for name in _SKETCH})
        theirs.counts = renumbered(theirs.counts, max(n_rows, self.sets + 1))
        own = self._sketch()
        if own is None:
            self._keep(Sketch(**{name: getattr(theirs, name).clone() for name in _SKETCH}))
        elif own.same_table(theirs):
            own.with_rows(theirs.counts.shape[0])
            theirs.with_rows(own.counts.shape[0])
            low_bits = own.facts[:, -1] | theirs.facts[:, -1]
            own.counts += theirs.counts
            own.facts[:, -1] = low_bits
            self._keep(own)
        else:
            cells = theirs.cells()
            self._archive(
                torch.from_numpy(cells.codes).to(device),
                torch.from_numpy(cells.counts).to(device),
                theirs.facts,
            )

    def _archive(self, codes: Tensor, counts: Tensor, facts: Tensor) -> None:
        """Put counts aside whose intervals the sketch does not have."""
        if not self.archive_codes.numel():
            self.archive_codes, self.archive_counts, self.archive_facts = codes, counts, facts
            return
        n_rows = max(len(counts), len(self.archive_counts))
        device = self.archive_codes.device
        total = Cells.sum(
            [
                Cells.of_codes(self.archive_codes, _with_rows(self.archive_counts, n_rows)),
                Cells.of_codes(codes, _with_rows(counts, n_rows)),
            ]
        )
        self.archive_codes = torch.from_numpy(total.codes).to(device)
        self.archive_counts = torch.from_numpy(total.counts).to(device)
        self.archive_facts = _sum_facts(
            _with_rows(self.archive_facts, n_rows), _with_rows(facts, n_rows)
        )

    # --- reading ------------------------------------------------------------------------------

    def pending(self) -> tuple[Tensor, Tensor] | None:
        """Scores that are kept as they are, and their rows."""
        if not self.pending_scores:
            return None
        return torch.cat(self.pending_scores), torch.cat(self.pending_rows)

    def cells(self) -> Cells:
        """Everything, as float32 keys in intervals; an OOD set has a row before it is used."""
        n_rows, parts = max(1, len(self.set_names())) + 1, []
        if (sketch := self._sketch()) is not None:
            sketch.with_rows(n_rows)
            cells = sketch.cells()
            parts.append(Cells(cells.key, cells.shift, cells.counts[:n_rows]))
        if self.archive_codes.numel():
            counts = _with_rows(self.archive_counts, n_rows)
            parts.append(Cells.of_codes(self.archive_codes, counts))
        if (pending := self.pending()) is not None:
            parts.append(Cells.of_scores(*pending, n_rows))
        return Cells.sum(parts)

    def sides(self, where: str, argument: str) -> dict[str, tuple[int, Intervals]]:
        """Row and intervals, ID against OOD, of each OOD set by name.

        Raises:
            ValueError: There are scores that were NaN, which an accelerator could not refuse, or
                2^62 scores.
        """
        names = self.set_names() or [UNNAMED]
        facts = torch.zeros(len(names) + 1, N_FACTS, dtype=torch.int64)
        for more in (
            self.counts[:, -N_FACTS:] if self.counts.numel() else None,
            self.archive_facts if self.archive_codes.numel() else None,
        ):
            if more is not None:
                facts = _sum_facts(facts, _with_rows(more.cpu(), len(facts))[: len(facts)])
        refused, pending = int(facts[:, 1].sum()), self.pending()
        if pending is not None:
            refused += int(pending[0].isnan().sum())
        if refused:
            raise ValueError(f"{where}: {argument} must not be NaN, got {refused} NaN")
        self.check_total(where)
        if not self.binned:
            kept = _as_they_are(pending, len(names) + 1)
            return {name: (row, kept(row)) for row, name in enumerate(names, 1)}
        if pending is not None:
            single = pending[0].float()
            facts[0, 2] += int((single.to(pending[0].dtype) != pending[0]).sum())
            bits = single.cpu().view(torch.int32).numpy()
            facts[0, 3] |= int(np.bitwise_or.reduce(bits)) & 0xFFFF
        low_bits, rounded = int(np.bitwise_or.reduce(facts[:, 3].numpy())), bool(facts[:, 2].any())
        cells = self.cells()
        return {
            name: (row, cells.intervals(row, low_bits, rounded))
            for row, name in enumerate(names, 1)
        }


STATES = tuple(f.name for f in fields(StreamState) if f.name not in ("layout", "sets", "pace"))
"""The fields that are tensors, or lists of them."""


def encoded(names: list[str]) -> Tensor:
    """Names as :attr:`StreamState.names` holds them."""
    text = json.dumps(names) if names else ""
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")


def state_of(tensors: Mapping[str, object]) -> StreamState:
    """A state to be read, from its tensors by name."""
    return StreamState(None, 1, **{name: tensors[name] for name in STATES})  # type: ignore[arg-type]


def _with_rows(table: Tensor, rows: int) -> Tensor:
    """Add rows of zeros up to a number of ``rows``."""
    return torch.nn.functional.pad(table, (0, 0, 0, max(0, rows - len(table))))


def _sum_facts(a: Tensor, b: Tensor) -> Tensor:
    """Join the facts of two histograms: sums, and the OR of the low bits."""
    total = a + b
    total[:, -1] = a[:, -1] | b[:, -1]
    return total


def _as_they_are(pending: tuple[Tensor, Tensor] | None, n_rows: int) -> Callable[[int], Intervals]:
    """Intervals of a row against row 0, from nothing but scores that are kept as they are."""
    values, counts = np.zeros(0), np.zeros((n_rows, 0), np.int64)
    if pending is not None:
        scores, rows = (t.cpu() for t in pending)
        values, places = np.unique(scores.double().numpy(), return_inverse=True)
        counts = np.zeros((n_rows, values.size), np.int64)
        np.add.at(counts, (rows.numpy(), places), 1)
    point = np.arange(values.size)

    def decode(coordinates: Ints) -> tuple[Floats, Floats]:
        return values[coordinates], values[coordinates]

    return lambda row: Intervals(point, point, counts[0], counts[row], decode)
