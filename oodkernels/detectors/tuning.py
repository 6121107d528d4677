"""What a sweep found: every setting's figures, what was chosen, and on which data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from torch import nn

from oodkernels._digest import digest
from oodkernels._files import check_file, read_json, write_text
from oodkernels.detectors.base import OODDetector
from oodkernels.detectors.model import Model

__all__ = ["Figures", "SweptDetector", "Tuning", "model_digest"]

_FORMAT, _VERSION = "oodkernels.tuning", 1


class Figures(NamedTuple):
    """A setting's figures on one validation set, or the mean over them."""

    auroc: float
    """Area under the ROC curve."""
    fpr95: float
    """Share of OOD samples kept where 95 % of the ID samples are."""


@dataclass(frozen=True, eq=False)
class SweptDetector:
    """A detector under every setting that was tried.

    Attributes:
        settings: Options by name, one mapping a setting, in the order they were tried.
        figures: Validation set -> a row of :class:`Figures` for each setting.
        chosen: Index of the setting that was chosen.
        left_out: Settings of the detector's own grid that it refused, and why, in words.
        fitted: Whether the detector was fitted to training data.
    """

    settings: Sequence[Mapping[str, Any]]
    figures: Mapping[str, Sequence[Figures]]
    chosen: int
    left_out: Sequence[str] = ()
    fitted: bool = False

    @cached_property
    def mean(self) -> list[Figures]:
        """The unweighted mean over the validation sets, for each setting: the curve."""
        rows = zip(*self.figures.values(), strict=True)
        return [Figures(*(math.fsum(f) / len(f) for f in zip(*r, strict=True))) for r in rows]

    @property
    def best(self) -> Mapping[str, Any]:
        """The setting that was chosen."""
        return self.settings[self.chosen]

    @property
    def varied(self) -> list[str]:
        """The options that were tried with more than one value."""
        names = dict.fromkeys(name for one in self.settings for name in one)
        return [n for n in names if len({str(one.get(n)) for one in self.settings}) > 1]


