"""Sweeps: detectors under many settings, from one walk over the data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from oodkernels._checks import check_int
from oodkernels._digest import StreamDigest
from oodkernels.detectors.base import OODDetector
from oodkernels.detectors.batch import Batch
from oodkernels.detectors.compose import spec_of
from oodkernels.detectors.head import Head, read_head
from oodkernels.detectors.model import Model
from oodkernels.detectors.tuning import Figures, SweptDetector, Tuning, model_digest
from oodkernels.detectors.walk import (
    Alike,
    Data,
    fit_detectors,
    identity,
    parts_of,
    score_part,
    tell_absent,
)
from oodkernels.groups import Groups
from oodkernels.ops import roc_metrics

Grid: TypeAlias = Mapping[str, Mapping[str, Sequence[Any] | str] | None] | Sequence[str]
"""Detector -> option -> values, or "all"; None, or the name alone, for the detector's own grid."""

__all__ = ["NOISE", "Grid", "sweep"]

NOISE = "noise"
_ID, _TRAIN = "ID", "train"
_ROLES = frozenset({"features", "logits", "labels", "confidence", "scores"})
_ROWS = 4096  # of data that come in one piece


def sweep(
    grid: Grid,
    *,
    id: Data,
    ood_val: Mapping[str, Data] | str,
    train: Data | None = None,
    model: Model | None = None,
    head: Head | None = None,
    groups: Groups | None = None,
    by: Literal["auroc", "fpr95"] = "auroc",
    seed: int = 0,
    on_batch: Callable[[str, int], None] = lambda name, samples: None,
) -> Tuning:
    """Detectors under every setting of a grid, and for each the best one on validation data.

    Training data are read once, and validation data once, for all detectors and settings. What
    settings share is computed once: one scan of the bank for every k of :class:`KNN`, one
    projection for every ``dim`` of :class:`ViM`, one sort of the row for every percentile of
    :class:`SCALE`, one gradient for every step of :class:`ODIN`; the others are scored one after
    another within the same walk. Settings are never chosen on test sets: what was chosen on is
    kept, and an evaluation on the same data is refused.

    Example:
        >>> found = sweep(
        ...     {"scale": {"percentile": [80, 85, 90]}, "vim": {"dim": "all"}, "knn": None},
        ...     id=val_loader, ood_val={"textures": textures}, train=train_loader, model=model,
        ... )
        >>> print(found)
        >>> found.save("tuned.json")                      # oodk eval --tuned tuned.json
        >>> found.fitted["scale"].score(x)

    Args:
        grid: Detector -> option -> values to try, every combination of them, or "all" for every
            dimension of :class:`ViM`, :class:`Residual` and :class:`NECO`. In place of the
            options None for the grid of the detector's registration, of which settings that the
            detector refuses are left out, and its defaults are taken where all are; a sequence of
            names for nothing but these.
        id: ID validation samples: batches as for :func:`oodkernels.evaluate`, or a mapping of
            tensors ``logits``, ``features``.
        ood_val: Name -> OOD validation samples, the same way. Or ``"noise"``: the ID samples with
            every column of what they hold shuffled over the batch by itself, so that each keeps
            its distribution and what ties them is lost; logits are then the head's.
        train: Training samples with labels, for detectors that are fitted.
        model: What is run on the data; None where they hold logits and features.
        head: The layer between features and logits, where it is not the model's.
        groups: Of a MOS head.
        by: What is chosen by: the highest mean AUROC or the lowest mean FPR95 over ``ood_val``.
        seed: Of the noise.
        on_batch: Told the data set and the number of its samples done.

    Returns:
        A :class:`Tuning`.

    Raises:
        ValueError: A detector, an option or a value is unknown or refused, training data are
            needed and missing, a data set is empty, or as :func:`oodkernels.evaluate`.
        TypeError: A batch is of no form that :func:`oodkernels.evaluate` takes.
    """
    where = "sweep"
    if by not in Figures._fields:
        raise ValueError(f"{where}: by must be one of {', '.join(Figures._fields)}, got {by!r}")
    asked = dict.fromkeys(grid) if not isinstance(grid, Mapping) else dict(grid)
    if not asked:
        raise ValueError(f"{where}: grid must name at least one detector, got none")
    sets = {_ID: id, **_validation(where, id, ood_val, head, model, seed)}
    families = [
        _Family(where, name, options, {"groups": groups, "model": model, "head": head})
        for name, options in asked.items()
    ]
    seen = {name: StreamDigest() for name in sets}
    if any(base.trained_on for family in families for base, _ in family.bases):
        if train is None:
            needy = [f.name for f in families if any(b.trained_on for b, _ in f.bases)]
            raise ValueError(f"{where}: train must be given for {', '.join(needy)}")
        seen[_TRAIN] = StreamDigest()
        bases = [base for family in families for base, _ in family.bases]
        fit_detectors(where, bases, _in_pieces(train), model, seen[_TRAIN])
    swept = {family.name: family.swept(where) for family in families}
    scores = _scores(where, sets, swept, model, seen, on_batch)
    detectors = {}
    for family in families:
        own = swept[family.name]
        figures = {
            name: _figures(scores[_ID][family.name], found[family.name])
            for name, found in scores.items()
            if name != _ID
        }
        fitted = any(base.trained_on for base, _ in family.bases)
        result = SweptDetector(own.settings, figures, 0, family.left_out, fitted)
        order = [f.auroc if by == "auroc" else -f.fpr95 for f in result.mean]
        best = max(range(len(order)), key=order.__getitem__)
        detectors[family.name] = SweptDetector(own.settings, figures, best, family.left_out, fitted)
    names = [f"{name} ({seen[name].count})" for name in sets if name != _ID]
    if isinstance(ood_val, str):
        words = f"noise of the ID samples: their columns shuffled, seed {seed}"
    else:
        words = f"validation OOD {', '.join(names)}"
    return Tuning(
        detectors,
        by,
        words,
        {name: found.count for name, found in seen.items()},
        {name: found.found() for name, found in seen.items()},
        model_digest(model, head),
        {name: swept[name].chosen(where, found.chosen) for name, found in detectors.items()},
    )


