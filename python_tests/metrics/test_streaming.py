"""OODMetrics: certain bounds on streams of every kind, merging, and what torchmetrics asks for."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import ranks, run_code

pytest.importorskip("torchmetrics")
from oodkernels.metrics.ood import ood_metrics
from oodkernels.metrics.streaming import OODMetrics
from oodkernels.metrics.streaming._sketch import Layout, Sketch
from oodkernels.metrics.threshold import Threshold

FIGURES = list(ood_metrics([1.0], [0.0]).as_dict())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_batch(kind, i, n=1_200_000, batch=150_000, prevalence=0.5):
    """Scores and is_ood, the i-th of a stream of n."""
    g = generator(1000 + i)
    is_ood = torch.rand(batch, generator=g) < prevalence
    return STREAMS[kind](torch.randn(batch, generator=g), is_ood.float(), i * batch / n), is_ood


def make_stream(kind, n=1_200_000, batch=150_000, prevalence=0.5):
    """Batches (scores, is_ood)."""
    return (make_batch(kind, i, n, batch, prevalence) for i in range(n // batch))


VALUES = torch.randn(300, generator=generator(5))


def few_values(x, ood, t):
    return VALUES[(x * 40 + 150 - 30 * ood).long().clamp(0, 299)]


def close_values(x, ood, t):
    """Thousands of values, far more than a prefix has atoms for."""
    return 1000 + ((x - 2 * ood) * 700).round() * 2**-10


STREAMS = {
    "normal": lambda x, ood, t: x - 2 * ood,
    "narrow": lambda x, ood, t: 1000 + x - ood,
    "msp": lambda x, ood, t: torch.sigmoid(3 * x + 6 - 3 * ood),
    "mahalanobis": lambda x, ood, t: 400 * x - 300 * ood,
    "drift": lambda x, ood, t: x + 50 * t - 2 * ood,
    "jump": lambda x, ood, t: x + (1000 if t >= 0.5 else 0) - 2 * ood,
    "widening": lambda x, ood, t: x * (1 + 100 * t) - 2 * ood,
    "ceiling": lambda x, ood, t: torch.where(x > 0.5 + ood, torch.ones(()), x - ood),
    "bfloat16": lambda x, ood, t: (x - 2 * ood).bfloat16(),
    "float16": lambda x, ood, t: (x - 2 * ood).half(),
    "upcast": lambda x, ood, t: (x - 2 * ood).half().float(),
    "few values": few_values,
    "close values": close_values,
    "float64": lambda x, ood, t: x.double() * (1 + 1e-12) - 2.0 * ood,
}
EXACT = ("bfloat16", "float16", "upcast", "few values", "close values")


def run(stream, **kwargs):
    metric, parts = OODMetrics(**kwargs), []
    for scores, is_ood in stream:
        metric.update(scores, is_ood)
        parts.append((scores.reshape(-1), is_ood.reshape(-1)))
    scores, is_ood = (torch.cat(p) for p in zip(*parts, strict=True))
    return metric, ood_metrics(scores[~is_ood], scores[is_ood]).as_dict()


def check_bounds(result, exact, fpr="fpr95"):
    for name in FIGURES:
        name = name.replace("fpr95", fpr)
        lower, upper = result[f"{name}_lower"], result[f"{name}_upper"]
        assert lower <= result[name] <= upper, name
        assert lower - 1e-12 <= exact[name] <= upper + 1e-12, name


def width(result, name):
    return result[f"{name}_upper"] - result[f"{name}_lower"]


@pytest.mark.parametrize("kind", STREAMS)
def test_bounds_hold_and_are_narrow(kind):
    metric, exact = run(make_stream(kind))
    assert metric.state_bytes <= 16 * 2**20
    result = metric.compute()
    check_bounds(result, exact)
    for name in FIGURES:
        limit = 1e-4
        if kind in EXACT:
            limit = 1e-12
        elif name.startswith("threshold"):
            limit = 0.02 * max(1, abs(exact[name]))
        elif name == "tie_fraction" or (name.startswith("aupr") and kind == "drift"):
            limit = 1e-3
        assert width(result, name) <= limit, name


@pytest.mark.parametrize("kind", ["normal", "msp"])
def test_rare_outliers(kind):
    """AUPR with 1 % OOD is the figure that bins bound worst."""
    metric, exact = run(make_stream(kind, prevalence=0.01))
    result = metric.compute()
    check_bounds(result, exact)
    assert width(result, "aupr_out") <= 2e-3
    assert width(result, "auroc") <= 1e-4
    assert width(result, "fpr95") <= 2e-4


pieces = st.lists(
    st.tuples(
        st.sampled_from(["normal", "constant", "grid", "wide", "sorted", "half", "bits", "tiny"]),
        st.floats(-100, 100, width=16),
        st.sampled_from([1e-6, 1e-2, 1.0, 300.0]),
        st.integers(1, 200_000),
        st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    ),
    min_size=2,
    max_size=6,
)


def piece(kind, shift, scale, n, seed):
    x = torch.randn(n, generator=generator(seed))
    if kind == "constant":
        x = torch.full((n,), 0.1)
    elif kind == "grid":
        x = (x * 5).round() / 7
    elif kind == "wide":
        x = torch.exp(30 * x).clamp(max=3e38) * x.sign()
    elif kind == "sorted":
        x = x.sort().values
    elif kind == "bits":  # every float there is, infinities included
        x = torch.randint(-(2**31), 2**31, (n,), generator=generator(seed)).int()
        x = x.view(torch.float32)
        return torch.where(x.isnan(), torch.tensor(float("inf")), x)
    elif kind == "tiny":
        x = x * 1e-42
    x = x * scale + shift
    return x.half().clamp(-6e4, 6e4) if kind == "half" else x


@given(pieces, st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=12, deadline=None)
def test_bounds_hold_whatever_the_stream(stream, dtype):
    def batches():
        yield torch.tensor([0.0, 1.0]), torch.tensor([True, False])
        for seed, (kind, shift, scale, n, prevalence) in enumerate(stream):
            is_ood = torch.rand(n, generator=generator(seed + 77)) < prevalence
            yield piece(kind, shift, scale, n, seed).to(dtype), is_ood

    metric, exact = run(batches(), memory="8MiB")
    check_bounds(metric.compute(), exact)
    assert metric.state_bytes <= 8 * 2**20


def test_scarce_memory_makes_old_blocks_coarser():
    """A stream that moves on and on, in as little memory as there can be."""

    def batches():
        for i in range(20):
            is_ood = torch.rand(150_000, generator=generator(i)) < 0.5
            yield (
                torch.randn(150_000, generator=generator(99 + i)) * 3 + 37 * i - 3 * is_ood,
                is_ood,
            )

    metric, exact = run(batches(), memory="6.5MiB")
    result = metric.compute()
    check_bounds(result, exact)
    assert metric.state_bytes <= 6.5 * 2**20
    assert width(result, "auroc") <= 1e-3


def test_moving_counts_to_coarser_blocks_keeps_every_score():
    layout = Layout.of(8 * 2**20, 2)
    sketch = Sketch.empty(layout, 2, torch.device("cpu"))
    x = torch.randn(400_000, generator=generator())
    rows = (x > 0).to(torch.uint8)
    sketch.count(x, rows, layout, first=True)
    before = prefix_counts(sketch.cells())
    sketch.scale = sketch.scale * 0 + 1
    tight = Layout(layout.bins, layout.atoms, layout.half, layout.share * 1000)
    sketch.used = torch.tensor(layout.bins)
    used = int((sketch.blocks >= 0).sum())
    sketch._compact(tight)
    assert int(sketch.used) <= sketch._half(layout)
    assert int((sketch.blocks >= 0).sum()) <= used
    assert torch.equal(prefix_counts(sketch.cells()), before)
    sketch.count(x, rows, layout)
    assert torch.equal(prefix_counts(sketch.cells()), 2 * before)


def test_first_blocks():
    for half in (False, True):
        layout = Layout(1 << 20, 1 << 16, half, 1e-5)
        assert layout.base_bins == int((4 ** layout.base(torch.device("cpu"))).sum())


def prefix_counts(cells):
    """(R, 65536) counts by the 16 high bits of the key: what any two tables agree on."""
    total = np.zeros((cells.counts.shape[0], 65536), np.int64)
    np.add.at(total, (slice(None), (cells.key >> 16) + 32768), cells.counts)
    return torch.from_numpy(total)


def all_cells(metric):
    """Everything the metric holds."""
    return metric._state().cells()


def test_short_streams_are_exact():
    metric, exact = run(make_stream("normal", n=60_000, batch=100))
    result = metric.compute()
    for name in FIGURES:
        assert result[name] == result[f"{name}_lower"] == result[f"{name}_upper"] == exact[name]
    assert result["n_id"] + result["n_ood"] == 60_000


def test_exact_keeps_scores():
    metric, exact = run(make_stream("float64", n=600_000), exact=True)
    result = metric.compute()
    assert {name: result[name] for name in FIGURES} == exact
    assert width(result, "auroc") == 0


def test_batch_size_hardly_matters():
    whole = run(make_stream("normal", n=600_000, batch=600_000))[0]
    small = OODMetrics()
    for scores, is_ood in make_stream("normal", n=600_000, batch=600_000):
        for s, o in zip(scores.split(9_999), is_ood.split(9_999), strict=True):
            small.update(s, o)
    a, b = whole.compute(), small.compute()
    assert torch.equal(prefix_counts(all_cells(whole)), prefix_counts(all_cells(small)))
    assert a["auroc_lower"] <= b["auroc_upper"]
    assert b["auroc_lower"] <= a["auroc_upper"]


def test_a_trillion_scores():
    metric, _ = run(make_stream("few values", n=300_000))
    once = metric.compute()
    metric.counts[:, :-1] *= 10**7
    metric._computed = None
    result = metric.compute()
    assert result["n_id"] + result["n_ood"] == 3 * 10**12
    for name in ("auroc", "fpr95", "detection_error", "threshold"):
        assert result[name] == pytest.approx(once[name], abs=1e-12)


def test_labels_names_and_average():
    g = generator()
    x, y, z = (torch.randn(500, generator=g) - shift for shift in (0, 1, 3))
    metric = OODMetrics()
    metric.update_id(x)
    metric.update_ood("near", y)
    metric.update_ood("far", z)
    result = metric.compute()
    assert set(result) == {"near", "far", "average"}
    assert result["near"]["fpr95"] == ood_metrics(x, y).fpr95
    assert result["far"]["auroc"] == ood_metrics(x, z).auroc
    mean = (result["near"]["auroc"] + result["far"]["auroc"]) / 2
    assert result["average"]["auroc"] == pytest.approx(mean, abs=1e-15)
    assert "threshold" not in result["average"]
    assert "n_ood" not in result["average"]

    labels = torch.cat([torch.arange(500) % 10, torch.full((500,), -1)])
    by_label, by_flag = OODMetrics(), OODMetrics()
    by_label.update(torch.cat([x, y]), labels)
    by_flag.update(torch.cat([x, y]).reshape(2, 500), (labels < 0).reshape(2, 500))
    assert by_label.compute() == by_flag.compute() == result["near"]

    metric.update(torch.cat([x, y]), labels)
    assert set(metric.compute()) == {"near", "far", "ood", "average"}


def test_many_sets_beyond_those_planned():
    metric, parts = OODMetrics(), {}
    x = torch.randn(200_000, generator=generator())
    metric.update_id(x)
    for i in range(4):
        parts[f"set {i}"] = torch.randn(140_000, generator=generator(i + 1)) - i
        metric.update_ood(f"set {i}", parts[f"set {i}"])
    result = metric.compute()
    for name, scores in parts.items():
        check_bounds(result[name], ood_metrics(x, scores).as_dict())


def test_other_tpr():
    metric = OODMetrics(tpr=0.8)
    x, y = torch.randn(100, generator=generator()), torch.randn(90, generator=generator(1))
    metric.update_id(x.numpy())
    metric.update(y.tolist(), True)
    result = metric.compute()
    assert result["fpr80"] == ood_metrics(x, y, tpr=0.8).fpr_at_tpr
    assert "fpr95" not in result


# --- bad input ------------------------------------------------------------------------------------


def test_nan_is_refused_with_its_place():
    metric = OODMetrics()
    metric.update(torch.tensor([1.0, 0.0]), torch.tensor([False, True]))
    for n in (10, 200_000):
        bad = torch.zeros(n)
        bad[[7, 9]] = torch.nan
        with pytest.raises(
            ValueError, match=r"OODMetrics\.update: .*NaN, got 2 NaN, the first at index 7"
        ):
            metric.update(bad, False)
        assert metric.compute()["n_id"] == 1


@pytest.mark.parametrize(
    ("scores", "labels", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(2, dtype=torch.bool), ValueError, "shape of scores"),
        (torch.zeros(3), torch.zeros(3), TypeError, "labels must be bool"),
        (torch.zeros(3), 1, TypeError, "labels must be a bool or integer tensor, or a bool"),
        (
            torch.zeros(3, dtype=torch.bool),
            False,
            TypeError,
            "scores must be numbers, got torch.bool",
        ),
        (torch.zeros(3, device="meta"), False, ValueError, "move it with"),
    ],
)
def test_bad_updates(scores, labels, error, message):
    with pytest.raises(error, match=message):
        OODMetrics().update(scores, labels)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tpr": 0.0}, "tpr must be in"),
        ({"tpr": 1.5}, "tpr must be in"),
        ({"memory": "1MiB"}, "memory must be at least"),
        ({"memory": "lots"}, "memory must be a size"),
        ({"sets": 0}, "sets must be in"),
    ],
)
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        OODMetrics(**kwargs)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_sides_without_scores():
    metric = OODMetrics()
    with pytest.raises(ValueError, match="there are no ID scores"):
        metric.compute()
    metric.update(torch.zeros(3), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="there are no OOD scores yet"):
        metric.compute()
    with pytest.raises(ValueError, match="cannot be called 'average'"):
        metric.update_ood("average", torch.zeros(3))
    metric.update(torch.zeros(0), torch.zeros(0, dtype=torch.bool))


def test_integers_and_special_values():
    metric = OODMetrics()
    metric.update(torch.tensor([5, 4, 3, 2]), torch.tensor([False, False, True, True]))
    assert metric.compute()["auroc"] == 1
    metric = OODMetrics()
    metric.update(torch.tensor([torch.inf, 0.0]), False)
    metric.update(torch.tensor([-torch.inf, -0.0]), True)
    assert metric.compute()["auroc"] == 0.875
    assert metric.compute()["tie_fraction"] == 0.25


# --- what a stream must not do to its numbers -----------------------------------------------------


def state_of(metric):
    """Every state, to be compared with what it becomes."""
    return copy.deepcopy(metric.metric_state)


def same(a, b):
    if isinstance(a, list):
        return len(a) == len(b) and all(map(torch.equal, a, b))
    return torch.equal(a, b)


@pytest.mark.parametrize("memory", [2.1, 2.3, 4.6, 9, 100])
@pytest.mark.parametrize("rows", [2, 5])
def test_places_fit_their_bits_whatever_the_memory(memory, rows):
    """A table's entry has 27 bits for the start of bins and 24 for the first atom."""
    layout = Layout.of(int(memory * 2**30), rows)
    assert layout.bins <= 1 << 27
    assert layout.atoms < 1 << 24
    assert layout.bins * rows * 8 > 2**30 or memory < 4  # what the cap leaves is used
    packed = 16 | (layout.bins - 1) << 5 | layout.atoms << 32 | 127 << 56
    assert (packed >> 5) & 0x7FFFFFF == layout.bins - 1
    assert (packed >> 32) & 0xFFFFFF == layout.atoms
    assert packed < 1 << 63


