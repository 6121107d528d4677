"""The monitor against restatements of its rules, and its error against simulation."""

from __future__ import annotations

import json
import math
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import GROUPS, data, make
from processes import started
from scipy import stats
from torch import Tensor, nn

from oodkernels.deploy import Bundle, ConformalPValues, Decision, Monitor
from oodkernels.deploy.monitor import confidence_sequence
from oodkernels.detectors import Energy

CLASSES = 3


def bundle_of(scores: Tensor, **options: Any) -> Bundle:
    """A bundle that was calibrated on these scores."""
    energy = Energy()
    return Bundle(
        nn.Identity(),
        energy,
        energy.calibrate(scores),
        p_values=ConformalPValues(scores.double().numpy()),
        input_shape=(CLASSES,),
        **options,
    )


def decisions(bundle: Bundle, scores: Tensor, label: Tensor | None = None) -> Decision:
    if label is None:
        label = torch.arange(len(scores)) % CLASSES
    nan = scores.isnan()
    p = torch.ones(len(scores), dtype=torch.float64)
    return Decision(torch.where(nan, -1, label), scores, ~(scores.double() >= bundle.cut), p, None)


def normal(n: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, size=n)).float()


BUNDLE = bundle_of(normal(1000, 0))


def watch(scores: Tensor, bundle: Bundle = BUNDLE, step: int = 77, **options: Any) -> Monitor:
    """A monitor that was given scores in batches."""
    monitor = Monitor(bundle, clock=lambda: 0.0, **options)
    label = torch.arange(len(scores)) % CLASSES
    for part, own in zip(scores.split(step), label.split(step), strict=True):
        monitor.update(decisions(bundle, part, own))
    return monitor


# --- rules ----------------------------------------------------------------------------------------


def test_ranks_are_those_of_the_rule() -> None:
    monitor = Monitor(BUNDLE)
    random = np.random.default_rng(3)
    bins = random.integers(0, len(monitor._base), 300)
    u = np.concatenate([monitor._ranks(monitor._bag, part) for part in np.split(bins, [1, 100])])
    bag = np.repeat(np.arange(len(monitor._base)), monitor._base).tolist()
    ties = np.random.Generator(np.random.PCG64(1))
    for found, score in zip(u, bins, strict=True):
        below, same = sum(b < score for b in bag), sum(b == score for b in bag)
        assert found == pytest.approx((below + ties.random() * (same + 1)) / (len(bag) + 1))
        bag.append(score)
    assert monitor._base.sum() == 500  # half of the calibration makes the bins


def test_martingales_are_those_of_the_rule() -> None:
    """Capital 1 / (k (k + 1)) for the k-th start, at every 128th sample, put on fair bets."""
    monitor, ranks = Monitor(BUNDLE), []
    rule = monitor._ranks

    def kept(bag: Any, bins: Any) -> Any:
        found = rule(bag, bins)
        ranks.extend(found if bag is monitor._bag else ())
        return found

    monitor._ranks = kept  # type: ignore[method-assign]
    for part in normal(400, 1).split(77):
        monitor.update(decisions(BUNDLE, part))
    z = stats.norm.ppf(ranks)
    pairs = [(d, 1.0) for d in (-2, -1, -0.5, -0.25, 0.25, 0.5, 1, 2)]
    pairs += [(0.0, s) for s in (0.6, 0.8, 1.25, 1.7)]
    capital = []
    for mean, scale in pairs:
        ratio = stats.norm.pdf(z, mean, scale) / stats.norm.pdf(z)
        starts = [(k + 1, 128 * k) for k in range(4)]
        capital.append(sum(np.prod(ratio[at:]) / (k * (k + 1)) for k, at in starts))
    wanted = np.mean(capital) + 1 / 5
    assert monitor.report()["log10_drift"] == pytest.approx(math.log10(wanted), abs=1e-6)