@dataclass(frozen=True, eq=False)
class Tuning:
    """What :func:`sweep` found; prints what was chosen.

    Attributes:
        detectors: Name -> every setting's figures and what was chosen.
        by: The figure that the choice is by, of the mean over the validation sets; of equal ones
            the setting that was tried first.
        chosen_on: The validation data in words.
        sizes: Data set -> samples; "ID" is the ID set.
        digests: Data set -> array -> digest of its content; "train" is what was fitted to.
        model: Digest of the weights of the model and the head, None where there was neither.
        fitted: Name -> the detector with the chosen setting, fitted; empty from a file.
    """

    detectors: Mapping[str, SweptDetector]
    by: Literal["auroc", "fpr95"]
    chosen_on: str
    sizes: Mapping[str, int]
    digests: Mapping[str, Mapping[str, str]]
    model: str | None = None
    fitted: Mapping[str, OODDetector] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Name -> the options that were chosen."""
        return {name: dict(found.best) for name, found in self.detectors.items()}

    def check_model(self, where: str, model: Model | None, head: Any = None) -> None:
        """Refuse another model than the one that the settings were chosen for.

        Args:
            where: What the error starts with.
            model: What data are sent through.
            head: The layer between features and logits, where that was given.

        Raises:
            ValueError: It is another one.
        """
        found = model_digest(model, head)
        if self.model is not None and found is not None and found != self.model:
            raise ValueError(
                f"{where}: model must be {self.model}, which settings were chosen for, got "
                f"{found}: sweep again"
            )

    def check_fit(self, where: str, found: Mapping[str, str]) -> None:
        """Refuse training data other than those that the settings were chosen with.

        Args:
            where: What the error starts with.
            found: Array -> digest, of the data that detectors were fitted to.

        Raises:
            ValueError: They are others.
        """
        mine = self.digests.get("train", {})
        both = sorted((mine.keys() & found.keys()) - {"labels"})
        if not both or any(mine[name] != found[name] for name in both):
            name = both[0] if both else min(mine, default="nothing")
            raise ValueError(
                f"{where}: training data must be those that the settings were chosen with, "
                f"{name} of digest {mine.get(name)}, got {found.get(name)}: sweep again"
            )

    def check_test(self, where: str, name: str, found: Mapping[str, str]) -> None:
        """Refuse to test on data that the settings were chosen on.

        Args:
            where: What the error starts with.
            name: Of the test set.
            found: Array -> digest, of its data.

        Raises:
            ValueError: They are a validation set of the sweep.
        """
        for known, mine in self.digests.items():
            both = (mine.keys() & found.keys()) - {"labels"}
            if known != "train" and both and all(mine[key] == found[key] for key in both):
                raise ValueError(
                    f"{where}: {name} must be test data, got those that the settings were chosen "
                    f"on ({known})"
                )

    def to_json(self) -> str:
        """All but the fitted detectors as JSON, from which :meth:`from_json` makes an equal one.

        Raises:
            TypeError: A setting is one that JSON cannot hold.
        """
        content = {
            name: getattr(self, name) for name in ("by", "chosen_on", "sizes", "digests", "model")
        }
        content["detectors"] = {name: asdict(found) for name, found in self.detectors.items()}
        return json.dumps({"format": _FORMAT, "version": _VERSION, **content}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Tuning:
        """What :meth:`to_json` wrote.

        Raises:
            ValueError: ``text`` is not JSON, not of this format, of another version, or a field is
                missing or not what it should be.
        """
        where = "Tuning.from_json"
        content = read_json(where, text, _FORMAT, _VERSION)
        try:
            detectors = {}
            for name, one in content.pop("detectors").items():
                figures = {
                    k: [Figures(*map(float, r)) for r in v] for k, v in one["figures"].items()
                }
                found = SweptDetector(**{**one, "figures": figures})
                if {len(rows) for rows in figures.values()} != {len(found.settings)}:
                    raise ValueError(f"{name} must have figures of every setting")
                dict(found.best)
                detectors[str(name)] = found
            found_all = cls(detectors, **content)
            if found_all.by not in Figures._fields:
                raise ValueError(f"by must be one of {', '.join(Figures._fields)}")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: {' '.join(str(error).split())[:500]}") from None
        return found_all

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a JSON file, which is replaced whole or not at all; :meth:`to_json`."""
        write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tuning:
        """What is in a file that :meth:`save` wrote.

        Raises:
            ValueError: As :meth:`from_json`, or the file is not text.
            OSError: The file cannot be read.
        """
        try:
            return cls.from_json(check_file("file", path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"Tuning.load: {os.fspath(path)}: {error}") from error

    def rows(self) -> list[tuple[str, str, str, str, int]]:
        """A row for each detector: name, what was chosen, AUROC and FPR95 there, settings tried."""
        found = []
        for name, one in self.detectors.items():
            auroc, fpr95 = one.mean[one.chosen]
            setting = ", ".join(f"{k}={v}" for k, v in one.best.items())
            figures = (f"{100 * auroc:.2f}", f"{100 * fpr95:.2f}")
            found.append((name, setting, *figures, len(one.settings)))
        return found

    def __str__(self) -> str:
        lines = [f"{n}: {s} (AUROC {a}, FPR95 {f}; of {k})" for n, s, a, f, k in self.rows()]
        return "\n".join([*lines, f"chosen by {self.by} on {self.chosen_on}"])


def model_digest(model: Model | None, head: Any = None) -> str | None:
    """A short name for the weights of a model or a head, None where there are none to look at."""
    if isinstance(model, nn.Module):
        return digest(model.state_dict())
    if isinstance(head, nn.Module):
        return digest(head.state_dict())
    if isinstance(head, Sequence):
        return digest(
            {name: t for name, t in zip(("weight", "bias"), head, strict=True) if t is not None}
        )
    return None
