from __future__ import annotations

import json
import math
import sys
from collections import OrderedDict
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from processes import run_code
from pytorch_ood_package import pytorch_ood
from torch import nn

import oodkernels
from oodkernels import Groups, ood_metrics
from oodkernels.detectors import (
    DETECTORS,
    KNN,
    MOS,
    MSP,
    ODIN,
    AbsentClass,
    ConfidenceBranch,
    Energy,
    Entropy,
    FeatureModel,
    Mahalanobis,
    MaxLogit,
    MOSClass,
    MOSLogOdds,
    NotFittedError,
    OODDetector,
    ViM,
    as_pytorch_ood,
    batch,
    extract,
    score_all,
)

GROUPS = Groups.from_labels(["b", "a", "b", "c", "a", "b", "c"])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def logits_of(n=50, c=10, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (5 * torch.randn(n, c, generator=generator, dtype=torch.float64)).to(dtype)


def mlp(width=6, hidden=12, classes=10, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, classes)
        ).to(dtype)


# --- the rules, restated in NumPy -----------------------------------------------------------------


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def logsumexp(z):
    m = z.max(1)
    return m + np.log(np.exp(z - m[:, None]).sum(1))


RULES = {
    "MSP": (MSP(), lambda z: softmax(z).max(1)),
    "MSP T": (MSP(2.5), lambda z: softmax(z / 2.5).max(1)),
    "MaxLogit": (MaxLogit(), lambda z: z.max(1)),
    "Energy": (Energy(), logsumexp),
    "Energy T": (Energy(temperature=0.5), lambda z: 0.5 * logsumexp(z / 0.5)),
    "Entropy": (Entropy(), lambda z: (softmax(z) * np.log(softmax(z))).sum(1)),
    "Entropy T": (Entropy(3), lambda z: (softmax(z / 3) * np.log(softmax(z / 3))).sum(1)),
    "AbsentClass": (
        AbsentClass(),
        lambda z: np.log(softmax(z)[:, :-1].sum(1) / softmax(z)[:, -1]),
    ),
    "MOS": (MOS(GROUPS), lambda z: mos_rule(z)[0]),
    "MOS log-odds": (MOS(GROUPS, log_odds=True), lambda z: mos_rule(z)[1]),
    "MOSLogOdds": (MOSLogOdds(GROUPS), lambda z: mos_rule(z)[1]),
    "MOSClass": (MOSClass(GROUPS), lambda z: logsumexp(mos_class_odds(z))),
    "MOSClass T": (MOSClass(GROUPS, 2.5), lambda z: 2.5 * logsumexp(mos_class_odds(z) / 2.5)),
}


def mos_class_odds(z):
    """(N, K) log-odds of the best class of each group."""
    odds, start = [], 0
    for k in range(3):
        end = start + 1 + sum(GROUPS.class_to_group[c] == k for c in range(7))
        p = softmax(z[:, start:end])
        best = 1 + p[:, 1:].argmax(1)
        rows = np.arange(len(p))
        odds.append(np.log(p[rows, best] / [np.delete(p[i], best[i]).sum() for i in rows]))
        start = end
    return np.stack(odds, 1)