def test_infinite_scores_have_a_threshold():
    """The bins of the infinities also hold keys of NaN."""
    x = torch.randn(300_000, generator=generator())
    x[::50_000], x[1::50_000] = -torch.inf, torch.inf
    y = torch.randn(200_000, generator=generator(1)) - 1
    y[7], y[9] = torch.inf, -torch.inf
    for dtype in (torch.float32, torch.float64):
        metric = OODMetrics(tpr=1)
        metric.update_id(x.to(dtype))
        metric.update(y.to(dtype), True)
        check_bounds(metric.compute(), {**ood_metrics(x, y, tpr=1).as_dict()}, fpr="fpr100")
        threshold = Threshold.from_metric(metric)
        assert threshold.value == threshold.value_bounds[0] == -torch.inf
        assert not np.isnan(threshold.value_bounds).any()


@pytest.mark.parametrize("n", [100, 200_000])
def test_merging_a_metric_with_itself_doubles_it(n):
    metric = OODMetrics()
    for row, shift in enumerate((0, -1)):
        metric.update(torch.randn(n, generator=generator(row)) + shift, bool(row))
    once = metric.compute()
    metric.merge_state(metric)
    twice = metric.compute()
    assert (twice["n_id"], twice["n_ood"]) == (2 * n, 2 * n)
    assert twice["auroc"] == once["auroc"]
    metric.merge_state(metric.metric_state)
    assert metric.compute()["n_id"] == 4 * n