def test_confidence_sequence_is_the_mixture() -> None:
    low, high = confidence_sequence(30, 400, 0.95)
    for p in (low, high):
        mixture = math.exp(
            math.lgamma(30.5) + math.lgamma(370.5) - math.lgamma(401) - 2 * math.lgamma(0.5)
        )
        assert mixture / (p**30 * (1 - p) ** 370) == pytest.approx(20, rel=1e-6)
    assert low < 30 / 400 < high
    assert confidence_sequence(0, 0) == (0, 1)
    assert confidence_sequence(0, 50)[0] == 0
    assert confidence_sequence(50, 50)[1] == 1
    with pytest.raises(ValueError, match=r"successes must be in 0\.\.trials, got 3 of 2"):
        confidence_sequence(3, 2)


def test_confidence_sequence_holds_at_all_times_at_once() -> None:
    random = np.random.default_rng(0)
    missed = 0
    for _ in range(200):
        upto = (random.random(1000) < 0.1).cumsum()
        missed += any(
            not low <= 0.1 <= high
            for n in range(10, 1000, 45)
            for low, high in [confidence_sequence(int(upto[n - 1]), n, 0.9)]
        )
    assert missed <= 200 * 0.1


# --- alarms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "six values", "heavy"])
def test_false_alarms_are_within_the_level(kind: str) -> None:
    """Calibration and stream are drawn anew each time; 60,000 ID samples in all."""
    level, runs, alarmed = 0.3, 40, 0
    for seed in range(runs):
        random = np.random.default_rng(seed)
        draw = {
            "normal": lambda n, r=random: r.normal(size=n),
            "six values": lambda n, r=random: r.integers(6, size=n).astype(float),
            "heavy": lambda n, r=random: r.standard_cauchy(n),
        }[kind]
        bundle = bundle_of(torch.from_numpy(draw(200)))
        monitor = Monitor(bundle, level, window=250)
        for _ in range(3):
            monitor.update(decisions(bundle, torch.from_numpy(draw(500))))
        alarmed += bool(monitor.alarms)
    assert stats.binom.sf(alarmed - 1, runs, level) > 1e-3


@pytest.mark.parametrize(("shift", "within"), [(-1.0, 300), (0.5, 800)])
def test_drift_is_found(shift: float, within: int) -> None:
    scores = torch.cat([normal(5000, 1), normal(3000, 2, shift)])
    (alarm,) = [a for a in watch(scores).alarms if (a.kind, a.scope) == ("drift", "all")]
    assert 5000 < alarm.sample <= 5000 + within
    assert alarm.evidence >= alarm.limit == 400
    assert alarm.text.startswith("scores are not those of before: ID samples give such ev")


def test_a_wider_distribution_is_found() -> None:
    kinds = {a.kind for a in watch(torch.cat([normal(2000, 1), 2 * normal(2000, 2)])).alarms}
    assert "drift" in kinds


def test_a_larger_share_of_flagged_is_found() -> None:
    """By its rate alone: that many scores move below the threshold, the others stay."""
    scores = normal(6000, 1)
    far = torch.arange(6000) % 4 == 0
    scores = torch.where(far & (torch.arange(6000) >= 3000), BUNDLE.threshold.value - 0.1, scores)
    (alarm,) = [a for a in watch(scores).alarms if a.kind == "rate"]
    assert 3000 < alarm.sample < 3400
    assert "more than" in alarm.text
    assert not [a for a in watch(scores, rate=0.5).alarms if a.kind == "rate"]


def test_a_window_that_differs_is_found() -> None:
    scores = torch.cat([normal(2000, 1), normal(1000, 2, -0.4)])
    monitor = watch(scores)
    (alarm,) = [a for a in monitor.alarms if a.kind == "ks"]
    assert alarm.sample == 3000
    base = np.repeat(np.arange(len(monitor._base)), monitor._base)
    last = np.searchsorted(monitor._edges, scores[2000:].double().numpy(), side="right")
    assert monitor.windows[-1]["ks"] == pytest.approx(stats.ks_2samp(last, base).statistic)
    exact = stats.ks_2samp(last, base, method="asymp").pvalue
    assert exact / 3 < monitor.windows[-1]["ks_p"] < 3 * exact


