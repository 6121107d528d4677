"""The bindings of the CUDA ops, run without a GPU up to the launch (cuda_bindings.py)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import cuda_bindings
import op_db
import pytest
import torch
from cuda_bindings import On, Result
from cuda_emulator import needs_compiler
from torch import Tensor

pytestmark = needs_compiler

F32, BF16, F64, I64 = torch.float32, torch.bfloat16, torch.float64, torch.int64


def meta(*sizes: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def offsets(*widths: int) -> Tensor:
    return torch.tensor((0, *widths)).cumsum(0)


BACKWARD = {  # what autograd calls, or other ops are made of
    "_mos_log_others": (meta(9, 12), offsets(5, 7)),
    "_mos_log_others_backward": (meta(9, 2), meta(9, 12), offsets(5, 7), meta(9, 2, 2)),
    "_mos_loss": (meta(9, 12), meta(9, dtype=I64), offsets(5, 7), -100),
    "_mos_loss_backward": (
        *(meta(9), meta(9, 12), meta(9, dtype=I64), offsets(5, 7), meta(9, 2, 2), -100),
    ),
    "_outlier_cross_entropy": (meta(9, 12), meta(9, dtype=I64)),
    "_outlier_cross_entropy_backward": (
        *(meta(9), meta(9), meta(9, 12), meta(9, dtype=I64), meta(9, 2)),
    ),
    "_roc_keys": (meta(100),),
    "_roc_counts": (meta(100, dtype=torch.int32), meta(70, dtype=torch.int32)),
}
ELSEWHERE = {
    *("mos_log_others", "mos_loss", "outlier_cross_entropy", "roc_metrics"),
    *("_outlier_loss", "_steer_histogram_"),
}
"""Made of other ops, or of the CPU alone."""
Calls = list[tuple[str, tuple[Any, ...]]]


def in_order(name: str, sample: op_db.Sample) -> tuple[Any, ...]:
    named = cuda_bindings.schema(name).arguments[len(sample.args) :]
    given = [sample.kwargs.get(a.name, a.default_value) for a in named]
    return (*sample.args, *given)


@functools.cache
def samples_of(dtype: torch.dtype) -> Calls:
    return [
        (op.name, in_order(op.name, sample))
        for op in op_db.OPS
        if op.name not in ELSEWHERE
        for sample in op.samples("cpu", dtype)
    ]


def wrong(calls: Calls, results: list[Result]) -> list[str]:
    assert len(calls) == len(results)
    return [
        f"{name} {[tuple(a.shape) if isinstance(a, Tensor) else a for a in arguments]}: {fault}"
        for (name, arguments), result in zip(calls, results, strict=True)
        for fault in result.faults()
    ]


def test_every_op_is_called() -> None:
    assert cuda_bindings.names() == {op.name for op in op_db.OPS} - ELSEWHERE | set(BACKWARD)


@pytest.mark.parametrize("dtype", op_db.FLOATS, ids=str)
def test_launches(dtype: torch.dtype) -> None:
    """On the device and the stream of the tensors, within what any GPU has; nothing waits."""
    calls = samples_of(dtype) + list(BACKWARD.items())
    results = cuda_bindings.run(calls)
    assert wrong(calls, results) == []
    for (name, arguments), result in zip(calls, results, strict=True):
        on_meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
        expected = getattr(torch.ops.oodk, name)(*on_meta)
        tensors = (
            expected if isinstance(expected, (tuple, list)) else [expected] * (expected is not None)
        )
        found = [(kind, sizes) for kind, device, sizes in result.outputs if device == 1]
        assert found == [(t.dtype, tuple(t.shape)) for t in tensors], name


@pytest.mark.parametrize("processors", [1, 1000])
def test_devices_of_other_sizes(processors: int) -> None:
    calls = samples_of(F32) + list(BACKWARD.items())
    assert wrong(calls, cuda_bindings.run(calls, processors)) == []


# --- nothing, and very much -----------------------------------------------------------------------

ROWS: dict[
    str, Callable[..., tuple[Any, ...]]
] = {  # ops that go row by row: what they take for so many
    "mos_score": lambda *n: (meta(*n, 12), offsets(5, 7)),
    "mos_predict": lambda *n: (meta(*n, 12), offsets(5, 7)),
    "_mos_log_others": lambda *n: (meta(*n, 12), offsets(5, 7)),
    "_mos_log_others_backward": lambda *n: (
        *(meta(*n, 2), meta(*n, 12), offsets(5, 7), meta(*n, 2, 2)),
    ),
    "_mos_loss": lambda *n: (meta(*n, 12), meta(*n, dtype=I64), offsets(5, 7), -100),
    "_mos_loss_backward": lambda *n: (
        *(meta(*n), meta(*n, 12), meta(*n, dtype=I64), offsets(5, 7), meta(*n, 2, 2), -100),
    ),
    "_outlier_cross_entropy": lambda *n: (meta(*n, 12), meta(*n, dtype=I64)),
    "_outlier_cross_entropy_backward": lambda *n: (
        *(meta(*n), meta(*n), meta(*n, 12), meta(*n, dtype=I64), meta(*n, 2)),
    ),
    "logit_scores": lambda *n: (meta(*n, 12),),
    "gen_scores": lambda *n: (meta(*n, 12), [0.1, 0.5], [10, 12]),
    "feature_stats": lambda *n: (meta(*n, 12), torch.tensor([65.0, 90.0], dtype=F64)),
    "scaled_energy": lambda *n: (meta(*n, 12), meta(*n, 3)),
    "indexed_distances": lambda *n: (meta(*n, 12), meta(5, 12), meta(*n, 3, dtype=I64)),
    "shape_features_": lambda *n: (meta(*n, 12), "ash-s", 65.0),
    "nearest_neighbors": lambda *n: (meta(*n, 12), meta(50, 12), 3),
    "nearest_centroid": lambda *n: (meta(*n, 12), meta(5, 12)),
}
MANY = (2**31 // 12 + 1, 2**31 - 1, 2**31, 2**33 + 5)
PIECEWISE = "nearest_neighbors"  # launches for some thousands of queries at a time
LARGE: Calls = [
    *((name, of(n)) for name, of in ROWS.items() for n in MANY if name != PIECEWISE),
    *((name, of(70_000, 70_000)) for name, of in ROWS.items() if name != PIECEWISE),
    (PIECEWISE, ROWS[PIECEWISE](70_000)),
    ("mos_score", (meta(5, 2**30 - 1), offsets(5, 2**30 - 6))),
    ("logit_scores", (meta(4_000_000, 1008, dtype=BF16),)),
    ("_outlier_cross_entropy", (meta(2, 2**30 - 1), meta(2, dtype=I64))),
    *(("_roc_keys", (meta(n),)) for n in MANY),
    *(
        ("_roc_counts", (meta(n, dtype=torch.int32), meta(m, dtype=torch.int32)))
        for n, m in itertools.product(MANY, repeat=2)
    ),
    *(
        ("roc_histogram_", (meta(2, 1000, dtype=I64), meta(65536, dtype=I64), meta(n), 1))
        for n in (1, 2**31, 2**40)
    ),
    *(("kmeans_init", (meta(n, 8), 64, 3)) for n in (1025, 9000, 70_000, 2**30)),
    ("kmeans", (meta(2**30, 8), meta(3, 64, dtype=I64), 3)),
    ("kmeans", (meta(70_000, 1025, 8), meta(70_000, 1, 64, dtype=I64), 3)),
    ("nearest_centroid", (meta(3, 2**31 + 7, 8), meta(3, 100, 8))),
    ("nearest_centroid", (meta(70_000, 9000, 8), meta(70_000, 100, 8))),
    ("nearest_neighbors", (meta(9, 12), meta(2**30 - 1, 12), 5)),
    ("cluster_argmax", (meta(2**31 - 2, dtype=I64), meta(2**31 - 2), 64)),
    ("cluster_argmax", (meta(70_000, 500, dtype=I64), meta(70_000, 500), 64, 3)),
    ("dos_select", (meta(70_000, 384, 34), meta(70_000, 384), 64, 64)),
    ("dos_select", (meta(2**22, 342), meta(2**22), 64, 64)),
]


@pytest.mark.parametrize("rows", [(0,), (3, 0)], ids=str)
def test_no_rows(rows: tuple[int, ...]) -> None:
    """Nothing is launched on nothing."""
    calls = [(name, of(*rows)) for name, of in ROWS.items()]
    for (name, _), result in zip(calls, cuda_bindings.run(calls), strict=True):
        assert not result.faults(), name
        assert not result.launches or name in ("nearest_neighbors", "nearest_centroid"), name


def test_sizes_beyond_2_31() -> None:
    """Of tensors, rows, problems: each has a grid and memory for it, of more than any GPU's."""
    assert wrong(LARGE, cuda_bindings.run(LARGE)) == []