def test_the_unnamed_set_and_one_called_ood():
    """Figures of the unnamed set are called "ood": of both, one would vanish."""
    unnamed, named = OODMetrics(), OODMetrics()
    for metric in (unnamed, named):
        metric.update_id([1.0, 2.0])
    unnamed.update([0.0], True)
    named.update_ood("ood", [3.0])
    assert named.compute()["ood"]["auroc"] == 0
    before = state_of(unnamed)
    match = "OOD sets must have names when one is called 'ood'"
    with pytest.raises(ValueError, match=rf"OODMetrics\.update: {match}"):
        unnamed.update_ood("ood", [3.0])
    with pytest.raises(ValueError, match=rf"OODMetrics\.update: {match}"):
        named.update([0.0], True)
    with pytest.raises(ValueError, match=rf"OODMetrics\.merge_state: {match}"):
        unnamed.merge_state(named)
    assert all(same(v, before[k]) for k, v in unnamed.metric_state.items())
    assert unnamed.compute()["auroc"] == 1


@pytest.mark.parametrize("name", ["", "average", 3, b"near"])
def test_names_that_no_set_has(name):
    with pytest.raises(ValueError, match="an OOD set cannot be called"):
        OODMetrics().update_ood(name, [1.0])
    metric = OODMetrics()
    metric.update_id([1.0])
    metric.update_ood(np.str_("near"), [0.0])
    assert set(metric.compute()) == {"near", "average"}