def test_a_class_that_drifts_is_named() -> None:
    scores = normal(9000, 1)
    label = torch.arange(9000) % CLASSES
    scores = torch.where((label == 1) & (torch.arange(9000) > 4500), scores + 1.0, scores)
    scopes = {a.scope for a in watch(scores).alarms if a.kind == "drift"}
    assert "class 1" in scopes
    assert not scopes & {"class 0", "class 2"}


def test_an_alarm_is_raised_once_until_it_is_acknowledged() -> None:
    monitor = watch(normal(1000, 1, -2.0))
    first = [(a.kind, a.scope) for a in monitor.alarms]
    assert len(first) == len(set(first)) >= 3
    assert monitor.update(decisions(BUNDLE, normal(1000, 2, -2.0))) == []
    monitor.acknowledge()
    assert monitor.alarms == []
    assert monitor.samples == 2000
    new = monitor.update(decisions(BUNDLE, normal(1000, 3, -2.0)))
    assert ("rate", "all") in {(a.kind, a.scope) for a in new}


# --- figures --------------------------------------------------------------------------------------


def test_report_counts_what_came() -> None:
    scores = normal(2500, 1)
    scores[7] = torch.nan
    monitor = watch(scores, window=1000)
    found = monitor.report()
    flagged = int((~(scores >= BUNDLE.threshold.value)).sum())
    assert (found["samples"], found["flagged"], found["not_numbers"]) == (2500, flagged, 1)
    assert found["share_low"] < flagged / 2500 < found["share_high"]
    assert [w["end"] for w in found["windows"]] == [1000, 2000]
    first = (~(scores[:1000] >= BUNDLE.threshold.value)).double().mean()
    assert found["windows"][0]["flagged"] == pytest.approx(float(first))
    assert sum(entry["samples"] for entry in found["scopes"].values()) == 2499
    wanted = np.quantile(scores[1000:2000].numpy(), [0.05, 0.25, 0.5, 0.75, 0.95])
    np.testing.assert_allclose(found["windows"][1]["quantiles"], wanted, atol=0.15)
    assert json.loads(monitor.to_json()) == found
    assert 0.05 < monitor.promised < 0.1  # what 1,000 samples vouch for


def test_recent_figures_forget() -> None:
    monitor = watch(torch.cat([normal(4000, 1, -9.0), normal(4000, 2)]), half_life=200)
    found = monitor.report()
    assert found["share"] > 0.5
    assert found["recent"]["share"] == pytest.approx(0.05, abs=0.04)
    assert found["recent"]["samples"] == pytest.approx(200 / math.log(2), rel=0.4)


def test_memory_does_not_grow() -> None:
    def size(n: int) -> int:
        monitor = watch(normal(n, 1), step=500, window=100, keep=5)
        arrays = [v for v in vars(monitor).values() if isinstance(v, np.ndarray)]
        assert len(monitor.windows) == 5
        return sum(a.nbytes for a in arrays)

    assert size(1000) == size(8000) < 1 << 16


def test_prometheus_text() -> None:
    monitor = watch(normal(1500, 1, -1.0))
    text = monitor.to_prometheus()
    sample = re.compile(r'oodk_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? -?[0-9.e+-]+')
    for line in text.splitlines():
        assert line.startswith(("# HELP ", "# TYPE ")) or sample.fullmatch(line)
    assert "oodk_samples_total 1500\n" in text
    assert f"oodk_flagged_total {monitor.flagged}\n" in text
    assert 'oodk_alarms{kind="rate"} 1\n' in text
    assert 'oodk_scope_samples_total{scope="class 0"} 500\n' in text


def test_page() -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    named = bundle_of(normal(400, 0), class_names=["<cat>", "dog", "owl"])
    scores = torch.cat([normal(1500, 1), normal(700, 2, -2.0)])
    text = watch(scores, named, window=200).to_html()
    assert "&lt;cat&gt;" in text
    assert "<cat>" not in text
    assert text.count("data:image/svg") + text.count("data:image/png") == 3
    assert re.search(r"<h1>\d+ alarms</h1>", text)
    assert "http" not in re.sub(r'"data:[^"]*"', "", text)
    assert "No window has ended yet" in Monitor(named).to_html()