def mos_rule(z):
    """Score, log-odds, class id and group, one sample and group at a time (section 3)."""
    members = [[c for c in range(7) if GROUPS.class_to_group[c] == k] for k in range(3)]
    out = []
    for row in z:
        start, others, odds, best = 0, [], [], (-1.0, -1, -1)
        for k, classes in enumerate(members):
            p = softmax(row[None, start : start + 1 + len(classes)])[0]
            others.append(p[0])
            odds.append(np.log(p[1:].sum() / p[0]))
            best = max(best, (p[1:].max(), classes[int(p[1:].argmax())], k))
            start += 1 + len(classes)
        out.append((-min(others), max(odds), best[1], best[2]))
    return [np.array(column) for column in zip(*out, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_score_is_the_rule(name, dtype, device):
    detector, rule = RULES[name]
    z = logits_of(dtype=dtype)
    score = detector.score(logits=z.to(device))
    assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert score.device.type == device
    assert score.shape == (50,)
    # Half precision is read as such and not rounded again, so that it is as close as float32.
    expected = torch.from_numpy(rule(z.double().numpy()))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(score.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", RULES)
def test_label_is_the_largest_class(name):
    detector, _ = RULES[name]
    z = logits_of(400)
    detector.calibrate(detector.score(logits=z))
    label, group, score, is_ood = detector.predict(logits=z)
    assert label.dtype == torch.int64
    if isinstance(detector, MOS):
        _, _, expected, k = mos_rule(z.double().numpy())
        assert group.tolist() == k.tolist()
    else:
        assert group is None
        columns = z[:, :-1] if isinstance(detector, AbsentClass) else z
        expected = columns.argmax(1)
    assert label.tolist() == expected.tolist()
    assert torch.equal(score, detector.score(logits=z))
    assert torch.equal(is_ood, score < detector.threshold.value)
    assert int(is_ood.sum()) <= 20 < int(is_ood.sum()) + 5


@pytest.mark.parametrize("name", [*RULES, "ODIN"])
def test_separates_a_clear_case(name):
    """ID: one class leads by 8. OOD: none does, or the absent class or every "others" leads."""
    detector = ODIN(model=lambda x: x) if name == "ODIN" else RULES[name][0]
    outside, leading, known = torch.zeros(10), slice(0), 1  # column 1 is a class in each layout
    if isinstance(detector, MOS):
        leading = GROUPS.offsets[:-1]
    elif isinstance(detector, AbsentClass):
        leading = 9
    outside[leading] = 8.0
    noise = logits_of(2 * 40).reshape(2, 40, 10) / 20
    inside = outside.clone()
    inside[known] += 16
    given = "x" if name == "ODIN" else "logits"
    id_scores, ood_scores = (
        detector.score(**{given: z}) for z in torch.stack([inside, outside])[:, None] + noise
    )
    result = ood_metrics(id_scores, ood_scores)
    assert (result.auroc, result.fpr95) == (1, 0)


def test_confidence_is_the_logit():
    z = torch.tensor([-3.0, 0.0, 30.0, 31.0])
    for confidence in (z, z[:, None], z.bfloat16()):
        score = ConfidenceBranch().score(confidence=confidence)
        assert score.tolist() == z.tolist()
        assert score.dtype == torch.float32
    score = ConfidenceBranch().score(confidence=z)
    score += 1
    assert z[0] == -3


# --- where public code is wrong -------------------------------------------------------------------


def test_absent_class_does_not_saturate():
    """1 - p rounds to 1 below p of 6e-8, -log p to 0 above 1 - 6e-8: neither tells these apart."""
    z = torch.zeros(12, 3)
    z[:, 2] = torch.tensor([-60.0, -50, -40, -30, -20, -18, 18, 20, 30, 40, 50, 60])
    public = 1 - z.softmax(1)[:, -1]
    minus_log_p = -z.log_softmax(1)[:, -1]
    assert len(public[:6].unique()) == 1
    assert len(minus_log_p[-5:].unique()) == 1
    score = AbsentClass().score(logits=z)
    assert (score.diff() < 0).all()
    torch.testing.assert_close(score.sigmoid()[3:], public[3:])


def test_confidence_does_not_saturate():
    z = torch.tensor([18.0, 19.0, 40.0])
    assert len(z.sigmoid().unique()) == 1
    assert (ConfidenceBranch().score(confidence=z).diff() > 0).all()


def test_mos_log_odds_does_not_saturate():
    """-min p_others is -1 for all of these, however far they are."""
    z = torch.zeros(3, GROUPS.width)
    z[:, GROUPS.offsets[:-1]] = torch.tensor([[20.0], [30.0], [40.0]])
    assert MOS(GROUPS).score(logits=z).tolist() == [-1, -1, -1]
    assert (MOSLogOdds(GROUPS).score(logits=z).diff() < 0).all()
    assert (MOSClass(GROUPS).score(logits=z).diff() < 0).all()


def test_mos_never_predicts_others():
    """An argmax over the whole head, as in OpenOOD, answers "others" where these are largest."""
    z = torch.zeros(1, GROUPS.width)
    others = GROUPS.offsets[:-1]
    z[0, others] = torch.tensor([9.0, 5.0, 9.0])
    column = int(GROUPS.to_column(torch.tensor(4)))
    z[0, column] = 4.0
    assert int(z.argmax()) in others
    detector = MOS(GROUPS)
    detector.calibrate([-1.0])
    prediction = detector.predict(logits=z)
    assert prediction.label.item() == 4
    assert prediction.group.item() == GROUPS.class_to_group[4]


def test_odin_steps_in_half_precision_too():
    """There the gradient of a batch's mean at T = 1000 underflows to 0, and the step with it."""
    x = torch.randn(4096, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = {}
    for dtype in (torch.float64, torch.float16):
        net, seen = mlp(dtype=dtype).eval(), []

        def model(x, net=net, seen=seen):
            seen.append(x.detach().double())
            return net(x)

        detector = ODIN(eps=0.5, model=model)
        detector.batch_size = len(x)
        detector.score(x.to(dtype))
        steps[dtype] = (seen[1] - seen[0]).sign()
    assert (steps[torch.float16] == steps[torch.float64]).double().mean() > 0.95
    half = x.half().requires_grad_()
    z = mlp(dtype=torch.float16).eval()(half) / 1000
    nn.functional.cross_entropy(z, z.argmax(1)).backward()
    assert (half.grad == 0).double().mean() > 0.5


# --- ODIN -----------------------------------------------------------------------------------------


def odin_rule(x, w, b, temperature, eps, std):
    """ODIN of f(x) = W x + b, whose gradient is known: W'(softmax(f / T) - onehot) / T."""
    z = x @ w.T + b
    p = softmax(z / temperature)
    p[np.arange(len(x)), z.argmax(1)] -= 1
    moved = x - eps * np.sign(p @ w / temperature) / std
    return softmax((moved @ w.T + b) / temperature).max(1)


@pytest.mark.parametrize("std", [None, 0.25, [0.1, 0.2, 0.5]])
@pytest.mark.parametrize("temperature", [1.0, 1000.0])
def test_odin_is_the_rule(std, temperature, device):
    rng = np.random.default_rng(0)
    w, b, x = rng.normal(size=(5, 3)), rng.normal(size=5), rng.normal(size=(300, 3))
    model = nn.Linear(3, 5).double()
    model.weight.data, model.bias.data = torch.from_numpy(w), torch.from_numpy(b)
    detector = ODIN(temperature, 0.05, std, model=model.to(device))
    score = detector.score(torch.from_numpy(x).to(device))
    expected = odin_rule(x, w, b, temperature, 0.05, np.array(1.0 if std is None else std))
    np.testing.assert_allclose(score.cpu().numpy(), expected, rtol=1e-12)
    unmoved = ODIN(temperature, 0.0, std, model=model).score(torch.from_numpy(x).to(device))
    assert (score > unmoved).double().mean() > 0.95  # the step is towards the predicted class


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_odin_leaves_everything_as_it_was(mode):
    model = mlp()
    model[0].eval()
    before = [module.training for module in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with mode():
        x = torch.randn(10, 6)
        kept = x.clone()
        score = ODIN(model=model, eps=0.1).score(x)
    assert torch.equal(x, kept)
    assert not x.requires_grad
    assert not score.requires_grad
    assert [module.training for module in model.modules()] == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_odin_scores_do_not_depend_on_the_batch():
    detector = ODIN(model=mlp(), eps=0.1)
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    whole = detector.score(x)
    detector.batch_size = 3
    torch.testing.assert_close(detector.score(x), whole, rtol=0, atol=1e-7)
    detector.calibrate(whole)
    prediction = detector.predict(x)
    assert torch.equal(prediction.label, mlp().eval()(x).argmax(1))


# --- a model --------------------------------------------------------------------------------------


def test_x_goes_through_the_model_in_chunks():
    sizes = []

    def model(x):
        sizes.append(len(x))
        return x

    detector = Energy(model=model)
    detector.batch_size = 4
    z = logits_of(10)
    assert torch.equal(detector.score(z), detector.score(logits=z))
    assert sizes == [4, 4, 2]
    detector.calibrate(detector.score(z))
    assert torch.equal(detector.predict(z).label, z.argmax(1))
    assert detector.score(z[:0]).shape == (0,)


def test_model_runs_in_evaluation_mode_and_without_gradients():
    model = mlp()
    x = torch.randn(10, 6)
    expected = mlp().eval()(x)
    score = MaxLogit(model=model).score(x)
    torch.testing.assert_close(score, expected.amax(1))
    assert model.training
    assert not score.requires_grad
    assert int(model[1].num_batches_tracked) == 0


def test_what_is_given_is_not_computed():
    def model(x):
        raise AssertionError

    z = logits_of()
    assert torch.equal(MSP(model=model).score(z, logits=z), MSP().score(logits=z))


def test_two_heads():
    class TwoHeads(nn.Module):
        def forward(self, x):
            return x[:, :-1], x[:, -1:]

    x = logits_of()
    detector = ConfidenceBranch(model=TwoHeads())
    assert torch.equal(detector.score(x), x[:, -1])
    detector.calibrate(x[:, -1])
    assert torch.equal(detector.predict(x).label, x[:, :-1].argmax(1))
    assert torch.equal(MaxLogit(model=TwoHeads()).score(x), x[:, :-1].amax(1))


# --- extract --------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.relu = nn.ReLU(inplace=True)
        self.unused = nn.Linear(2, 2)
        self.fc = nn.Linear(4, 5)
        self.aside = nn.Linear(7, 2)

    def forward(self, x):
        return self.fc(self.relu(self.conv(x)).mean((2, 3)))


def test_extract():
    net, x = Net().eval(), torch.randn(3, 1, 8, 8)
    outputs = extract(net, x, ["conv", "relu"])
    conv = net.conv(x)
    assert torch.equal(outputs.layers["conv"], conv)  # not what the ReLU made of it in place
    assert torch.equal(outputs.layers["relu"], conv.relu())
    torch.testing.assert_close(outputs.features, conv.relu().mean((2, 3)))
    torch.testing.assert_close(net.fc(outputs.features), outputs.logits)
    assert extract(net, x, features="relu", axis=1).features.shape == (3, 4)
    assert torch.equal(FeatureModel(net, "conv")(x).features, conv.flatten(2).mean(2))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    outputs.features.sum().backward()  # grad mode is the caller's
    assert net.conv.weight.grad is not None


def test_extract_finds_the_classifier():
    timm = Net()
    timm.get_classifier = lambda: timm.aside
    timm.forward = lambda x: timm.aside(timm.unused(x[:, :2]).repeat(1, 4)[:, :7])
    assert extract(timm, torch.randn(3, 5)).features.shape == (3, 7)
    last = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert extract(last, torch.randn(3, 3)).features.shape == (3, 4)
    assert extract(nn.Identity(), torch.randn(3, 3)).features is None
    by_keyword = Net()
    by_keyword.forward = lambda x: by_keyword.fc(input=x)
    assert extract(by_keyword, torch.randn(3, 4)).features is None


def test_extract_errors():
    net, x = Net(), torch.randn(3, 1, 8, 8)
    with pytest.raises(ValueError, match=r"extract: Net has no layer 'convv'; near it are \['conv"):
        extract(net, x, ["convv"])
    with pytest.raises(ValueError, match="extract: layer 'unused' did not run"):
        extract(net, x, ["unused"])
    with pytest.raises(ValueError, match="extract: layer 'unused' did not run"):
        extract(net, x, features="unused")
    pair = nn.Sequential(nn.LSTM(3, 2), nn.Identity())
    with pytest.raises(TypeError, match="extract: layer '0' must give a tensor, got tuple"):
        extract(pair, torch.randn(4, 3), ["0"])
    with pytest.raises(TypeError, match=r"extract: model must be an nn.Module, got f"):
        extract(lambda x: x, x)
    assert net.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


# --- one pass -------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """What the ops were called on."""
    seen = []

    def counted(name, op):
        def call(logits, argument=None):
            seen.append((name, len(logits), argument))
            return op(logits, argument)

        return call

    monkeypatch.setattr(batch, "logit_scores", counted("logits", oodkernels.logit_scores))
    monkeypatch.setattr(batch, "mos_predict", counted("mos", oodkernels.mos_predict))
    return seen


SEVERAL = {
    "msp": MSP(),
    "max": MaxLogit(),
    "energy": Energy(),
    "entropy": Entropy(),
    "warm": Energy(10),
    "warm msp": MSP(10.0),
    "mos": MOS(GROUPS),
    "odds": MOSLogOdds(Groups.from_labels(["b", "a", "b", "c", "a", "b", "c"])),
    "absent": AbsentClass(),
}


@pytest.mark.parametrize("chunk", [None, 1, 7, 1000])
def test_score_all_is_score(chunk):
    z = logits_of(50)
    scores = score_all(SEVERAL, logits=z, chunk=chunk)
    assert list(scores) == list(SEVERAL)
    for name, detector in SEVERAL.items():
        assert torch.equal(scores[name], detector.score(logits=z)), name


def test_score_all_reads_once(reads):
    softmax_scores = {name: SEVERAL[name] for name in ("msp", "max", "energy", "entropy")}
    score_all(softmax_scores, logits=logits_of(50))
    assert reads == [("logits", 50, 1.0)]
    reads.clear()
    score_all({name: d for name, d in SEVERAL.items() if name != "absent"}, logits=logits_of(50))
    assert [(name, n) for name, n, _ in reads] == [("logits", 50), ("logits", 50), ("mos", 50)]


def test_predict_reads_once(reads):
    for detector in (MSP(1000.0), MOS(GROUPS), AbsentClass()):
        detector.calibrate([0.0])
        detector.predict(logits=logits_of())
        assert len(reads) == 1
        reads.clear()


def test_score_all_runs_each_model_once():
    runs = []

    class Counted(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            runs.append(self.name)
            return x * (1 if self.name == "a" else 2)

    a, b = Counted("a"), Counted("b")
    detectors = {"1": MSP(model=a), "2": Energy(model=a), "3": MaxLogit(model=b)}
    z = logits_of()
    scores = score_all(detectors, x=z, chunk=30)
    assert runs == ["a", "b"] * 2
    assert torch.equal(scores["2"], Energy().score(logits=z))
    assert torch.equal(scores["3"], MaxLogit().score(logits=2 * z))
    odin = {"odin": ODIN(model=lambda x: x), "msp": MSP()}
    assert torch.equal(score_all(odin, x=z, logits=z)["msp"], MSP().score(logits=z))


def test_score_all_of_nothing():
    assert score_all({}, logits=logits_of()) == {}
    empty = score_all(SEVERAL, logits=logits_of(0))
    assert all(score.shape == (0,) for score in empty.values())


def test_nothing_of_the_size_of_the_logits_is_made():
    """Peak memory of a process that scores 64 MiB of bfloat16 logits with every detector."""
    code = """
import resource, sys, torch
from oodkernels import Groups
from oodkernels.detectors import *
groups = Groups.from_sizes([500] * 8)
detectors = {str(i): d for i, d in enumerate([MSP(), MaxLogit(), Energy(2), Entropy(), MOS(groups),
    AbsentClass()])}
z = torch.ones(2**25 // groups.width, groups.width, dtype=torch.bfloat16)
score_all(detectors, logits=z[:2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
score_all(detectors, logits=z)
for detector in detectors.values():
    detector.score(logits=z)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 2**10 / z.nbytes)
"""
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in KiB on Linux")
    assert float(run_code(code).stdout) < 0.25


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: MSP().score(logits=torch.zeros(3)),
            ValueError,
            r"MSP.score: logits must be \(N, C\), got \(3,\)",
        ),
        (
            lambda: MSP().score(logits=torch.zeros(3, 2).long()),
            TypeError,
            "MSP.score: logits must be floating-point, got torch.int64",
        ),
        (
            lambda: MSP().score(logits=[[1.0]]),
            TypeError,
            "MSP.score: logits must be a tensor, got list",
        ),
        (lambda: MSP().score(), ValueError, "MSP.score: x, logits, features or confidence must be"),
        (
            lambda: MSP().score(features=torch.zeros(3, 2)),
            ValueError,
            "MSP.score: msp needs logits, or x",
        ),
        (lambda: MSP().score(torch.zeros(3, 2)), ValueError, r"MSP.score: x needs a model: MSP\("),
        (lambda: ODIN().score(torch.zeros(3, 2)), ValueError, "ODIN.score: x needs a model: ODIN"),
        (
            lambda: ODIN(model=mlp()).score(logits=torch.zeros(3, 2)),
            ValueError,
            "ODIN.score: odin needs x",
        ),
        (
            lambda: ODIN(model=mlp()).score(torch.zeros(3, 6).long()),
            TypeError,
            "ODIN.score: x must be floating-point, got torch.int64",
        ),
        (
            lambda: ODIN(std=[1.0, 2.0], model=mlp()).score(torch.zeros(3, 6)),
            ValueError,
            r"ODIN.score: x must have a channel for each of the 2 std, got \(3, 6\)",
        ),
        (
            lambda: ODIN(model=lambda x: torch.zeros(3, 2)).score(torch.zeros(3, 6)),
            ValueError,
            "ODIN.score: model must be differentiable in x",
        ),
        (
            lambda: MSP(model=lambda x: "no").score(torch.zeros(3, 6)),
            TypeError,
            "model must give logits, .* got str",
        ),
        (
            lambda: ConfidenceBranch(model=mlp()).score(torch.zeros(3, 6)),
            ValueError,
            "ConfidenceBranch.score: the model must give confidence",
        ),
        (
            lambda: ConfidenceBranch().score(confidence=torch.zeros(3, 2)),
            ValueError,
            r"ConfidenceBranch.score: confidence must be \(N,\) or \(N, 1\), got \(3, 2\)",
        ),
        (
            lambda: MOS(GROUPS).score(logits=torch.zeros(3, 2)),
            ValueError,
            r"MOS.score: logits must have C \+ K = 10 columns, got 2",
        ),
        (
            lambda: AbsentClass().score(logits=torch.zeros(3, 1)),
            ValueError,
            r"AbsentClass.score: logits must be \(N, C \+ 1\)",
        ),
        (
            lambda: MSP().predict(logits=torch.zeros(3, 2)),
            NotFittedError,
            "MSP.predict: calibrate must come first",
        ),
        (
            lambda: score_all({"a": MSP}, logits=torch.zeros(3, 2)),
            TypeError,
            r"score_all: detectors\['a'\] must be an OODDetector, got type",
        ),
        (
            lambda: score_all({"a": MSP()}, logits=torch.zeros(3, 2), chunk=0),
            ValueError,
            "score_all: chunk must be >= 1, got 0",
        ),
        (
            lambda: score_all({"a": MSP()}, x=torch.zeros(3, 2), logits=torch.zeros(2, 2)),
            ValueError,
            "score_all: x and logits must be of the same samples, got 3 and 2",
        ),
        (lambda: MSP(0), ValueError, "MSP: temperature must be positive and finite, got 0"),
        (lambda: Energy(math.nan), ValueError, "Energy: temperature must be positive"),
        (lambda: ODIN(eps=-1), ValueError, "ODIN: eps must be >= 0 and finite, got -1"),
        (lambda: ODIN(std=[0.5, 0.0]), ValueError, "ODIN: std must be positive and finite"),
        (lambda: MOS(3), TypeError, "MOS: groups must be Groups, got int"),
        (lambda: as_pytorch_ood(3), TypeError, "as_pytorch_ood: detector must be an OODDetector"),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("name", RULES)
def test_nan_is_ood(name):
    detector, _ = RULES[name]
    z = logits_of()
    detector.calibrate(detector.score(logits=z))
    z[3, 2] = math.nan
    prediction = detector.predict(logits=z)
    assert prediction.score.isnan().nonzero().tolist() == [[3]]
    assert prediction.is_ood[3]


# --- fitting, by the smallest detector there is ---------------------------------------------------


class Means(OODDetector):
    """Minus the distance to the nearest class mean."""

    name = "means"
    needs = frozenset({"features"})
    trained_on = frozenset({"features", "labels"})
    _tensors: ClassVar = {"means": "C d"}

    def __init__(self, scale=1.0, *, model=None):
        super().__init__(model)
        self.scale = scale

    def _reset(self):
        super()._reset()
        self.seen = []

    def _update(self, where, batch, labels):
        self.__dict__.setdefault("seen", []).append((batch.features, labels))
        self.width = batch.features.shape[1]

    def _finish(self, where):
        x, y = (torch.cat(part) for part in zip(*self.seen, strict=True))
        self.num_classes = int(y.max()) + 1
        missing = set(range(self.num_classes)) - set(y.tolist())
        if missing:
            raise ValueError(f"{where}: class {min(missing)} is missing")
        self.means = torch.stack([x[y == c].mean(0) for c in range(self.num_classes)])

    def _score(self, batch):
        return -torch.cdist(batch.features, self.means).amin(1) * self.scale


def blobs(n=30):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    return torch.randn(n, 4, generator=generator) + 5 * y[:, None], y


def test_fit():
    x, y = blobs()
    detector = Means().fit(features=x, labels=y)
    expected = torch.stack([x[y == c].mean(0) for c in range(3)])
    torch.testing.assert_close(detector.means, expected)
    assert (detector.num_classes, detector.width) == (3, 4)
    parts = Means()
    for i in range(0, 30, 7):
        parts.partial_fit(features=x[i : i + 7], labels=y[i : i + 7])
    torch.testing.assert_close(parts.score(features=x), detector.score(features=x))
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 3))
    loader = list(zip(x.split(7), y.split(7), strict=True))
    through = Means(model=model).fit(loader)
    torch.testing.assert_close(through.score(x), detector.score(features=x))
    through.calibrate(through.score(x))
    assert torch.equal(through.predict(x).label, model(x).argmax(1))
    refitted = parts.fit(features=x + 1, labels=y)
    torch.testing.assert_close(refitted.means, expected + 1)


def test_fitting_drops_the_threshold():
    x, y = blobs()
    detector = Means().fit(features=x, labels=y)
    for learn in (detector.fit, detector.partial_fit):
        detector.calibrate(detector.score(features=x))
        learn(features=x, labels=y)
        with pytest.raises(NotFittedError, match="calibrate must come first"):
            detector.predict(features=x)


def test_detector_of_several_layers():
    class Layered(Means):
        layers = ("conv", "relu")

        def _score(self, batch):
            return batch.layers["relu"].sum((1, 2, 3)) - batch.layers["conv"].sum((1, 2, 3))

    net, x = Net().eval(), torch.randn(5, 1, 8, 8)
    conv = net.conv(x).detach()
    detector = Layered(model=net)
    detector._status = "fitted"
    score = detector.score(features={"conv": conv, "relu": conv.relu()})
    torch.testing.assert_close(score, conv.relu().sum((1, 2, 3)) - conv.sum((1, 2, 3)))
    torch.testing.assert_close(detector.score(x), score)
    both = {"layered": detector, "max": MaxLogit(model=net)}
    scores = score_all(both, x=x, chunk=2)
    torch.testing.assert_close(scores["layered"], score)
    torch.testing.assert_close(scores["max"], net(x).detach().amax(1))
    with pytest.raises(ValueError, match=r"Layered.score: means needs features\['relu'\], or x"):
        detector.score(features={"conv": conv})
    with pytest.raises(ValueError, match=r"extract: .* has no layer 'conv'"):
        Layered(model=mlp()).fit([(torch.randn(4, 6), torch.zeros(4).long())])
    with pytest.raises(ValueError, match=r"extract: layers \['conv', 'relu'\] need a mod"):
        Layered(model=lambda x: x).fit([(torch.randn(4, 6), torch.zeros(4).long())])


def test_fit_leaves_ood_samples_out():
    x, y = blobs()
    both = torch.cat([x, x + 100]), torch.cat([y, torch.full_like(y, -1)])
    torch.testing.assert_close(
        Means().fit(features=both[0], labels=both[1]).means,
        Means().fit(features=x, labels=y).means,
    )


def test_detectors_without_fit_read_nothing():
    def data():
        raise AssertionError
        yield

    assert isinstance(MSP().fit(data()).partial_fit(), MSP)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda x, y: Means().score(features=x),
            NotFittedError,
            "Means.score: fit must come first",
        ),
        (lambda x, y: Means().save("no"), NotFittedError, "Means.save: fit must come first"),
        (
            lambda x, y: Means().fit(features=x),
            ValueError,
            "Means.fit: labels must be given",
        ),
        (
            lambda x, y: Means().fit(logits=x, labels=y),
            ValueError,
            "Means.fit: features must be given",
        ),
        (
            lambda x, y: Means().fit(features=x, labels=y[1:]),
            ValueError,
            r"Means.fit: labels must be \(30,\), got \(29,\)",
        ),
        (
            lambda x, y: Means().fit(features=x, labels=y.float()),
            TypeError,
            "Means.fit: labels must be integers, got torch.float32",
        ),
        (
            lambda x, y: Means().fit(features=x, labels=y - 2),
            ValueError,
            "Means.fit: labels must be class ids or -1 for OOD, got -2",
        ),
        (
            lambda x, y: Means().fit(features=x, labels=2 * y),
            ValueError,
            "Means.fit: class 1 is missing",
        ),
        (
            lambda x, y: Means().fit(features=x, labels=y).score(features=x[:, 1:]),
            ValueError,
            "Means.score: features must have width 4, got 3",
        ),
        (lambda x, y: Means(model=mlp()).fit([]), ValueError, "Means.fit: data must give a batch"),
        (lambda x, y: Means().fit(x), TypeError, "Means.fit: data must be an iterable of batches"),
        (lambda x, y: Means().fit([x]), TypeError, r"Means.fit: data must give batches \(x, lab"),
        (lambda x, y: Means().fit([(x, y)]), ValueError, "Means.fit: x needs a model"),
        (
            lambda x, y: Means(model=lambda x: x).fit([(x, y)]),
            ValueError,
            "Means.fit: the model must give features for means; see FeatureModel",
        ),
    ],
)
def test_fit_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call(*blobs())


