"""Threshold: exact counts, exact comparison, coverage of its interval, and what is saved."""

import json
import math
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from oodkernels._digest import digest
from oodkernels.metrics.ood import ood_metrics
from oodkernels.metrics.threshold import Threshold, ThresholdSource

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def largest(scores, percent):
    """By trying every score: the largest t that at least percent % of the scores reach."""
    scores = [float(s) for s in scores]
    kept = {t: sum(s >= t for s in scores) for t in scores}
    return max(t for t, n in kept.items() if 100 * n >= percent * len(scores))


# --- calibration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    scores=st.lists(
        st.one_of(st.integers(-3, 3), st.floats(-9, 9, width=16), st.just(-0.0), st.just(math.inf)),
        min_size=1,
        max_size=60,
    ),
    percent=st.integers(1, 100),
)
@settings(max_examples=60, deadline=None)
def test_is_the_largest_that_keeps_the_tpr(dtype, scores, percent):
    x = torch.tensor(scores, dtype=dtype)
    threshold = Threshold.calibrate(x, percent / 100)
    assert threshold.value == largest(x, percent)
    kept = int((x.double() >= threshold.value).sum())
    assert threshold.achieved_tpr == kept / len(x)
    assert threshold.achieved_tpr_bounds == (kept / len(x),) * 2
    assert threshold.value_bounds == (threshold.value,) * 2
    assert (threshold.n_id, threshold.dtype) == (len(x), dtype)
    assert torch.equal(threshold.predict(x), x.double() < threshold.value)
    assert threshold == Threshold.from_json(threshold.to_json())


def test_is_that_of_ood_metrics():
    x = normal(10_001)
    for tpr in (0.5, 0.95, 0.999, 1):
        result = ood_metrics(x, normal(7, seed=1), tpr=tpr)
        threshold = Threshold.calibrate(x, tpr)
        assert threshold.value == result.threshold
        assert threshold.achieved_tpr == result.true_positives / 10_001
    assert Threshold.calibrate(x, np.float64(0.95)).value == Threshold.calibrate(x).value


def test_tpr_is_the_decimal_it_prints_as():
    # 0.95 is above 19 / 20 as a float, and a rule that multiplies floats may ask for 20 of 20.
    assert Threshold.calibrate(list(range(20))).value == 1
    assert Threshold.calibrate(range(100), 0.07).achieved_tpr == 0.07


# --- prediction -----------------------------------------------------------------------------------


