"""What the registry knows of a detector: what it reads, its options, where it comes from."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

__all__ = ["FAMILIES", "DetectorSpec", "Option"]

FAMILIES: Mapping[str, str] = {
    "A": "logits, or the logit of a confidence",
    "B": "features and logits",
    "C": "shaped features, then the head",
    "D": "class means and covariances of features",
    "E": "a bank of training features",
    "F": "the model itself: its inputs, gradients or layers",
}
"""What the detectors of a family read, and share when they score together."""

_GIVEN = ("head", "model", "texts")  # arguments that are no settings
REQUIRED: Any = inspect.Parameter.empty


class Option(NamedTuple):
    """An argument of a detector's constructor."""

    name: str
    kind: Any
    """Its type, as annotated."""
    default: Any
    """``REQUIRED`` if it must be given."""

    @property
    def type_name(self) -> str:
        """The type as one writes it."""
        if isinstance(self.kind, type) and not get_args(self.kind):
            return self.kind.__name__
        return str(self.kind).replace("typing.", "").replace("collections.abc.", "")

    def read(self, where: str, text: str) -> Any:
        """The value that a text stands for: ``none``, numbers, true or false; a + b for several.

        Raises:
            ValueError: It stands for none of the option's type, or no text does.
        """
        for kind in _alternatives(self.kind):
            try:
                return _read(kind, text)
            except (KeyError, ValueError):
                continue
        raise ValueError(f"{where}: {self.name} must be {self.type_name}, got {text!r}")


@dataclass(frozen=True)
class DetectorSpec:
    """A row of the registry.

    Attributes:
        name: Short name, for the command line and in files.
        detector: The class.
        family: A key of :data:`FAMILIES`.
        paper: Authors, venue and year.
        grid: Option -> values that a sweep tries where it is not told any.
        at_fit: Options on which the pass over the training data depends.
        at_score: Options that matter in scoring alone.
    """

    name: str
    detector: type[Any]
    family: str
    paper: str
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    at_fit: frozenset[str] = frozenset({"absent"})
    at_score: frozenset[str] = frozenset()

    @property
    def needs(self) -> frozenset[str]:
        """What ``score`` reads."""
        found: frozenset[str] = self.detector.needs
        return found

    @property
    def trained_on(self) -> frozenset[str]:
        """What ``fit`` reads; empty where there is none."""
        found: frozenset[str] = self.detector.trained_on
        return found

    @property
    def summary(self) -> str:
        """The first line of the class's description, as plain text."""
        first = (self.detector.__doc__ or "").splitlines()[0]
        return re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"\1", first)

    @property
    def options(self) -> dict[str, Option]:
        """The constructor's arguments but for model and head, by name, in their order."""
        hints = get_type_hints(self.detector.__init__)
        parameters = inspect.signature(self.detector).parameters.values()
        return {
            p.name: Option(p.name, hints.get(p.name, Any), p.default)
            for p in parameters
            if p.name not in _GIVEN
        }

    def make(self, where: str, options: Mapping[str, Any] | None = None, **offered: Any) -> Any:
        """The detector with these options.

        Args:
            where: What errors start with.
            options: By name; a text is read as :meth:`Option.read` has it, unless text is wanted.
            **offered: For the constructor where it takes them: ``model``, ``head``, ``groups``;
                None counts as not given.

        Raises:
            ValueError: An option is unknown, missing or not of its type, or the detector refuses
                it.
            TypeError: The detector refuses it.
        """
        known, takes = self.options, inspect.signature(self.detector).parameters
        given = {k: v for k, v in offered.items() if v is not None and k in takes}
        for name, value in (options or {}).items():
            if name not in known:
                raise ValueError(
                    f"{where}: {self.name} has no option {name!r}, only {', '.join(known) or None}"
                )
            given[name] = known[name].read(where, value) if isinstance(value, str) else value
        for option in known.values():
            if option.default is REQUIRED and option.name not in given:
                raise ValueError(f"{where}: detector {self.name!r} needs {option.name}")
        return self.detector(**given)


def _alternatives(kind: Any) -> Sequence[Any]:
    """The types that a union joins: None first, text last."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    order = {type(None): 0, bool: 1, int: 2, float: 3, str: 5}
    return sorted(kinds, key=lambda k: order.get(k, 4))


def _read(kind: Any, text: str) -> Any:
    if kind is type(None):
        return {"none": None}[text.lower()]
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    if get_origin(kind) is Literal:
        return {str(choice): choice for choice in get_args(kind)}[text]
    if get_origin(kind) is Sequence:
        return [_read(get_args(kind)[0], part) for part in text.split("+")] if text else []
    raise ValueError