class _Family:
    """A detector's settings, by what the pass over the training data has to be made for anew.

    Attributes:
        bases: Detectors to be fitted, each with the settings that it serves.
        left_out: Settings of its own grid that the detector refuses, in words.
    """

    def __init__(
        self,
        where: str,
        name: str,
        options: Mapping[str, Sequence[Any] | str] | None,
        offered: Mapping[str, Any],
    ) -> None:
        spec = spec_of(where, name)
        self.name, self.own = name, options is None
        self.left_out: list[str] = []
        given: Mapping[str, Any] = spec.grid if options is None else options
        self.every = [option for option, values in given.items() if _is_all(values)]
        lists = {o: _values(where, name, o, v) for o, v in given.items() if o not in self.every}
        settings = [
            dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())
        ]
        self.bases: list[tuple[OODDetector, list[dict[str, Any]]]] = []
        groups: dict[str, list[dict[str, Any]]] = {}
        fresh = []
        for setting in settings:
            try:
                made = spec.make(where, setting, **offered)
            except (TypeError, ValueError) as error:
                if not self.own:
                    raise
                self._leave_out(setting, error)
                continue
            fresh.append(made)
            bound = {o: v for o, v in setting.items() if o in spec.at_fit}
            groups.setdefault(repr(bound), []).append(setting)
        for group in groups.values():
            bound = {o: v for o, v in group[0].items() if o in spec.at_fit}
            base = spec.make(where, bound, **offered)
            if base.trained_on and not any(made.trained_on for made in fresh):
                base = spec.make(where, group[0], **offered)
            self.bases.append((base, group))

    def _leave_out(self, setting: Mapping[str, Any], error: Exception) -> None:
        shown = ", ".join(f"{k}={v}" for k, v in setting.items())
        self.left_out.append(f"{shown}: {' '.join(str(error).split())}")

    def swept(self, where: str) -> _Swept:
        """What scores all settings, once the bases are fitted."""
        parts = []
        for i, (base, settings) in enumerate(self.bases):
            base = _ready(where, base, settings)
            self.bases[i] = base, settings
            for option in self.every:
                values = base._every(option)
                if values is None:
                    raise ValueError(
                        f"{where}: {option} of {self.name} must be a list of values, got 'all'"
                    )
                settings = [{**one, option: value} for one in settings for value in values]
            if self.own:
                settings = [one for one in settings if self._accepted(where, base, one)]
            if settings:
                parts.append((base, settings))
        if not parts:  # of its own grid: the defaults
            parts = [(self.bases[0][0], [{}])]
        return _Swept(where, self.name, parts)

    def _accepted(self, where: str, base: OODDetector, setting: Mapping[str, Any]) -> bool:
        try:
            base.varied(**setting)
        except ValueError as error:
            self._leave_out(setting, error)
            return False
        return True