def test_what_is_too_large_is_refused_before_it_is_launched() -> None:
    calls: Calls = [
        ("logit_scores", (meta(1, 2**30),)),
        ("nearest_neighbors", (meta(9, 12), meta(2**30, 12), 5)),
        ("cluster_argmax", (meta(2**31 - 1, dtype=I64), meta(2**31 - 1), 64)),
        ("kmeans_init", (meta(100, 2**30), 2)),
        ("kmeans_init", (meta(100, 8), 2, 2**20, 2**12)),
        ("fault_blocks", (meta(2**31),)),
        ("fault_blocks", (meta(2**32 + 5),)),  # 5, in 32 bits
    ]
    for (name, _), result in zip(calls, cuda_bindings.run(calls), strict=True):
        assert result.error, name
        assert not result.launches, name


# --- other devices --------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [-1, 0], ids=["cpu", "cuda:0"])
def test_arguments_on_different_devices_are_refused(device: int) -> None:
    """No kernel sees an address of another device."""
    calls: Calls = []
    for name, arguments in dict((*samples_of(F32), *BACKWARD.items())).items():
        tensors = [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]
        for i in tensors if len(tensors) > 1 else ():
            moved = [On(a, device) if i == j else a for j, a in enumerate(arguments)]
            calls.append((name, tuple(moved)))
    for (name, arguments), result in zip(calls, cuda_bindings.run(calls), strict=True):
        at = [isinstance(a, On) for a in arguments].index(True)
        assert result.error, f"{name}, argument {at}"
        assert not result.launches, f"{name}, argument {at}"


