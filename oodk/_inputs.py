"""What ``oodk eval``, ``score`` and ``threshold`` read: samples, detectors, heads and models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_type_hints

import typer

from oodk._command import one_of, step
from oodk._common import GroupsOption, pairs, read_groups
from oodk._images import DeviceOption, Images, ModelOption, SizeOption, WeightsOption, WorkersOption
from oodk._output import printable

if TYPE_CHECKING:
    from torch import nn

    from oodkernels import Groups
    from oodkernels.data.samples import Samples
    from oodkernels.detectors import OODDetector, Tuning

DATA = "a file ({formats}), a folder of `oodk extract`, or with --model images as it reads them"


TunedOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="File of `oodk tune`: its detectors, or those of --detector among them, with the "
        "settings that it chose.",
    ),
]


@dataclass
class Inputs:
    """Options that the commands have in common, and what they stand for."""

    detector: Annotated[
        list[str] | None,
        typer.Option(
            "--detector",
            "-d",
            metavar="NAME[:SETTING=VALUE,...]",
            help="A detector, with settings other than its own, as in knn:k=10; or steps of "
            "others before it, as in react:percentile=85+gen; or a file of one "
            "that was saved; or `all` that can score what there is; give it again for more. There "
            "are {detectors}; what they need and can be set to: `oodk info --detectors`. By "
            "default msp, max-logit and energy where there are logits, mos and mos-log-odds where "
            "there are groups; and absent-class or confidence of a head that has one.",
        ),
    ] = None
    groups: GroupsOption = None
    train: Annotated[
        str | None,
        typer.Option(
            help="Training samples with labels, for detectors that are fitted, such as knn and "
            "mahalanobis.",
        ),
    ] = None
    head: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="Head that `oodk train` made, for files with features. `oodk eval` compares "
            "several.",
        ),
    ] = None
    kind: Annotated[
        str | None,
        typer.Option(
            parser=one_of("kinds"),
            metavar="KIND",
            help="What a file with one array without a telling name holds, of {kinds}. By default "
            "two dimensions are logits, with --head features, and one is scores.",
        ),
    ] = None
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=NAME",
            help="Array or column that holds the logits, features, scores or labels, where it is "
            "called otherwise: --column scores=energy.",
        ),
    ] = None
    model: ModelOption = None
    weights: WeightsOption = None
    size: SizeOption = None
    batch_size: Annotated[int, typer.Option(min=1, help="Images sent through --model at once.")] = (
        64
    )
    workers: WorkersOption = 0
    device: DeviceOption = "auto"

    def __post_init__(self) -> None:
        if self.model is not None and self.head:
            raise typer.BadParameter("is of no use with --model", param_hint="'--head'")
        if self.model is None and self.weights is not None:
            raise typer.BadParameter("is needed for --weights", param_hint="'--model'")
        self.columns = pairs("--column", self.column or ())

    @cached_property
    def models(self) -> dict[str, nn.Module | None]:
        """Models by name, what samples are sent through; one that is None where files have all."""
        from oodkernels.nn.heads import Head

        if self.model is not None:
            return {self.model: self.images.network}
        found: dict[str, nn.Module | None] = {}
        for name, path in pairs("--head", self.head or (), _head_name).items():
            with step("read", path):
                found[name] = Head.load(path)
        return found or {"model": None}

    @cached_property
    def images(self) -> Images:
        """How images are read and sent through ``--model``."""
        assert self.model is not None
        return Images(
            self.model, self.weights, self.size, self.batch_size, self.workers, self.device
        )

    @property
    def one_model(self) -> nn.Module | None:
        """The only one."""
        if len(self.models) > 1:
            raise typer.BadParameter("one is enough here", param_hint="'--head'")
        return next(iter(self.models.values()))

    def groups_of(self, model: nn.Module | None, samples: Any) -> Groups | None:
        """Those asked for, or else those of the head, the model or the file."""
        if self.groups is not None:
            groups = read_groups(self.groups)
            known: Any = getattr(samples, "model_classes", None)
            if model is not None:
                known = getattr(model, "class_names", None)
            if known is None or groups.class_names is None:
                return groups
            return groups.matched(known)
        return getattr(samples if model is None else model, "groups", None)

    def open(self, option: str, path: str, labels: Path | None = None) -> Samples | Any:
        """The samples in a file or folder, or the images there."""
        from oodkernels.data.samples import open_samples

        if self.model is not None:
            if labels is not None:
                raise typer.BadParameter("is of no use with --model", param_hint="'--labels'")
            return self.images.open(path)
        if not Path(path).exists():
            raise typer.BadParameter(f"there is no {printable(path)!r}", param_hint=f"'{option}'")
        kind = self.kind or ("features" if self.head else None)
        with step("read", path):
            return open_samples(path, kind=kind, columns=self.columns, labels=labels)

    def detectors(
        self, samples: Any, model: nn.Module | None, tuned: Path | None = None
    ) -> dict[str, OODDetector] | None:
        """Those asked for, fitted where they have to be; None for those by default.

        Args:
            samples: What is to be scored.
            model: What it is sent through.
            tuned: File of `oodk tune` with settings for detectors that have none of their own.
        """
        from oodkernels._digest import StreamDigest
        from oodkernels.detectors import fit_detectors

        tuning = None if tuned is None else read_tuning(tuned)
        if tuning is not None:
            tuning.check_model(f"--tuned {tuned}", model)
        chosen = {} if tuning is None else tuning.settings
        if not self.detector and not chosen:
            arrays = getattr(samples, "arrays", {"logits": None})
            if model is None and not arrays.keys() - {"features", "labels"}:
                raise typer.BadParameter("is needed for features", param_hint="'--detector'")
            return None
        groups = self.groups_of(model, samples)
        asked = list(self.detector or chosen)
        if "all" in asked:
            at = asked.index("all")
            asked[at : at + 1] = self.all_names(samples, model, groups)
        found, unfitted = named_detectors(asked, model, groups, chosen)
        if unfitted and self.train is None:
            raise typer.BadParameter(f"is needed for {', '.join(unfitted)}", param_hint="'--train'")
        if unfitted:
            assert self.train is not None
            with step(f"fit {', '.join(unfitted)} on", self.train):
                data, seen = self.open("--train", self.train), StreamDigest()
                watched = None if tuning is None else seen
                fit_detectors("--train", unfitted.values(), data, model, watched)
            if tuning is not None and unfitted.keys() & chosen.keys():
                tuning.check_fit(f"--tuned {tuned}", seen.found())
        return found

    def all_names(self, samples: Any, model: nn.Module | None, groups: Groups | None) -> list[str]:
        """Names of all detectors that can score the samples, fitted where they have to be."""
        from oodkernels.detectors import applicable, linear_head

        given = frozenset(getattr(samples, "arrays", ("logits",)))
        reads = given if model is None else frozenset({"logits", "features"})
        return applicable(
            reads,
            trained_on=() if self.train is None else {*reads, "labels"},
            groups=groups,
            head=model is not None and linear_head(model) is not None,
            absent=getattr(model, "absent_column", None) is not None,
        )


def read_detector(text: str) -> tuple[str, dict[str, Any]]:
    """A detector as `--detector` has it: its name, and its settings as texts.

    Of a composition, `react:percentile=85+gen`, the settings are `react.percentile`.
    """
    from oodkernels.detectors.compose import split_parts

    names, options = [], {}
    parts = split_parts(text)
    for part in parts:
        name, _, settings = part.partition(":")
        names.append(name)
        own = pairs("--detector", settings.split(",") if settings else ())
        options.update({f"{name}.{k}" if len(parts) > 1 else k: v for k, v in own.items()})
    return "+".join(names), options


def named_detectors(
    asked: Iterable[str],
    model: nn.Module | None,
    groups: Groups | None,
    chosen: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[dict[str, OODDetector], dict[str, OODDetector]]:
    """The detectors that texts stand for, by label; and those of them that are yet to be fitted.

    Args:
        asked: NAME, NAME:SETTING=VALUE,... or a file of one that was saved.
        model: For those that read it, or its head.
        groups: For those that read logits by group.
        chosen: Name -> settings, for those that are asked for without any.
    """
    from oodkernels.detectors import OODDetector
    from oodkernels.detectors.compose import spec_of

    found: dict[str, OODDetector] = {}
    unfitted = {}
    for text in asked:
        path = Path(text)
        label = path.stem if path.suffix == ".safetensors" else text
        if label in found:
            raise typer.BadParameter(f"{label!r} is there twice", param_hint="'--detector'")
        if path.suffix == ".safetensors":
            with step("read", path):
                found[label] = OODDetector.load(path, model)
            continue
        name, settings = read_detector(text)
        options = settings or (chosen or {}).get(name, {})
        spec = spec_of("--detector", name)
        found[label] = spec.make("--detector", options, groups=groups, model=model)
        if found[label].trained_on:
            unfitted[label] = found[label]
    return found, unfitted


def read_tuning(path: Path) -> Tuning:
    """What `oodk tune` wrote."""
    from oodkernels.detectors import Tuning

    with step("read", path):
        return Tuning.load(path)


def _head_name(path: Path) -> str:
    """``oodk train`` calls all of them head.safetensors; their folders tell them apart."""
    return path.stem if path.stem != "head" else path.absolute().parent.name


_SHARED = ("evaluate", "score", "threshold")
"""Commands that torchrun's processes share."""


