"""A bundle as a program, compiled ahead of time, as ONNX and as a model repository."""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from oodkernels import reference
from oodkernels._checks import check_count
from oodkernels._files import replacing, write_text
from oodkernels._optional import require
from oodkernels.deploy.program import export_program
from oodkernels.detectors import OODDetector

if TYPE_CHECKING:
    from torch.export import ExportedProgram

PathLike: TypeAlias = str | os.PathLike[str]

__all__ = [
    "bundle_to_onnx",
    "bundle_to_triton",
    "compile_bundle",
    "decompose",
    "export_bundle",
    "nodes_of",
]


class _Fields(nn.Module):
    """A bundle that gives the fields of its decisions by name."""

    def __init__(self, bundle: nn.Module) -> None:
        super().__init__()
        self.bundle = bundle

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Those that are not None."""
        fields: dict[str, Any] = self.bundle(x)._asdict()
        return {name: value for name, value in fields.items() if value is not None}


def export_bundle(
    bundle: nn.Module, example: Tensor, detector: OODDetector, where: str = "Bundle.export"
) -> ExportedProgram:
    """Do what :meth:`Bundle.export` says.

    Args:
        bundle: The bundle.
        example: (2, ...) inputs.
        detector: The one that decides.
        where: What errors start with.
    """
    bundle(example)  # what is computed once is computed before; errors as they are
    if "x" in detector.needs:
        raise ValueError(f"{where}: {detector.name} takes gradients of the model, no program does")
    return export_program(where, _Fields(bundle), example)


def compile_bundle(
    bundle: nn.Module, example: Tensor, detector: OODDetector, path: PathLike
) -> Path:
    """Do what :meth:`Bundle.compile_to` says."""
    path = _path("Bundle.compile_to", path, ".pt2")
    program = export_bundle(bundle, example, detector, "Bundle.compile_to")
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return path


def bundle_to_onnx(
    bundle: nn.Module, example: Tensor, detector: OODDetector, path: PathLike
) -> Path:
    """Do what :meth:`Bundle.to_onnx` says."""
    where = "Bundle.to_onnx"
    path = _path(where, path, ".onnx")
    for package in ("onnx", "onnxscript"):
        require(package, "onnx", where)
    program = decompose(export_bundle(bundle, example, detector, where))
    with torch.no_grad():
        names = list(_Fields(bundle)(example))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own deprecations
        made = torch.onnx.export(
            program, dynamo=True, input_names=["x"], output_names=names, verbose=False
        )
    assert made is not None
    with replacing(path) as temporary:
        made.save(temporary)
    return path


def nodes_of(program: ExportedProgram) -> Iterator[torch.fx.Node]:
    """All nodes of a program, those of graphs within it too, such as what autocast leaves alone."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from module.graph.nodes


def decompose(program: ExportedProgram) -> ExportedProgram:
    """The program with each op of this package written out as :mod:`oodkernels.reference` has it.

    Raises:
        ValueError: There is an op that the reference does not have.
    """
    constants = program.graph_signature.inputs_to_lifted_tensor_constants
    table: dict[Any, Callable[..., Any]] = {}
    for node in nodes_of(program):
        op: Any = node.target
        if node.op != "call_function" or getattr(op, "namespace", "") != "oodk":
            continue
        name = op._opname
        rule = getattr(reference, name, None)
        if rule is None:
            raise ValueError(f"Bundle.to_onnx: {name} cannot be written out")
        place = list(inspect.signature(rule).parameters).index
        if "groups" in inspect.signature(rule).parameters:
            # Tracing knows tensors by their shape alone, and the rule needs the numbers.
            groups: Any = node.args[place("groups")]
            name_of = constants.get(groups.name)
            if name_of is None:
                raise ValueError(f"Bundle.to_onnx: {name} must have its groups as a constant")
            offsets = program.constants[name_of]
            rule = partial(_with_groups, rule, place("groups"), offsets.cpu().numpy())
        table[op] = rule
    found = program.run_decompositions(table) if table else program
    left = {str(node.target) for node in nodes_of(found) if "oodk" in str(node.target)}
    if left:
        raise ValueError(f"Bundle.to_onnx: {', '.join(sorted(left))} cannot be written out")
    return found


def _with_groups(rule: Callable[..., Any], place: int, offsets: Any, *args: Any) -> Any:
    return rule(*args[:place], offsets, *args[place + 1 :])


def bundle_to_triton(
    bundle: nn.Module,
    example: Tensor,
    detector: OODDetector,
    folder: PathLike,
    name: str,
    max_batch: int,
) -> Path:
    """Do what :meth:`Bundle.to_triton` says."""
    where = "Bundle.to_triton"
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"{where}: name must be letters, digits, _, . and -, got {name!r}")
    check_count(where, "max_batch", max_batch)
    model = Path(folder) / name
    (model / "1").mkdir(parents=True, exist_ok=True)
    bundle_to_onnx(bundle, example, detector, model / "1" / "model.onnx")
    with torch.no_grad():
        outputs = _Fields(bundle)(example)
    shape = ", ".join(map(str, example.shape[1:]))
    kind = _TRITON[example.dtype]
    lines = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {max_batch}",
        f'input [ {{ name: "x" data_type: {kind} dims: [ {shape} ] }} ]',
        *(
            f'output [ {{ name: "{field}" data_type: {_TRITON[value.dtype]} '
            "dims: [ 1 ] reshape { shape: [ ] } } ]"
            for field, value in outputs.items()
        ),
        "dynamic_batching { }",
    ]
    write_text(model / "config.pbtxt", "\n".join(lines) + "\n")
    return model


_TRITON = {
    torch.float64: "TYPE_FP64",
    torch.float32: "TYPE_FP32",
    torch.bfloat16: "TYPE_BF16",
    torch.float16: "TYPE_FP16",
    torch.int64: "TYPE_INT64",
    torch.uint8: "TYPE_UINT8",
    torch.bool: "TYPE_BOOL",
}


def _path(where: str, path: PathLike, ending: str) -> Path:
    path = Path(path)
    if path.suffix != ending:
        raise ValueError(f"{where}: path must end in {ending}, got {os.fspath(path)!r}")
    return path
