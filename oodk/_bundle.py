"""``oodk bundle``, and ``oodk score`` with one."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oodk._command import step
from oodk._common import ConfigOption, JsonOption, QuietOption, require_writable
from oodk._inputs import DATA, Inputs, watching, with_inputs
from oodk._output import print_json, print_path, printable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from oodkernels.deploy import Bundle


class By(str, Enum):
    """Within what p-values compare."""

    label = "class"
    group = "group"


@with_inputs
def bundle(
    id_data: Annotated[
        str,
        typer.Option(
            "--id",
            help=f"Held-out ID samples, which neither model nor detectors were trained on: {DATA}.",
        ),
    ],
    inputs: Inputs,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the bundle.")],
    tpr: Annotated[float, typer.Option(help="Share of ID samples to keep, in (0, 1].")] = 0.95,
    confidence: Annotated[
        float, typer.Option(help="Of the interval for the share kept of new ID samples, in (0, 1).")
    ] = 0.95,
    by: Annotated[
        By | None,
        typer.Option(help="P-values compare within the predicted class, or its group."),
    ] = None,
    program: Annotated[
        bool,
        typer.Option(help="Export the model, so that nothing but the folder is needed to score."),
    ] = True,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write model.onnx into the folder too.")
    ] = False,
    triton: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Model repository for Triton to add the bundle to."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Put a model, detectors, threshold and p-values into one folder that scores by itself.

    The first `--detector` decides. The threshold keeps a share `--tpr` of the held-out samples;
    p-values compare with them.

    **Examples**

        oodk bundle --model mypackage:make --weights model.pt -d energy --id images/held-out \\
            --out bundle

        oodk bundle --head runs/mos/head.safetensors -d mos-log-odds --id val.npz --out bundle

        oodk score --bundle bundle --data images/new --out scores.csv
    """
    from torch import nn

    from oodkernels.deploy import Bundle

    if not inputs.detector:
        raise typer.BadParameter("is needed", param_hint="'--detector'")
    if by is By.group and inputs.groups is None and not inputs.head and inputs.model is None:
        raise typer.BadParameter("needs groups: --groups", param_hint="'--by'")
    require_writable(out)
    network = inputs.one_model
    samples = inputs.open("--id", id_data)
    detectors = inputs.detectors(samples, network)
    assert detectors is not None
    first = next(_inputs(samples, network), None)
    if first is None:
        raise ValueError(f"{id_data} has no samples")
    names: Any = getattr(samples if network is None else network, "class_names", None)
    if network is None:
        names = getattr(samples, "model_classes", None)
    made = Bundle(
        nn.Identity() if network is None else network,
        detectors,
        groups=inputs.groups_of(network, samples),
        transform=None if inputs.model is None else inputs.images.transform,
        class_names=names,
        input_shape=first[0].shape[1:],
        input_dtype=first[0].dtype,
    )
    within: Any = None if by is None else by.value
    with watching(quiet, {"ID": samples}) as on_batch, step("calibrate on", id_data):
        watched = _watched(_inputs(samples, network), on_batch)
        found = made.calibrate(watched, tpr, confidence, by=within)
    with step("write to", out):
        made.save(out, program=program)
        if onnx:
            made.to_onnx(out / "model.onnx")
        if triton is not None:
            made.to_triton(triton, out.name)
    assert made.p_value_info is not None
    low, high = found.interval
    if as_json:
        facts = {"detector": next(iter(detectors)), "threshold": found.value, "n_id": found.n_id}
        counts = made.p_value_info["counts"]
        print_json({**facts, "interval": [low, high], "counts": counts, **made.fingerprints()})
        return
    if not quiet:
        typer.echo(
            f"{printable(next(iter(detectors)))} < {found.value:.9g} is OOD; of new ID samples "
            f"{100 * low:.2f} to {100 * high:.2f} % are kept ({100 * confidence:g} % confidence)"
        )
    print_path(out)