def with_inputs(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of :class:`Inputs` in place of its parameter ``inputs``."""
    hints = get_type_hints(Inputs, include_extras=True)
    own = get_type_hints(command, include_extras=True)
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name == "inputs":
            parameters += [
                inspect.Parameter(
                    f.name, parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name]
                )
                for f in fields(Inputs)
            ]
        else:
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(kind=kind, annotation=own[parameter.name]))

    @wraps(command)
    def run(**given: Any) -> None:
        from oodkernels._ranks import joined

        mine = {f.name: given.pop(f.name) for f in fields(Inputs)}
        with joined("oodk") as (_, world):
            if world > 1 and command.__name__ not in _SHARED:
                raise ValueError("is for one process: start it without torchrun")
            command(**given, inputs=Inputs(**mine))

    del run.__wrapped__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


@contextmanager
def watching(quiet: bool, sets: Mapping[str, Any]) -> Iterator[Callable[[str, int], None]]:
    """A bar for each data set, on the first rank."""
    from oodkernels._progress import progress
    from oodkernels._ranks import ranks

    with progress(not quiet and not ranks()[0]) as shown:
        tasks = {
            name: shown.add_task(printable(name), total=samples.num_samples, start=False)
            for name, samples in sets.items()
        }

        def on_batch(name: str, done: int) -> None:
            shown.start_task(tasks[name])
            shown.update(tasks[name], completed=done)

        yield on_batch
