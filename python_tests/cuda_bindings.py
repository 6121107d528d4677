"""Runs the bindings of the CUDA ops without a GPU: cuda_emulation/bindings.cpp.

The stable ABI is a list of C functions, so that a stub can stand in for torch, and another for the
CUDA runtime: a call goes through the real binding up to the launch, which is noted and not made.
Tensors have sizes, strides and an address that nothing may touch; they may be of any size, and are
on ``cuda:1`` while the current device is ``cuda:0``. A CUDA function that the stub lacks, such as
cudaMalloc or a synchronisation, does not compile.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cuda_emulator import compiled, kernel_names, limits_broken, resources_of
from torch import Tensor

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
DEVICE = 1
STREAM = 1000 + DEVICE
WAITS = ("to host", "to device")  # copies during which the host waits
DTYPES = {
    torch.uint8: 0,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}
_BY_CODE = {code: dtype for dtype, code in DTYPES.items()}


def _flags() -> list[str]:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    include = Path(spec.submodule_search_locations[0], "include")
    sources = ["torch_stub.h", *map(str, sorted(CUDA.glob("*.cu")))]
    return [
        *(word for source in sources for word in ("-include", source)),
        *("-std=c++20", "-O0", "-w", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *(f'-DTORCH_IS="{torch.__version__}"', "-isystem", str(include)),
    ]


@dataclass(frozen=True)
class Launch:
    kernel: str  # "" for CUB's
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # bytes, dynamic
    stream: int
    device: int


@dataclass(frozen=True)
class Event:
    kind: str
    bytes: int
    device: int
    current: int


@dataclass(frozen=True)
class Result:
    error: str
    outputs: tuple[tuple[torch.dtype, int, tuple[int, ...]], ...]  # type, device, sizes
    device: int  # current, afterwards
    launches: tuple[Launch, ...]
    events: tuple[Event, ...]

    def faults(self) -> list[str]:
        """What a GPU would not do, or not where it should, or make the host wait for."""
        found = [self.error] * bool(self.error)
        if self.device != 0:
            found.append(f"leaves device {self.device} as the current one")
        for launch in self.launches:
            name = launch.kernel or "CUB"
            if launch.device != DEVICE:
                found.append(f"{name} is launched on device {launch.device}")
            if launch.stream != STREAM:
                found.append(f"{name} is launched on stream {launch.stream}")
            if launch.kernel and not resources_of(launch.kernel) and "nothing" not in launch.kernel:
                found.append(f"{name} is not in cuda_resources.json: run scripts/cuda_resources.py")
            if launch.grid[1:] != (1, 1) or not 0 < launch.grid[0] < 2**31:
                found.append(f"{name} has a grid of {launch.grid}")
            if launch.block[1:] != (1, 1) or launch.block[0] % 32:
                found.append(f"{name} has blocks of {launch.block}")
            found += limits_broken(launch.kernel, launch.block[0], launch.shared)
        for event in self.events:
            if event.kind in WAITS:
                found.append(f"waits for a copy {event.kind}")
            if event.device != DEVICE:
                found.append(f"{event.kind} on device {event.device}")
        return found


@dataclass(frozen=True)
class On:
    """A tensor on another device than ``cuda:1``; -1: the CPU."""

    tensor: Tensor
    device: int


def run(
    calls: Iterable[tuple[str, Sequence[Any]]], processors: int = 132, **environment: str
) -> list[Result]:
    """Calls of ops by name. Arguments that are left out have their defaults."""
    program = compiled("bindings", _flags())
    lines = [_line(name, arguments) for name, arguments in calls]
    done = subprocess.run(
        [str(program), str(processors)],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"the bindings ended with {done.returncode}: {done.stderr}")
    names = kernel_names(program)
    return [_result(json.loads(line), names) for line in done.stdout.splitlines()[1:]]


def names() -> set[str]:
    """Of all ops that have a binding."""
    program = compiled("bindings", _flags())
    done = subprocess.run([str(program)], input="", capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split() if not name.startswith("fault_")}


def schema(name: str) -> Any:
    return getattr(torch.ops.oodk, name).default._schema


def _line(name: str, arguments: Sequence[Any]) -> str:
    if name.startswith("fault_"):
        return f"{name} 1 " + " ".join(_token(a, "Tensor") for a in arguments)
    of = schema(name)
    given = [*arguments, *(a.default_value for a in of.arguments[len(arguments) :])]
    tokens = [_token(x, str(a.type)) for x, a in zip(given, of.arguments, strict=True)]
    return " ".join([name, str(len(of.returns)), *tokens])


def _token(x: Any, kind: str) -> str:
    if kind.startswith("Optional["):
        return "n" if x is None else "?" + _token(x, kind[9:-1])
    if kind == "List[float]":
        return ",".join(["ld", *map(str, x)])
    if kind == "List[int]":
        return ",".join(["li", *map(str, x)])
    if kind != "Tensor":
        letter = {"int": "i", "float": "d", "bool": "b", "str": "s"}[kind]
        return f"{letter},{int(x) if kind == 'bool' else x}"
    on = x if isinstance(x, On) else On(x, DEVICE)
    t = on.tensor
    parts = [DTYPES[t.dtype], on.device, t.storage_offset() * t.element_size()]
    parts += ["x" + "x".join(map(str, t.shape)), "x" + "x".join(map(str, t.stride()))]
    if t.device.type == "cpu" and t.numel() < 1000:  # what OODK_VALIDATE=1 would see
        parts.append(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex())
    return ",".join(["t", *map(str, parts)])


def _result(found: dict[str, Any], names: dict[int, str]) -> Result:
    return Result(
        found["error"],
        tuple((_BY_CODE[code], device, tuple(sizes)) for code, device, sizes in found["outputs"]),
        found["device"],
        tuple(
            Launch(names[at] if at else "", tuple(grid), tuple(block), *rest)
            for at, grid, block, *rest in found["launches"]
        ),
        tuple(Event(*event) for event in found["events"]),
    )