def test_contents_are_looked_at_only_when_asked_for() -> None:
    calls: Calls = [
        ("mos_score", (meta(5, 12), offsets(5, 6))),
        ("_mos_loss", (meta(2, 12), torch.tensor([3, 10]), offsets(5, 7), -100)),
        ("_outlier_cross_entropy", (meta(2, 12), torch.tensor([3, 12]))),
        ("feature_stats", (meta(2, 12), torch.tensor([101.0], dtype=F64))),
        ("indexed_distances", (meta(1, 4), meta(3, 4), torch.tensor([[0, 3]]))),
        ("kmeans", (meta(9, 4), torch.tensor([[1, 9]]))),
    ]
    assert wrong(calls, cuda_bindings.run(calls)) == []
    for (name, _), result in zip(calls, cuda_bindings.run(calls, OODK_VALIDATE="1"), strict=True):
        assert "ValueError" in result.error, name
        assert not result.launches, name
        assert {e.kind for e in result.events if e.kind != "empty"} == {"to host"}, name


# --- planted faults -------------------------------------------------------------------------------

FAULTS = {
    "fault_default_stream": "nothing is launched on stream 0",
    "fault_no_guard": "nothing is launched on device 0",
    "fault_waits": "waits for a copy to host",
    "fault_empty_grid": "1 to 2^31 - 1 blocks expected, got 0",
    "fault_threads": "1024 threads",
    "fault_shared": "bytes of shared memory",
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name: str) -> None:
    (result,) = cuda_bindings.run([(name, (meta(10),))])
    assert any(FAULTS[name] in fault for fault in result.faults()), result.faults()


def test_host_code_that_reads_device_memory_is_caught() -> None:
    with pytest.raises(RuntimeError, match="the bindings ended with -11"):
        cuda_bindings.run([("fault_reads_device", (meta(10),))])
