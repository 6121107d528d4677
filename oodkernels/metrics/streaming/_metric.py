"""What metrics of a stream of scores share: the state as torchmetrics wants it."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from oodkernels._checks import check_flag, check_tpr, plain
from oodkernels.metrics.ood import FIGURES, ood_metrics
from oodkernels.metrics.plots import draw_roc, new_axes
from oodkernels.metrics.streaming._bounds import Bounded, Intervals, curves, figures
from oodkernels.metrics.streaming._sketch import Layout
from oodkernels.metrics.streaming._state import (
    PENDING,
    STATES,
    UNNAMED,
    Pace,
    StreamState,
    encoded,
    state_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_SETS_PLANNED = 254


class SyncedMetric(Metric):  # type: ignore[misc, unused-ignore]
    """A metric that is its own process's again whatever is raised while it is synced."""

    is_differentiable = False
    full_state_update = False

    @contextmanager
    def sync_context(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any = None,
        should_sync: bool = True,
        should_unsync: bool = True,
        distributed_available: Callable[..., bool] | None = None,
    ) -> Iterator[None]:
        """States of all processes within; as torchmetrics has it."""
        self.sync(dist_sync_fn, process_group, should_sync, distributed_available)
        try:
            yield
        finally:
            self.unsync(should_unsync=self._is_synced and should_unsync)

    def _synced(self) -> AbstractContextManager[None]:
        return self.sync_context(
            self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        )


