"""Several detectors, or one at several layers, as one score."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from oodkernels.detectors.base import COMPOUNDS, DETECTORS, NotFittedError, OODDetector
from oodkernels.detectors.batch import Batch, Features, as_batch, check_kept, present
from oodkernels.detectors.compose import Composed
from oodkernels.detectors.model import Model, positions_mean
from oodkernels.detectors.passes import completed

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Ensemble", "LayerEnsemble"]

Rule = Literal["mean", "standardised", "fisher"]
_RULES = ("mean", "standardised", "fisher")


class _Combined(OODDetector):
    """Scores of several members put together."""

    reference: Tensor | None = None

    def __init__(
        self, members: Sequence[OODDetector], rule: Rule, model: Model | None = None
    ) -> None:
        where = type(self).__name__
        if rule not in _RULES:
            raise ValueError(f"{where}: rule must be one of {', '.join(_RULES)}, got {rule!r}")
        if wrong := [m for m in members if not isinstance(m, OODDetector)]:
            raise TypeError(f"{where}: members must be detectors, got {type(wrong[0]).__name__}")
        if not members:
            raise ValueError(f"{where}: there must be at least one member, got none")
        super().__init__(model)
        self.members, self.rule = list(members), rule
        self.trained_on = frozenset().union(*(m.trained_on for m in members))
        self.passes = max(m.passes for m in members)
        self._pass = 0

    def fit_reference(
        self,
        x: Tensor | None = None,
        *,
        logits: Tensor | None = None,
        features: Features | None = None,
    ) -> Self:
        """Learn what the members' scores of ID samples are like, for all rules but the mean.

        Args:
            x: ID samples that neither model nor members were trained on; as for :meth:`score`.
            logits: As there.
            features: As there.

        Returns:
            The ensemble, without its threshold.

        Raises:
            ValueError: There are fewer than two samples, or as :meth:`score`.
            NotFittedError: A member has not been fitted.
        """
        where = f"{type(self).__name__}.fit_reference"
        batch = as_batch(where, x, logits, features)
        found = []
        with torch.no_grad():
            for part in batch.chunks(None if batch.x is None else self.batch_size):
                (own,) = completed(where, [self], part)
                found.append(self._of_members(own))
        scores = torch.cat(found)
        if len(scores) < 2 or not scores.isfinite().all():
            raise ValueError(
                f"{where}: there must be at least two samples, of finite scores, got {len(scores)}"
            )
        if self.rule == "standardised" and not (scores.std(0) > 0).all():
            raise ValueError(f"{where}: scores of every member must differ, got equal ones")
        self.reference = scores.double().sort(0).values
        self.threshold = None  # it was of other scores
        return self

    def _own(self, member: int, batch: Batch) -> Batch:
        """What a member reads of a batch."""
        return batch

    def _of_members(self, batch: Batch) -> Tensor:
        """The members' scores, (N, members)."""
        found = [m._score(self._own(i, batch)) for i, m in enumerate(self.members)]
        kind = max((s.dtype for s in found), key=lambda dtype: dtype.itemsize)
        return torch.stack([s.to(kind) for s in found], 1)

    def _score(self, batch: Batch) -> Tensor:
        scores = self._of_members(batch)
        if self.rule == "mean":
            return scores.mean(1)
        if self.reference is None:
            raise NotFittedError(
                f"{type(self).__name__}.score: fit_reference must come first: with held-out ID "
                f"samples, for rule={self.rule!r}"
            )
        known = self.reference.to(scores.device)
        if self.rule == "standardised":
            standard = (scores.double() - known.mean(0)) / known.std(0, correction=0)
            return standard.mean(1).to(scores.dtype)
        # As conformal p-values have it, (1 + scores at or below) / (n + 1): never 0.
        below = torch.searchsorted(known.T.contiguous(), scores.double().T.contiguous(), right=True)
        p = (1 + below.double().T) / (len(known) + 1)
        found = 2 * p.log().sum(1)
        return torch.where(scores.isnan().any(1), torch.nan, found).to(scores.dtype)

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        for i, member in enumerate(self.members):
            if member.passes > self._pass:
                member.fit_batch(self._own(i, batch), labels, where=where)
        self.reference = None

    def _next_pass(self, where: str) -> None:
        for member in self.members:
            if member.passes > self._pass + 1:
                member._next_pass(where)
        self._pass += 1

    def _ready(self, where: str) -> None:
        for member in self.members:  # which may have been fitted by themselves
            member._ready(where)
        self._status = "fitted"

    def _reset(self) -> None:
        super()._reset()
        self._pass, self.reference = 0, None
        for member in self.members:
            if member.trained_on:
                member._reset()

    def to(self, device: torch.device | str | int) -> Self:
        """Move what was fitted; the model is left where it is."""
        for member in self.members:
            member.to(device)
        return self

    def _state(self) -> dict[str, Tensor]:
        found = {f"{i}/{k}": v for i, m in enumerate(self.members) for k, v in m._state().items()}
        return found if self.reference is None else {**found, "reference": self.reference}

    def _load_state(self, tensors: Mapping[str, Tensor]) -> None:
        rest = dict(tensors)
        for i, member in enumerate(self.members):
            own = [name for name in rest if name.startswith(f"{i}/")]
            member._load_state({name.partition("/")[2]: rest.pop(name) for name in own})
            member._status, member._loaded = "fitted", True
        self.reference = rest.pop("reference", None)
        if rest:
            raise ValueError(f"tensors must be of the members, got {min(rest)!r}")
        if self.reference is not None:
            check_kept("reference", self.reference)
            if self.reference.dim() != 2 or self.reference.shape[1] != len(self.members):
                raise ValueError(
                    f"reference must be (n, {len(self.members)}), got {tuple(self.reference.shape)}"
                )

    def _settings(self) -> dict[str, Any]:
        members = [[member.name, member._settings()] for member in self.members]
        return {"members": members, "rule": self.rule}

    def _plain_settings(self) -> dict[str, Any]:
        return self._settings()


