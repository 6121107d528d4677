"""Steps of one method before the score of another, as papers combine them: ReAct, then GEN."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oodkernels.detectors.activations import LTS, SCALE, top_share
from oodkernels.detectors.base import COMPOUNDS, DETECTORS, OODDetector
from oodkernels.detectors.batch import Batch, joined, present
from oodkernels.detectors.gradients import ODIN
from oodkernels.detectors.head import HeadDetector, floats
from oodkernels.detectors.model import Model, run
from oodkernels.detectors.shaping import ASHB, ASHP, ASHS, DICE, VRA, ReAct
from oodkernels.detectors.specs import DetectorSpec, Option

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["STEPS", "Composed", "spec_of", "split_parts"]

_Shaping = ReAct | VRA | ASHP | ASHB | ASHS | DICE
STEPS: tuple[type[OODDetector], ...] = (ReAct, VRA, ASHP, ASHB, ASHS, DICE, SCALE, LTS, ODIN)
"""What can come before another detector; ODIN first of all."""
_BLOCK = 1 << 20  # numbers of a block's features and logits: some megabytes


class Composed(OODDetector):
    """A detector that scores what a network with other methods' steps in it gives.

    Example:
        >>> Composed([ReAct(percentile=85, head=model.fc), GEN()])
        >>> spec_of("x", "react+gen").make("x", {"react.percentile": 85}, head=model.fc)
        >>> # oodk eval -d react:percentile=85+gen

    A step changes what comes after it: :class:`ReAct`, :class:`VRA`, :class:`ASHP`, :class:`ASHB`
    and :class:`ASHS` the features, :class:`DICE` the head's weights, :class:`SCALE` the features'
    scale, :class:`LTS` that of the logits, :class:`ODIN` the input, in scoring alone. The logits
    are then the head's of the features as they are after the step. What comes after a step is
    fitted to the training data after that step too: where both have something to learn, ``fit``
    goes over the data once for each, and :meth:`partial_fit` is refused.

    Args:
        parts: The steps in their order, and last the detector that scores.
        model: As for :class:`OODDetector`; None for the model of the first part.

    Raises:
        ValueError: There are fewer than two parts, one twice, or a step that is none.
        TypeError: A part is no detector.
    """

    name = "composed"

    def __init__(self, parts: Sequence[OODDetector], *, model: Model | None = None) -> None:
        where = "Composed"
        if wrong := [p for p in parts if not isinstance(p, OODDetector)]:
            raise TypeError(f"{where}: parts must be detectors, got {type(wrong[0]).__name__}")
        names = [part.name for part in parts]
        if len(set(names)) < max(2, len(names)):
            raise ValueError(f"{where}: parts must be two or more, each once, got {names}")
        steps = parts[:-1]
        _check_steps(where, names)
        super().__init__(parts[0].model if model is None else model)
        self.parts = list(parts)
        self.spec = spec_of(where, "+".join(names))  # type: ignore[misc]
        moved = isinstance(parts[0], ODIN)
        rest = steps[1:] if moved else steps
        features = any(not isinstance(step, LTS) for step in rest)
        read = frozenset().union(*(p.needs for p in self.parts if not isinstance(p, ODIN)))
        if features or "features" in read:
            read |= {"features"}
        if rest and not isinstance(rest[0], LTS):
            read -= {"logits"}  # which the head gives
        self.needs = frozenset({"x"}) if moved else read
        learnt = frozenset().union(*(p.trained_on for p in self.parts))
        self.trained_on = learnt and (learnt - {"logits"} | (read - {"x"}))
        self._stage = 0
        self.passes = max(1, len(self.stages))

    @property
    def stages(self) -> list[int]:
        """Parts that are fitted, each in a pass of its own over the training data."""
        return [i for i, part in enumerate(self.parts) if part.trained_on]

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        stages = self.stages
        if self._stage >= len(stages):
            raise ValueError(
                f"{where}: {self.spec.name} is fitted: fit it again to all of the data"
            )
        at = stages[self._stage]
        for step in self.parts[:at]:
            step._ready(where)
            batch = batch if isinstance(step, ODIN) else after(step, batch)
        own = self.parts[at]
        if at and isinstance(own, HeadDetector):
            own._checked = True  # the logits are of a head with steps in it
        own.fit_batch(batch, labels, where=where)

    def _next_pass(self, where: str) -> None:
        self.parts[self.stages[self._stage]]._ready(where)
        self._stage += 1

    def partial_fit(self, **given: Any) -> Self:
        """:meth:`OODDetector.partial_fit`, where one part alone is fitted.

        Raises:
            ValueError: Several are, each to what comes out of those before it; or as there.
        """
        if self.passes > 1:
            raise ValueError(
                f"Composed.partial_fit: {self.spec.name} is fitted in {self.passes} passes over "
                f"the data: fit(data), or give the first part its limit"
            )
        return super().partial_fit(**given)

    def _finish(self, where: str) -> None:
        for part in self.parts:
            part._ready(where)

    def _ready(self, where: str) -> None:
        if self._status == "pending" and self._stage < self.passes - 1:
            raise ValueError(
                f"{where}: {self.spec.name} must be fitted in {self.passes} passes over the data, "
                f"got {self._stage + 1}"
            )
        super()._ready(where)
        for part in self.parts:
            part._ready(where)

    def _check(self, where: str, batch: Batch) -> None:
        if not isinstance(self.parts[0], ODIN):
            self.parts[0]._check(where, batch)

    def _scored(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return batch.once(self, lambda: self._compute(batch))

    def _compute(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        *steps, last = self.parts
        if isinstance(last, HeadDetector):
            last._checked = True
        scores, labels, groups = [], [], []
        widths = [t.shape[1] for t in (batch.features, batch.logits) if t is not None]
        rows = None if torch.compiler.is_compiling() else max(1, _BLOCK // max(widths, default=1))
        for block in batch.chunks(rows if batch.features is not None else None):
            for step in steps:
                block = self._moved(step, block) if isinstance(step, ODIN) else after(step, block)
            scores.append(last._score(block))
            label, group = last._label(block)
            labels.append(label)
            groups.append(group)
        score = present(joined(scores, batch.device))
        return score, joined(labels, batch.device), joined(groups, batch.device)

    def _moved(self, odin: ODIN, batch: Batch) -> Batch:
        """What the model makes of the inputs moved towards their classes."""
        model = present(self.model)
        x, away, _ = odin._away(batch)
        x = x - odin.eps * away
        return Batch.of(x, run(model, x))

    def _score(self, batch: Batch) -> Tensor:
        return self._scored(batch)[0]

    def _label(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        return self._scored(batch)[1:]

    # --- keeping ------------------------------------------------------------------------------

    def _reset(self) -> None:
        super()._reset()
        self._stage = 0
        for part in self.parts:
            if part.trained_on:
                part._reset()

    def to(self, device: torch.device | str | int) -> Self:
        """Move what was fitted; the model is left where it is."""
        for part in self.parts:
            part.to(device)
        return self

    def varied(self, **settings: Any) -> Self:
        """:meth:`OODDetector.varied`, of options such as ``react.percentile``, by keyword."""
        where = "Composed.varied"
        if unknown := settings.keys() - self.spec.options.keys():
            raise ValueError(
                f"{where}: {self.spec.name} has no option {min(unknown)!r}, only "
                f"{', '.join(self.spec.options)}"
            )
        mine = self._arguments()
        changed = {name for name, value in settings.items() if value != mine[name]}
        if self._status != "unfitted" and (bound := changed & self.spec.at_fit):
            raise ValueError(
                f"{where}: {min(bound)} must be {mine[min(bound)]!r}, as in the fit, which depends "
                f"on it: fit another detector"
            )
        parts = [
            part.varied(**{o.partition(".")[2]: v for o, v in settings.items() if _of(part, o)})
            for part in self.parts
        ]
        other = type(self)(parts, model=self.model)
        other._status, other._stage = self._status, self._stage
        return other

    def _arguments(self) -> dict[str, Any]:
        return {f"{p.name}.{k}": v for p in self.parts for k, v in p._arguments().items()}

    def _settings(self) -> dict[str, Any]:
        return {"parts": [[p.name, p._settings()] for p in self.parts]}

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any], model: Model | None) -> Self:
        parts = []
        for name, own in settings["parts"]:
            if name not in DETECTORS:
                raise ValueError(f"there is no detector {str(name)[:80]!r}")
            parts.append(DETECTORS[name]._from_settings(own, model))
        return cls(parts, model=model)

    def _state(self) -> dict[str, Tensor]:
        return {f"{p.name}/{k}": v for p in self.parts for k, v in p._state().items()}

    def _load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for part in self.parts:
            start = f"{part.name}/"
            part._load_state(
                {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
            )
            part._status, part._loaded = "fitted", True
        if extra := [k for k in tensors if k.partition("/")[0] not in {p.name for p in self.parts}]:
            raise ValueError(f"tensors must be of the parts, got {extra[0]!r}")
        self._stage = self.passes

    def __repr__(self) -> str:
        return f"Composed([{', '.join(map(repr, self.parts))}])"


COMPOUNDS["composed"] = Composed


def _of(part: OODDetector, option: str) -> bool:
    return option.partition(".")[0] == part.name


def after(step: OODDetector, batch: Batch) -> Batch:
    """What a network with this step in it gives, of the classes alone.

    Args:
        step: One of :data:`STEPS`, but ODIN.
        batch: Some rows.
    """
    if isinstance(step, LTS):
        features = present(batch.features)
        share = top_share(batch, step.percentile, rectified=True)
        scale = torch.where((features <= 0).all(1), torch.ones_like(share), share).square()
        return Batch(batch.x, scale[:, None] * floats(batch.class_logits(step.absent)), features)
    assert isinstance(step, HeadDetector)
    x = floats(present(batch.features))
    weight, bias = step._linear(batch)
    if isinstance(step, SCALE):
        shaped = x * top_share(batch, step.percentile).exp()[:, None]
    elif isinstance(step, DICE):
        shaped, (weight, bias) = x, step._weights(batch)
    else:
        assert isinstance(step, _Shaping)
        shaped = step._shape_(x.clone())
    with torch.autocast(x.device.type, enabled=False):
        return Batch(batch.x, torch.addmm(bias, shaped, weight.T), shaped)


@dataclass(frozen=True)
class _ComposedSpec(DetectorSpec):
    """The row of a composition: options are ``part.option``."""

    parts: tuple[DetectorSpec, ...] = ()

    @property
    def options(self) -> dict[str, Option]:
        """The parts' options, ``react.percentile``."""
        return {
            f"{part.name}.{name}": option._replace(name=f"{part.name}.{name}")
            for part in self.parts
            for name, option in part.options.items()
        }

    def make(self, where: str, options: Mapping[str, Any] | None = None, **offered: Any) -> Any:
        """Make the composition, arguments as for :meth:`DetectorSpec.make`."""
        given, known = options or {}, self.options
        if unknown := given.keys() - known.keys():
            raise ValueError(
                f"{where}: {self.name} has no option {min(unknown)!r}, only {', '.join(known)}"
            )
        parts = []
        for part in self.parts:
            own = {
                o.partition(".")[2]: v for o, v in given.items() if o.startswith(f"{part.name}.")
            }
            parts.append(part.make(where, own, **offered))
        return Composed(parts, model=offered.get("model"))


