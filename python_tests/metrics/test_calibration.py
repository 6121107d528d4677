"""Calibration error: both binnings against a restatement, torchmetrics, streams, the diagram."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_code

from oodkernels.metrics.calibration import (
    calibration_bins,
    expected_calibration_error,
    reliability_diagram,
)


def answers(n=5000, seed=0, power=0.5, dtype=torch.float32):
    """Confidences piled up at 1, right with another probability."""
    g = torch.Generator().manual_seed(seed)
    confidence = torch.rand(n, generator=g).to(dtype) ** 0.3
    return confidence, torch.rand(n, generator=g) < confidence.float() ** (1 / power)


def restated(confidence, correct, bins, binning):
    """Answer by answer, in Python numbers: which bin, then the definition."""
    pairs = sorted(zip(map(float, confidence), map(bool, correct), strict=True))
    n = len(pairs)
    if binning == "width":
        ends = [(i + 1) / bins for i in range(bins)]
    else:
        ends = [pairs[math.ceil((i + 1) * n / bins) - 1][0] for i in range(bins)]
    total = 0.0
    for i, end in enumerate(ends):
        start = ends[i - 1] if i else -1.0
        members = [(c, ok) for c, ok in pairs if start < c <= end]
        if members:
            total += abs(sum(ok for _, ok in members) - math.fsum(c for c, _ in members)) / n
    return total


@pytest.mark.parametrize("binning", ["width", "mass"])
@given(
    values=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 8).map(lambda i: i / 8), st.floats(0, 1, width=32)),
            st.booleans(),
        ),
        min_size=1,
        max_size=60,
    ),
    bins=st.integers(1, 20),
)
@settings(max_examples=100, deadline=None)
def test_is_the_definition(binning, values, bins):
    confidence = torch.tensor([c for c, _ in values], dtype=torch.float64)
    correct = torch.tensor([ok for _, ok in values])
    got = expected_calibration_error(confidence, correct, bins=bins, binning=binning)
    assert got == pytest.approx(restated(confidence, correct, bins, binning), abs=1e-14)
    found = calibration_bins(confidence, correct, bins=bins, binning=binning)
    assert found.count.sum() == len(values)
    assert found.edges.shape == (bins + 1,)
    order = torch.randperm(len(values))
    assert got == pytest.approx(
        expected_calibration_error(confidence[order], correct[order], bins=bins, binning=binning),
        abs=1e-14,
    )


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_binary_is_that_of_torchmetrics(bins):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    # Without confidences at the ends of bins, where rules differ: torchmetrics has [l, r).
    confidence, correct = answers(3000)
    theirs = functional.binary_calibration_error(confidence, correct.int(), n_bins=bins)
    ours = expected_calibration_error(confidence, correct, bins=bins)
    assert ours == pytest.approx(float(theirs), abs=2e-6)  # it sums in float32


def test_multiclass_is_that_of_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    g = torch.Generator().manual_seed(0)
    probabilities = (3 * torch.randn(2000, 10, generator=g)).softmax(1)
    labels = torch.randint(10, (2000,), generator=g)
    theirs = functional.multiclass_calibration_error(probabilities, labels, 10, n_bins=15)
    confidence, label = probabilities.max(1)
    ours = expected_calibration_error(confidence, label == labels)
    assert ours == pytest.approx(float(theirs), abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_bins_are_open_below_and_closed_above(dtype):
    confidence = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=dtype)
    found = calibration_bins(confidence, torch.ones(5, dtype=torch.bool), bins=4)
    assert found.count.tolist() == [2, 1, 1, 1]
    assert found.confidence.tolist() == [0.125, 0.5, 0.75, 1.0]
    assert found.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_equal_mass():
    confidence, correct = answers(1003, dtype=torch.float64)
    found = calibration_bins(confidence, correct, binning="mass")
    assert found.count.max() - found.count.min() == 1
    tied = torch.tensor([0.1, 0.5, 0.5, 0.5, 0.5, 0.9])
    found = calibration_bins(tied, tied > 0.3, bins=3, binning="mass")
    assert found.count.tolist() == [5, 0, 1]  # bins end at 0.5, 0.5 and 0.9
    assert math.isnan(found.accuracy[1])
    assert found.mce == pytest.approx(abs(4 / 5 - 2.1 / 5))


def test_calibrated_answers_have_little_error():
    confidence, correct = answers(200_000, power=1)
    over, wrong = answers(200_000, power=0.5)
    for binning in ("width", "mass"):
        assert expected_calibration_error(confidence, correct, binning=binning) < 0.005
        gap = float((over - over**2).mean())  # the expected gap of answers right at confidence^2
        assert expected_calibration_error(over, wrong, binning=binning) == pytest.approx(
            gap, abs=0.005
        )


def test_shapes_and_types(device):
    confidence, correct = answers(60)
    expected = expected_calibration_error(confidence, correct)
    shaped = confidence.reshape(3, 20).to(device), correct.reshape(3, 20).to(device)
    assert expected_calibration_error(*shaped) == pytest.approx(expected)
    assert expected_calibration_error(confidence.numpy(), correct.numpy()) == expected
    assert expected_calibration_error([1, 0.5], [True, False]) == 0.25


def test_numpy_and_lists():
    confidence, correct = (t.numpy() for t in answers(60))
    expected = expected_calibration_error(confidence, correct, bins=10)
    swapped = confidence.astype(">f4")[::-1], correct[::-1]
    metric = make(bins=np.int64(10))
    metric.update(*swapped)
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-15)
    for pair in (swapped, (confidence.tolist(), correct.tolist()), (list(confidence), correct)):
        found = expected_calibration_error(*pair, bins=np.uint8(10))
        assert found == pytest.approx(expected, abs=1e-15)
    one = make()
    one.update(np.float32(0.75), np.True_)
    one.update(0.75, True)
    assert float(one.compute()) == expected_calibration_error(0.75, True) == 0.25
    assert one.calibration_bins().count.sum() == 2


# --- streams --------------------------------------------------------------------------------------


def make(**options):
    pytest.importorskip("torchmetrics")
    from oodkernels.metrics.streaming import CalibrationError

    return CalibrationError(**options)


def test_stream_is_exact_in_fixed_memory(device):
    confidence, correct = answers(20_000, dtype=torch.float64)
    metric = make(bins=20).to(device)
    for c, ok in zip(confidence.split(1700), correct.split(1700), strict=True):
        metric.update(c.to(device), ok.to(device))
    expected = expected_calibration_error(confidence, correct, bins=20)
    assert metric.compute().dtype == torch.float64
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-14)
    assert sum(t.numel() for t in metric.metric_state.values()) == 3 * 20 + 1
    metric.half()
    metric.set_dtype(torch.float16)
    assert metric.confidence.dtype == torch.float64


def test_merge_forward_reset_and_saved_state():
    confidence, correct = answers(1000)
    whole, half, other = make(), make(), make()
    whole.update(confidence, correct)
    batch = half(confidence[:400], correct[:400])
    assert float(batch) == pytest.approx(
        expected_calibration_error(confidence[:400], correct[:400])
    )
    other.update(confidence[400:], correct[400:])
    half.compute()
    half.merge_state(pickle.loads(pickle.dumps(other)))
    assert float(half.compute()) == pytest.approx(float(whole.compute()), abs=1e-14)
    half = copy.deepcopy(other)
    half.reset()
    half.update(confidence[:400], correct[:400])
    half.merge_state(other.metric_state)
    assert float(half.compute()) == pytest.approx(float(whole.compute()), abs=1e-14)

    whole.persistent(True)
    loaded = make()
    loaded.load_state_dict(whole.state_dict())
    assert float(loaded.compute()) == float(whole.compute())
    loaded.reset()
    with pytest.raises(ValueError, match=r"CalibrationError.compute: there are no answers yet"):
        loaded.compute()
    count = whole.count.clone()
    whole.merge_state(whole)
    assert torch.equal(whole.count, 2 * count)
    with pytest.raises(ValueError, match=r"incoming_state must have the shapes.*\(15,\).*\(3,\)"):
        whole.merge_state(make(bins=3))
    with pytest.raises(ValueError, match="must be a CalibrationError or a dict, got int"):
        whole.merge_state(3)


# --- the diagram ----------------------------------------------------------------------------------


def test_diagram(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    confidence, correct = answers()
    before = pyplot.get_fignums()
    figure, ax = reliability_diagram(confidence, correct, bins=10, binning="mass")
    assert pyplot.get_fignums() == before
    found = calibration_bins(confidence, correct, bins=10, binning="mass")
    assert [bar.get_height() for bar in ax.patches] == found.accuracy.tolist()
    assert ax.texts[0].get_text() == f"ECE {found.ece:.4f}"
    figure.savefig(tmp_path / "diagram.png")
    assert (tmp_path / "diagram.png").stat().st_size > 5000
    own = Figure().subplots(1, 2)
    assert reliability_diagram([0.5], [True], ax=own[1]) == (own[1].figure, own[1])
    assert not own[0].patches
    metric = make()
    metric.update(confidence, correct)
    _, ax = metric.plot()
    assert len(ax.patches) == (metric.count > 0).sum()


# --- errors ---------------------------------------------------------------------------------------

ENTRIES = [expected_calibration_error, calibration_bins, reliability_diagram]


@pytest.mark.parametrize("entry", [*ENTRIES, "metric"])
@pytest.mark.parametrize(
    ("confidence", "correct", "error", "match"),
    [
        ([0.5, math.nan, math.nan], [True] * 3, ValueError, "not be NaN, got 2 NaN.*index 1"),
        ([0.5, 1.5, -0.1], [True] * 3, ValueError, r"in \[0, 1\], got 2 outside.*index 1"),
        ([0.5], [1], TypeError, "correct must be bool, got torch.int64"),
        ([True], [True], TypeError, "confidence must be numbers, got torch.bool"),
        ([0.5], [True, False], ValueError, r"shape of confidence, \(1,\), got \(2,\)"),
        ([math.inf], [True], ValueError, r"in \[0, 1\], got 1 outside.*index 0"),
        (["a"], [True], TypeError, "confidence must be numbers, got <U1"),
        ([0.5], [None], TypeError, "correct must be numbers, got object"),
    ],
)
def test_refuses(entry, confidence, correct, error, match):
    name = getattr(entry, "__name__", "CalibrationError.update")
    if entry == "metric":
        metric = make()
        entry = metric.update
    with pytest.raises(error, match=f"{name}: .*{match}"):
        entry(np.array(confidence), np.array(correct))
    if name == "CalibrationError.update":
        assert not metric.count.any()


@pytest.mark.parametrize("entry", ENTRIES)
def test_refuses_options(entry):
    name = entry.__name__
    with pytest.raises(ValueError, match=f"{name}: confidence must not be empty"):
        entry(torch.empty(0), torch.empty(0, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"{name}: bins must be an int >= 1, got 0"):
        entry([0.5], [True], bins=0)
    with pytest.raises(ValueError, match=f"{name}: binning must be 'width' or 'mass', got 'x'"):
        entry([0.5], [True], binning="x")


def test_metric_refuses_options():
    with pytest.raises(ValueError, match=r"CalibrationError: bins must be an int >= 1, got 1.5"):
        make(bins=1.5)


def test_without_extras():
    code = (
        "import sys; sys.modules['torchmetrics'] = sys.modules['matplotlib'] = None\n"
        "from oodkernels import expected_calibration_error, reliability_diagram\n"
        "print(expected_calibration_error([0.5], [True]))\n"
        "try: from oodkernels import CalibrationError\n"
        "except ImportError as error: print(error)\n"
        "try: reliability_diagram([0.5], [True])\n"
        "except ImportError as error: print(error)\n"
    )
    out = run_code(code)
    assert out.returncode == 0, out.stderr
    first, second, third = out.stdout.splitlines()
    assert first == "0.5"
    assert "oodkernels.metrics.streaming needs torchmetrics" in second
    assert "pip install 'oodkernels[metrics]'" in second
    assert "reliability_diagram needs matplotlib" in third
    assert "pip install 'oodkernels[demo]'" in third


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_counts_without_waiting():
    confidence, correct = (t.cuda() for t in answers())
    metric = make().to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update(confidence, correct)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = expected_calibration_error(confidence.cpu(), correct.cpu())
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-12)
    metric.update(torch.tensor([math.nan, 2.0], device="cuda"), correct[:2])
    with pytest.raises(ValueError, match="got 2 NaN or outside of it"):
        metric.compute()