def test_score_all_names_the_detector_that_is_not_fitted():
    with pytest.raises(NotFittedError, match=r"score_all.*fit must come first"):
        score_all({"a": Means()}, features=torch.zeros(2, 4))


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "detector",
    [
        MSP(2.5),
        MaxLogit(),
        Energy(),
        Entropy(),
        ODIN(10, 0.1, [0.5, 0.25]),
        MOS(GROUPS, log_odds=True),
        MOS(GROUPS),
        MOSLogOdds(GROUPS),
        MOSClass(GROUPS, 3.0),
        AbsentClass(),
        ConfidenceBranch(),
    ],
    ids=lambda d: d.name,
)
@pytest.mark.parametrize("calibrated", [True, False])
def test_file_gives_the_detector_back(detector, calibrated, tmp_path):
    pytest.importorskip("safetensors")
    detector.threshold = None
    if calibrated:
        detector.calibrate(torch.randn(100))
    path = tmp_path / "detector.safetensors"
    detector.save(path)
    for cls in (OODDetector, type(detector)):
        loaded = cls.load(path, "a model")
        assert type(loaded) is type(detector)
        assert loaded.model == "a model"
        mine, found = (
            {**vars(d), "model": None, "_status": "", "_verified": None, "_loaded": None}
            for d in (detector, loaded)
        )
        mine = {k: v for k, v in mine.items() if v is not None}
        assert {k: v for k, v in found.items() if v is not None} == mine
    assert [p.name for p in tmp_path.iterdir()] == ["detector.safetensors"]