def test_counts_that_would_overflow_are_refused():
    """Sums over pairs are exact below 2^62 scores; doubling gets there fast."""
    metric = OODMetrics()
    for row, shift in enumerate((0, -1)):
        metric.update(torch.randn(200_000, generator=generator(row)) + shift, bool(row))
    auroc, n = metric.compute()["auroc"], 400_000
    while 2 * n < 2**62:
        metric.merge_state(metric)
        n *= 2
    assert metric.compute()["auroc"] == auroc
    before = state_of(metric)
    message = rf"OODMetrics.merge_state: there must be fewer than 2\*\*62 scores, got {2 * n}"
    with pytest.raises(ValueError, match=message):
        metric.merge_state(metric)
    assert all(same(v, before[k]) for k, v in metric.metric_state.items())
    metric.counts[:, :-4] *= 2  # as a file could have it
    metric._computed = None
    with pytest.raises(ValueError, match=r"OODMetrics.compute: there must be fewer than 2\*\*62"):
        metric.compute()


def test_refused_scores_leave_what_was_counted():
    """A batch with NaN may have moved bins and atoms before it is refused."""
    metric = run(make_stream("ceiling", n=300_000))[0]
    expected, cells = metric.compute(), prefix_counts(all_cells(metric))
    bad = torch.cat((make_scores("few values"), make_scores("narrow"), torch.tensor([torch.nan])))
    with pytest.raises(ValueError, match=f"OODMetrics.update: .* 1 NaN, .* index {len(bad) - 1}"):
        metric.update(bad, False, name="new")
    metric._computed = None
    assert torch.equal(prefix_counts(all_cells(metric)), cells)
    check_overlap(metric.compute(), expected)
    other = OODMetrics()
    with pytest.raises(ValueError, match="1 NaN"):
        other.update(bad, True, name="new")
    assert not other.state_bytes


