"""The CUDA kernels, run on the CPU by cuda_emulation/ and held against ``oodkernels.reference``.

Every run is under AddressSanitizer and UBSan, with the threads of a block in several orders that
must give the same bits, and with shared memory and outputs filled with a NaN first.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from oodkernels import reference

HERE = Path(__file__).parent
SOURCES = HERE / "cuda_emulation"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # as enum DType has them
POISON = 0xFF
ORDERS = 3

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}")


class Emulator:
    """The compiled programs, and a place for their files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

        def build(name: str) -> None:
            include = ["-I", str(SOURCES), "-I", str(HERE.parent / "csrc")]
            files = [str(SOURCES / f"{name}.cpp"), "-o", str(directory / name)]
            subprocess.run([COMPILER, *FLAGS, *include, *files], check=True)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(build, ("mos", "logits", "faults")))

    def start(
        self, kernel: str, inputs: dict[str, Tensor], **values: Any
    ) -> subprocess.CompletedProcess[str]:
        program = "mos" if "mos" in kernel else "logits" if "logit" in kernel else "faults"
        for file in self.directory.glob("*.out"):
            file.unlink()
        for name, x in inputs.items():
            x.contiguous().view(torch.uint8).numpy().tofile(self.directory / f"{name}.in")
        settings = {"processors": 1, "shared_bytes": 228 << 10, "orders": ORDERS, **values}
        arguments = [f"{name}={value}" for name, value in settings.items()]
        return subprocess.run(
            [str(self.directory / program), kernel, str(self.directory), *arguments],
            capture_output=True,
            text=True,
        )

    def run(
        self, kernel: str, inputs: dict[str, Tensor], outputs: dict[str, torch.dtype], **values: Any
    ) -> list[Tensor]:
        """The kernel's outputs, flat, none of which it may have left unwritten."""
        done = self.start(kernel, inputs, **values)
        assert done.returncode == 0, done.stderr
        found = [self.output(name, dtype) for name, dtype in outputs.items()]
        for name, x in zip(outputs, found, strict=True):
            assert not unwritten(x).any(), f"{name} is not written at {unwritten(x).nonzero()[:5]}"
        return found

    def output(self, name: str, dtype: torch.dtype) -> Tensor:
        raw = np.fromfile(self.directory / f"{name}.out", np.uint8)
        return torch.from_numpy(raw).view(dtype) if raw.size else torch.empty(0, dtype=dtype)