# --- keeping --------------------------------------------------------------------------------------


def test_state_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    whole = watch(normal(3000, 1))
    half = watch(normal(3000, 1)[:1540])
    half.save(tmp_path / "monitor.safetensors")
    other = Monitor(BUNDLE, clock=lambda: 0.0)
    other.load(tmp_path / "monitor.safetensors")
    label = torch.arange(3000) % CLASSES
    for at in range(1540, 3000, 77):
        own = slice(at, min(at + 77, 3000))
        other.update(decisions(BUNDLE, normal(3000, 1)[own], label[own]))
    assert other.report() == whole.report()


def test_states_of_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "monitor.safetensors"
    watch(normal(500, 1)).save(path)
    with pytest.raises(ValueError, match="of this bundle and these settings: calibration must be"):
        Monitor(bundle_of(normal(1000, 5)), path=path)
    with pytest.raises(ValueError, match=r"level must be 0.5, got 0.01"):
        Monitor(BUNDLE, 0.5, rate=watch(normal(5, 1)).promised, path=path)
    with pytest.raises(ValueError, match="must be of one bundle and settings"):
        Monitor(BUNDLE).merge([Monitor(BUNDLE, 0.5)])


KILLED = """
import sys, torch
from bundles import data, make
from oodkernels.deploy import Monitor
bundle = make()
monitor = Monitor(bundle, window=50, path=sys.argv[1])
while True:
    monitor(data().new[:25])
"""


def test_state_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "monitor.safetensors"
    process = started(KILLED, str(path))
    deadline = time.monotonic() + 120
    while not path.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    monitor = Monitor(make(), window=50, path=path)
    assert monitor.samples >= 50
    assert monitor.samples % 50 == 0
    before = monitor.samples
    monitor(data().new[:25])
    assert monitor.samples == before + 25


def test_processes_merge() -> None:
    parts = [watch(normal(1200, seed), window=400) for seed in (1, 2, 3)]
    parts.append(watch(normal(1200, 4, -1.5), window=400))
    merged = parts[0].merge(parts[1:])
    assert merged.samples == 4800
    assert merged.flagged == sum(part.flagged for part in parts)
    assert len(merged.windows) == 12
    assert (merged._bag - merged._base).sum() == 4800
    assert [a.kind for a in merged.alarms] == [a.kind for a in parts[3].alarms]
    capital = [10 ** part.report()["log10_drift"] for part in parts]
    assert 10 ** merged.report()["log10_drift"] == pytest.approx(np.mean(capital), rel=1e-6)
    merged.update(decisions(BUNDLE, normal(100, 9)))
    assert merged.samples == 4900


def test_threads_share_a_monitor() -> None:
    bundle = make("mos", calibrated=False)
    bundle.calibrate(data(GROUPS.num_classes).held_out)
    monitor = Monitor(bundle)
    x = data().new
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(monitor, [x[i % 40 :][:3] for i in range(64)]))
    assert monitor.samples == sum(len(f.label) for f in found)
    assert monitor.flagged == sum(int(f.is_ood.sum()) for f in found)
    scopes = monitor.report()["scopes"]
    for kind in ("class", "group"):
        own = [e["samples"] for name, e in scopes.items() if name.startswith(kind)]
        assert sum(own) == monitor.samples


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 1.0}, r"level must be in \(0, 1\), got 1.0"),
        ({"rate": 0.0}, r"rate must be in \(0, 1\), got 0.0"),
        ({"window": 0}, "window must be an int >= 1, got 0"),
        ({"half_life": 0}, "half_life must be positive and finite, got 0"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Monitor: {message}"):
        Monitor(BUNDLE, **options)


def test_what_was_not_calibrated_is_refused() -> None:
    with pytest.raises(ValueError, match="Monitor: bundle must be calibrated"):
        Monitor(make(calibrated=False))
    with pytest.raises(ValueError, match="at least 20 calibration scores, got 5"):
        Monitor(bundle_of(normal(5, 0)))