class Ensemble(_Combined):
    """Scores of several detectors as one.

    Detectors of one model read what they need from one run of it; detectors of several models, a
    deep ensemble, are members with models of their own that share nothing but ``x``.

    Args:
        members: The detectors; ``fit`` fits those that are fitted, from the same passes.
        rule: ``"mean"`` of the scores as they are. ``"standardised"``: the mean of each score less
            its mean over held-out ID samples, over its standard deviation there. ``"fisher"``:
            Fisher's method, 2 sum_i log p_i, where p_i is the share of held-out ID samples that
            score no higher, (1 + their number) / (n + 1); members of any scale weigh the same.
            The last two need :meth:`fit_reference`.
        model: As for :class:`OODDetector`.

    Raises:
        ValueError: There is no member, or ``rule`` is none of these.
        TypeError: A member is no detector.
    """

    name = "ensemble"

    def __init__(
        self,
        members: Sequence[OODDetector],
        rule: Rule = "standardised",
        *,
        model: Model | None = None,
    ) -> None:
        found = [m.model for m in members if isinstance(m, OODDetector) and m.model is not None]
        super().__init__(members, rule, found[0] if model is None and found else model)
        own = [m for m in members if m.model is not None and m.model is not self.model]
        self._apart = bool(own)
        self.layers = tuple(dict.fromkeys(layer for m in members for layer in m.layers))
        self.needs = frozenset({"x"} if own else ()).union(*(m.needs for m in members))
        if own:  # each runs its own model on x
            self.needs = frozenset({"x"})

    def _check(self, where: str, batch: Batch) -> None:
        for member in () if self._apart else self.members:
            member._check(where, batch)

    def _own(self, member: int, batch: Batch) -> Batch:
        if not self._apart:
            return batch
        (own,) = completed(type(self).__name__, [self.members[member]], Batch(batch.x))
        return own

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        if self._apart and self.trained_on:
            raise ValueError(
                f"{where}: members with models of their own must be fitted by themselves, before"
            )
        super()._update(where, batch, labels)

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any], model: Model | None) -> Self:
        members = [_made(name, own, model) for name, own in settings["members"]]
        return cls(members, settings["rule"], model=model)

    def __repr__(self) -> str:
        return f"Ensemble([{', '.join(map(repr, self.members))}], rule={self.rule!r})"


class LayerEnsemble(_Combined):
    """One detector at several layers of a model, as one score.

    Each layer has a detector of its own, fitted to its features: outputs of more than two axes are
    averaged over the positions.

    Args:
        detector: Of features alone, such as :class:`KNN` or :class:`Mahalanobis`; copied for each
            layer.
        layers: Names of layers, as in ``model.named_modules()``.
        rule: As for :class:`Ensemble`.
        axis: Axis of the features in the layers' outputs, where these have more than two axes and
            the model's modules do not tell.
        model: As for :class:`OODDetector`.

    Raises:
        ValueError: There is no layer, one twice, the detector reads more than features, or
            ``rule`` is none of these.
        TypeError: ``detector`` is none.
    """

    name = "layer-ensemble"
    needs = frozenset({"features"})

    def __init__(
        self,
        detector: OODDetector,
        layers: Sequence[str],
        rule: Rule = "standardised",
        axis: int | None = None,
        *,
        model: Model | None = None,
    ) -> None:
        layers = (layers,) if isinstance(layers, str) else tuple(layers)
        if len(set(layers)) < len(layers):
            raise ValueError(f"LayerEnsemble: layers must be named once each, got {layers}")
        if isinstance(detector, OODDetector) and (
            detector.needs != {"features"} or detector.layers or "logits" in detector.trained_on
        ):
            raise ValueError(
                f"LayerEnsemble: detector must read features alone, got {detector.name}, which "
                f"reads {', '.join(sorted(detector.needs | detector.trained_on))}"
            )
        super().__init__([copy.deepcopy(detector) for _ in layers], rule, model)
        self.layers, self.axis = layers, axis

    def _own(self, member: int, batch: Batch) -> Batch:
        layer = self.layers[member]
        axis = batch.axes.get(layer) if self.axis is None else self.axis
        what = f"layer {layer!r}"
        features = positions_mean("LayerEnsemble", what, present(batch.layers[layer]), axis)
        found = Batch(features=features)
        self.members[member]._check(f"LayerEnsemble: {what}", found)
        return batch.once((self, layer), lambda: found)

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any], model: Model | None) -> Self:
        (name, own), *_ = settings["members"]
        return cls(
            _made(name, own, None),
            settings["layers"],
            settings["rule"],
            settings["axis"],
            model=model,
        )

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "layers": list(self.layers), "axis": self.axis}

    def __repr__(self) -> str:
        return f"LayerEnsemble({self.members[0]!r}, {list(self.layers)}, rule={self.rule!r})"


COMPOUNDS["ensemble"] = Ensemble
COMPOUNDS["layer-ensemble"] = LayerEnsemble


def _made(name: str, settings: Mapping[str, Any], model: Model | None) -> OODDetector:
    known: dict[str, type[Any]] = {**DETECTORS, Composed.name: Composed}
    if name not in known:
        raise ValueError(f"there is no detector {str(name)[:80]!r}")
    found: OODDetector = known[name]._from_settings(settings, model)
    return found
