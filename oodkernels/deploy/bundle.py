"""Everything that turns an input into a decision, as one module and one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

import oodkernels._version
from oodkernels._checks import check_class_ids
from oodkernels._digest import digest
from oodkernels._files import check_file, file_digest, locked, read_json, write_text
from oodkernels._safetensors import read_tensors, write_tensors
from oodkernels.data import Preprocess, ToTensor
from oodkernels.deploy import exports
from oodkernels.deploy.conformal import ConformalPValues
from oodkernels.deploy.program import Network, Program
from oodkernels.detectors import Batch, OODDetector, Outputs, Walk, predict_batch, run, score_batch
from oodkernels.detectors.batch import inputs_of
from oodkernels.groups import Groups
from oodkernels.metrics import Threshold

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from typing_extensions import Self

PathLike: TypeAlias = str | os.PathLike[str]
By: TypeAlias = Literal["class", "group"]
Data: TypeAlias = Tensor | Iterable[Any]

__all__ = ["Bundle", "Decision"]

_FORMAT, _VERSION = "oodkernels.bundle", 1
_MANIFEST, _WEIGHTS, _CALIBRATION = "bundle.json", "weights.safetensors", "calibration.safetensors"
_PROGRAM, _THRESHOLD = "program.pt2", "threshold.json"


class Decision(NamedTuple):
    """What a :class:`Bundle` says of N inputs, each (N,)."""

    label: Tensor
    """Predicted class, int64, whether OOD or not; -1 where the score is NaN."""
    score: Tensor
    """Higher = more in-distribution (ID)."""
    is_ood: Tensor
    """Bool: the score is below the threshold, or NaN."""
    p_value: Tensor | None
    """Conformal, float64 in (0, 1], small = unlike the calibration samples: the least there is
    where the score is NaN, 1 where its class or group has no calibration samples. None for a bundle
    without p-values."""
    group: Tensor | None
    """Group of the predicted class, int64, -1 where the score is NaN; None without groups."""


class Bundle(nn.Module):
    """A model with its detector, threshold, p-values, groups, transform and class names.

    It is in evaluation mode and stays in it. What can be wrong about it is found when it is made,
    on two inputs of zeros. Threads may share it. An input that holds NaN, or makes the model give
    NaN, gives a flagged row and leaves the others as they are.

    A change of type would move scores across the threshold, so ``half()`` and the like are refused:
    change the model, and calibrate anew.

    Args:
        model: x -> logits, or (logits, confidence); ``nn.Identity()`` where x are logits.
        detectors: A fitted detector, or several by name, of which the first decides. Those with a
            model must have this one.
        threshold: Of the deciding detector; None for its own.
        groups: Of the classes; None for the detector's, if it has any.
        transform: PIL image -> tensor, for whoever has images. :class:`~oodkernels.data.ToTensor`,
            :class:`~oodkernels.data.Preprocess`, and timm's and torchvision's that
            :meth:`~oodkernels.data.Preprocess.of` knows, are kept in files; others have to be given
            again.
        class_names: By class id.
        p_values: Of scores of the deciding detector; those of groups must be by class id or group
            number.
        by: What the groups of ``p_values`` are: the predicted ``"class"`` or its ``"group"``.
        input_shape: Of one input, without the batch; None for that of a transform that is kept.
        input_dtype: Of the inputs.

    Attributes:
        model: As given; in a bundle that was loaded without one, the exported program.
        detectors: By name.
        num_classes: C.

    Raises:
        ValueError: Something is missing, not fitted, or does not belong to the rest.
        TypeError: Something is of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        detectors: OODDetector | Mapping[str, OODDetector],
        threshold: Threshold | None = None,
        groups: Groups | None = None,
        transform: Callable[[Any], Tensor] | None = None,
        class_names: Sequence[str] | None = None,
        *,
        p_values: ConformalPValues | None = None,
        by: By | None = None,
        input_shape: Sequence[int] | None = None,
        input_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"Bundle: model must be an nn.Module, got {type(model).__name__}")
        if isinstance(detectors, OODDetector):
            detectors = {detectors.name: detectors}
        self.model = model
        self._walk: Walk | None = None
        self.fitted = nn.ModuleDict()
        self.detectors = _checked_detectors(detectors, model)
        for number, detector in enumerate(self.detectors.values()):
            self.fitted[str(number)] = _Fitted(detector)
        kept = _kept_transform(transform)
        if input_shape is None and kept is not None:
            input_shape = (3, kept.size, kept.size)
        if input_shape is None:
            raise ValueError("Bundle: input_shape must be given, as in (3, 224, 224)")
        self.input_shape, self.input_dtype = tuple(map(int, input_shape)), input_dtype
        self.transform = transform
        self.groups = _checked_groups(self._decides, groups)
        super().train(False)

        self.register_buffer("cut", torch.tensor(torch.nan, dtype=torch.float64))
        for name in ("scores", "steps"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))
        for name in ("begins", "rows", "counts"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int64))
        self.threshold: Threshold | None = None
        self.p_value_info: dict[str, Any] | None = None
        _, outputs = self._try()
        self.num_classes = _count(outputs, self.groups, hasattr(self._decides, "groups"))
        self.class_names = _checked_names(class_names, self.num_classes)
        found = self._decides.threshold if threshold is None else threshold
        if found is not None:
            self._set_threshold(found)
        if p_values is not None:
            self._set_p_values(p_values, by)
        elif by is not None:
            raise ValueError(f"Bundle: by={by!r} needs p_values of groups")

    # --- deciding -----------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, x: Tensor | ArrayLike) -> Decision:
        """Decide on a batch.

        Args:
            x: (N, *input_shape), of :attr:`input_dtype`; an array is taken for a tensor.

        Returns:
            A :class:`Decision`, on the device of the bundle.

        Raises:
            ValueError: The shape is another; or there is no threshold.
            TypeError: The type is another.
        """
        if self.threshold is None:
            raise ValueError(
                "Bundle: threshold must be given, or calibrate must come first: bundle.calibrate("
                "held-out ID samples)"
            )
        batch, n = self._batch(x)
        score, label, group = predict_batch(self._decides, batch, where="Bundle")
        assert label is not None  # there are logits
        score, label = score[:n], label[:n]
        if self.groups is not None:
            table = self.groups.to(label.device).class_to_group
            group = table[label] if group is None else group[:n]
        wide, nan = score.double(), score.isnan()
        return Decision(
            torch.where(nan, -1, label),
            score,
            ~(wide >= self.cut),
            self._p_value(wide, label, group) if self.p_value_info else None,
            None if group is None else torch.where(nan, -1, group),
        )

    @torch.no_grad()
    def score(self, data: Data | ArrayLike) -> dict[str, Tensor]:
        """Scores of every detector by name, each (N,), higher = more ID.

        Args:
            data: As for :meth:`predict`.

        Raises:
            ValueError: As :meth:`forward`.
            TypeError: As :meth:`forward`.
        """
        parts = []
        for x, _ in _batches("Bundle.score", data):
            batch, n = self._batch(x)
            found = score_batch(self.detectors, batch, len(batch), where="Bundle.score")
            parts.append({name: values[:n] for name, values in found.items()})
        if not parts:
            raise ValueError("Bundle.score: data must give a batch, got none")
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def predict(self, data: Data | ArrayLike) -> Decision:
        """Decide on all batches of a data set.

        Args:
            data: A tensor or array, or batches of them, alone or with labels: (x, labels), or
                {"x" or "pixel_values": x, ...}.

        Raises:
            ValueError: As :meth:`forward`; or there is no batch.
            TypeError: As :meth:`forward`.
        """
        parts = [self(x) for x, _ in _batches("Bundle.predict", data)]
        if not parts:
            raise ValueError("Bundle.predict: data must give a batch, got none")
        columns: list[Any] = [
            None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)
        ]
        return Decision(*columns)

    def calibrate(
        self,
        data: Data | ArrayLike,
        tpr: float = 0.95,
        confidence: float = 0.95,
        *,
        by: By | None = None,
        delta: float | None = None,
    ) -> Threshold:
        """Set threshold and p-values from held-out ID samples.

        Args:
            data: As for :meth:`predict`: samples that neither model nor detector was trained on.
                Those with label -1, OOD, are left out.
            tpr: Share of ID samples to keep.
            confidence: Of the threshold's interval.
            by: Whether p-values compare within the predicted ``"class"`` or its ``"group"``.
            delta: As for :class:`ConformalPValues`.

        Returns:
            The threshold.

        Raises:
            ValueError: As :meth:`forward` and :meth:`Threshold.calibrate`.
            TypeError: As there.
        """
        scores, labels, groups = [], [], []
        for x, y in _batches("Bundle.calibrate", data):
            batch, n = self._batch(x)
            score, label, group = predict_batch(self._decides, batch, where="Bundle.calibrate")
            assert label is not None
            if self.groups is not None and group is None:
                group = self.groups.to(label.device).class_to_group[label]
            rows = torch.arange(n, device=score.device)
            if y is not None:
                rows = rows[check_class_ids("Bundle.calibrate", y, n).to(rows.device) >= 0]
            scores.append(score[rows])
            labels.append(label[rows])
            groups.append(label[rows] if group is None else group[rows])
        if not scores:
            raise ValueError("Bundle.calibrate: data must give a batch, got none")
        found = torch.cat(scores)
        source = self._decides.source()
        threshold = Threshold.calibrate(found, tpr, confidence, source=source)
        ids = None
        if by is not None:
            ids = torch.cat(labels if by == "class" else groups).tolist()
        p_values = ConformalPValues(found.double().cpu().numpy(), ids, delta=delta)
        self._set_threshold(threshold)
        self._set_p_values(p_values, by)
        return threshold

    def fingerprints(self) -> dict[str, str]:
        """Digests of the model's weights, of what was fitted, and of threshold and p-values."""
        fitted = {
            f"{name}.{key}": tensor
            for name, detector in self.detectors.items()
            for key, tensor in detector.state_dict().items()
        }
        calibration = {name: getattr(self, name) for name in _BUFFERS}
        limit = None if self.threshold is None else self.threshold.to_json()
        return {
            "weights": digest(dict(self.model.state_dict())),
            "fit": digest(*map(repr, self.detectors.values()), fitted),
            "calibration": digest(limit, calibration),
        }

    # --- exports ------------------------------------------------------------------------------

    def export(self) -> ExportedProgram:
        """Export the whole of :meth:`forward` by ``torch.export``, for batches of any size.

        It takes x and gives the fields of :class:`Decision` that are not None, by name. Ops of this
        package stay fused: whoever loads the program has to import it.

        Raises:
            ValueError: The model or the detector cannot be exported; the message has the cause.
        """
        return exports.export_bundle(self, self._example(), self._decides)

    def compile_to(self, path: PathLike) -> Path:
        """Compile :meth:`export` ahead of time by AOTInductor, to one file ``.pt2``.

        ``torch._inductor.aoti_load_package`` reads it, as C++ does. It is for this machine's kind
        of processor and this version of torch; ops of this package are called as they are.

        Raises:
            ValueError: As :meth:`export`; or ``path`` does not end in .pt2.
        """
        return exports.compile_bundle(self, self._example(), self._decides, path)

    def to_onnx(self, path: PathLike) -> Path:
        """Write ONNX, with this package's ops written out in ONNX's; extra "onnx".

        Input ``x``, outputs the fields of :class:`Decision` that are not None, the batch dynamic.
        Scores agree to the precision of their type, not to the bit.

        Raises:
            ValueError: As :meth:`export`.
            ImportError: onnx or onnxscript is missing.
        """
        return exports.bundle_to_onnx(self, self._example(), self._decides, path)

    def to_triton(self, folder: PathLike, name: str = "bundle", max_batch: int = 64) -> Path:
        """Write a model repository for Triton's ONNX backend: ``folder/name/1/model.onnx``.

        Args:
            folder: The repository, made where there is none.
            name: Of the model.
            max_batch: Rows that Triton may put together.

        Raises:
            ValueError: As :meth:`export`, or a number or a name is none.
            ImportError: As :meth:`to_onnx`.
        """
        return exports.bundle_to_triton(
            self, self._example(), self._decides, folder, name, max_batch
        )

    # --- keeping ------------------------------------------------------------------------------

    def save(self, folder: PathLike, *, program: bool = True) -> None:
        """Write everything to a folder: JSON, safetensors and the exported model; extra "files".

        The manifest ``bundle.json`` is written last, with a digest of every file, so that a folder
        that is half written is no bundle.

        Args:
            folder: Made where there is none.
            program: Whether the model is exported, so that :meth:`load` needs no model.

        Raises:
            ValueError: The model cannot be exported: ``program=False`` goes without.
            ImportError: safetensors is missing.
            OSError: A file cannot be written.
        """
        where = "Bundle.save"
        folder = Path(folder)
        exported = None
        if program:
            network, example = self._network(), self._example()
            exported = Program.export(where, network, example)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, where):
            (folder / _MANIFEST).unlink(missing_ok=True)
            write_tensors(where, folder / _WEIGHTS, self.model.state_dict(), _FORMAT, _VERSION, {})
            buffers = {name: getattr(self, name) for name in _BUFFERS}
            write_tensors(where, folder / _CALIBRATION, buffers, _FORMAT, _VERSION, {})
            files = [_WEIGHTS, _CALIBRATION]
            for number, detector in enumerate(self.detectors.values()):
                files.append(f"detector-{number}.safetensors")
                detector.save(folder / files[-1])
            if self.threshold is not None:
                self.threshold.save(folder / _THRESHOLD)
                files.append(_THRESHOLD)
            if exported is not None:
                exported.save(folder / _PROGRAM)
                files.append(_PROGRAM)
            content = {
                "format": _FORMAT,
                "version": _VERSION,
                "made_with": {
                    "oodkernels": oodkernels._version.__version__,
                    "torch": torch.__version__,
                },
                "detectors": list(self.detectors),
                "input": {"shape": self.input_shape, "dtype": _dtype_name(self.input_dtype)},
                "groups": self.groups and self.groups.to_json(),
                "class_names": self.class_names,
                "transform": _transform_content(self.transform),
                "p_values": self.p_value_info,
                "program": None if exported is None else exported.content,
                "fingerprints": self.fingerprints(),
                "files": {name: file_digest(folder / name) for name in files},
            }
            write_text(folder / _MANIFEST, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(
        cls,
        folder: PathLike,
        model: nn.Module | None = None,
        *,
        transform: Callable[[Any], Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """The bundle in a folder that :meth:`save` wrote, with every file and fingerprint checked.

        Nothing is unpickled. The exported program is run, though: load bundles of people you trust.

        Args:
            folder: The folder.
            model: Of the class of the one that was saved; its weights are loaded into it. None for
                the exported program.
            transform: In place of the one in the file, or where that could not be kept.
            device: Where it is put.

        Raises:
            ValueError: A file is missing, changed or none of these; a fingerprint is another; or
                the folder has no program and no ``model`` is given, or a detector needs the model
                itself.
            ImportError: safetensors is missing.
            OSError: A file cannot be read.
        """
        where, folder = f"Bundle.load: {os.fspath(folder)}", Path(folder)
        content = _read_manifest(where, folder)
        try:
            made = cls._of(where, folder, content, model, transform, torch.device(device))
            if (mine := made.fingerprints()) != content["fingerprints"]:
                apart = [k for k, v in mine.items() if content["fingerprints"].get(k) != v]
                raise ValueError(f"fingerprints of {', '.join(apart)} must be those of the files")
        except KeyError as error:
            raise ValueError(f"{where}: {error} is missing") from None
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            text = " ".join(str(error).split())[:2000]
            raise ValueError(text if text.startswith(where) else f"{where}: {text}") from error
        return made

    @classmethod
    def _of(
        cls,
        where: str,
        folder: Path,
        content: Mapping[str, Any],
        model: nn.Module | None,
        transform: Callable[[Any], Tensor] | None,
        device: torch.device,
    ) -> Self:
        _, weights = read_tensors(where, folder / _WEIGHTS, _FORMAT, _VERSION)
        if model is not None:
            model.load_state_dict(weights)
            model = model.to(device)
        elif content["program"] is None:
            raise ValueError("it was saved with program=False: model must be given")
        else:
            path = folder / _PROGRAM
            model = Program.load(where, path, content["program"], weights, device)
        given = None if isinstance(model, Program) else model
        detectors = {}
        for number, name in enumerate(content["detectors"]):
            file = folder / f"detector-{number}.safetensors"
            detectors[name] = OODDetector.load(file, given).to(device)
        groups = content["groups"] and Groups.from_json(content["groups"])
        if transform is None and content["transform"] is not None:
            transform = _read_transform(content["transform"])
        made = cls(
            model,
            detectors,
            groups=groups,
            transform=transform,
            class_names=content["class_names"],
            input_shape=content["input"]["shape"],
            input_dtype=_DTYPES[content["input"]["dtype"]],
        )
        _, buffers = read_tensors(where, folder / _CALIBRATION, _FORMAT, _VERSION)
        if set(buffers) != set(_BUFFERS):
            raise ValueError(f"{_CALIBRATION} must have {', '.join(_BUFFERS)}")
        made.threshold = made._decides.threshold = None
        if _THRESHOLD in content["files"]:
            made._set_threshold(Threshold.load(folder / _THRESHOLD))
        for name, tensor in buffers.items():
            setattr(made, name, tensor.to(device))
        made.p_value_info = content["p_values"]
        return made

    def __repr__(self) -> str:
        limit = "no threshold" if self.threshold is None else f"threshold {self.threshold.value:g}"
        p = self.p_value_info
        held = f", p-values from {sum(p['counts'].values())} samples" if p else ""
        names = ", ".join(self.detectors)
        model = type(self.model).__name__
        return f"Bundle({model}, {names}, {self.num_classes} classes, {limit}{held})"

    # --- of modules ---------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Do nothing: a bundle stays in evaluation mode."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        probe = fn(torch.empty(0))
        if probe.dtype != torch.float32:
            raise TypeError(
                f"Bundle: {probe.dtype} would change scores behind the threshold: change the "
                "model, and calibrate a new bundle"
            )
        if isinstance(self.model, Program) and probe.device != self.device:
            raise ValueError(
                f"Bundle: an exported program stays where it is, on {self.device}: "
                f"Bundle.load(folder, device={str(probe.device)!r})"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.cut.device

    # --- shared -------------------------------------------------------------------------------

    cut: Tensor
    scores: Tensor
    steps: Tensor
    counts: Tensor
    begins: Tensor
    rows: Tensor

    @property
    def _decides(self) -> OODDetector:
        return next(iter(self.detectors.values()))

    @property
    def _reads(self) -> tuple[tuple[str, ...], bool]:
        """Layers that detectors want, and whether they want features."""
        layers = [name for d in self.detectors.values() for name in d.layers]
        features = any("features" in d.needs and not d.layers for d in self.detectors.values())
        return tuple(dict.fromkeys(layers)), features

    def _network(self) -> Network:
        return Network(self.model, *self._reads)

    def _example(self, n: int = 2) -> Tensor:
        return torch.zeros(n, *self.input_shape, dtype=self.input_dtype, device=self.device)

    def _batch(self, x: Any) -> tuple[Batch, int]:
        """What the model says of inputs; of none, what it says of one of zeros, and 0."""
        x = self._checked(x)
        n = x.shape[0]
        if not torch.compiler.is_compiling() and n == 0:
            x = self._example(1)
        layers, features = self._reads
        walk = None
        if not torch.compiler.is_compiling():
            if self._walk is None or not self._walk.is_of(self.model):
                self._walk = Walk(self.model)
            walk = self._walk.current()
        return Batch.of(x, run(self.model, x, layers, features, walk)), n

    def _checked(self, x: Any) -> Tensor:
        if not isinstance(x, Tensor):
            x = torch.as_tensor(np.asarray(x))
        if x.dtype != self.input_dtype:
            raise TypeError(f"Bundle: x must be {self.input_dtype}, got {x.dtype}")
        if x.shape[1:] != self.input_shape or x.dim() == 0:
            wanted = ", ".join(map(str, self.input_shape))
            raise ValueError(f"Bundle: x must be (N, {wanted}), got {tuple(x.shape)}")
        return x.to(self.device)

    def _try(self) -> tuple[Tensor, Outputs]:
        """Scores of two inputs of zeros, and what the model says of them."""
        layers, features = self._reads
        x = self._example()
        with torch.no_grad():
            outputs = run(self.model, x, layers, features)
            if not isinstance(outputs.logits, Tensor) or outputs.logits.dim() != 2:
                raise ValueError("Bundle: model must give logits (N, C)")
            if len(outputs.logits) != 2:
                raise ValueError(
                    f"Bundle: model must give a row of logits an input, got {len(outputs.logits)} "
                    "for 2"
                )
            batch = Batch.of(x, outputs)
            scores = score_batch(self.detectors, batch, 2, where="Bundle")
            predict_batch(self._decides, batch, where="Bundle")
        return next(iter(scores.values())), outputs

    def _set_threshold(self, threshold: Threshold) -> None:
        self._decides.check_threshold(threshold, "Bundle")
        self.threshold = threshold
        self.cut = torch.tensor(threshold.value, dtype=torch.float64, device=self.device)

    def _set_p_values(self, p_values: ConformalPValues, by: By | None) -> None:
        steps = p_values.steps()
        grouped = set(steps) != {None}
        if by not in (None, "class", "group") or (by is not None) != grouped:
            wanted = "'class' or 'group' for p-values of groups" if grouped else "None"
            raise ValueError(f"Bundle: by must be {wanted}, got {by!r}")
        if by == "group" and self.groups is None:
            raise ValueError("Bundle: by='group' needs groups")
        size = self.num_classes if by == "class" or self.groups is None else len(self.groups)
        if grouped and not all(isinstance(k, int) and 0 <= k < size for k in steps):
            raise ValueError(f"Bundle: groups of p_values must be integers 0..{size - 1}")
        rows = torch.full((size if grouped else 0,), -1)
        for row, name in enumerate(steps if grouped else ()):
            rows[name] = row
        lengths = [len(part.scores) for part in steps.values()]
        columns = map(np.concatenate, zip(*steps.values(), strict=True))
        found = {
            **dict(zip(("scores", "steps", "counts"), map(torch.from_numpy, columns), strict=True)),
            "begins": torch.tensor([0, *lengths]).cumsum(0),
            "rows": rows,
        }
        for name, tensor in found.items():
            setattr(self, name, tensor.to(self.device))
        counts = {str(name): n for name, n in p_values.counts.items()}
        self.p_value_info = {"by": by, "delta": p_values.delta, "counts": counts}

    def _p_value(self, score: Tensor, label: Tensor, group: Tensor | None) -> Tensor:
        """P-values: steps looked up within the row of each score's class or group."""
        assert self.p_value_info is not None
        score = torch.where(score.isnan(), -torch.inf, score)
        by = self.p_value_info["by"]
        if by is None and not torch.compiler.is_compiling():
            return self.steps[torch.searchsorted(self.scores, score, right=True)]
        if by is None:
            row = torch.zeros_like(label)
        else:
            row = self.rows[label if by == "class" or group is None else group]
        known, row = row >= 0, row.clamp(min=0)
        low, high = self.begins[row], self.begins[row + 1]
        last = len(self.scores) - 1
        for _ in range(len(self.scores).bit_length()):
            middle = (low + high) // 2
            right = (low < high) & (self.scores[middle.clamp(max=last)] <= score)
            low, high = torch.where(right, middle + 1, low), torch.where(right, high, middle)
        return torch.where(known, self.steps[low + row], 1.0)


_BUFFERS = ("cut", "scores", "steps", "counts", "begins", "rows")


class _Fitted(nn.Module):
    """What a detector was fitted to, among the tensors of a module."""

    def __init__(self, detector: OODDetector) -> None:
        super().__init__()
        self.detector = detector

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.detector.to(fn(torch.empty(0)).device)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, tensor in self.detector.state_dict().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        known = self.detector.state_dict()
        missing_keys += [prefix + name for name in known if name not in own]
        if own.keys() == known.keys():
            if own:
                try:
                    self.detector.load_state_dict(own)
                except ValueError as error:
                    error_msgs.append(str(error))
        else:
            unexpected_keys += [prefix + name for name in own if name not in known]


# --- checks -----------------------------------------------------------------------------------


def _checked_detectors(
    detectors: Mapping[str, OODDetector], model: nn.Module
) -> dict[str, OODDetector]:
    if not isinstance(detectors, Mapping) or not detectors:
        raise TypeError(
            f"Bundle: detectors must be a detector, or some by name, got {detectors!r:.80}"
        )
    for name, detector in detectors.items():
        if not isinstance(name, str) or not isinstance(detector, OODDetector):
            raise TypeError(
                f"Bundle: detectors[{name!r}] must be an OODDetector, got {type(detector).__name__}"
            )
        if detector.model is not None and detector.model is not model:
            raise ValueError(f"Bundle: the model of {name} must be the bundle's, or None")
        if "x" in detector.needs and detector.model is None:
            raise ValueError(
                f"Bundle: {name} runs the model itself: {type(detector).__name__}(..., "
                "model=model); from a folder: Bundle.load(folder, model=model)"
            )
        detector.state_dict()  # finishes its fit, or says that there was none
    return dict(detectors)


def _checked_groups(detector: OODDetector, groups: Groups | None) -> Groups | None:
    own: Groups | None = getattr(detector, "groups", None)
    if groups is not None and not isinstance(groups, Groups):
        raise TypeError(f"Bundle: groups must be Groups, got {type(groups).__name__}")
    if own is not None and groups is not None and own != groups:
        raise ValueError(f"Bundle: groups must be those of {detector.name}, got others")
    return own if groups is None else groups


def _count(outputs: Outputs, groups: Groups | None, others: bool) -> int:
    """The number of classes; ``others``: whether the logits have a column a group beside them."""
    width = outputs.logits.shape[1] - (outputs.absent is not None)
    if groups is not None and width != (groups.width if others else groups.num_classes):
        raise ValueError(
            f"Bundle: groups must be of the model's {width} columns, got {groups.num_classes} "
            f"classes in {len(groups)} groups"
        )
    return width if groups is None else groups.num_classes


def _checked_names(names: Sequence[str] | None, count: int) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str) or len(names) != count:
        got = repr(names) if isinstance(names, str) else len(names)
        raise ValueError(f"Bundle: class_names must be {count}, one a class, got {got}")
    return tuple(map(str, names))


def _batches(where: str, data: Any) -> Iterator[tuple[Any, Any]]:
    """Inputs and labels, or None, of each batch."""
    if isinstance(data, Tensor | np.ndarray):
        yield data, None
        return
    if not isinstance(data, Iterable):
        raise TypeError(f"{where}: data must be a tensor or batches, got {type(data).__name__}")
    for item in data:
        yield inputs_of(where, item)


# --- files ------------------------------------------------------------------------------------

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "bfloat16", "float16", "uint8", "int64")
}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_manifest(where: str, folder: Path) -> dict[str, Any]:
    path = check_file(where, folder / _MANIFEST)
    if not path.exists():
        raise ValueError(f"{where}: must be a folder with {_MANIFEST}")
    content = read_json(where, path.read_text(encoding="utf-8"), _FORMAT, _VERSION)
    files = content.get("files")
    if not isinstance(files, dict) or not {_WEIGHTS, _CALIBRATION} <= set(files):
        raise ValueError(f"{where}: {_MANIFEST} must list the files")
    for name, known in files.items():
        file = folder / str(name)
        if Path(name).name != name or not check_file(where, file).exists():
            raise ValueError(f"{where}: {name} is missing")
        if (found := file_digest(file)) != known:
            raise ValueError(
                f"{where}: {name} must have the digest {known}, got {found}: it was changed, or is "
                "of another bundle"
            )
    return content


_TRANSFORMS: dict[str, type[ToTensor | Preprocess]] = {
    "ToTensor": ToTensor,
    "Preprocess": Preprocess,
}


def _kept_transform(transform: Any) -> ToTensor | Preprocess | None:
    """The transform as files hold it, None where they cannot."""
    return transform if type(transform) is ToTensor else Preprocess.of(transform)


def _transform_content(transform: Any) -> dict[str, Any] | None:
    if transform is None:
        return None
    if (kept := _kept_transform(transform)) is not None:
        return {"kind": type(kept).__name__, **vars(kept)}
    return {"kind": "given", "name": repr(transform)[:2000]}


def _read_transform(content: Mapping[str, Any]) -> Callable[[Any], Tensor]:
    fields: dict[str, Any] = dict(content)
    kind = fields.pop("kind")
    if kind in _TRANSFORMS:
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
        }
        return _TRANSFORMS[kind](**known)

    def missing(image: Any) -> Tensor:
        raise ValueError(
            "Bundle: its transform could not be kept in a file: Bundle.load(folder, transform=...),"
            f" which was {fields['name']}"
        )

    return missing
