"""Misclassification detection: the function, the stream, OOD samples, open-set accuracy."""

import copy
import math
import pickle
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import ranks, run_code

from oodkernels.metrics.misclassification import misclassification_metrics
from oodkernels.metrics.ood import ood_metrics
from oodkernels.metrics.threshold import Threshold


def answers(n=3000, seed=0, dtype=torch.float32):
    """Confidence, predicted class and class, a third of them OOD (-1)."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(3, (n,), generator=g)
    confidence = (torch.randn(n, generator=g) + 2 - kind).sigmoid().to(dtype)
    predicted = torch.randint(10, (n,), generator=g)
    label = torch.where(kind == 0, predicted, torch.where(kind == 1, (predicted + 1) % 10, -1))
    return confidence, predicted, label


def make(**options):
    pytest.importorskip("torchmetrics")
    from oodkernels.metrics.streaming import MisclassificationMetrics

    return MisclassificationMetrics(**options)


def average_precision(scores, positive):
    """Over the distinct scores from the top: precision times the recall gained."""
    total = 0.0
    for t in set(scores):
        at_or_above = [p for s, p in zip(scores, positive, strict=True) if s >= t]
        gained = sum(p for s, p in zip(scores, positive, strict=True) if s == t)
        total += gained / sum(positive) * sum(at_or_above) / len(at_or_above)
    return total


def restated(confidence, correct):
    """The figures from their definitions, in Python numbers."""
    right = [c for c, ok in zip(confidence, correct, strict=True) if ok]
    wrong = [c for c, ok in zip(confidence, correct, strict=True) if not ok]
    wins = sum((r > w) + (r == w) / 2 for r in right for w in wrong)
    kept = [t for t in right if 20 * sum(r >= t for r in right) >= 19 * len(right)]
    return {
        "auroc": wins / len(right) / len(wrong),
        "aupr_succ": average_precision(confidence, correct),
        "aupr_err": average_precision([-c for c in confidence], [not ok for ok in correct]),
        "fpr_at_tpr": sum(w >= max(kept) for w in wrong) / len(wrong),
        "threshold": max(kept),
        "mean_confidence": math.fsum(confidence) / len(confidence),
        "mean_confidence_right": math.fsum(right) / len(right),
        "mean_confidence_wrong": math.fsum(wrong) / len(wrong),
        "base_rate_right": len(right) / len(confidence),
        "base_rate_wrong": len(wrong) / len(confidence),
        "tpr": 0.95,
        "n_right": len(right),
        "n_wrong": len(wrong),
    }


@given(
    values=st.lists(
        st.tuples(st.one_of(st.sampled_from([0.25, 0.5, 1.0]), st.floats(0, 1)), st.booleans()),
        max_size=40,
    )
)
@settings(max_examples=100, deadline=None)
def test_is_the_definition(values):
    values = [(0.5, True), *values, (0.25, False)]
    confidence, correct = [c + 0.0 for c, _ in values], [ok for _, ok in values]
    result = misclassification_metrics(confidence, correct)
    assert asdict(result) == pytest.approx(restated(confidence, correct), abs=1e-12)
    assert result.accuracy == result.base_rate_right


def test_is_that_of_scikit_learn(device):
    metrics = pytest.importorskip("sklearn.metrics")
    confidence, predicted, label = answers()
    correct = predicted == label
    result = misclassification_metrics(confidence.to(device), correct.to(device))
    assert result.auroc == pytest.approx(metrics.roc_auc_score(correct, confidence), abs=1e-12)
    for got, positive, scores in (
        (result.aupr_succ, correct, confidence),
        (result.aupr_err, ~correct, -confidence),
    ):
        expected = metrics.average_precision_score(positive, scores)
        assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("correct", [True, False])
def test_answers_of_one_kind(correct):
    result = misclassification_metrics([0.5, 0.75], [correct] * 2)
    metric = make()
    metric.update(torch.tensor([0.5, 0.75]), torch.tensor([correct] * 2))
    figures = metric.compute()
    for name in ("auroc", "aupr_succ", "aupr_err", "threshold"):
        assert math.isnan(getattr(result, name))
        assert math.isnan(figures[name])
    assert result.accuracy == figures["accuracy"] == correct
    seen, other = ("right", "wrong") if correct else ("wrong", "right")
    for got in (asdict(result), figures):
        assert got[f"mean_confidence_{seen}"] == 0.625
        assert math.isnan(got[f"mean_confidence_{other}"])


# --- the stream -----------------------------------------------------------------------------------


def expected_figures(confidence, predicted, label, value):
    right, is_ood = predicted == label, label < 0
    result = misclassification_metrics(confidence[~is_ood], right[~is_ood])
    ood = ood_metrics(confidence[right], confidence[is_ood])
    hits = torch.where(is_ood, confidence < value, right & (confidence >= value))
    figures = {
        "auroc": result.auroc,
        "aupr_succ": result.aupr_succ,
        "aupr_err": result.aupr_err,
        "fpr95": result.fpr_at_tpr,
        "threshold": result.threshold,
        "auroc_ood": ood.auroc,
        "aupr_in_ood": ood.aupr_in,
        "aupr_out_ood": ood.aupr_out,
        "fpr95_ood": ood.fpr95,
    }
    rest = {
        "accuracy": result.accuracy,
        "base_rate_right": result.base_rate_right,
        "base_rate_wrong": result.base_rate_wrong,
        "mean_confidence_right": result.mean_confidence_right,
        "mean_confidence_wrong": result.mean_confidence_wrong,
        "mean_confidence_ood": float(confidence[is_ood].double().mean()),
        "open_set_accuracy": float(hits.double().mean()),
        "n_right": int(right.sum()),
        "n_wrong": int((~right & ~is_ood).sum()),
        "n_ood": int(is_ood.sum()),
    }
    return figures, rest


def check(got, figures, rest):
    """Every figure is there, no other, and exact or between its bounds."""
    ends = ("", "_lower", "_upper")
    assert got.keys() == {name + end for name in figures for end in ends} | rest.keys()
    for name, value in figures.items():
        assert got[f"{name}_lower"] - 1e-15 <= value <= got[f"{name}_upper"] + 1e-15
        assert got[f"{name}_upper"] - got[f"{name}_lower"] <= 3e-4
        assert got[f"{name}_lower"] <= got[name] <= got[f"{name}_upper"]
    assert {name: got[name] for name in rest} == pytest.approx(rest, abs=1e-12)


@pytest.mark.parametrize("exact", [True, False])
def test_short_stream_is_exact(exact, device):
    data = answers()
    threshold = Threshold.calibrate(data[0][data[1] == data[2]], 0.9)
    metric = make(exact=exact, threshold=threshold).to(device)
    for part in zip(*(t.split(700) for t in data), strict=True):
        metric.update(*(t.to(device) for t in part))
    figures, rest = expected_figures(*data, threshold.value)
    check(metric.compute(), figures, rest)
    for name, value in figures.items():
        assert metric.compute()[name] == value
    assert metric.exact == exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bounded_stream_bounds_hold(dtype):
    data = answers(400_000, dtype=dtype)
    metric = make(memory="16MiB", threshold=0.5)
    for part in zip(*(t.split(70_000) for t in data), strict=True):
        metric.update(*part)
    figures, rest = expected_figures(*data, 0.5)
    got = metric.compute()
    check(got, figures, rest)
    if dtype == torch.bfloat16:
        assert {name: got[name] for name in figures} == pytest.approx(figures, abs=1e-12)
    assert metric.state_bytes <= 16 * 2**20


def test_right_or_wrong_given_as_such():
    confidence, predicted, label = (t[:500] for t in answers())
    inside = label >= 0
    by_class, by_answer = make(), make()
    by_class.update(confidence[inside].reshape(-1, 1), predicted[inside, None], label[inside, None])
    by_answer.update(confidence[inside].numpy(), (predicted == label)[inside].numpy())
    assert by_class.compute() == pytest.approx(by_answer.compute(), nan_ok=True)
    assert "open_set_accuracy" not in by_answer.compute()
    assert math.isnan(by_answer.compute()["auroc_ood"])


def test_numpy_and_lists():
    confidence, predicted, label = (t[:500].numpy() for t in answers())
    expected = make(tpr=0.9, threshold=0.75)
    expected.update(*(torch.from_numpy(x) for x in (confidence, predicted, label)))
    metric = make(exact=np.True_, tpr=np.float32(0.9), threshold=np.float32(0.75))
    metric.update(confidence.astype(">f4")[::-1], predicted.astype(">i8")[::-1], label[::-1])
    assert metric.compute() == pytest.approx(expected.compute(), abs=1e-14)
    right = (predicted == label).tolist()
    result = misclassification_metrics(confidence.tolist(), right, tpr=np.float16(0.9))
    assert result == misclassification_metrics(confidence, np.array(right), tpr=0.9)
    assert type(result.tpr) is float


def test_saturated_confidences():
    """As many wrong answers as right ones, and of two confidences: no labels in disguise."""
    confidence, correct = [1.0, 1.0, 0.0, 1.0], [True, True, False, False]
    metric = make()
    metric.update(confidence, correct)
    result = misclassification_metrics(confidence, correct)
    assert metric.compute()["auroc"] == result.auroc == 0.75


def test_merging_with_itself_doubles_it():
    metric = make()
    metric.update(*answers(400))
    once = metric.compute()
    metric.merge_state(metric)
    twice = metric.compute()
    assert twice["n_ood"] == 2 * once["n_ood"]
    assert twice["mean_confidence_ood"] == once["mean_confidence_ood"]
    assert twice["auroc"] == once["auroc"]


def test_a_collection_does_not_lend_sums_between_thresholds():
    """It groups metrics whose states are equal after the first batch; these differ later."""
    pytest.importorskip("torchmetrics")
    from torchmetrics import MetricCollection

    both = MetricCollection({"low": make(threshold=0.25), "high": make(threshold=0.5)})
    for value in (0.75, 0.375):
        both.update(torch.tensor([value]), torch.tensor([True]))
    assert both["low"].compute()["open_set_accuracy"] == 1
    assert both["high"].compute()["open_set_accuracy"] == 0.5


def test_an_empty_batch_has_no_figures():
    figures = make(threshold=0.5)(torch.empty(0), torch.empty(0, dtype=torch.bool))
    assert math.isnan(figures["open_set_accuracy"])
    assert math.isnan(figures["auroc"])
    assert figures["n_right"] == 0


def test_sums_of_another_threshold_are_refused():
    metric, other = make(threshold=0.5), make(threshold=0.25)
    other.update([0.4], [True])
    other.persistent(True)
    match = "incoming_state must have the threshold 0.5, got 0.25"
    with pytest.raises(ValueError, match=f"load_state_dict: {match}"):
        metric.load_state_dict(other.state_dict())


def test_tpr_names_the_fpr():
    confidence, predicted, label = answers()
    inside = label >= 0
    correct = (predicted == label)[inside]
    metric = make(tpr=0.8)
    metric.update(confidence[inside], correct)
    expected = misclassification_metrics(confidence[inside], correct, tpr=0.8)
    assert metric.compute()["fpr80"] == expected.fpr_at_tpr
    assert "fpr95" not in metric.compute()


def test_merge_forward_reset_and_saved_state():
    first, second = answers(400), answers(600, seed=1)
    whole, half, other = (make(threshold=0.7) for _ in range(3))
    whole.update(*first)
    batch = half(*first)
    assert batch == whole.compute()
    whole.update(*second)
    other.update(*second)
    half.compute()
    before = copy.deepcopy(other)
    half.merge_state(pickle.loads(pickle.dumps(other)))
    assert half.compute() == pytest.approx(whole.compute(), abs=1e-14)
    assert other.compute() == before.compute()
    half.reset()
    with pytest.raises(ValueError, match=r"MisclassificationMetrics.compute: .* no answers yet"):
        half.compute()
    half.update(*second)
    assert half.compute() == other.compute()

    whole.persistent(True)
    loaded = make(threshold=0.7)
    loaded.persistent(True)
    loaded.load_state_dict(whole.state_dict())
    assert loaded.compute() == whole.compute()

    with pytest.raises(ValueError, match="must be a MisclassificationMetrics, got dict"):
        whole.merge_state({})
    with pytest.raises(ValueError, match=r"must have the threshold 0.7, got None"):
        whole.merge_state(make())
    with pytest.raises(ValueError, match="MisclassificationMetrics: an exact metric merges with"):
        whole.merge_state(make(exact=True, threshold=0.7))


def test_in_a_collection():
    pytest.importorskip("torchmetrics")
    from torchmetrics import MetricCollection

    both = MetricCollection({"a": make(tpr=0.8), "b": make(tpr=0.95)}, prefix="x_")
    for seed in range(3):
        both.update(*answers(300, seed=seed))
    got = {key.split("_")[-1]: value for key, value in both.compute().items()}
    for tpr, name in ((0.8, "fpr80"), (0.95, "fpr95")):
        single = make(tpr=tpr)
        for seed in range(3):
            single.update(*answers(300, seed=seed))
        assert got[name] == single.compute()[name]


def share(rank, world):
    metric = make(threshold=0.7)
    metric.update(*(t[rank::world] for t in answers(1000)))
    return metric.compute(), metric.compute()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_distributed(tmp_path):
    one, _ = share(0, 1)
    for results in ranks(tmp_path, 2, share):
        for result in results:
            assert result == pytest.approx(one, abs=1e-14)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    metric = make()
    with pytest.raises(ValueError, match=r"MisclassificationMetrics.plot: there must be right"):
        metric.plot()
    metric.update(*answers())
    figure, ax = metric.plot()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert [label.split(":")[0] for label in labels] == ["wrong", "ood"]
    assert pyplot.get_fignums() == before
    figure.savefig(tmp_path / "roc.png")


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("confidence", "correct", "error", "match"),
    [
        ([0.5, math.nan], [True, False], ValueError, "confidence must not be NaN, got 1.*index 1"),
        ([0.5], [1], TypeError, "must be bool.*got torch.int64"),
        ([True], [True], TypeError, "confidence must be numbers, got torch.bool"),
        ([0.5], [True, False], ValueError, r"shape of confidence, \(1,\), got \(2,\)"),
    ],
)
def test_refuses(confidence, correct, error, match):
    with pytest.raises(error, match=f"misclassification_metrics: .*{match}"):
        misclassification_metrics(confidence, correct)
    metric = make()
    with pytest.raises(error, match=f"MisclassificationMetrics.update: .*{match}"):
        metric.update(np.array(confidence), torch.tensor(correct))
    with pytest.raises(ValueError, match="there are no answers yet"):
        metric.compute()


def test_refuses_options():
    with pytest.raises(ValueError, match="misclassification_metrics: confidence must not be empty"):
        misclassification_metrics([], np.zeros(0, bool))
    with pytest.raises(ValueError, match=r"misclassification_metrics: tpr must be in \(0, 1\]"):
        misclassification_metrics([0.5], [True], tpr=0)
    with pytest.raises(ValueError, match=r"MisclassificationMetrics: tpr must be in \(0, 1\]"):
        make(tpr=2)
    with pytest.raises(ValueError, match="MisclassificationMetrics: threshold must not be NaN"):
        make(threshold=math.nan)
    with pytest.raises(ValueError, match="MisclassificationMetrics: memory must be a size"):
        make(memory="much")


def test_refuses_labels():
    metric, x = make(), torch.tensor([0.5, 0.75])
    i = torch.tensor([1, 2])
    with pytest.raises(TypeError, match=r"update: answer must be integers where.*torch.bool"):
        metric.update(x, i > 1, i)
    with pytest.raises(TypeError, match=r"update: label must be integers where.*torch.float32"):
        metric.update(x, i, x)
    with pytest.raises(ValueError, match=r"label must have the shape of answer, \(2,\), got \(1,"):
        metric.update(x, i, i[:1])


def test_without_torchmetrics():
    code = (
        "import sys; sys.modules['torchmetrics'] = None\n"
        "from oodkernels import misclassification_metrics\n"
        "print(misclassification_metrics([0.5, 0.25], [True, False]).auroc)\n"
        "try: from oodkernels import MisclassificationMetrics\n"
        "except ImportError as error: print(error)\n"
    )
    out = run_code(code)
    assert out.returncode == 0, out.stderr
    first, second = out.stdout.splitlines()
    assert first == "1.0"
    assert "oodkernels.metrics.streaming needs torchmetrics" in second
    assert "pip install 'oodkernels[metrics]'" in second


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_counts_without_waiting():
    data = [t.cuda() for t in answers()]
    metric = make(threshold=0.7).to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update(*data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    figures, rest = expected_figures(*(t.cpu() for t in data), 0.7)
    check(metric.compute(), figures, rest)