def test_file_of_a_fitted_detector(tmp_path):
    pytest.importorskip("safetensors")
    x, y = blobs()
    detector = Means(2.0).fit(features=x, labels=y)
    detector.calibrate(detector.score(features=x))
    path = tmp_path / "means.safetensors"
    detector.save(path)
    loaded = Means.load(path, num_classes=3, width=4)
    before, after = (d.predict(features=x) for d in (detector, loaded))
    assert torch.equal(before.score, after.score)
    assert torch.equal(before.is_ood, after.is_ood)
    for wrong, message in (
        ({"num_classes": 10}, "num_classes must be 10, got 3"),
        ({"width": 5}, "width must be 5, got 4"),
    ):
        with pytest.raises(ValueError, match=rf"Means.load: .*means.safetensors: {message}"):
            Means.load(path, **wrong)
    with pytest.raises(ValueError, match=r"Means.score: features must have width 4, got 3"):
        loaded.score(features=x[:, 1:])
    with pytest.raises(ValueError, match=r"MSP.load: .*detector must be one of \['msp'\], got 'me"):
        MSP.load(path)
    with pytest.raises(ValueError, match=r"OODDetector.load: .*detector must be .*got 'mean"):
        OODDetector.load(path)


def test_broken_files(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "detector.safetensors"
    MOS(GROUPS).save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        good = json.loads(file.metadata()["oodkernels"])

    def load(tensors=None, missing=(), **changed):
        content = {k: v for k, v in {**good, **changed}.items() if k not in missing}
        metadata = {"oodkernels": json.dumps(content)}
        safetensors.save_file(tensors or {}, path, metadata)
        return OODDetector.load(path)

    assert load().groups == GROUPS
    for changed, message in (
        ({"format": "else"}, "format must be 'oodkernels.detector', got 'else'"),
        ({"missing": ["format"]}, "format must be 'oodkernels.detector', got 'None'"),
        ({"version": 2}, "version must be 1, got 2"),
        ({"missing": ["version"]}, "version must be 1, got None"),
        ({"detector": "else"}, "detector must be one of .*'msp'.*, got 'else'"),
        ({"missing": ["detector"]}, "'detector' is missing"),
        ({"settings": []}, "indices must be"),
        ({"settings": {}}, "'groups' is missing"),
        ({"settings": {"groups": "{}", "log_odds": True}}, "Groups.from_json"),
        ({"missing": ["threshold"]}, "'threshold' is missing"),
        ({"threshold": "{}"}, "Threshold.from_json: format"),
        ({"num_classes": 8}, "num_classes must be 7, got 8"),
    ):
        with pytest.raises(ValueError, match=rf"(?s)OODDetector.load: .*{message}"):
            load(**changed)
    safetensors.save_file({}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"format must be 'oodkernels.detector', got 'None'"):
        OODDetector.load(path)
    with pytest.raises(ValueError, match=r"tensors must be \[\], got \['means'\]"):
        load({"means": torch.zeros(3)})
    path.write_bytes(b"no safetensors file")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        OODDetector.load(path)
    with pytest.raises(FileNotFoundError):
        OODDetector.load(tmp_path / "none")


def test_failed_save_leaves_the_file(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "detector.safetensors"
    MSP(2.5).save(path)

    def fail(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        MSP(3.5).save(path)
    assert MSP.load(path).temperature == 2.5
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_safetensors_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: MSP().save(tmp_path / "a"), lambda: MSP.load(tmp_path / "a")):
        with pytest.raises(ImportError, match=r"needs safetensors, .*pip install 'oodkernels\["):
            call()


# --- registry and adapter -------------------------------------------------------------------------


def test_registry():
    assert {"msp", "max-logit", "energy", "entropy", "odin", "mos", "mos-log-odds"} < set(DETECTORS)
    assert {"absent-class", "confidence"} < set(DETECTORS)
    for name, cls in DETECTORS.items():
        assert cls.name == name
        assert issubclass(cls, OODDetector)
        assert cls.needs <= {"x", "logits", "features", "confidence"}
        assert cls.needs
        assert cls.__doc__


def test_every_detector_of_pytorch_ood_has_its_counterpart_or_a_reason():
    detectors = pytorch_ood("detector")
    page = Path(__file__).parents[2] / "docs" / "migrating.md"
    table = page.read_text(encoding="utf-8").split("<!-- pytorch-ood -->")[1].split("<!-- end")[0]
    rows = [line.strip("| ").split(" |") for line in table.strip().splitlines()[2:]]
    theirs = {name for name in detectors.__all__ if isinstance(getattr(detectors, name), type)}
    assert {row[0].strip(" `") for row in rows} == theirs
    for row in rows:
        names = [cell.strip(" `").split(":")[0] for cell in row[1].split(",")]
        assert all(name in DETECTORS for name in names) or (names == ["none"] and row[2].strip())
    assert len(DETECTORS) > 40


def test_repr_shows_the_settings():
    assert repr(MSP(2.0)) == "MSP(temperature=2.0)"
    assert repr(MOS(GROUPS)).startswith("MOS(groups=Groups(")


def test_import_brings_no_extra():
    code = "import sys, oodkernels.detectors; print(*(m for m in sys.modules))"
    modules = set(run_code(code).stdout.split())
    assert "oodkernels.detectors" in modules
    assert not modules & {"safetensors", "torchmetrics", "sklearn", "pytorch_ood", "faiss"}


def test_adapter_is_the_outlier_score():
    x, y = blobs()
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 3))
    adapted = as_pytorch_ood(Means(model=model))
    assert adapted.requires_fit
    assert adapted.fit([(x, y)]) is adapted
    assert torch.equal(adapted.predict(x), -adapted.detector.score(x))
    assert torch.equal(adapted(x), adapted.predict(x))
    assert torch.equal(adapted.fit_features(x, y).predict_features(x), adapted(x))
    assert adapted.to("cpu").model is model
    z = logits_of()
    msp = as_pytorch_ood(MSP())
    assert torch.equal(msp.fit([]).fit_logits(z, y).predict_logits(z), -MSP().score(logits=z))
    assert not msp.requires_fit