def make_scores(kind):
    return torch.cat([scores for scores, _ in make_stream(kind, n=300_000)])


def check_overlap(result, other):
    """Both bound the same truth."""
    for name in FIGURES:
        assert result[f"{name}_lower"] <= other[f"{name}_upper"], name
        assert result[f"{name}_upper"] >= other[f"{name}_lower"], name
    assert (result["n_id"], result["n_ood"]) == (other["n_id"], other["n_ood"])


@pytest.mark.parametrize(("exact", "bounded"), [("a", "b"), ("b", "a")])
def test_a_collection_does_not_lend_states_between_settings(exact, bounded):
    """It groups metrics whose states are equal after the first batch; these differ later."""
    from torchmetrics import MetricCollection

    both = MetricCollection({exact: OODMetrics(exact=True), bounded: OODMetrics(memory="6.5MiB")})
    parts = [(torch.tensor([1.0, 0.0]), torch.tensor([False, True]))]
    parts += make_stream("normal", n=1_200_000, batch=600_000)
    for batch in parts:
        both.update(*batch)
    scores, is_ood = (torch.cat(p) for p in zip(*parts, strict=True))
    expected = ood_metrics(scores[~is_ood], scores[is_ood]).as_dict()
    result = both[exact].compute()
    assert {name: result[name] for name in FIGURES} == expected
    check_bounds(both[bounded].compute(), expected)
    assert both[bounded].state_bytes < both[exact].state_bytes


# --- every kind of input --------------------------------------------------------------------------