class StreamMetric(SyncedMetric):
    """A metric of scores in rows, row 0 against each other one, in memory that does not grow."""

    argument: ClassVar[str] = "scores"
    """What errors call the scores."""

    names: Tensor
    settings: Tensor
    pending_scores: list[Tensor]

    def __init__(
        self,
        *,
        exact: bool,
        memory: int | str,
        sets: int,
        tpr: float,
        names: tuple[str, ...] = (),
        settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        where = type(self).__name__
        self.tpr = check_tpr(where, tpr)
        self.exact = check_flag(where, "exact", exact)
        self.memory = _parse_bytes(where, memory)
        self.sets = plain(sets)
        if type(self.sets) is not int or not 1 <= self.sets <= _MOST_SETS_PLANNED:
            raise ValueError(f"{where}: sets must be in 1..{_MOST_SETS_PLANNED}, got {sets}")
        # Nine bytes a pending score: up to eight of its own, and its row.
        aside = 9 * PENDING
        self._layout = None if self.exact else Layout.of(self.memory, self.sets + 1, where, aside)
        self._kwargs = kwargs
        self._pace = Pace()
        empty = StreamState(self._layout, self.sets, names=encoded(list(names)))
        for name in STATES:
            self.add_state(name, getattr(empty, name))
        # Metrics of one collection share a state where theirs are equal after the first batch. With
        # other settings they take the next one in differently.
        self._settings = {"exact": self.exact, **(settings or {})}
        ours = json.dumps({**self._settings, "memory": self.memory, "sets": self.sets})
        self.add_state("settings", torch.tensor(list(ours.encode()), dtype=torch.uint8))

    def _state(self) -> StreamState:
        states = {name: getattr(self, name) for name in STATES}
        return StreamState(self._layout, self.sets, self._pace, **states)

    def _keep(self, state: StreamState) -> None:
        for name in STATES:
            if getattr(self, name) is not (value := getattr(state, name)):
                setattr(self, name, value)  # which takes a module a while

    def _add(self, state: StreamState, scores: Tensor, rows: Tensor | int, where: str) -> None:
        """Take in scores, (n,), of the rows of a state, which is this metric's from then on."""
        try:
            state.add(scores, rows, where, self.argument)
        except ValueError:
            state.names = self.names
            raise
        finally:
            self._keep(state)

    @property
    def state_bytes(self) -> int:
        """Size of the state now."""
        states = [getattr(self, name) for name in self._defaults if name != "settings"]
        return sum(sum(t.nbytes for t in s) if isinstance(s, list) else s.nbytes for s in states)

    # --- torchmetrics -------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """:meth:`update`, and the figures of this batch alone: NaN where it lacks a side."""
        name = type(self).__name__
        if self._is_synced:
            raise RuntimeError(f"{name}: forward of a synced metric; unsync it first")
        self.update(*args, **kwargs)
        batch = self._for_batch().to(self.device)
        batch._to_sync = self.dist_sync_on_step
        batch.update(*args, **kwargs)
        with batch._synced():
            result = batch._result(f"{name}.forward", allow_empty=True)
        self._forward_cache: Any = result
        self._computed: Any = None
        return result

    def _for_batch(self) -> StreamMetric:
        """Another of this kind that keeps all scores."""
        raise NotImplementedError

    def _result(self, where: str, *, allow_empty: bool) -> Any:
        raise NotImplementedError

    def merge_state(self, incoming_state: Mapping[str, Any] | Metric) -> None:
        """Take in what another metric has seen: the metric, or its ``metric_state``.

        Raises:
            ValueError: It is neither, keeps scores where this one does not or the reverse, or both
                have seen 2^62 scores or more.
        """
        name = type(self).__name__
        state: Mapping[str, Any]
        if isinstance(incoming_state, type(self)):
            updates, state = incoming_state._update_count, incoming_state.metric_state
        elif isinstance(incoming_state, Mapping) and incoming_state.keys() >= self._defaults.keys():
            updates, state = 1, incoming_state
        else:
            raise ValueError(
                f"{name}: a state must be {'an' if name[0] in 'AEIOU' else 'a'} {name} or a dict "
                f"of its states, got {type(incoming_state).__name__}"
            )
        self._merge(state)
        self._update_count += updates
        self._computed = None

    def _merge(self, state: Mapping[str, Any]) -> None:
        where = f"{type(self).__name__}.merge_state"
        self._check_settings(where, state["settings"])
        own = self._state()
        own.merge(state_of(state), where)
        self._keep(own)

    def _check_settings(self, where: str, settings: Tensor) -> None:
        """Refuse a state that another metric would have made of the same scores."""
        theirs = json.loads(settings.cpu().numpy().tobytes())
        if theirs["exact"] != self.exact:
            raise ValueError(f"{type(self).__name__}: an exact metric merges with exact ones only")
        for name, ours in self._settings.items():
            if theirs[name] != ours:
                raise ValueError(
                    f"{where}: incoming_state must have the {name} {ours}, got {theirs[name]}"
                )

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None
    ) -> None:
        buffer = io.BytesIO()
        torch.save(self.metric_state, buffer)
        packed = torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)
        gathered = dist_sync_fn(packed.to(self.device), group=process_group or self.process_group)
        own = self.metric_state
        for name, default in self._defaults.items():
            kept = default.clone().to(self.device) if isinstance(default, Tensor) else None
            setattr(self, name, [] if kept is None else kept)
        self._names_to_host()
        try:
            for data in gathered:
                file = io.BytesIO(data.cpu().numpy().tobytes())
                self._merge(torch.load(file, map_location="cpu", weights_only=True))
        except ValueError:
            for name, value in own.items():
                setattr(self, name, value)
            raise

    def _names_to_host(self) -> None:
        # Where reading them waits for no device.
        self.names = self.names.cpu()

    def _apply(self, fn: Callable[..., Any], exclude_state: Any = ()) -> StreamMetric:
        super()._apply(fn, exclude_state=(*exclude_state, "names"))
        return self

    def set_dtype(self, dst_type: str | torch.dtype) -> StreamMetric:
        """Do nothing: counts stay integers and sums float64."""
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if (settings := state_dict.pop(f"{prefix}settings", None)) is not None:
            self._check_settings(f"{type(self).__name__}.load_state_dict", settings)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._names_to_host()
        self._computed = None
        if self._state().binned or self.pending_scores:
            self._update_count = max(1, self._update_count)

    def reset(self) -> None:
        """Forget all scores, and the names of the sets."""
        super().reset()
        self._names_to_host()
        self._pace = Pace()

    # --- figures ------------------------------------------------------------------------------

    def _sides(self, where: str) -> dict[str, tuple[int, Intervals]]:
        return self._state().sides(where, self.argument)

    def _figures(self, row: int, side: Intervals) -> dict[str, Bounded]:
        if not side.n_id.any() or not side.n_ood.any():
            return dict.fromkeys(FIGURES, Bounded(math.nan, math.nan, math.nan))
        state = self._state()
        if state.binned or (pending := state.pending()) is None:
            return figures(side, self.tpr)
        scores, rows = pending
        exact = ood_metrics(scores[rows == 0], {"": scores[rows == row]}, tpr=self.tpr)[""]
        return {name: Bounded(v, v, v) for name in FIGURES for v in [getattr(exact, name)]}

    def _draw(
        self, where: str, sides: Mapping[str, tuple[int, Intervals]], ax: Axes | None
    ) -> tuple[Figure, Axes]:
        """ROC curves over the bands in which they lie."""
        drawn = {}
        for name, (row, side) in sides.items():
            auroc = self._figures(row, side)["auroc"]
            digits = f"AUROC {auroc.estimate:.4f}"
            if auroc.lower < auroc.upper:
                digits += f" \N{PLUS-MINUS SIGN} {(auroc.upper - auroc.lower) / 2:.0e}"
            label = digits if name == UNNAMED else f"{name}: {digits}"
            outer, middle, inner = curves(side)
            drawn[label] = middle, np.concatenate((outer, inner[:, ::-1]), 1)
        return draw_roc(drawn, self.tpr, new_axes(where) if ax is None else ax)


def _parse_bytes(where: str, memory: Any) -> int:
    memory = plain(memory)
    if isinstance(memory, int) and not isinstance(memory, bool):
        return memory
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)(i?)b?\s*", str(memory), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{where}: memory must be a size such as '16MiB', got {memory!r}")
    number, unit, binary = match.groups()
    power = " kmg".index(unit.lower()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)
