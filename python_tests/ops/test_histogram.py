"""roc_histogram_ against its reference."""

import threading

import numpy as np
import pytest
import torch

from oodkernels import reference
from oodkernels.ops import roc_histogram_
from oodkernels.ops.keys import order_key

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def plain_table(bits=0, start=0):
    """Every prefix in 2^bits bins."""
    prefix = torch.arange(65536)
    return (start + (prefix << bits)) << 5 | (16 - bits)


def table_with_atoms(atoms, bits):
    prefixes = (atoms.long() >> 16) + 32768
    first = torch.searchsorted(prefixes, torch.arange(65537))
    return plain_table(bits) | first[:-1] << 32 | first.diff() << 56


def counts_for(bits, rows=2, atoms=0):
    return torch.zeros(rows, (65536 << bits) + atoms + 4, dtype=torch.int64)


def scores(n, dtype=torch.float32, seed=0):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1.0, 1.0, 1e-40, -1e-40, 65504.0])
    x[: min(n, len(special))] = special[:n].double()
    return x.to(dtype)


def same(actual, x, table, side, rows=None, atoms=None):
    expected = torch.zeros_like(actual)
    reference.roc_histogram_(expected, table, x, side, rows, atoms)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 7, 511, 512, 513, 5000])
@pytest.mark.parametrize("bits", [0, 3])
def test_counts(dtype, n, bits):
    x, counts = scores(n, dtype), counts_for(bits)
    roc_histogram_(counts, plain_table(bits), x, 1)
    same(counts, x, plain_table(bits), 1)
    assert counts[1, -4] == n == counts[1, :-4].sum()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_rows(dtype):
    x, counts = scores(3000), counts_for(0, rows=4)
    rows = (torch.arange(3000) % (2 if dtype == torch.bool else 3)).to(dtype)
    roc_histogram_(counts, plain_table(), x, 1, rows)
    same(counts, x, plain_table(), 1, rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_atoms(dtype):
    x = scores(3000, dtype)
    atoms = torch.cat([order_key(x[:100]).unique(), torch.tensor([0x7FFFFFFF], dtype=torch.int32)])
    table, counts = table_with_atoms(atoms, 2), counts_for(2, atoms=len(atoms))
    roc_histogram_(counts, table, x, 0, atoms=atoms)
    same(counts, x, table, 0, atoms=atoms)
    assert counts[0, 65536 << 2 : -4].sum() >= 100


@pytest.mark.parametrize("side", ["one", "each"])
def test_any_number_of_threads(side):
    x = scores(1_700_000)
    side, rows = (1, None) if side == "one" else (0, torch.arange(len(x)) % 3 == 0)
    before = torch.get_num_threads()
    try:
        counts = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            counts.append(counts_for(0))
            counts[-1][:, -1] = 1  # low bits seen before must survive
            roc_histogram_(counts[-1], plain_table(), x, side, rows)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(counts[0], counts[1])
    assert torch.equal(counts[0], counts[2])
    assert counts[0][:, -4].sum() == len(x)


def test_strided_scores_and_shapes():
    x = scores(6000).reshape(30, 200)
    counts = counts_for(0)
    roc_histogram_(counts, plain_table(), x.t()[::2], 0)
    same(counts, x.t()[::2].reshape(-1), plain_table(), 0)
    scalar = counts_for(0)
    roc_histogram_(scalar, plain_table(), torch.tensor(1.0), 0)
    assert scalar[0, -4] == 1


def test_keys_order_as_floats():
    values = np.sort(np.random.default_rng(0).standard_normal(1000).astype(np.float32) ** 5)
    keys = order_key(torch.from_numpy(values)).tolist()
    assert keys == sorted(keys)
    assert order_key(torch.tensor(-0.0)) == order_key(torch.tensor(0.0)) == 0
    assert len(set(keys)) == len(set(values.tolist()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1000, 700_000])
def test_nan_is_refused_and_nothing_counted(dtype, n):
    x = scores(n, dtype)
    x[777] = x[900] = torch.nan
    counts = counts_for(0)
    with pytest.raises(ValueError, match="must not be NaN, got 2 NaN, the first at index 777"):
        roc_histogram_(counts, plain_table(), x, 0)
    assert not counts[:, :-1].any()


def test_a_row_outside_is_refused():
    rows = torch.zeros(1000, dtype=torch.uint8)
    rows[5] = 2
    counts = counts_for(0)
    with pytest.raises(ValueError, match=r"side \+ rows must be in 0..1, got 2 at index 5"):
        roc_histogram_(counts, plain_table(), scores(1000), 0, rows)
    assert not counts[:, :-1].any()


def test_a_table_that_points_outside_is_refused():
    counts = counts_for(0)
    for table in (plain_table(start=65536), torch.full((65536,), -1)):
        with pytest.raises(ValueError, match="table points outside of counts"):
            roc_histogram_(counts, table, scores(1000), 0)
        assert not counts[:, :-1].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.arange(3)}, TypeError, "scores must be float64"),
        ({"counts": torch.zeros(2, 70000)}, TypeError, "counts must be"),
        ({"table": torch.zeros(65536)}, TypeError, "table must be"),
        ({"table": torch.zeros(5, dtype=torch.int64)}, ValueError, r"table must have shape"),
        ({"counts": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, r"counts must have shape"),
        (
            {"counts": torch.zeros(70000, 2, dtype=torch.int64).t()},
            ValueError,
            "counts must be contiguous",
        ),
        ({"side": 2}, ValueError, r"side must be in 0..1, got 2"),
        ({"rows": torch.zeros(3)}, TypeError, "rows must be uint8 or bool"),
        ({"rows": torch.zeros(4, dtype=torch.bool)}, ValueError, "rows must have the shape"),
        ({"atoms": torch.zeros(3)}, TypeError, "atoms must be"),
        ({"atoms": torch.zeros(1, 1, dtype=torch.int32)}, ValueError, "atoms must have shape"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_errors(change, error, message, device):
    args = {"counts": counts_for(0), "table": plain_table(), "scores": scores(3), "side": 0}
    args = {**args, **change}
    if device == "meta":
        if "contiguous" in message:
            pytest.skip("moving to meta makes it contiguous")
        args = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    with pytest.raises(error, match=message):
        roc_histogram_(**args)


def test_opcheck():
    for rows in (None, torch.arange(10) % 2 == 0):
        torch.library.opcheck(
            torch.ops.oodk.roc_histogram_, (counts_for(0), plain_table(), scores(10), 0, rows, None)
        )


def test_compiles():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def count(counts, x):
        torch.ops.oodk.roc_histogram_(counts, plain_table(), x * 2, 0)
        return counts.sum(1)

    counts = counts_for(0)
    assert count(counts, scores(100))[0] >= 200


def test_concurrent_calls_on_their_own_counts():
    results = [counts_for(0) for _ in range(4)]
    x = scores(50_000)
    threads = [
        threading.Thread(target=roc_histogram_, args=(c, plain_table(), x, 0)) for c in results
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(results[0], c) for c in results)