def test_numpy_and_lists():
    expected = OODMetrics(tpr=0.9)
    expected.update(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([False, False, True]))
    metric = OODMetrics(
        exact=np.False_, memory=np.int64(2**24), sets=np.int64(1), tpr=np.float32(0.9)
    )
    metric.update(np.array([3, 2], ">f4")[::-1], np.False_)
    metric.update(np.float64(1), np.True_)
    assert metric.compute() == expected.compute()
    for labels in ([0, 5, -1], (False, False, True), np.array([7, 1, -1], ">i2")):
        other = OODMetrics(tpr=0.9)
        other.update([3.0, 2.0, 1.0], labels)
        assert other.compute() == expected.compute()
    strided = OODMetrics(tpr=0.9)
    strided.update(torch.tensor([3.0, 9, 2, 9, 1, 9])[::2], np.array([True, False, False])[::-1])
    assert strided.compute() == expected.compute()


@pytest.mark.parametrize(
    ("scores", "labels", "error", "match"),
    [
        ([[1.0], [1.0, 2.0]], False, ValueError, "update: scores must be an array"),
        (["a"], False, TypeError, "update: scores must be numbers"),
        (np.array([1], object), False, TypeError, "update: scores must be numbers, got object"),
        ([2**53], False, ValueError, r"update: scores must be integers below 2\*\*53"),
        (torch.tensor([2**53 + 1]), False, ValueError, r"integers below 2\*\*53"),
        ([1.0], [[True], []], ValueError, "update: labels must be an array"),
        ([1.0], ["a"], TypeError, "update: labels must be numbers"),
        ([1.0], None, TypeError, "or a bool, got NoneType"),
        (1.0, [True], ValueError, r"shape of scores, \(\), got \(1,\)"),
    ],
)
def test_refused_inputs(scores, labels, error, match):
    metric = OODMetrics()
    with pytest.raises(error, match=rf"OODMetrics\..*{match}"):
        metric.update(scores, labels)
    assert not metric.state_bytes


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"tpr": "0.9"}, TypeError, r"tpr must be a number in \(0, 1\], got '0.9'"),
        ({"tpr": True}, TypeError, r"tpr must be a number in \(0, 1\], got True"),
        ({"exact": 1}, TypeError, "exact must be True or False, got 1"),
        ({"memory": True}, ValueError, "memory must be a size"),
        ({"memory": -1}, ValueError, "memory must be at least"),
        ({"sets": 1.5}, ValueError, "sets must be in 1..254, got 1.5"),
    ],
)
def test_refused_settings(options, error, match):
    with pytest.raises(error, match=f"^OODMetrics: {match}"):
        OODMetrics(**options)


def test_labels_0_and_1_are_classes():
    metric = OODMetrics()
    metric.update([1.0, 0.0], [1, 0])
    with pytest.raises(ValueError, match=r"no OOD scores yet: .*negative \(0 and 1 are classes\)"):
        metric.compute()


def test_plot_of_hostile_names():
    """Dollars are no mathematics, and an underscore or a line break hides no curve."""
    pytest.importorskip("matplotlib")
    metric = OODMetrics()
    metric.update_id([1.0, 2.0])
    names = ["$_$", "_hidden", "a\nb", r"\frac", "$x", "\udcff"]
    for name in names:
        metric.update_ood(name, [0.0])
    figure, axes = metric.plot()
    figure.savefig(io.BytesIO())
    assert len(axes.get_legend().get_texts()) == len(names)
    table = str(ood_metrics([1.0, 2.0], {name: [0.0] for name in names}))
    assert len(table.encode().splitlines()) == 1 + len(names) + 2


# --- torchmetrics ---------------------------------------------------------------------------------


def three_states(memory="16MiB"):
    kinds = ("normal", "jump", "ceiling")
    metrics = [run(make_stream(kind, n=450_000), memory=memory)[0] for kind in kinds]
    metrics[0].update_ood("extra", torch.randn(1000, generator=generator(3)))
    metrics[2].update_ood("other", torch.randn(140_000, generator=generator(4)))
    metrics[2].update_ood("extra", torch.randn(1000, generator=generator(5)))
    return metrics


def test_merging_in_any_order_gives_the_same():
    results, states = [], three_states()
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        merged = OODMetrics()
        for i in order:
            merged.merge_state(states[i])
        results.append(merged.compute())
    assert results[0] == results[1] == results[2]
    # And in a tree, on top of one that has its own table.
    left, right = copy.deepcopy(states[0]), copy.deepcopy(states[1])
    right.merge_state(states[2].metric_state)
    left.merge_state(right)
    assert left.compute() == results[0]
    total = sum(prefix_counts(all_cells(s))[0] for s in states)
    assert torch.equal(prefix_counts(all_cells(left))[0], total)