@pytest.mark.parametrize("of", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(value=st.floats(allow_nan=False), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_compares_numbers_and_not_roundings(dtype, of, value, seed):
    """In the scores' own type, as every score in float64 with the value there."""
    value = float(torch.tensor(value, dtype=torch.float64).to(of))
    threshold = Threshold.calibrate(torch.tensor([value], dtype=torch.float64))
    near = torch.tensor(value, dtype=torch.float64).to(dtype)
    steps = [near]
    for end in (math.inf, -math.inf):
        steps.append(torch.nextafter(near, torch.tensor(end, dtype=dtype)))
    x = torch.cat((torch.stack(steps), normal(5, seed=seed, dtype=dtype)))
    expected = [not float(s) >= value for s in x]
    assert threshold.predict(x).tolist() == expected


def test_predict_shape_and_special_values(device):
    threshold = Threshold.calibrate(torch.tensor([0.0, 1.0], device=device), 1)
    scores = torch.tensor([[math.nan, math.inf, -0.0], [-math.inf, -1e-45, 0.0]], device=device)
    is_ood = threshold.predict(scores)
    assert is_ood.device == scores.device
    assert is_ood.tolist() == [[True, False, False], [True, True, False]]
    assert threshold.predict(torch.tensor(-1.0)).shape == ()
    assert threshold.predict(torch.empty(0, 3)).shape == (0, 3)
    assert threshold.predict([-1, 0]).tolist() == [True, False]
    assert threshold.predict(normal(3).requires_grad_()).dtype == torch.bool


def test_float32_threshold_between_bfloat16_scores():
    threshold = Threshold.calibrate(torch.tensor([1.001]))
    scores = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)
    assert threshold.predict(scores).tolist() == [True, False]


# --- the interval ---------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(("n", "tpr"), [(1, 0.95), (19, 0.95), (20, 0.95), (1000, 0.95), (77, 1)])
def test_interval_of_untied_scores(n, tpr, confidence):
    """Beta quantiles; the TPR is Beta(k, n - k + 1), so that the coverage is known exactly."""
    threshold = Threshold.calibrate(normal(n, dtype=torch.float64), tpr, confidence)
    low, high = threshold.interval
    k = round(threshold.achieved_tpr * n)
    tail = (1 - confidence) / 2
    assert low == pytest.approx(stats.beta(k, n - k + 1).ppf(tail), rel=1e-10)
    upper = stats.beta(k + 1, n - k).ppf(1 - tail) if k < n else 1.0
    assert high == pytest.approx(upper, rel=1e-10)
    achieved = stats.beta(k, n - k + 1)
    assert achieved.cdf(low) <= tail * (1 + 1e-9)
    assert achieved.sf(high) <= tail * (1 + 1e-9)
    if n == 1000:  # one rank wider than it would have to be without ties, no more
        assert achieved.sf(high) > 0.5 * tail


@pytest.mark.parametrize(
    "shares", [(0.76, 0.1), (0.88, 0.02), (0.93, 0.02), (0.94, 0.02), (0.95, 0.02), (0.97, 0.02)]
)
@pytest.mark.parametrize("n", [20, 100])
def test_interval_of_tied_scores(n, shares):
    """Three values, the upper two with these shares: every outcome, by its weight.

    With the count kept in place of k in the lower end (the first shares), or one less than it in
    the upper end (others), an end would err too often.
    """
    values = np.array([2.0, 1.0, 0.0])
    kept = np.cumsum([*shares, 1 - sum(shares)])
    below = above = 0.0
    for first in range(n + 1):
        weights = stats.binom(n - first, shares[1] / (1 - shares[0])).pmf(range(n - first + 1))
        weights = weights * stats.binom(n, shares[0]).pmf(first)
        for second in np.flatnonzero(weights > 1e-9):
            counts = [first, second, n - first - second]
            threshold = Threshold.calibrate(np.repeat(values, counts), 0.95, 0.9)
            truth = kept[values == threshold.value][0]
            below += weights[second] * (truth < threshold.interval[0])
            above += weights[second] * (truth > threshold.interval[1])
    assert below <= 0.05 + 1e-6
    assert above <= 0.05 + 1e-6


# --- from a stream --------------------------------------------------------------------------------


def stream(kind, n):
    x = normal(n, seed=n, dtype=torch.float64 if kind == "float64" else torch.float32)
    if kind == "float64":
        x = x + normal(n, seed=3, dtype=torch.float64) * 1e-9
    return {"bfloat16": x.bfloat16(), "ties": (x * 3).round() / 3, "msp": x.sigmoid() ** 0.01}.get(
        kind, x
    )


@pytest.mark.parametrize("kind", ["normal", "bfloat16", "ties", "msp", "float64"])
def test_stream_bounds_hold(kind):
    pytest.importorskip("torchmetrics")
    from oodkernels.metrics.streaming import OODMetrics

    x = stream(kind, 200_000)
    metric = OODMetrics()
    for part in x.split(50_000):
        metric.update_id(part)
    for tpr in (0.5, 0.95, 0.9999):
        exact, got = Threshold.calibrate(x, tpr), Threshold.from_metric(metric, tpr)
        assert got.value == got.value_bounds[0] <= exact.value <= got.value_bounds[1]
        achieved = float((x.double() >= got.value).double().mean())
        assert tpr <= got.achieved_tpr <= achieved <= got.achieved_tpr_bounds[1]
        assert got.achieved_tpr_bounds[1] - got.achieved_tpr < 2e-4
        assert got.interval[0] == exact.interval[0]
        assert exact.interval[1] <= got.interval[1] <= exact.interval[1] + 3e-3
        if kind in ("bfloat16", "ties"):
            assert got == replace(exact, dtype=torch.float32)
        assert Threshold.from_json(got.to_json()) == got


@pytest.mark.parametrize("exact", [True, False])
def test_kept_scores_are_exact(exact):
    pytest.importorskip("torchmetrics")
    from oodkernels.metrics.streaming import OODMetrics

    x = normal(5000, dtype=torch.float64)
    metric = OODMetrics(exact=exact, tpr=0.9)
    metric.update_id(x)
    assert Threshold.from_metric(metric) == Threshold.calibrate(x, 0.9)
    metric.update_ood("a", x - 1)
    metric.update_ood("b", x - 2)
    assert Threshold.from_metric(metric) == Threshold.calibrate(x, 0.9)
    assert Threshold.from_metric(metric, 0.95, 0.5) == Threshold.calibrate(x, 0.95, 0.5)


def test_interval_from_a_stream_covers():
    """Bins make the threshold depend on the sample: the interval has to hold all the same."""
    pytest.importorskip("torchmetrics")
    from oodkernels.metrics.streaming import OODMetrics

    misses = 0
    for seed in range(8):
        metric = OODMetrics(memory="8MiB")
        x = normal(140_000, seed=seed)
        metric.update_id(x[:135_000])
        metric.update_id(x[135_000:])
        threshold = Threshold.from_metric(metric, confidence=0.9)
        assert threshold.value_bounds[0] < threshold.value_bounds[1]
        low, high = threshold.interval
        misses += not low <= stats.norm.sf(threshold.value) <= high
    assert misses <= 4  # P(Binomial(8, 0.1) > 4) = 0.0004


# --- keeping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_save_and_load(tmp_path, dtype):
    path = tmp_path / "threshold.json"
    for value in (1 / 3, -math.inf, math.inf):
        threshold = Threshold.calibrate(torch.tensor([value], dtype=dtype))
        threshold.save(path)
        assert Threshold.load(path) == threshold
        content = json.loads(path.read_text(), parse_constant=pytest.fail)
        assert (content["format"], content["version"]) == ("oodkernels.threshold", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["threshold.json"]


def test_failing_save_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "threshold.json"
    threshold = Threshold.calibrate([1.0])
    threshold.save(path)
    before = path.read_text()

    def fail(*_args):
        raise OSError("full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="full"):
        Threshold.calibrate([2.0]).save(path)
    assert path.read_text() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_in_the_state_dict_of_a_model(tmp_path):
    threshold = Threshold.calibrate(normal(100, dtype=torch.float64))
    model = torch.nn.Linear(2, 2)
    model.register_buffer("ood_threshold", threshold.to_tensor())
    torch.save(model.half().state_dict(), tmp_path / "model.pt")
    other = torch.nn.Linear(2, 2)
    other.register_buffer("ood_threshold", Threshold.calibrate([1.0]).to_tensor())
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert Threshold.from_tensor(other.ood_threshold) == threshold


def test_longest_fits_a_tensor():
    longest = -1.2345678901234567e-300
    threshold = Threshold(
        value=longest,
        dtype=torch.bfloat16,
        tpr=1.2345678901234567e-300,
        confidence=1.2345678901234567e-300,
        n_id=10**18,
        achieved_tpr=1.2345678901234567e-300,
        achieved_tpr_bounds=(1.2345678901234567e-300, 1.2345678901234568e-300),
        value_bounds=(longest, longest),
        interval=(1.2345678901234567e-300, 1.2345678901234568e-300),
    )
    assert Threshold.from_tensor(threshold.to_tensor()) == threshold


# --- whose scores ---------------------------------------------------------------------------------

ENERGY = ThresholdSource("energy", {"temperature": 1.0}, model="12ab")


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (replace(ENERGY, detector="msp"), "its detector = 'energy', got 'msp'"),
        (replace(ENERGY, settings={"temperature": 2}), "energy's temperature = 1.0, got 2"),
        (replace(ENERGY, settings={}), r"temperature = 1.0, got '\(not given\)'"),
        (replace(ENERGY, groups="cd"), r"its groups = \(not known\), got cd"),
        (replace(ENERGY, model=None), r"its model = 12ab, got \(not known\)"),
    ],
)
def test_others_scores_are_refused(other, match):
    threshold = Threshold.calibrate([1.0, 2.0], source=ENERGY)
    threshold.check_source(replace(ENERGY, settings={"temperature": 1}))
    with pytest.raises(ValueError, match=f"^predict: threshold is of other scores: .*{match}"):
        threshold.check_source(other, "predict")


def test_a_threshold_without_source_judges_no_ones_scores():
    with pytest.raises(ValueError, match=r"check_source: threshold does not say what its scores"):
        Threshold.calibrate([1.0]).check_source(ENERGY)


def test_source_is_kept(tmp_path):
    settings = {"k": np.int64(5), "t": np.float32(0.1), "flag": np.True_, "p": (1, math.inf)}
    source = ThresholdSource("knn", settings, groups="a" * 16)
    assert source.settings == {"k": 5, "t": 0.1, "flag": True, "p": [1, "inf"]}
    threshold = Threshold.calibrate([1.0, 2.0], source=source)
    threshold.save(tmp_path / "t.json")
    for kept in (
        Threshold.load(tmp_path / "t.json"),
        Threshold.from_tensor(threshold.to_tensor()),
    ):
        assert kept == threshold
        kept.check_source(source)
        assert hash(kept) == hash(threshold)
    with pytest.raises(ValueError, match=r"must fit 4096 bytes, got .*settings are too long"):
        Threshold.calibrate([1.0], source=replace(source, settings={"x": "y" * 5000})).to_tensor()


def test_source_refuses_what_is_no_plain_value():
    with pytest.raises(TypeError, match=r"settings\['a'\]\[1\] must be a number.* got Tensor"):
        ThresholdSource("knn", {"a": [1, torch.zeros(2)]})
    with pytest.raises(TypeError, match="model must be text, got 3"):
        ThresholdSource("knn", model=3)
    with pytest.raises(TypeError, match="source must be a ThresholdSource, got str"):
        Threshold.calibrate([1.0], source="energy")
    content = json.loads(Threshold.calibrate([1.0]).to_json())
    with pytest.raises(ValueError, match="source cannot be"):
        Threshold.from_json(json.dumps({**content, "source": {"name": "knn"}}))


def test_digest_tells_content_apart():
    x = torch.arange(6.0)
    same = [digest(x), digest(x.reshape(2, 3).T.T.reshape(6)), digest(torch.arange(12.0)[::2] / 2)]
    assert same[0] == same[1] == same[2]
    assert len(same[0]) == 16
    others = [
        digest(x.double()),
        digest(x.reshape(2, 3)),
        digest({"x": x}),
        digest({"y": x}),
        digest(x, x),
        digest(x, None),
        digest(x, ""),
        digest({}),
        digest(""),
        digest(None),
        digest(),
        digest("a", "b"),
        digest("ab"),
    ]
    assert len({same[0], *others}) == len(others) + 1
    assert digest({"a": x, "b": x[0]}) == digest({"b": x[0], "a": x})


# --- NumPy's numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_numpy_numbers_are_those_they_print_as(tmp_path, kind):
    """float32's 0.95 is 0.949999988: of 20 scores, 19 are kept, whatever the type."""
    threshold = Threshold.calibrate(list(range(20)), kind(0.95), kind(0.9))
    assert (threshold.tpr, threshold.confidence) == (0.95, 0.9)
    assert threshold == Threshold.calibrate(list(range(20)), 0.95, 0.9)
    fields = {k: getattr(threshold, k) for k in asdict(threshold)}
    given = {
        "value": kind(1),
        "tpr": kind(0.95),
        "n_id": np.int64(20),
        "achieved_tpr_bounds": np.array([0.95, 0.95]),
        "value_bounds": [kind(1), np.int32(1)],
    }
    Threshold(**{**fields, **given}).save(tmp_path / "t.json")
    assert Threshold.load(tmp_path / "t.json") == threshold


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "options", "error", "match"),
    [
        ([], {}, ValueError, "Threshold.calibrate: id_scores must not be empty"),
        ([0.0, math.nan, math.nan], {}, ValueError, "id_scores must not hold NaN, got 2.*index 1"),
        ([True], {}, TypeError, "Threshold.calibrate: id_scores must be numbers, got torch.bool"),
        ([1.0], {"tpr": 0}, ValueError, r"Threshold.calibrate: tpr must be in \(0, 1\], got 0"),
        ([1.0], {"tpr": math.nan}, ValueError, "tpr must be in .* got nan"),
        ([1.0], {"confidence": 1}, ValueError, r"confidence must be in \(0, 1\), got 1"),
    ],
)
def test_calibrate_refuses(scores, options, error, match):
    with pytest.raises(error, match=match):
        Threshold.calibrate(np.array(scores), **options)