def test_pytorch_ood_agrees():
    detectors = pytorch_ood("detector")
    z = logits_of(500, 20)
    for ours, theirs in (
        (MSP(2.0), detectors.MaxSoftmax(None, t=2.0)),
        (MaxLogit(), detectors.MaxLogit(None)),
        (Energy(2.0), detectors.EnergyBased(None, t=2.0)),
        (Entropy(), detectors.Entropy(None)),
    ):
        expected = theirs.predict_logits(z)
        torch.testing.assert_close(
            as_pytorch_ood(ours).predict_logits(z), expected, rtol=1e-5, atol=2e-5
        )
    model = mlp().eval()
    x = torch.randn(100, 6)
    expected = detectors.ODIN(model, eps=0.05, temperature=100.0, norm_std=[0.5] * 6).predict(x)
    adapted = as_pytorch_ood(ODIN(100.0, 0.05, 0.5, model=model))
    torch.testing.assert_close(adapted.predict(x), expected, rtol=0, atol=1e-6)


def test_pytorch_ood_takes_our_detectors():
    """Its own evaluation loop: a detector is what has ``predict`` or is callable."""
    metrics = pytorch_ood("metrics")
    model = nn.Linear(10, 10)
    model.weight.data, model.bias.data = 5 * torch.eye(10), torch.zeros(10)
    x = torch.cat([torch.eye(10), 0.1 * torch.eye(10)])
    y = torch.cat([torch.arange(10), torch.full((10,), -1)])
    figures = metrics.MetricCollection([metrics.AUROC()])
    figures.update(scores=as_pytorch_ood(MSP(model=model))(x), labels=y)
    assert next(iter(figures.compute().values())) == 1