def _inputs(samples: Any, network: nn.Module | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What the model is sent, with labels where there are any."""
    for item in samples:
        if isinstance(item, dict):
            role = "logits" if network is None else "features"
            if role not in item:
                raise ValueError(f"{samples.name} has no {role}, only {', '.join(item)}")
            yield item[role], item.get("labels")
        elif isinstance(item, tuple):
            yield item[0], item[1]
        else:
            yield item, None


def _watched(batches: Iterator[Any], on_batch: Any) -> Iterator[Any]:
    done = 0
    for batch in batches:
        yield batch
        done += len(batch[0])
        on_batch("ID", done)


# --- scoring ----------------------------------------------------------------------------------


def score_bundle(folder: Path, data: str, inputs: Inputs, out: Path | None, quiet: bool) -> None:
    """``oodk score --bundle``: names, classes, all scores and decisions, as a table."""
    from oodkernels._files import write_text
    from oodkernels.data.formats.csv import text_cell
    from oodkernels.deploy import Bundle

    for name in ("detector", "groups", "train", "head", "model", "weights", "size"):
        if getattr(inputs, name) is not None:
            raise typer.BadParameter("is in the bundle", param_hint=f"'--{name}'")
    if out is not None and out.suffix != ".csv":
        raise typer.BadParameter("must end in .csv with --bundle", param_hint="'--out'")
    with step("read", folder):
        made = Bundle.load(folder, device=_device(inputs.device))
    columns: list[str] = []
    rows: list[Any] = []
    with step("score", data):
        samples = _Samples(made, data, inputs)
        with watching(quiet, {data: samples}) as on_batch:
            for names, x in samples:
                found = _columns(made, x)
                columns = [*(["name"] if names else []), *found]
                values = ([names] if names else []) + list(found.values())
                rows += zip(*values, strict=True)
                on_batch(data, len(rows))
    if not rows:
        raise ValueError(f"{data} has no samples")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(text_cell, columns))
    writer.writerows([text_cell(v) if isinstance(v, str) else v for v in row] for row in rows)
    if out is None:
        typer.echo(buffer.getvalue(), nl=False)
        return
    with step("write", out):
        write_text(out, buffer.getvalue())
    print_path(out)


def _device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _columns(made: Bundle, x: Tensor) -> dict[str, list[Any]]:
    """A batch's columns: class, every detector's score, and what is decided."""
    found, scores = made(x), made.score(x)
    columns: dict[str, list[Any]] = {"label": found.label.tolist()}
    if made.class_names is not None:
        columns["class"] = [made.class_names[i] if i >= 0 else "" for i in columns["label"]]
    columns |= {name: values.tolist() for name, values in scores.items()}
    columns["is_ood"] = found.is_ood.int().tolist()
    if found.p_value is not None:
        columns["p_value"] = found.p_value.tolist()
    if found.group is not None:
        columns["group"] = found.group.tolist()
    return columns


class _Samples:
    """Names and inputs of a bundle's kind, a batch at a time."""

    def __init__(self, made: Bundle, data: str, inputs: Inputs) -> None:
        from oodkernels.data import open_images, open_samples

        self.inputs = inputs
        self.images: Any = None
        if len(made.input_shape) == 3:
            if made.transform is None:
                raise ValueError("the bundle has no transform for images")
            self.images = open_images(data, made.transform)
        else:
            self.samples = open_samples(data, kind=inputs.kind, columns=inputs.columns)
            (width,) = made.input_shape
            fits = [
                role
                for role in ("logits", "features")
                if role in self.samples.arrays and self.samples.arrays[role].shape[1] == width
            ]
            if len(fits) != 1:
                shapes = {k: a.shape for k, a in self.samples.arrays.items()}
                raise ValueError(
                    f"{data} must have one array of logits or features with {width} columns, got "
                    f"{shapes}: --column, or --kind"
                )
            self.samples = self.samples.only(*fits)
            (self.role,) = fits

    @property
    def num_samples(self) -> int | None:
        """How many; None where only reading on tells it."""
        if self.images is not None:
            return len(self.images) if hasattr(self.images, "labels") else None
        return self.samples.num_samples

    def __iter__(self) -> Iterator[tuple[list[str], Tensor]]:
        import torch
        from torch.utils.data import DataLoader

        if self.images is None:
            for item in self.samples:
                yield [], item[self.role]
            return

        def collate(samples: list[Any]) -> Any:
            return [sample.name for sample in samples], torch.stack([s.image for s in samples])

        workers = self.inputs.workers if hasattr(self.images, "labels") else 0
        yield from DataLoader(
            self.images, self.inputs.batch_size, num_workers=workers, collate_fn=collate
        )