def test_predict_refuses():
    with pytest.raises(
        TypeError, match=r"Threshold.predict: scores must be numbers, got torch.bool"
    ):
        Threshold.calibrate([1.0]).predict(torch.tensor([True]))


def test_from_metric_refuses():
    pytest.importorskip("torchmetrics")
    from oodkernels.metrics.streaming import OODMetrics

    with pytest.raises(TypeError, match="metric must be an OODMetrics, got int"):
        Threshold.from_metric(3)
    metric = OODMetrics()
    with pytest.raises(ValueError, match="from_metric: metric must have seen ID scores, got none"):
        Threshold.from_metric(metric)
    metric.update_ood("a", [1.0])
    with pytest.raises(ValueError, match="metric must have seen ID scores"):
        Threshold.from_metric(metric)
    with pytest.raises(ValueError, match=r"from_metric: tpr must be in \(0, 1\], got 2"):
        Threshold.from_metric(metric, 2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "oodkernels.groups"}, "format must be 'oodkernels.threshold', got 'oodkernels"),
        ({"version": 2}, "version must be 1, got 2"),
        ({"value": None}, "value cannot be 'None'"),
        ({"value": "nan"}, "value cannot be 'nan'"),
        ({"value": 7.0}, "value must be in value_bounds"),
        ({"dtype": "int8"}, "dtype cannot be 'int8'"),
        ({"n_id": 0}, "n_id must be >= 1, got 0"),
        ({"n_id": 2.5}, "n_id cannot be '2.5'"),
        ({"tpr": 1.5}, r"tpr must be in \(0, 1\], got 1.5"),
        ({"interval": [1, 0]}, "interval must be ascending"),
        ({"interval": [1]}, "interval cannot be"),
        ({"achieved_tpr": 0.5}, "achieved_tpr must be in achieved_tpr_bounds"),
        ({"more": 1}, r"unknown: \['more'\]"),
    ],
)
def test_load_refuses(tmp_path, change, match):
    path = tmp_path / "threshold.json"
    content = json.loads(Threshold.calibrate([1.0]).to_json())
    path.write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=match) as info:
        Threshold.load(path)
    assert str(path) in str(info.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"a"', "{}", '{"format": "x"}'])
def test_from_json_refuses(text):
    with pytest.raises(ValueError, match=r"Threshold.from_json"):
        Threshold.from_json(text)
    content = json.loads(Threshold.calibrate([1.0]).to_json())
    del content["tpr"]
    with pytest.raises(ValueError, match=r"missing: \['tpr'\]"):
        Threshold.from_json(json.dumps(content))


@pytest.fixture
def usual_recursion():
    """Python's own limit: what a test before this one imports may have raised it."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(limit)


@pytest.mark.parametrize("depth", [900, 100_000])
@pytest.mark.usefixtures("usual_recursion")
def test_deep_settings_are_one_line(tmp_path, depth):
    content = json.loads(Threshold.calibrate([1.0]).to_json())
    deep = {**content, "source": {"detector": "a", "settings": {"x": "here"}}}
    path = tmp_path / "t.json"
    path.write_text(json.dumps(deep).replace('"here"', "[" * depth + "]" * depth))
    with pytest.raises(ValueError, match=r"Threshold.load: .*: Threshold.from_json: ") as info:
        Threshold.load(path)
    assert len(str(info.value)) < 500


@pytest.mark.parametrize(
    "source",
    [
        3,
        [],
        "a",
        {},
        {"detector": 3},
        {"detector": "a", "settings": 3},
        {"detector": "a", "more": 1},
        {"detector": "a", "model": []},
    ],
)
def test_from_json_refuses_sources(source):
    content = json.loads(Threshold.calibrate([1.0]).to_json())
    with pytest.raises(ValueError, match=r"Threshold.from_json: source cannot be"):
        Threshold.from_json(json.dumps({**content, "source": source}))


HUGE = 10**400


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("value", "tpr", "n_id", "interval", "achieved_tpr_bounds")
        for value in (HUGE, -HUGE, {}, [], [[1, 2], 3], "1", True)
        if (name, value) != ("n_id", HUGE)  # which is a number of scores
    ],
    ids=lambda x: str(x)[:20],
)
def test_from_json_refuses_hostile_fields(name, value):
    content = json.loads(Threshold.calibrate([1.0]).to_json())
    with pytest.raises(ValueError, match=rf"Threshold.from_json: .*{name}"):
        Threshold.from_json(json.dumps({**content, name: value}))


def test_every_kind_of_input():
    expected = Threshold.calibrate([3.0, 2.0, 1.0])
    storage = torch.tensor([3.0, 9, 2, 9, 1, 9], dtype=torch.float64)
    for scores in (
        storage[::2],
        storage[::2].numpy()[::-1],
        np.array([3, 2, 1], ">i2"),
        (np.float32(3), 2, True + 0),
        storage[::2].reshape(3, 1).requires_grad_(),
    ):
        assert Threshold.calibrate(scores) == expected
        assert expected.predict(scores).any().item() is False
    infinite = Threshold.calibrate([-math.inf, math.inf], 1)
    assert (infinite.value, infinite.predict([-math.inf, math.nan]).tolist()) == (
        -math.inf,
        [False, True],
    )
    for scores, error, match in (
        (1.0, ValueError, "id_scores must have at least one dimension"),
        ([[1.0], []], ValueError, "id_scores must be an array"),
        (["a"], TypeError, "id_scores must be numbers"),
        (None, TypeError, "id_scores must be numbers, got object"),
    ):
        with pytest.raises(error, match=f"^Threshold.calibrate: {match}"):
            Threshold.calibrate(scores)
    with pytest.raises(TypeError, match=r"Threshold.predict: scores must be numbers, got <U1"):
        expected.predict(["a"])


def test_from_tensor_refuses():
    with pytest.raises(TypeError, match=r"must be uint8, got torch.float32"):
        Threshold.from_tensor(torch.zeros(4096))
    with pytest.raises(ValueError, match=r"shape \(4096,\), got \(3,\)"):
        Threshold.from_tensor(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"Threshold.from_tensor: .*JSON"):
        Threshold.from_tensor(torch.zeros(4096, dtype=torch.uint8))


def test_fields_are_checked():
    fields = asdict(Threshold.calibrate([1.0]))
    with pytest.raises(TypeError, match=r"dtype must be one of float64.*got torch.int8"):
        Threshold(**{**fields, "dtype": torch.int8})
    with pytest.raises(ValueError, match="value must not be NaN"):
        Threshold(**{**fields, "value": math.nan})
