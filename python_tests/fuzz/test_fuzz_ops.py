"""The harness of ops: guarded memory, memory limits, many threads at once."""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fuzz.guarded import PAGE, Arena
from fuzz.ops import CASES, Draw, outputs, run_all
from op_db import OPS, Op, Sample
from processes import python, run_code
from torch import Tensor

from oodkernels import _C

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect and /proc")


def test_every_op_has_a_case() -> None:
    assert {op.name for op in OPS} == CASES.keys()


@linux
@pytest.mark.parametrize(("at_end", "index"), [(True, "3"), (False, "-1")])
def test_the_guard_is_real(at_end: bool, index: str) -> None:
    """Reading one element beyond a tensor, or before it, ends the process."""
    code = f"""
import ctypes, torch
from fuzz.guarded import Arena
x = Arena(100).place(torch.arange(3.0), (1,), {at_end})
assert x.tolist() == [0, 1, 2]
print("placed", flush=True)
(ctypes.c_float * 1).from_address(x.data_ptr() + {index} * 4)[0]
"""
    done = run_code(code)
    assert done.stdout.strip() == "placed", done.stderr
    assert done.returncode < 0


@linux
def test_tensors_are_what_was_placed() -> None:
    arenas = [Arena(PAGE * 64) for _ in range(2)]
    for number in range(200):
        draw = Draw(str(number), arenas)
        x = draw.normal((3, 5, 2))
        placed = draw.laid_out(x)
        assert placed.shape == x.shape
        assert torch.equal(placed.nan_to_num(9.0), x.nan_to_num(9.0))


@linux
@pytest.mark.parametrize(
    "cases", [500, pytest.param(8_000, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_random_calls(cases: int) -> None:
    seed = random.randrange(10**6) if cases > 500 else 0
    wrong = run_all(seed, 0, cases, _C.available_cpu_capabilities())
    assert not wrong, "\n".join([f"seed {seed}", *wrong])


@linux
def test_memory_that_is_not_there() -> None:
    done = python("-m", "fuzz.memory", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_eight_threads(op: Op) -> None:
    """Calls that run at once do not see each other."""
    samples = [s for s in op.samples("cpu", torch.float32) if s.args[0].numel()][:12]
    expected = [outputs(op.call(*s.args, **s.kwargs)) for s in samples]

    def work(thread: int) -> None:
        order = list(zip(samples, expected, strict=True)) * 4
        random.Random(thread).shuffle(order)
        for sample, outs in order:
            check_same(sample, outputs(op.call(*sample.args, **sample.kwargs)), outs)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def check_same(sample: Sample, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f.nan_to_num(0.5), e.nan_to_num(0.5)), sample.name