# --- real images ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """Small models of the digits, and the test sets: "digits" is ID."""
    pytest.importorskip("lightning_fabric")
    from small_models import digits

    from oodkernels.nn import Head
    from oodkernels.training import TrainConfig, Trainer, reproducible, tensor_loader

    it = digits()
    sets = {"digits": it.test_images, "photos": it.ood["photos"]}
    outliers = it.ood["textures"]
    groups = Groups.random(10, 3)

    def fit(objective, images, labels, columns=10, **head):
        loader = tensor_loader(images, labels, batch_size=64, shuffle=True, drop_last=True)
        with reproducible(0):
            body = nn.Sequential(
                *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
                *(nn.Conv2d(32, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
                *(nn.Flatten(), nn.Linear(512, 128), nn.ReLU()),
            )
            model = nn.Sequential(body, Head(128, columns, **head))
            Trainer(model, objective, TrainConfig(epochs=5, accelerator="cpu")).fit(loader)
        return model

    images, labels = it.images, it.labels
    absent = torch.full((len(outliers),), 10)
    models = {
        "flat": it.model,
        "mos": fit("mos", images, labels, groups.width, groups=groups),
        "absent": fit("softmax", torch.cat([images, outliers]), torch.cat([labels, absent]), 11),
        "confidence": fit("confidence", images, labels, confidence=True),
    }
    return models, groups, sets, it.test_labels


@pytest.mark.parametrize(
    ("make", "stage", "least"),
    [
        (MSP, "flat", 0.9),
        (MaxLogit, "flat", 0.9),
        (Energy, "flat", 0.9),
        (Entropy, "flat", 0.9),
        (ODIN, "flat", 0.9),
        (MOS, "mos", 0.8),
        (MOSLogOdds, "mos", 0.8),
        (AbsentClass, "absent", 0.95),
        (ConfidenceBranch, "confidence", 0.75),
    ],
)
def test_beats_chance_on_images(make, stage, least, trained):
    models, groups, sets, labels = trained
    model = models[stage]
    detector = make(groups, model=model) if stage == "mos" else make(model=model)
    scores = {name: detector.score(x) for name, x in sets.items()}
    id_scores = scores.pop("digits")
    for name, result in ood_metrics(id_scores, scores).items():
        assert result.auroc > least, name
    detector.calibrate(id_scores, tpr=0.9)
    prediction = detector.predict(sets["digits"])
    assert 0.85 < 1 - prediction.is_ood.double().mean() < 0.95
    assert (prediction.label == labels).double().mean() > 0.9


# --- other libraries' forms -----------------------------------------------------------------------


class ModelOutput(OrderedDict):
    """Hugging Face's, in short: a dict whose fields are attributes, too."""

    def __getattr__(self, name):
        return self[name]


def images_model():
    model = mlp().eval()
    model.register_forward_hook(lambda m, args, z: ModelOutput(loss=None, logits=z))
    return model


def test_models_of_hugging_face_and_their_batches():
    model, plain = images_model(), mlp().eval()
    x, y = torch.randn(30, 6), torch.arange(30) % 10
    batches = [{"pixel_values": x[i : i + 8], "labels": y[i : i + 8]} for i in range(0, 30, 8)]
    torch.testing.assert_close(Energy(model=model).score(x), Energy(model=plain).score(x))
    wanted = KNN(3, "torch", model=plain).fit([(x, y)])
    found = KNN(3, "torch", model=model).fit(batches)
    torch.testing.assert_close(found.bank, wanted.bank)
    torch.testing.assert_close(found.score(batches), wanted.score(x))
    rows = oodkernels.evaluate(model, batches, {"far": [{"x": 9 * x}]}, ["energy"]).rows
    expected = oodkernels.evaluate(plain, [(x, y)], {"far": 9 * x}, ["energy"]).rows
    assert [row.auroc for row in rows] == [row.auroc for row in expected]
    assert [row.id_accuracy for row in rows] == [row.id_accuracy for row in expected]


@pytest.mark.parametrize("as_", [torch.from_numpy, lambda a: a], ids=["tensors", "arrays"])
def test_arrays_are_taken_wherever_tensors_are(as_):
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(40, 6)).astype(np.float32), rng.normal(size=(40, 10))
    y = np.arange(40) % 10
    x_, z_ = torch.from_numpy(x), torch.from_numpy(z)
    knn = KNN(3, "torch").fit(features=x_)
    assert torch.equal(KNN(3, "torch").fit(features=as_(x), labels=as_(y)).bank, knn.bank)
    assert torch.equal(
        KNN(3, "torch").partial_fit(features=as_(x)).score(features=as_(x)),
        (knn.score(features=x_)),
    )
    energy = Energy()
    assert torch.equal(energy.score(logits=as_(z)), energy.score(logits=z_))
    energy.calibrate(z.max(1))
    assert torch.equal(energy.predict(logits=as_(z)).is_ood, energy.predict(logits=z_).is_ood)
    assert torch.equal(
        ConfidenceBranch().score(confidence=as_(z[:, 0])),
        ConfidenceBranch().score(confidence=z_[:, 0]),
    )
    assert torch.equal(score_all({"a": energy}, logits=as_(z))["a"], energy.score(logits=z_))
    read_only = np.broadcast_to(z[:1], z.shape)
    assert len(energy.score(logits=read_only)) == 40
    assert not read_only.flags.writeable


@pytest.mark.parametrize("as_", [torch.from_numpy, lambda a: a], ids=["tensors", "arrays"])
def test_fit_takes_samples_and_labels(as_):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(600, 6)).astype(np.float32), np.arange(600) % 10
    pair = torch.from_numpy(x), torch.from_numpy(y)
    model = mlp().eval()
    found = Mahalanobis(shrinkage=0.1, model=model).fit(as_(x), as_(y))
    wanted = Mahalanobis(shrinkage=0.1, model=model).fit([pair])
    torch.testing.assert_close(found.score(pair[0]), wanted.score(pair[0]))
    assert torch.equal(
        KNN(3, "torch").fit(as_(x), as_(y)).bank, KNN(3, "torch").fit(features=pair[0]).bank
    )
    with pytest.raises(ValueError, match=r"vim is trained on features, logits: say features=\.\."):
        ViM(2, head=nn.Linear(6, 10)).fit(as_(x), as_(y))
    with pytest.raises(ValueError, match="y must be one a sample, 600, got 5"):
        KNN(3).fit(as_(x), as_(y[:5]))
    with pytest.raises(TypeError, match="with y, data must be a tensor or an array, got list"):
        KNN(3).fit([x], as_(y))


def test_scores_of_loaders():
    model = mlp().eval()
    x = torch.randn(50, 6)
    energy = Energy(model=model)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(50)), 16)
    energy.calibrate(energy.score(loader))
    torch.testing.assert_close(energy.score(loader), energy.score(x))
    torch.testing.assert_close(energy.score(iter(x.numpy()[:, None])), energy.score(x))
    found, wanted = energy.predict(loader), energy.predict(x)
    assert torch.equal(found.label, wanted.label)
    assert found.group is None
    for wrong, message in (([], "x must give a batch"), ([{"y": x}], "one of x and pixel_values")):
        with pytest.raises((TypeError, ValueError), match=message):
            energy.score(wrong)


def test_adapter_is_a_detector_of_pytorch_ood():
    api = pytorch_ood("api")
    assert isinstance(as_pytorch_ood(MSP()), api.Detector)
    assert not isinstance(MSP(), api.Detector)
