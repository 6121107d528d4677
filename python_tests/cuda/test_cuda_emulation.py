"""The CUDA kernels, run on the CPU (cuda_emulator.py) and held against ``oodkernels.reference``.

The sums of the ROC ops, which it does not have, are held against the CPU backend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from cuda_emulator import DTYPES, Emulator, needs_compiler, unwritten
from op_db import CONFIDENT, confident_rows
from torch import Tensor

from oodkernels import reference
from oodkernels.ops.histogram import N_FACTS, N_PREFIXES
from oodkernels.ops.keys import order_key, scores_of_keys

pytestmark = needs_compiler


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
    processors: int = 1  # of the emulated device: the fewer, the more rows to a block

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
    Sample(2, (4000, 2, 4500), gap=3),  # rows in spans
    Sample(2, (100, 2, 2, 8190, 9, 10000), torch.float16, offset=5),
    Sample(3, (3, 2) * 1000, torch.bfloat16, index=torch.int32),  # many tiny groups
    Sample(3, (3, 2) * 1000, torch.float64, kind="special", offset=1),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CONFIDENT, ids=str)
def test_mos_predict_where_probabilities_are_1(
    emulator: Emulator, case: tuple[int, int, float, float], dtype: torch.dtype
) -> None:
    z, offsets, expected, clear = confident_rows(*case)
    z, expected, clear = z[:60], expected[:60], clear[:60]
    sample = Sample(60, (case[1] + 1,) * case[0], dtype)
    label, group, prob = emulator.run(
        "mos_predict",
        {"logits": z.to(dtype), "groups": offsets},
        {"label": torch.int64, "group": torch.int64, "prob": dtype},
        **sample.values(),
    )
    exact = reference.mos_predict(z.double(), sample.groups)
    assert torch.equal(group[clear], expected[clear])
    assert torch.equal(label[clear], exact[2][clear])
    assert_close([prob[clear]], [exact[4][clear]])


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


# --- the same row, the same bits ------------------------------------------------------------------

FORWARD = {
    "mos_score": ("score",),
    "mos_predict": ("score", "log_odds", "prob"),
    "mos_log_others": ("log_others", "stats"),
    "mos_loss": ("loss", "stats"),
    "outlier_cross_entropy": ("loss", "logsumexp", "stats"),
    "logit_scores": ("msp", "max_logit", "energy", "entropy"),
}
INDICES = {"mos_predict": ("label", "group"), "logit_scores": ("label",)}
WIDTHS = {
    416: ((24, 160, 8, 224), 37),  # sizes of groups, rows: several of them to a block
    9003: ((4000, 3, 5000), 3),  # a row in spans
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", FORWARD)
def test_a_row_keeps_its_bits(
    emulator: Emulator, kernel: str, dtype: torch.dtype, width: int
) -> None:
    """In any batch, at any alignment, whatever the number of multiprocessors."""
    sizes, n = WIDTHS[width]
    rows = Sample(n, sizes, dtype).logits
    target = torch.arange(n) % (width - len(sizes))

    def run(take: slice, gap: int = 0, offset: int = 0, processors: int = 1) -> list[Tensor]:
        sample = Sample(len(rows[take]), sizes, dtype, "normal", gap, offset)
        storage = torch.zeros(len(sample.storage), dtype=dtype)
        sample.view(storage).copy_(rows[take])
        outputs = dict.fromkeys(FORWARD[kernel], sample.accumulated)
        outputs |= dict.fromkeys(INDICES.get(kernel, ()), torch.int64)
        values = {**sample.values(), "processors": processors, "orders": 1}
        inputs = sample.inputs(target=target[take])
        inputs["logits"] = storage
        found = emulator.run(kernel, inputs, outputs, ignore_index=-100, temperature=1.0, **values)
        return [x.view(sample.rows, -1) for x in found]

    whole = run(slice(None), processors=132)
    others = [
        (slice(None), run(slice(None), gap=1, offset=1)),
        (slice(1, n - 1), run(slice(1, n - 1), gap=2, offset=3)),
        (slice(2, 3), run(slice(2, 3))),
    ]
    for take, found in others:
        for x, expected in zip(found, whole, strict=True):
            torch.testing.assert_close(x, expected[take], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", FORWARD)
def test_rows_beyond_2_31_values(emulator: Emulator, kernel: str, dtype: torch.dtype) -> None:
    """Three rows of a view of a tensor of many GiB, of which only they take memory."""
    sample = Sample(3, (5, 7), dtype)
    outputs = dict.fromkeys(FORWARD[kernel], sample.accumulated)
    outputs |= dict.fromkeys(INDICES.get(kernel, ()), torch.int64)
    inputs = sample.inputs(target=torch.tensor([1, 0, 3]))
    values = {**sample.values(), "orders": 1, "ignore_index": -100, "temperature": 1.0}
    near = emulator.run(kernel, inputs, outputs, **values)
    far = emulator.run(kernel, inputs, outputs, **{**values, "stride": 2**31 - 16, "far": 1})
    for x, expected in zip(far, near, strict=True):
        torch.testing.assert_close(x, expected, rtol=0, atol=0)


# --- ROC ------------------------------------------------------------------------------------------

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def some_scores(n: int, dtype: torch.dtype, kind: str, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=random, dtype=torch.float64)
    if kind == "ties":
        x = x.round()
    if kind == "tied":
        x = torch.ones_like(x)
    x = x.to(dtype)
    if kind in ("special", "nan"):
        special = [torch.inf, -torch.inf, 0.0, -0.0, 1e-40, -1e-40, 5e-324, 1e300, 65504.0]
        special += [torch.nan, -torch.nan] if kind == "nan" else []
        values = torch.tensor(special, dtype=torch.float64)
        at = torch.randperm(n, generator=random)[: (n + 1) // 2]
        x[at] = values[(at + n) % len(values)].to(dtype)
    if kind == "bits":
        integer = INTEGERS[dtype.itemsize]
        low, high = torch.iinfo(integer).min, torch.iinfo(integer).max
        x = torch.randint(low, high, (n,), generator=random, dtype=integer).view(dtype)
    return x


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
SIZES = (1, 31, 32, 33, 127, 128, 129, 1000)

KEYS = [  # kind, scores, blocks, stride, values before the first score
    *(("nan", n, 1 + n // 200, 1, n % 3) for n in SIZES),
    ("bits", 1000, 3, 1, 8),
    ("bits", 129, 2, 7, 5),
    ("normal", 40, 1, 0, 0),
]


@dtypes
@pytest.mark.parametrize(("kind", "n", "blocks", "stride", "offset"), KEYS)
def test_roc_keys(
    emulator: Emulator, dtype: torch.dtype, kind: str, n: int, blocks: int, stride: int, offset: int
) -> None:
    storage = some_scores(offset + (n - 1) * stride + 1, dtype, kind)
    scores = storage.as_strided((n,), (stride,), offset)
    integer = INTEGERS[dtype.itemsize]
    (keys,) = emulator.run(
        "roc_keys",
        {"scores": storage},
        {"keys": integer},
        dtype=DTYPES.index(dtype),
        inf_bits=torch.tensor(torch.inf, dtype=dtype).view(integer).item(),
        n=n,
        blocks=blocks,
        stride=stride,
        offset=offset,
    )
    nan = scores.isnan()
    assert torch.equal(keys == torch.iinfo(integer).max, nan)
    assert torch.equal(scores_of_keys(keys[~nan], dtype), scores[~nan])
    assert torch.equal(keys.sort().values, torch.ops.oodk._roc_keys(scores))


SETS = [  # ID and OOD scores, those of a thread, kind
    *((n, SIZES[i - 3], 64, "normal") for i, n in enumerate(SIZES)),
    *((300, 211, 2, kind) for kind in ("ties", "tied", "special", "nan", "separate")),
]
LARGE_SETS = [
    *((55, 73 + more, 1, "normal") for more in (-1, 0, 1)),  # around a full block
    *((3000, 14_001, 64, kind) for kind in ("normal", "ties", "tied")),
    (4096, 4096, 64, "normal"),
    (9000, 8000, 1, "ties"),  # more blocks than sum_blocks has threads
    (16_400, 1, 1, "special"),
]


@pytest.mark.parametrize(
    ("dtype", "n", "m", "size", "kind"),
    [
        *((dtype, *sets) for dtype in DTYPES for sets in SETS),
        *((DTYPES[i % 4], *sets) for i, sets in enumerate(LARGE_SETS)),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_roc_counts(
    emulator: Emulator, dtype: torch.dtype, n: int, m: int, size: int, kind: str
) -> None:
    x = some_scores(n, dtype, kind, seed=1)
    y = some_scores(m, dtype, kind, seed=2) - (100 if kind == "separate" else 0)
    id_keys, ood_keys = map(torch.ops.oodk._roc_keys, (x, y))
    counts, areas = roc_counts(emulator, dtype, id_keys, ood_keys, size)
    expected, expected_areas = torch.ops.oodk._roc_counts(id_keys, ood_keys)
    assert torch.equal(counts, expected.flatten())
    torch.testing.assert_close(areas, expected_areas, rtol=1e-12, atol=0)


@dtypes
@pytest.mark.parametrize("size", [1, 5, 64])
def test_unsorted_roc_keys_stay_in_bounds(
    emulator: Emulator, dtype: torch.dtype, size: int
) -> None:
    for kind in ("ties", "bits"):
        keys = some_scores(700, dtype, kind).view(INTEGERS[dtype.itemsize])
        roc_counts(emulator, dtype, keys, keys.flip(0)[:600], size)
        roc_counts(emulator, dtype, keys, keys.sort(descending=True).values, size)


def roc_counts(
    emulator: Emulator, dtype: torch.dtype, id_keys: Tensor, ood_keys: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    counts, areas, _ = emulator.run(
        "roc_counts",
        {"id": id_keys, "ood": ood_keys},
        {"counts": torch.int64, "areas": torch.float64, "partial": torch.int64},
        dtype=DTYPES.index(dtype),
        n=len(id_keys),
        m=len(ood_keys),
        size=size,
    )
    return counts, areas


# --- histogram ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Histogram:
    n: int
    dtype: torch.dtype
    kind: str = "normal"
    rows: int = 0  # of counts, but for `side`, that scores go to; 0: rows is None
    atoms: bool = False
    blocks: int = 1
    offset: int = 0  # values before the first score
    n_rows: int = 3
    side: int = 1

    def __str__(self) -> str:
        parts: list[Any] = [self.n, str(self.dtype)[6:], self.kind, f"blocks{self.blocks}"]
        parts += [f"rows{self.rows}"] * bool(self.rows) + ["atoms"] * self.atoms
        return "-".join(map(str, parts))

    @property
    def storage(self) -> Tensor:
        return some_scores(self.offset + self.n, self.dtype, self.kind, self.n)

    @property
    def scores(self) -> Tensor:
        return self.storage[self.offset :]

    @property
    def row(self) -> Tensor:
        random = torch.Generator().manual_seed(self.n)
        return torch.randint(0, self.rows + 1, (self.n,), generator=random).to(torch.uint8)

    @property
    def atom_keys(self) -> Tensor:
        keys = order_key(self.scores[: self.n // 2 + 1])
        missing = torch.tensor([-(2**31), 12345, 2**31 - 1], dtype=torch.int32)
        atoms: Tensor = torch.cat([keys, missing]).unique()
        return atoms


def prefixes(keys: Tensor) -> Tensor:
    return (keys >> 16) + N_PREFIXES // 2


def tables(sample: Histogram) -> tuple[Tensor, int]:
    """A table, and its number of bins: some prefixes have many, some share one."""
    shift = torch.full((N_PREFIXES,), 16)
    shift[::97], shift[0xBF80:0xBF90], shift[0x8000] = 15, 8, 5  # by 1.0, by 0.0
    bins = 1 << (16 - shift)
    bins[(shift == 16) & (torch.arange(N_PREFIXES) % 32 > 0)] = 0
    start = bins.cumsum(0) - bins
    table = start << 5 | shift
    if sample.atoms:
        first = torch.searchsorted(prefixes(sample.atom_keys), torch.arange(N_PREFIXES + 1))
        table |= first[:-1] << 32 | first.diff() << 56
    return table, int(bins.sum()) + 1


def check_histogram(
    emulator: Emulator,
    sample: Histogram,
    table: Tensor,
    bins: int,
    refused: Tensor,
    found_atoms: bool = True,
) -> None:
    """`refused`: the scores whose table entry points outside of counts."""
    x, atoms = sample.scores, sample.atom_keys if sample.atoms else None
    rows = sample.row if sample.rows else None
    n_atoms = 0 if atoms is None else len(atoms)
    width = bins + n_atoms + N_FACTS
    random = torch.Generator().manual_seed(0)
    before = torch.randint(0, 2**40, (sample.n_rows, width), generator=random)
    before[:, -1] &= 0xFFFF
    inputs = {"scores": sample.storage, "table": table, "before": before}
    if atoms is not None:
        inputs["atoms"] = atoms
    if rows is not None:
        inputs["rows"] = rows
    (counts,) = emulator.run(
        "histogram",
        inputs,
        {"counts": torch.int64},
        dtype=DTYPES.index(sample.dtype),
        has_rows=int(rows is not None),
        **{k: getattr(sample, k) for k in ("n", "side", "n_rows", "blocks", "offset")},
        width=width,
        n_atoms=n_atoms,
    )
    # What is refused is NaN to the reference, but still has the facts of a number.
    if rows is not None:
        outside = sample.side + rows.long() >= sample.n_rows
        refused, rows = refused | outside, torch.where(outside, 0, rows)
    if atoms is not None and not found_atoms:
        atoms = torch.full_like(atoms, 2**31 - 1)  # a NaN's
    expected = before.clone()
    x = torch.where(refused, torch.nan, x)
    table = torch.where(table >> 5 & 0x7FFFFFF < bins, table, 0)
    reference.roc_histogram_(expected, table, x, sample.side, rows, atoms)
    facts = torch.zeros(1, 1 + N_FACTS, dtype=torch.int64)
    x = sample.scores
    reference.roc_histogram_(facts, torch.full((N_PREFIXES,), 16), x[~x.isnan()], 0)
    expected[sample.side, -2] = before[sample.side, -2] + facts[0, -2]
    expected[sample.side, -1] = before[sample.side, -1] | facts[0, -1]
    assert torch.equal(counts.view_as(expected), expected)


HISTOGRAMS = [
    *(Histogram(n, dtype, offset=n % 5) for n in (*SIZES, 257) for dtype in DTYPES),
    *(
        Histogram(600, dtype, kind, rows, atoms, blocks)
        for dtype in DTYPES
        for kind in ("ties", "nan", "bits")
        for rows, atoms, blocks in ((0, True, 3), (1, False, 2), (1, True, 1))
    ),
    *(Histogram(3000, dtype, "tied", 1, blocks=2) for dtype in DTYPES),
    *(
        Histogram(700, dtype, "nan", 200, atoms, blocks=2)
        for dtype in DTYPES
        for atoms in (False, True)
    ),
    Histogram(400, torch.float32, "ties", 200, blocks=2, n_rows=1, side=0),  # most rows outside
    Histogram(400, torch.float32, "ties", 2, atoms=True, n_rows=3, side=0),
]


@pytest.mark.parametrize("sample", HISTOGRAMS, ids=str)
def test_histogram(emulator: Emulator, sample: Histogram) -> None:
    check_histogram(emulator, sample, *tables(sample), torch.zeros(sample.n, dtype=torch.bool))


@dtypes
@pytest.mark.parametrize("rows", [0, 1])
def test_histogram_table_that_points_outside(
    emulator: Emulator, dtype: torch.dtype, rows: int
) -> None:
    sample = Histogram(500, dtype, "nan", rows, blocks=2)
    table, bins = tables(sample)
    for start in (bins, 2**27 - 1):
        outside = torch.arange(N_PREFIXES) % 2 == 0
        prefix = prefixes(order_key(sample.scores))
        bad = torch.where(outside, start << 5 | 16, table)
        check_histogram(emulator, sample, bad, bins, outside[prefix])


@dtypes
def test_histogram_atoms_that_lie_outside_are_not_read(
    emulator: Emulator, dtype: torch.dtype
) -> None:
    sample = Histogram(500, dtype, "ties", 1, atoms=True)
    table, bins = tables(sample)
    good = torch.zeros(sample.n, dtype=torch.bool)
    for first, n in ((len(sample.atom_keys), 1), (0xFFFFFF, 127), (len(sample.atom_keys) - 1, 2)):
        bad = table & (1 << 32) - 1 | first << 32 | n << 56
        check_histogram(emulator, sample, bad, bins, good, found_atoms=False)


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


def test_unwritten_shared_memory_is_caught(emulator: Emulator) -> None:
    done = emulator.start("unwritten_shared", {}, orders=1)
    assert done.returncode == 0
    out = emulator.output("out", torch.int32).view(2, -1)
    expected = torch.arange(out.size(1), dtype=torch.int32)
    expected[1::2] = -1
    assert torch.equal(out, torch.stack([expected, torch.full_like(expected, -1)]))


@pytest.mark.parametrize("fault", ["lost_updates", "unfenced"])
def test_blocks_that_meet_in_memory_are_caught(emulator: Emulator, fault: str) -> None:
    done = emulator.start(fault, {}, orders=1)  # one block after the other: nothing is wrong
    assert done.returncode == 0, done.stderr
    assert emulator.output("out", torch.int32).item() == {"lost_updates": 5, "unfenced": 384}[fault]
    done = emulator.start(fault, {}, orders=8)
    assert done.returncode != 0
    assert "the order of the threads changes" in done.stderr


def test_a_fenced_hand_over_between_blocks_is_right(emulator: Emulator) -> None:
    done = emulator.start("fenced", {}, orders=30)
    assert done.returncode == 0, done.stderr
    assert emulator.output("out", torch.int32).item() == 6 * 64


def test_rows_counted_in_32_bits_are_caught(emulator: Emulator) -> None:
    rows = torch.arange(3.0)[:, None].expand(3, 64)
    values = {"dtype": DTYPES.index(torch.float32), "rows": 3, "width": 64, "far": 1}
    done = emulator.start("int_offsets", {"logits": rows}, **values, stride=1000)
    assert done.returncode == 0, done.stderr
    assert (emulator.output("out", torch.int32) == 2).all()
    done = emulator.start("int_offsets", {"logits": rows}, **values, stride=2**31 - 16)
    assert done.returncode != 0 or (emulator.output("out", torch.int32) != 2).any()


def test_approximate_powers_are_not_exact(emulator: Emulator) -> None:
    """A kernel that counts on more than the GPU gives is given less."""
    done = emulator.start("exact_powers", {})
    assert done.returncode == 0, done.stderr
    exact = emulator.output("out", torch.int32)
    assert 0 < exact.sum() < len(exact)


def test_unwritten_output_is_caught(emulator: Emulator) -> None:
    done = emulator.start("unwritten_output", {})
    assert done.returncode == 0
    assert unwritten(emulator.output("out", torch.int32)).nonzero().flatten().tolist() == [63]


@pytest.mark.parametrize(
    "operation",
    [
        *("shuffles", "votes", "matches", "reductions", "atomics", "static"),
        *("nan_rules", "approximations"),
    ],
)
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
        "matches": torch.where(lane % 2 == 0, 0x55555555, 0xAAAAAAAA).int(),
        "reductions": torch.full((64,), -16 + 15 + sum(range(-16, 16))),
        "atomics": torch.full((64,), 64),
        "static": torch.arange(64).flip(0),
        **dict.fromkeys(("nan_rules", "approximations"), torch.ones(64)),
    }[operation]
    assert emulator.output("out", torch.int32).tolist() == expected.tolist()
