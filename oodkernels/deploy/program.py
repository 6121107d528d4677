"""A model as an exported program: its graph in a file, its weights beside it, nothing pickled."""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from oodkernels._files import check_file, replacing
from oodkernels.detectors import Outputs, OutputsModule, run

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from typing_extensions import Self

__all__ = ["Network", "Program", "export_program"]

_LAYER = "layer:"


class Network(nn.Module):
    """A model that gives what detectors read by name, as programs want it.

    Args:
        model: As for :func:`oodkernels.detectors.extract`.
        layers: Layers that are wanted.
        features: Whether features are.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], features: bool) -> None:
        super().__init__()
        self.model, self.layers, self.features = model, tuple(layers), features

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits, and what else there is, by name."""
        found = run(self.model, x, self.layers, self.features)
        fields = {name: getattr(found, name) for name in ("logits", "features", "confidence")}
        layers = {f"{_LAYER}{name}": tensor for name, tensor in found.layers.items()}
        return {k: v for k, v in {**fields, **layers}.items() if v is not None}


class Program(OutputsModule):
    """An exported :class:`Network`, which gives :class:`Outputs`.

    Attributes:
        content: What JSON keeps of it.
    """

    def __init__(
        self, graph: nn.Module, content: Mapping[str, Any], program: ExportedProgram | None = None
    ) -> None:
        super().__init__()
        self.graph, self.content, self._program = graph, dict(content), program
        for module in self.modules():
            module.training = False

    def train(self, mode: bool = True) -> Self:
        """Do nothing: it is in evaluation mode and stays in it."""
        return self

    def forward(self, x: Tensor) -> Outputs:
        """What the model says."""
        found = dict(self.graph(x))
        layers = {name: found.pop(_LAYER + name) for name in self.content["layers"]}
        return Outputs(
            **found, layers=layers, axes=self.content["axes"], absent=self.content["absent"]
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The weights by the names that the model has for them."""
        found = self.graph.state_dict(*args, **kwargs)
        return {k.removeprefix("model."): v for k, v in found.items() if k.startswith("model.")}

    @classmethod
    def export(cls, where: str, network: Network, example: Tensor) -> Program:
        """The program of a network.

        Args:
            where: What errors start with.
            network: In evaluation mode.
            example: (2, ...) inputs.

        Raises:
            ValueError: It cannot be exported.
        """
        if isinstance(network.model, Program):
            return network.model
        with torch.no_grad():
            outputs = run(network.model, example, network.layers, network.features)
        content = {
            "layers": list(network.layers),
            "axes": dict(outputs.axes),
            "absent": outputs.absent,
            "strides": _strides(network.model.state_dict()),
        }
        program = export_program(
            where, network, example, "; program=False goes without, and load then needs the model"
        )
        return cls(program.module(check_guards=False), content, program)

    def save(self, path: Path) -> None:
        """Write the graph; of the weights only their names, types and shapes."""
        program = self._program
        assert program is not None
        kept = dict(program.state_dict)
        try:
            for name, tensor in kept.items():
                hollow = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                is_parameter = isinstance(tensor, nn.Parameter)
                program.state_dict[name] = (
                    nn.Parameter(hollow, tensor.requires_grad) if is_parameter else hollow
                )
            buffer = io.BytesIO()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the weights, which are elsewhere
                torch.export.save(program, buffer)
        finally:
            program.state_dict.update(kept)
        with replacing(path) as temporary:
            temporary.write_bytes(buffer.getvalue())

    @classmethod
    def load(
        cls,
        where: str,
        path: Path,
        content: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        device: torch.device,
    ) -> Program:
        """The program in a file that :meth:`save` wrote, with its weights.

        Raises:
            ValueError: The file is none of these, holds pickled objects, or the weights do not fit.
        """
        data = check_file(where, path).read_bytes()
        _refuse_pickles(f"{where}: {path.name}", data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of buffers that cannot be written to
            program = torch.export.load(io.BytesIO(data))
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        graph = program.module(check_guards=False)
        strides = content["strides"]
        own = {
            f"model.{name}": _laid_out(tensor, strides.get(name)).to(device)
            for name, tensor in weights.items()
        }
        graph.load_state_dict({**graph.state_dict(), **own}, strict=True, assign=True)
        unused = own.keys() - graph.state_dict().keys()
        if unused:
            raise ValueError(f"weights must be those of the program, got {sorted(unused)[:4]} more")
        for parameter in graph.parameters():
            parameter.requires_grad_(False)
        return cls(graph, content, program)


def _strides(weights: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Strides of the weights that files would lay out otherwise, such as ``channels_last`` ones.

    The layout decides how a convolution is computed, and so its last digits.
    """
    return {
        name: list(tensor.stride())
        for name, tensor in weights.items()
        if tensor.stride() == torch.empty_like(tensor).stride()  # without gaps
        and tensor.stride() != torch.empty(tensor.shape, device="meta").stride()
    }


def _laid_out(tensor: Tensor, stride: Sequence[int] | None) -> Tensor:
    if stride is None:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)


def export_program(
    where: str, module: nn.Module, example: Tensor, otherwise: str = ""
) -> ExportedProgram:
    """A module as a program that takes batches of any size.

    Args:
        where: What errors start with.
        module: Takes x.
        example: (2, ...) inputs.
        otherwise: What else can be done, for errors.

    Raises:
        ValueError: It cannot be exported; the message has the first line of the cause.
    """
    batch = ({0: torch.export.Dim.DYNAMIC},)
    try:
        with torch.no_grad():
            return torch.export.export(module, (example,), dynamic_shapes=batch, strict=False)
    except Exception as error:  # whatever a model's code or the exporter raises
        lines = [line for line in str(error).splitlines() if line.strip()]
        cause = " ".join(lines[:2])[:300]
        raise ValueError(
            f"{where}: torch.export cannot export it for batches of any size: "
            f"{type(error).__name__}: {cause}{otherwise}"
        ) from error


_MEMBERS = re.compile(
    r"(archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)"
    r"|models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt)"
)


def _refuse_pickles(where: str, data: bytes) -> None:
    """Raise ValueError unless an archive of torch.export holds nothing that would be unpickled."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{where}: must be a program of torch.export: {error}") from None
    for name, content in members.items():
        if not _MEMBERS.fullmatch(name):
            raise ValueError(f"{where}: must hold tensors and a graph alone, got {name[:80]!r}")
        if name.endswith("_config.json"):
            entries = json.loads(content).get("config", {}).values()
            if any(entry.get("use_pickle") for entry in entries):
                raise ValueError(f"{where}: must hold nothing pickled, got an entry of {name}")
        if name.endswith(".pt") and content:
            try:
                torch.load(io.BytesIO(content), weights_only=True)
            except Exception as error:
                raise ValueError(f"{where}: must hold nothing pickled: {name}") from error