def test_merged_bounds_hold_the_truth():
    metric, parts = OODMetrics(), []
    for kind in ("normal", "narrow", "ceiling"):
        parts += list(make_stream(kind, n=300_000))
        metric.merge_state(run(parts[-2:])[0])
    scores, is_ood = (torch.cat(p) for p in zip(*parts, strict=True))
    check_bounds(metric.compute(), ood_metrics(scores[~is_ood], scores[is_ood]).as_dict())
    metric.update(*parts[0])  # a merged state takes in more
    assert metric.compute()["n_id"] == int((~is_ood).sum() + (~parts[0][1]).sum())


def test_equal_tables_are_added_up():
    one = run(make_stream("normal", n=300_000))[0]
    two = one.clone()
    two.merge_state(one)
    assert not two.archive_codes.numel()
    assert two.state_bytes == one.state_bytes
    assert two.compute()["n_id"] == 2 * one.compute()["n_id"]
    assert two.compute()["auroc"] == one.compute()["auroc"]


def test_exact_and_bounded_do_not_merge():
    with pytest.raises(ValueError, match="exact metric merges with exact"):
        OODMetrics().merge_state(OODMetrics(exact=True))
    with pytest.raises(ValueError, match="a state must be"):
        OODMetrics().merge_state(3)


def test_pickle_clone_reset_and_state_dict():
    metric = run(make_stream("msp", n=300_000))[0]
    expected = metric.compute()
    assert pickle.loads(pickle.dumps(metric)).compute() == expected
    clone = metric.clone()
    metric.reset()
    assert metric.state_bytes == 0
    assert clone.compute() == expected
    assert not clone.state_dict()
    clone.persistent(True)
    other = OODMetrics()
    other.load_state_dict(clone.state_dict())
    assert other.compute() == expected
    other.update(torch.zeros(10), torch.arange(10) % 2 == 0)
    assert clone.compute() == expected


def test_dtype_conversions_leave_the_state_alone():
    metric = run(make_stream("normal", n=300_000))[0]
    expected = metric.compute()
    for convert in (
        lambda m: m.half(),
        lambda m: m.set_dtype(torch.float16),
        lambda m: m.to("cpu"),
    ):
        metric = convert(metric)
        metric._computed = None
        assert metric.compute() == expected


def test_saved_state_in_another_process(tmp_path):
    metric = run(make_stream("normal", n=300_000))[0]
    metric.persistent(True)
    torch.save(metric.state_dict(), tmp_path / "state.pt")
    code = (
        "import torch, sys; from oodkernels.metrics.streaming import OODMetrics\n"
        "metric = OODMetrics(); metric.load_state_dict(torch.load(sys.argv[1]))\n"
        "metric.merge_state(metric.clone()); print(repr(metric.compute()['auroc_lower']))"
    )
    out = run_code(code, str(tmp_path / "state.pt"))
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) == metric.compute()["auroc_lower"]


def test_forward_returns_the_batch():
    metric = OODMetrics()
    batches = list(make_stream("normal", n=20_000, batch=5_000))
    values = [metric(*batch) for batch in batches]
    assert values[1] == run(batches[1:2])[0].compute()
    assert metric.compute() == run(batches)[0].compute()
    assert metric.update_count == 4
    one_sided = metric(torch.zeros(5), torch.zeros(5, dtype=torch.bool))
    assert np.isnan(one_sided["auroc"])
    assert one_sided["n_id"] == 5


def test_a_batch_may_be_overwritten():
    metric, scores = OODMetrics(), torch.tensor([1.0, 0.0])
    metric.update(scores, torch.tensor([False, True]))
    scores.zero_()
    assert metric.compute()["auroc"] == 1


def test_plot():
    plt = pytest.importorskip("matplotlib.pyplot")
    metric = run(make_stream("normal", n=300_000))[0]
    metric.update_ood("far", torch.randn(100, generator=generator()) - 4)
    figure, axes = metric.plot()
    figure.savefig(io.BytesIO())
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[1].startswith("far: AUROC 0.99")
    assert "±" in labels[0]
    plt.close(figure)


def test_gradients_do_not_hold_on():
    metric = OODMetrics()
    metric.update(torch.randn(10, requires_grad=True), torch.arange(10) % 2 == 0)
    assert not metric.pending_scores[0].requires_grad