def _ready(where: str, base: OODDetector, settings: Sequence[Mapping[str, Any]]) -> OODDetector:
    """The detector with its fit finished: with its defaults, or the first setting that it takes."""
    for setting in ({}, *settings):
        try:
            found = base.varied(**setting) if setting else base
            found._ready(where)
            return found
        except ValueError as error:
            last = error
    raise last


class _Swept(OODDetector):
    """A detector under several settings: (N, settings) scores."""

    def __init__(
        self, where: str, name: str, parts: Sequence[tuple[OODDetector, Sequence[dict[str, Any]]]]
    ) -> None:
        first = parts[0][0]
        super().__init__(first.model, first.absent)
        self.name = name  # type: ignore[misc]
        self.parts = parts
        self.settings = [dict(one) for _, settings in parts for one in settings]
        self.bases = [base for base, _ in parts]
        self.batch_size = min(base.batch_size for base in self.bases)
        self.layers = tuple(dict.fromkeys(layer for base in self.bases for layer in base.layers))
        kinds = [
            base.spec.make(where, {**base._arguments(), **one}, model=base.model)
            for base, settings in parts
            for one in settings[:64]
        ]
        self.needs = frozenset().union(*(kind.needs for kind in kinds))
        self._scorers = [base._scorer(where, settings) for base, settings in parts]

    def _check(self, where: str, batch: Batch) -> None:
        for base in self.bases:
            base._check(where, batch)

    def _score(self, batch: Batch) -> Tensor:
        return torch.cat([scorer(batch) for scorer in self._scorers], 1)

    def chosen(self, where: str, index: int) -> OODDetector:
        """The detector with one of the settings."""
        for base, settings in self.parts:
            if index < len(settings):
                found = base.varied(**settings[index])
                found._ready(where)
                return found
            index -= len(settings)
        raise IndexError


def _is_all(values: Any) -> bool:
    return isinstance(values, str) and values == "all"


def _values(where: str, name: str, option: str, values: Any) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
        raise ValueError(
            f"{where}: {option} of {name} must be a list of values to try, got {values!r}"
        )
    return list(values)


def _validation(
    where: str,
    id: Data,
    ood_val: Any,
    head: Head | None,
    model: Model | None,
    seed: int,
) -> dict[str, Data]:
    if isinstance(ood_val, str):
        if ood_val != NOISE:
            raise ValueError(f"{where}: ood_val must be sets by name or 'noise', got {ood_val!r}")
        return {
            NOISE: _Noise(
                where, id, head if model is None else None, check_int(where, "seed", seed)
            )
        }
    if not isinstance(ood_val, Mapping) or not ood_val or ood_val.keys() & _ROLES:
        got = sorted(map(str, ood_val)) if isinstance(ood_val, Mapping) else type(ood_val).__name__
        raise ValueError(f"{where}: ood_val must be sets by name, {{'name': data}}, got {got}")
    if wrong := ood_val.keys() & {_ID, _TRAIN, ""}:
        raise ValueError(f"{where}: an OOD set cannot be called {min(wrong)!r}")
    return dict(ood_val)