def split_parts(text: str) -> list[str]:
    """The parts of a composition as one writes it, each with its settings.

    Args:
        text: ``"react:percentile=85+gen"``; a ``+`` before no detector's name is a part's own.
    """
    names = "|".join(sorted(map(re.escape, DETECTORS), key=len, reverse=True))
    return re.split(rf"\+(?=(?:{names})(?:[:+]|$))", text)


def spec_of(where: str, name: str) -> DetectorSpec:
    """The row of the registry for a name, or of a composition such as ``"react+gen"``.

    Args:
        where: What errors start with.
        name: Of a detector, or of several joined by ``+``, without settings.

    Raises:
        ValueError: There is no such detector, or no such step.
    """
    names = split_parts(name)
    for one in names:
        if one not in DETECTORS:
            raise ValueError(
                f"{where}: there is no detector {one!r}, only {', '.join(sorted(DETECTORS))}"
            )
    specs = tuple(DETECTORS[one].spec for one in names)
    if len(specs) == 1:
        return specs[0]
    _check_steps(where, names)

    def prefixed(found: Callable[[DetectorSpec], Collection[str]]) -> set[str]:
        return {f"{spec.name}.{option}" for spec in specs for option in found(spec)}

    at_fit = prefixed(lambda spec: spec.at_fit & spec.options.keys())
    for i, spec in enumerate(specs):
        if any(later.trained_on for later in specs[i + 1 :]):
            at_fit |= {f"{spec.name}.{option}" for option in spec.options}
    grid = {f"{s.name}.{option}": values for s in specs for option, values in s.grid.items()}
    return _ComposedSpec(
        name,
        Composed,
        specs[-1].family,
        "; ".join(spec.paper for spec in specs),
        grid,
        frozenset(at_fit),
        frozenset(prefixed(lambda spec: spec.at_score)),
        specs,
    )


def _check_steps(where: str, names: Sequence[str]) -> None:
    allowed = {step.name for step in STEPS}
    for i, name in enumerate(names[:-1]):
        if name not in allowed or (name == ODIN.name and i):
            what = "odin must come first" if name == ODIN.name else f"got {name!r}"
            raise ValueError(f"{where}: a step must be one of {', '.join(sorted(allowed))}, {what}")