def share(rank, world):
    """Figures, counts and names of what ranks count together, and what this one has counted."""
    half, single = OODMetrics(), OODMetrics()
    for i in range(rank, 8, world):
        for metric, kind in ((half, "bfloat16"), (single, "drift")):
            metric.update(*make_batch(kind, i), name=f"set {i % 3}")
    # What ranks have seen differs, names and their order included, and one has seen less.
    results = half.compute(), single.compute()
    with single._synced():
        return results, prefix_counts(all_cells(single)), single._state().set_names()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_distributed(tmp_path):
    """Three processes count the same integers as one."""
    (half, single), counts, names = share(0, 1)
    for (half_n, single_n), counts_n, names_n in ranks(tmp_path, 3, share):
        assert half_n == half
        order = [0, *(names_n.index(name) + 1 for name in names)]
        assert torch.equal(counts_n[order], counts)
        for name in names:
            assert single_n[name]["n_id"] == single[name]["n_id"]
            for figure in FIGURES:
                assert single_n[name][f"{figure}_lower"] <= single[name][f"{figure}_upper"]
                assert single_n[name][f"{figure}_upper"] >= single[name][f"{figure}_lower"]
            assert width(single_n[name], "auroc") < 1e-4


def alone(**options):
    """A metric that syncs with no one but itself."""
    return OODMetrics(
        distributed_available_fn=lambda: True, dist_sync_fn=lambda x, group: [x], **options
    )


def test_what_is_raised_while_synced_leaves_a_metric_as_it_was():
    metric = alone()
    metric.update([1.0, 2.0], False)
    for refused in (metric.compute, metric.levels, metric.plot):
        with pytest.raises(ValueError, match="there are no OOD scores yet"):
            refused()
        assert not metric._is_synced
    metric.update([0.0], True)
    assert metric.compute()["auroc"] == 1
    other = OODMetrics()
    other.update_id([3.0])
    other.update_ood("ood", [0.0])
    buffer = io.BytesIO()
    torch.save(other.metric_state, buffer)
    theirs = torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)
    before = state_of(metric)
    metric._computed, metric.dist_sync_fn = None, lambda x, group: [x, theirs]
    with pytest.raises(ValueError, match="OOD sets must have names when one is called 'ood'"):
        metric.compute()
    assert all(same(v, before[k]) for k, v in metric.metric_state.items())
    metric.dist_sync_fn = lambda x, group: [x]
    assert metric.compute()["n_id"] == 2


def test_states_of_other_settings_are_refused():
    exact, bounded = OODMetrics(exact=True), OODMetrics()
    for metric in (exact, bounded):
        metric.update([1.0, 0.0], [1, -1])
        metric.persistent(True)
    for one, other in ((exact, bounded), (bounded, exact)):
        for take in (
            lambda: one.merge_state(dict(other.metric_state)),  # noqa: B023
            lambda: one.load_state_dict(other.state_dict()),  # noqa: B023
        ):
            with pytest.raises(ValueError, match="an exact metric merges with exact ones only"):
                take()
    with pytest.raises(ValueError, match="a state must be an OODMetrics or a dict of its states"):
        bounded.merge_state({"counts": torch.zeros(3)})


def test_inside_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.metric = OODMetrics()
            self.result = None

        def validation_step(self, batch, _):
            scores, labels = batch
            self.metric.update(scores, labels)

        def on_validation_epoch_end(self):
            self.result = self.metric.compute()
            self.log_dict({k: float(v) for k, v in self.result.items()})
            self.metric.reset()

    scores, labels = torch.randn(64, generator=generator()), torch.arange(64) % 4 - 1
    data = torch.utils.data.TensorDataset(scores, labels)
    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.validate(module, torch.utils.data.DataLoader(data, batch_size=8), verbose=False)
    exact = ood_metrics(scores[labels >= 0], scores[labels < 0])
    assert module.result["fpr95"] == exact.fpr95
    assert trainer.callback_metrics["auroc"] == pytest.approx(exact.auroc)


def test_without_torchmetrics():
    code = (
        "import sys; sys.modules['torchmetrics'] = None\n"
        "import oodkernels\n"
        "try: import oodkernels.metrics.streaming\n"
        "except ImportError as error: print(error)"
    )
    out = run_code(code)
    assert out.returncode == 0, out.stderr
    assert "pip install 'oodkernels[metrics]'" in out.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_counts_the_same_without_waiting():
    metric = OODMetrics().to("cuda")
    batches = [(s.cuda(), o.cuda()) for s, o in make_stream("msp")]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for scores, is_ood in batches:
            metric.update(scores, is_ood)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, exact = run(make_stream("msp"))
    check_bounds(metric.compute(), exact)
    assert torch.equal(prefix_counts(all_cells(metric)), prefix_counts(all_cells(expected)))
    metric.update(torch.full((10,), torch.nan, device="cuda"), False)
    with pytest.raises(ValueError, match="got 10 NaN"):
        metric.compute()