def _in_pieces(data: Data) -> Data:
    """Data that come as one mapping of tensors, some rows at a time."""
    if not isinstance(data, Mapping):
        return data
    size = max((len(t) for t in data.values() if isinstance(t, Tensor)), default=0)
    rows = [slice(i, i + _ROWS) for i in range(0, max(1, size), _ROWS)]
    return [{name: t[some] for name, t in data.items()} for some in rows]


class _Noise:
    """ID samples of which every column is shuffled over the batch by itself, without labels."""

    def __init__(self, where: str, data: Data, head: Head | None, seed: int) -> None:
        self.where, self.data, self.seed = where, data, seed
        self.head = None if head is None else read_head(where, head)

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self.seed)
        data = _in_pieces(self.data)
        for item in [data] if isinstance(data, Tensor) else data:
            first = item[0] if isinstance(item, (tuple, list)) else item
            if not isinstance(first, Mapping):
                if len(first) > 1:
                    yield _shuffled(first, generator)
                continue
            found = {k: t for k, t in first.items() if k in ("logits", "features", "confidence")}
            if not found or len(next(iter(found.values()))) < 2:
                continue
            if "features" in found and "logits" in found:
                if self.head is None:
                    raise ValueError(
                        f"{self.where}: ood_val='noise' needs head where there are features and "
                        f"logits, so that both stay of one sample; or name OOD sets"
                    )
                features = _shuffled(found["features"], generator)
                weight, bias = (t.to(features) for t in self.head)
                yield {"features": features, "logits": features @ weight.T + bias}
                continue
            yield {name: _shuffled(t, generator) for name, t in found.items()}


def _shuffled(x: Tensor, generator: torch.Generator) -> Tensor:
    flat = x.reshape(len(x), -1)
    order = torch.rand(flat.shape, generator=generator).argsort(0).to(x.device)
    return flat.gather(0, order).reshape(x.shape)


def _scores(
    where: str,
    sets: Mapping[str, Data],
    swept: Mapping[str, _Swept],
    model: Model | None,
    seen: Mapping[str, StreamDigest],
    on_batch: Callable[[str, int], None],
) -> dict[str, dict[str, Tensor]]:
    """Data set -> detector -> (N, settings) scores."""
    alike, found = Alike(where), {}
    for name, data in sets.items():
        source, kept = str(getattr(data, "name", name)), {n: [] for n in swept}  # type: ignore[var-annotated]
        for part in parts_of(where, model, _in_pieces(data), swept):
            if model is None and part.batch.logits is not None:
                part.batch.absent = getattr(data, "absent_column", None)
            tell_absent(where, swept, part.batch)
            scores = score_part(where, swept, part, source, seen[name].count)
            alike.check(source, part.batch, scores)
            seen[name].add(**identity(part))
            for n, values in kept.items():
                values.append(scores[n])
            on_batch(name, seen[name].count)
        if not seen[name].count:
            raise ValueError(f"{where}: {source} has no samples")
        found[name] = {n: torch.cat(values) for n, values in kept.items()}
    return found


def _figures(inside: Tensor, outside: Tensor) -> list[Figures]:
    dtype = torch.promote_types(inside.dtype, outside.dtype)
    pairs = zip(inside.to(dtype).unbind(1), outside.to(dtype).unbind(1), strict=True)
    found = [roc_metrics(a, b) for a, b in pairs]
    return [Figures(float(f.auroc), float(f.fpr_at_tpr)) for f in found]
