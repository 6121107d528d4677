"""Steps before a score against what one does by hand, one after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from head_world import world
from torch import Tensor, nn

from oodkernels.detectors import (
    ASHS,
    DETECTORS,
    DICE,
    GEN,
    KNN,
    LTS,
    MSP,
    NCI,
    ODIN,
    SCALE,
    Composed,
    Energy,
    OODDetector,
    ReAct,
    ViM,
    extract,
    score_all,
    sweep,
)
from oodkernels.detectors.compose import spec_of, split_parts
from oodkernels.evaluation import evaluate

W = world(d=30)
TRAIN = {"features": W.features, "logits": W.logits, "labels": W.labels}
TEST = {"features": W.test, "logits": W.test_logits}
CLIP = W.features.flatten().quantile(0.9)


def head(features: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = W.head(features)
    return found


def share(f: Tensor, percentile: float) -> Tensor:
    k = f.shape[1] - round(f.shape[1] * percentile / 100)
    return f.sum(1, keepdim=True) / f.sort(1).values[:, -k:].sum(1, keepdim=True)


def scaled(f: Tensor) -> Tensor:
    return f * share(f, 85).exp()


def clipped(f: Tensor) -> Tensor:
    return f.clamp(max=CLIP)


def lts(f: Tensor) -> Tensor:
    return head(f) * share(f, 95).square()


def sparse(f: Tensor) -> Tensor:
    weight = W.head.weight.detach()
    part = weight * clipped(W.features).mean(0)
    return f @ (weight * (part > part.flatten().quantile(0.9))).T + W.head.bias.detach()


RULES: dict[str, Callable[[], Tensor]] = {
    "react+energy": lambda: ReAct(head=W.head).fit(**TRAIN).score(features=W.test),
    "react+gen": lambda: GEN().score(logits=head(clipped(W.test))),
    "scale+energy": lambda: SCALE(head=W.head).score(**TEST),
    "scale+gen": lambda: GEN().score(logits=head(scaled(W.test))),
    "ash-s+energy": lambda: ASHS(head=W.head).score(features=W.test),
    "lts+energy": lambda: LTS().score(**TEST),
    "lts+msp": lambda: MSP().score(logits=lts(W.test)),
    "react+scale+msp": lambda: MSP().score(logits=head(scaled(clipped(W.test)))),
    "react+dice+energy": lambda: Energy().score(logits=sparse(clipped(W.test))),
    "react+knn": lambda: KNN().fit(features=clipped(W.features)).score(features=clipped(W.test)),
    "react+vim": lambda: (
        ViM(head=W.head)
        .fit(features=clipped(W.features), logits=head(clipped(W.features)))
        .score(features=clipped(W.test), logits=head(clipped(W.test)))
    ),
    "scale+nci": lambda: (
        NCI(head=W.head)
        .fit(features=scaled(W.features), logits=head(scaled(W.features)))
        .score(features=scaled(W.test), logits=head(scaled(W.test)))
    ),
}


def made(name: str, **options: Any) -> OODDetector:
    found: OODDetector = spec_of("test", name).make("test", options, head=W.head)
    return found


@pytest.mark.parametrize("name", RULES)
def test_it_is_one_after_the_other(name: str, tmp_path: Path) -> None:
    detector = made(name).fit(**TRAIN)
    expected = RULES[name]()
    torch.testing.assert_close(detector.score(**TEST), expected, rtol=1e-7, atol=1e-7)
    detector.calibrate(detector.score(**TEST))
    detector.save(tmp_path / "d")
    again = OODDetector.load(tmp_path / "d")
    assert repr(again) == repr(detector)
    assert torch.equal(again.score(**TEST), detector.score(**TEST))
    assert again.threshold == detector.threshold
    batches = [
        detector.score(features=f[None], logits=z[None])
        for f, z in zip(*TEST.values(), strict=True)
    ]
    torch.testing.assert_close(torch.cat(batches), expected, rtol=1e-7, atol=1e-7)
    broken = W.test.clone()
    broken[3, 2] = torch.nan
    nan = detector.score(features=broken, logits=head(broken)).isnan()
    assert nan.nonzero().tolist() == [[3]]


def test_the_class_is_that_of_the_shaped_logits() -> None:
    detector = made("react+gen").fit(**TRAIN)
    detector.calibrate(detector.score(**TEST))
    assert torch.equal(detector.predict(**TEST).label, head(clipped(W.test)).argmax(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU())
            self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.body(x))
        return out


def test_odin_moves_the_input_of_whatever_comes_after() -> None:
    model = Net().eval()
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    moved = x.clone().requires_grad_()
    z = model(moved) / 100
    nn.functional.cross_entropy(z, z.argmax(1), reduction="sum").backward()
    assert moved.grad is not None
    moved = (x - 0.1 * moved.grad.sign()).detach()
    options = {"odin.temperature": 100, "odin.eps": 0.1}
    energy = spec_of("test", "odin+energy").make("test", options, model=model)
    torch.testing.assert_close(energy.score(x), Energy(model=model).score(moved))
    scale = spec_of("test", "odin+scale+gen").make("test", options, model=model)
    seen = extract(model, moved)
    assert seen.features is not None
    with torch.no_grad():
        expected = GEN().score(logits=model.fc(scaled(seen.features)))
    torch.testing.assert_close(scale.score(x), expected)
    torch.testing.assert_close(
        spec_of("test", "odin+msp").make("test", {"msp.temperature": 1000}, model=model).score(x),
        ODIN(model=model).score(x),
    )
    assert torch.equal(
        score_all({"a": energy, "b": Energy(model=model)}, x=x)["a"], energy.score(x)
    )


def test_settings_are_swept_and_varied() -> None:
    far = 1.5 * W.test.flip(0)
    out = {"features": far, "logits": head(far)}
    grid = {
        "react+gen": {"react.percentile": [60, 90], "gen.gamma": [0.1, 1]},
        "react+knn": {"react.percentile": [60, 90], "knn.k": [1, 5]},
    }
    found = sweep(grid, id=TEST, ood_val={"far": out}, train=TRAIN, head=W.head)
    for name, swept in found.detectors.items():
        assert len(swept.settings) == 4
        for setting, figures in zip(swept.settings, swept.mean, strict=True):
            alone = made(name, **setting).fit(**TRAIN)
            sets = {"a": (alone.score(**TEST), {"far": alone.score(**out)})}
            assert figures.auroc == pytest.approx(evaluate(sets).rows[0].auroc, abs=1e-12)
    fitted = made("react+knn").fit(**TRAIN)
    with pytest.raises(
        ValueError, match=r"react.percentile must be 90.0, as in the fit, which dep"
    ):
        fitted.varied(**{"react.percentile": 80})
    with pytest.raises(
        ValueError, match=r"react\+knn has no option 'percentile', only react.percen"
    ):
        fitted.varied(percentile=80)


def test_names_are_taken_apart() -> None:
    assert split_parts("react:percentile=85+gen:gamma=0.5") == [
        "react:percentile=85",
        "gen:gamma=0.5",
    ]
    assert split_parts("mahalanobis++") == ["mahalanobis++"]
    assert split_parts("ash-s+rmds++") == ["ash-s", "rmds++"]
    assert split_parts("odin:std=0.5+0.25+energy") == ["odin:std=0.5+0.25", "energy"]
    rows = evaluate(
        None, [TEST], {"a": [TEST]}, {"mine": made("scale+gen"), "max-logit": "max-logit"}
    ).rows
    assert [row.score for row in rows[::2]] == ["mine", "max-logit"]
    assert all(DETECTORS[step].name == step for step in ("react", "scale", "dice", "odin"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: made("knn+energy"), "a step must be one of .*, got 'knn'"),
        (lambda: made("react+nothing"), r"there is no detector 'react\+nothing'"),
        (lambda: made("scale+odin+msp"), "odin must come first"),
        (lambda: made("scale+gen", gamma=1), r"scale\+gen has no option 'gamma', only scale.perc"),
        (lambda: Composed([MSP()]), r"parts must be two or more, each once, got \['msp'\]"),
        (lambda: made("react+energy").score(**TEST), "fit must come first"),
        (lambda: made("react+knn").partial_fit(**TRAIN), "is fitted in 2 passes over the data"),
        (lambda: Composed([SCALE(), MSP()]).score(**TEST), "head must be given"),
        (lambda: Composed([DICE(head=W.head), Energy()]).score(**TEST), "fit must come first"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