def unwritten(x: Tensor) -> Tensor:
    return (x.view(torch.uint8).view(-1, x.element_size()) == POISON).all(1)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("cuda_emulation"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny torch calls cost less without waking other threads for each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- samples --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sample:
    rows: int
    sizes: tuple[int, ...]  # of the groups, in columns, others included
    dtype: torch.dtype = torch.float32
    kind: str = "normal"
    gap: int = 0  # values between the rows
    offset: int = 0  # values before the first row
    index: torch.dtype = torch.int64
    shared: int = 228  # KiB of the emulated device: the less, the shorter the spans of rows
    processors: int = 1  # of the emulated device: the more, the fewer rows to a block

    def __str__(self) -> str:
        sizes = "+".join(map(str, self.sizes))
        if len(self.sizes) > 4:
            sizes = f"{sum(self.sizes)}in{len(self.sizes)}"
        parts: list[Any] = [self.rows, sizes, str(self.dtype)[6:], self.kind]
        parts += [f"{n}{v}" for n, v in (("gap", self.gap), ("offset", self.offset)) if v]
        return "-".join(map(str, parts))

    @property
    def width(self) -> int:
        return sum(self.sizes)

    @property
    def groups(self) -> Tensor:
        return torch.tensor((0, *self.sizes)).cumsum(0).to(self.index)

    @property
    def storage(self) -> Tensor:
        """What `logits` is a view of; the same on every call."""
        stride, random = self.width + self.gap, torch.Generator().manual_seed(self.rows)
        n = self.offset + (self.rows - 1) * stride + self.width if self.rows else self.offset
        x = torch.randn(n, generator=random, dtype=torch.float64) * 3
        if self.kind == "large":
            x *= 4000
        if self.kind == "ties":
            x = x.round().clamp(-2, 2)
        x = x.to(self.dtype)
        if self.kind == "special":
            at = torch.randint(0, max(n, 1), (max(self.rows, n // 40),), generator=random)
            values = torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.inf])
            x[at] = values[torch.randint(0, 4, at.shape, generator=random)].to(self.dtype)
            rows = self.view(x)
            for r in range(0, self.rows, 3):  # a whole group, all but its others, a whole row
                k = r % len(self.sizes)
                begin, end = self.groups[k : k + 2].tolist()
                rows[r, begin + (r % 2) : end] = -torch.inf
            rows[self.rows // 2] = -torch.inf
        return x

    def view(self, storage: Tensor) -> Tensor:
        stride = self.width + self.gap
        return storage.as_strided((self.rows, self.width), (stride, 1), self.offset)

    @property
    def logits(self) -> Tensor:
        return self.view(self.storage)

    @property
    def target(self) -> Tensor:
        random = torch.Generator().manual_seed(1)
        classes = self.width - len(self.sizes)
        target = torch.randint(0, classes, (self.rows,), generator=random)
        target[::5] = -100
        target[1::5] = torch.tensor([0, classes - 1]).repeat(self.rows)[: len(target[1::5])]
        return target

    @property
    def accumulated(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def inputs(self, **more: Tensor) -> dict[str, Tensor]:
        return {"logits": self.storage, "groups": self.groups, **more}

    def values(self) -> dict[str, Any]:
        return {
            "dtype": DTYPES.index(self.dtype),
            "rows": self.rows,
            "width": self.width,
            "stride": self.width + self.gap,
            "offset": self.offset,
            "groups": len(self.sizes),
            "wide_offsets": int(self.index == torch.int64),
            "shared_bytes": self.shared << 10,
            "processors": self.processors,
        }


IMAGENET = (399, 522, 10, 8, 53, 9, 4, 3)
SAMPLES = [
    *(Sample(9, IMAGENET, dtype) for dtype in DTYPES),
    *(Sample(70, (2, 5, 13, 3), dtype, offset=3, gap=2) for dtype in DTYPES),
    *(Sample(40, (7, 40, 2, 2, 30), dtype, "special", offset=1) for dtype in DTYPES),
    *(Sample(40, (24, 8, 17), dtype, "large") for dtype in DTYPES),
    *(Sample(33, (11, 6, 23), dtype, "ties", offset=2) for dtype in DTYPES),
    Sample(1, (2,)),
    Sample(1, (2,), torch.bfloat16, offset=7),
    Sample(800, (5, 6), torch.bfloat16),  # a row to a thread
    Sample(300, (3, 4, 4), index=torch.int32),
    Sample(2, (1501,), torch.bfloat16, offset=1),  # one huge group over all threads
    Sample(20, (700, 2, 799), shared=8, gap=3),  # rows in spans
    Sample(6, (100, 2, 2, 2500, 9), torch.float16, shared=8, offset=5),
    Sample(3, (3, 2) * 1000, torch.bfloat16, index=torch.int32),  # many tiny groups
    Sample(5, (3, 2) * 1000, shared=8, kind="special"),
    Sample(40, (100, 30), torch.bfloat16, processors=4),
    Sample(8300, (2, 2), torch.bfloat16),  # more rows than the grid has threads
    Sample(900, (5, 9, 70)),  # as much shared memory as there is
]

samples = pytest.mark.parametrize("sample", SAMPLES, ids=str)


def assert_close(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Equal up to the rounding of what is accumulated in float32 or float64."""
    for f, e in zip(found, expected, strict=True):
        rtol, atol = (1e-5, 2e-6) if f.dtype == torch.float32 else (1e-9, 1e-12)
        e = e.flatten().to(f.dtype)
        torch.testing.assert_close(f, e, rtol=rtol, atol=atol, equal_nan=True)


# --- MOS ------------------------------------------------------------------------------------------


@samples
def test_mos_score(emulator: Emulator, sample: Sample) -> None:
    (score,) = emulator.run(
        "mos_score", sample.inputs(), {"score": sample.accumulated}, **sample.values()
    )
    assert_close([score], [reference.mos_score(sample.logits.double(), sample.groups)])


@samples
def test_mos_predict(emulator: Emulator, sample: Sample) -> None:
    outputs = dict.fromkeys(("score", "log_odds", "prob"), sample.accumulated)
    outputs |= dict.fromkeys(("label", "group"), torch.int64)
    score, log_odds, prob, label, group = emulator.run(
        "mos_predict", sample.inputs(), outputs, **sample.values()
    )
    expected = reference.mos_predict(sample.logits.double(), sample.groups)
    assert_close([score, log_odds, prob], [expected[i] for i in (0, 1, 4)])
    # Where two groups' probabilities are the same but for rounding, either may win.
    best = [z.softmax(-1)[:, 1:].amax(-1) for z in reference._split(sample.logits, sample.groups)]
    top = torch.stack([*best, torch.full_like(best[0], -1)]).topk(2, 0).values
    clear = ~(top[0] - top[1] < 1e-5)
    torch.testing.assert_close(label[clear], expected[2][clear])
    torch.testing.assert_close(group[clear], expected[3][clear])


@samples
def test_mos_log_others(emulator: Emulator, sample: Sample) -> None:
    logits = sample.logits.double().requires_grad_()
    expected = reference.mos_log_others(logits, sample.groups)
    random = torch.Generator().manual_seed(0)
    grad = torch.randn(expected.shape, generator=random, dtype=sample.accumulated)
    outputs = dict.fromkeys(("log_others", "stats"), sample.accumulated)
    found, stats = emulator.run("mos_log_others", sample.inputs(), outputs, **sample.values())
    assert_close([found], [expected.detach()])
    torch.autograd.backward(expected, grad)
    check_backward(emulator, "mos_log_others_backward", sample, logits, grad=grad, stats=stats)


@samples
def test_mos_loss(emulator: Emulator, sample: Sample) -> None:
    logits = sample.logits.double().requires_grad_()
    expected = reference.mos_loss(logits, sample.target, sample.groups)
    random = torch.Generator().manual_seed(0)
    grad = torch.randn(expected.shape, generator=random, dtype=sample.accumulated)
    outputs = dict.fromkeys(("loss", "stats"), sample.accumulated)
    inputs = sample.inputs(target=sample.target)
    found, stats = emulator.run("mos_loss", inputs, outputs, ignore_index=-100, **sample.values())
    assert_close([found], [expected.detach()])
    torch.autograd.backward(expected, grad)
    assert logits.grad is not None
    logits.grad[sample.target == -100] = 0  # autograd makes NaN of it where the row has one
    check_backward(
        emulator, "mos_loss_backward", sample, logits, target=sample.target, grad=grad, stats=stats
    )


def check_backward(
    emulator: Emulator, kernel: str, sample: Sample, logits: Tensor, **inputs: Tensor
) -> None:
    (found,) = emulator.run(
        kernel,
        sample.inputs(**inputs),
        {"grad_logits": sample.dtype},
        ignore_index=-100,
        **sample.values(),
    )
    assert logits.grad is not None
    rounding = torch.finfo(sample.dtype).eps
    torch.testing.assert_close(
        found.double(),
        logits.grad.flatten(),
        rtol=max(1e-5 if sample.dtype != torch.float64 else 1e-9, rounding),
        atol=1e-6 if sample.dtype != torch.float64 else 1e-12,
        equal_nan=True,
    )


INVALID = [
    (1, 5, 12),  # does not start at 0
    (0, 5, 11),  # does not end at the width
    (0, 5, 13),
    (0, 11, 12),  # a group of one column
    (0, 0, 12),
    (0, 14, 12),  # decreasing
    (0, -7, 12),
    (0, 2**62, 12),
    (-(2**63), 2**63 - 1, -(2**63)),
    (2**32, 2**32 + 5, 2**32 + 12),  # valid but for the high bits
]


@pytest.mark.parametrize("offsets", INVALID, ids=str)
def test_invalid_groups_give_nan(emulator: Emulator, offsets: tuple[int, ...]) -> None:
    sample = Sample(5, (5, 7))
    values = sample.values()
    target = sample.target
    inputs = sample.inputs(groups=torch.tensor(offsets), target=target)
    f32, i64 = torch.float32, torch.int64
    (score,) = emulator.run("mos_score", inputs, {"score": f32}, **values)
    predicted = emulator.run(
        "mos_predict",
        inputs,
        {"score": f32, "log_odds": f32, "prob": f32, "label": i64, "group": i64},
        **values,
    )
    others = emulator.run("mos_log_others", inputs, {"log_others": f32, "stats": f32}, **values)
    loss = emulator.run(
        "mos_loss", inputs, {"loss": f32, "stats": f32}, ignore_index=-100, **values
    )
    for x in (score, *predicted[:3], *others, *loss):
        assert x.isnan().all()
    for x in predicted[3:]:
        assert (x == 0).all()
    gradients = {"mos_log_others_backward": torch.ones(5, 2), "mos_loss_backward": torch.ones(5)}
    for kernel, grad in gradients.items():
        more = {"grad": grad, "stats": torch.ones(5, 2, 2)}
        (x,) = emulator.run(
            kernel, {**inputs, **more}, {"grad_logits": f32}, ignore_index=-100, **values
        )
        assert x.isnan().all()


def test_invalid_targets_give_nan(emulator: Emulator) -> None:
    sample = Sample(6, (5, 7))
    target = torch.tensor([-1, 10, 2**62, -(2**63), 9, -100])
    bad = torch.tensor([True] * 4 + [False] * 2)
    inputs = sample.inputs(target=target)
    values = {**sample.values(), "ignore_index": -100}
    loss, stats = emulator.run(
        "mos_loss", inputs, {"loss": torch.float32, "stats": torch.float32}, **values
    )
    assert torch.equal(loss.isnan(), bad)
    inputs |= {"grad": torch.ones(6), "stats": stats}
    (grad,) = emulator.run("mos_loss_backward", inputs, {"grad_logits": torch.float32}, **values)
    assert torch.equal(grad.view(6, 12).isnan(), bad[:, None].expand(6, 12))


def test_mos_ties_go_to_the_lowest_index(emulator: Emulator) -> None:
    sample = Sample(2, (4, 4, 4))
    logits = torch.tensor([[0.0, 1, 2, 2] * 3, [-torch.inf] * 12])
    logits[1, 4] = 0  # the classes of group 1 have probability 0, those of the others NaN
    label, group = emulator.run(
        "mos_predict",
        {"logits": logits, "groups": sample.groups},
        {"label": torch.int64, "group": torch.int64},
        **sample.values(),
    )
    assert label.tolist() == [1, 0]
    assert group.tolist() == [0, 0]


# --- logit scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample", "temperature"),
    [*((s, 1.0) for s in SAMPLES), *((s, t) for s in SAMPLES[4:12] for t in (0.3, 1000.0))],
    ids=str,
)
def test_logit_scores(emulator: Emulator, sample: Sample, temperature: float) -> None:
    outputs = dict.fromkeys(("msp", "max_logit", "energy", "entropy"), sample.accumulated)
    *found, label = emulator.run(
        "logit_scores",
        {"logits": sample.storage},
        {**outputs, "label": torch.int64},
        temperature=temperature,
        **sample.values(),
    )
    *expected, expected_label = reference.logit_scores(sample.logits.double(), temperature)
    assert_close(found, expected)
    torch.testing.assert_close(label, expected_label)


# --- planted faults -------------------------------------------------------------------------------


def test_out_of_bounds_write_is_caught(emulator: Emulator) -> None:
    done = emulator.start("out_of_bounds", {})
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_out_of_bounds_shared_memory_is_caught(emulator: Emulator) -> None:
    done = emulator.start("out_of_bounds_shared", {})
    assert done.returncode != 0
    assert "use-after-poison" in done.stderr


def test_missing_barrier_is_caught(emulator: Emulator) -> None:
    done = emulator.start("missing_barrier", {}, orders=8)
    assert done.returncode != 0
    assert "the order of the threads changes" in done.stderr


def test_divergent_barrier_is_caught(emulator: Emulator) -> None:
    done = emulator.start("divergent_barrier", {})
    assert done.returncode != 0
    assert "deadlock" in done.stderr


def test_missing_wait_is_caught(emulator: Emulator) -> None:
    done = emulator.start("missing_wait", {})
    assert done.returncode == 0
    assert unwritten(emulator.output("out", torch.int32)).all()


def test_unwritten_output_is_caught(emulator: Emulator) -> None:
    done = emulator.start("unwritten_output", {})
    assert done.returncode == 0
    assert unwritten(emulator.output("out", torch.int32)).nonzero().flatten().tolist() == [63]


@pytest.mark.parametrize("operation", ["shuffles", "votes", "reductions", "atomics", "static"])
def test_emulated_operations(emulator: Emulator, operation: str) -> None:
    done = emulator.start(operation, {})
    assert done.returncode == 0, done.stderr
    lane = torch.arange(64) % 32
    expected = {
        "shuffles": torch.where(lane >= 3, lane - 3, lane)  # up 3, then down 1, then xor 4
        .view(2, 32)
        .gather(1, torch.arange(1, 33).clamp(max=31).expand(2, 32))
        .gather(1, (torch.arange(32) ^ 4).expand(2, 32))
        .flatten(),
        "votes": torch.full((64,), 0x55555555),
        "reductions": torch.full((64,), -16 + 15 + sum(range(-16, 16))),
        "atomics": torch.full((64,), 64),
        "static": torch.arange(64).flip(0),
    }[operation]
    assert emulator.output("out", torch.int32).tolist() == expected.tolist()
