"""Settings scored together against each alone; what is chosen, kept and refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from head_world import world
from torch import Tensor, nn

from oodkernels import ood_metrics
from oodkernels.detectors import (
    DETECTORS,
    KNN,
    ODIN,
    Mahalanobis,
    NotFittedError,
    OODDetector,
    Tuning,
    ViM,
    extract,
    fit_detectors,
    sweep,
)
from oodkernels.detectors.batch import as_batch

W = world()
TRAIN = {"features": W.features, "logits": W.logits, "labels": W.labels}
HALF = {"features": W.test, "logits": W.test_logits}
NOISE = torch.rand(W.test.shape, generator=torch.Generator().manual_seed(1))
FAR = 1.5 * W.test.flip(0) + 0.3 * NOISE
with torch.no_grad():
    OUT = {"features": FAR, "logits": W.head(FAR)}
GRIDS: dict[str, dict[str, list[Any]]] = {
    "energy": {"temperature": [0.5, 1, 3]},
    "gen": {"gamma": [0.1, 0.5], "m": [2, 5, 100]},
    "scale": {"percentile": [50, 85, 95]},
    "lts": {"percentile": [80, 95]},
    "gradnorm": {"temperature": [1, 2]},
    "fdbd": {"normalize": ["mean", "norm"]},
    "nci": {"alpha": [0, 0.01]},
    "she": {"metric": ["inner", "cosine", "euclidean"]},
    "cadref": {"decoupled": [False]},
    "react": {"percentile": [60, 90]},
    "vra": {"low": [50, 60], "high": [80, 95]},
    "ash-p": {"percentile": [65, 90]},
    "ash-b": {"percentile": [65, 90]},
    "ash-s": {"percentile": [65, 90]},
    "dice": {"percentile": [30, 90]},
    "optfs": {"kind": ["logit", "energy"], "bins": [20, 100]},
    "residual": {"dim": [1, 7, 23]},
    "vim": {"dim": [1, 7, 23]},
    "neco": {"dim": [1, 10, 24]},
    "cop": {"variance": [50, 99, 100]},
    "corp": {"variance": [50, 90], "m": [16, 32]},
    "knn": {"k": [1, 10, 50, 200]},
    "nnguide": {"k": [1, 10], "size": [50, None]},
    "relation": {"power": [1, 4], "cut": [0.03, 0.1]},
    "mahalanobis": {"shrinkage": [0.0, 0.1]},
    "rmds": {"shrinkage": [0.0, 0.1]},
}


def made(name: str, setting: Mapping[str, Any]) -> OODDetector:
    found: OODDetector = DETECTORS[name].spec.make("test", setting, head=W.head)
    return found


@pytest.mark.parametrize("name", GRIDS)
def test_settings_scored_together_are_those_scored_alone(name: str) -> None:
    found = sweep({name: GRIDS[name]}, id=HALF, ood_val={"far": OUT}, train=TRAIN, head=W.head)
    tried = found.detectors[name]
    every = [
        dict(zip(GRIDS[name], values, strict=True))
        for values in itertools.product(*GRIDS[name].values())
    ]
    key = str
    assert sorted(tried.settings, key=key) == sorted(every, key=key)
    for setting, figures in zip(tried.settings, tried.figures["far"], strict=True):
        alone = made(name, setting).fit(**TRAIN)
        result = ood_metrics(alone.score(**HALF), alone.score(**OUT))
        assert figures.auroc == pytest.approx(result.auroc, abs=1e-12)
        assert figures.fpr95 == pytest.approx(result.fpr95, abs=1e-12)
    aurocs = [row.auroc for row in tried.mean]
    assert tried.chosen == aurocs.index(max(aurocs))
    again = made(name, tried.best).fit(**TRAIN)
    torch.testing.assert_close(found.fitted[name].score(**OUT), again.score(**OUT))


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_the_scores_themselves_are_those_of_each_alone(name: str) -> None:
    settings = [
        dict(zip(GRIDS[name], values, strict=True))
        for values in itertools.product(*GRIDS[name].values())
    ]
    bound = {o: v for o, v in settings[0].items() if o in DETECTORS[name].spec.at_fit}
    settings = [s for s in settings if bound.items() <= s.items()]
    base = made(name, bound).fit(**TRAIN)
    with torch.no_grad():
        together = base._scorer("test", settings)(as_batch("test", **HALF))
    for column, setting in zip(together.unbind(1), settings, strict=True):
        alone = made(name, setting).fit(**TRAIN).score(**HALF)
        torch.testing.assert_close(column, alone, rtol=1e-9, atol=1e-9)


def test_one_scan_and_one_projection_serve_all(monkeypatch: pytest.MonkeyPatch) -> None:
    scans, projections = [], []
    nearest, outside = KNN._distances, ViM._all_outside
    monkeypatch.setattr(
        KNN, "_distances", lambda self, x, ks: scans.append(ks) or nearest(self, x, ks)
    )
    monkeypatch.setattr(
        ViM, "_all_outside", lambda self, x, d: projections.append(d) or outside(self, x, d)
    )
    grid = {"knn": {"k": [1, 5, 9]}, "vim": {"dim": "all"}}
    found = sweep(grid, id=HALF, ood_val={"far": OUT}, train=TRAIN, head=W.head)
    assert [list(ks) for ks in scans] == [[1, 5, 9]] * 2  # ID and OOD, once each
    assert len(projections) == 3  # and the sample that alpha comes from
    assert [s["dim"] for s in found.detectors["vim"].settings] == list(range(1, 24))


def test_data_are_read_once() -> None:
    reads = []

    class Watched:
        def __init__(self, name: str, data: dict[str, Tensor]) -> None:
            self.name, self.data = name, data

        def __iter__(self) -> Any:
            reads.append(self.name)
            for rows in torch.arange(len(self.data["logits"])).split(20):
                yield {key: tensor[rows] for key, tensor in self.data.items()}

    sets = {n: Watched(n, d) for n, d in {"train": TRAIN, "id": HALF, "far": OUT}.items()}
    grid = {"corp": {"m": [8, 16]}, "knn": {"k": [1, 2]}, "scale": None, "msp": None}
    found = sweep(
        grid, id=sets["id"], ood_val={"far": sets["far"]}, train=sets["train"], head=W.head
    )
    assert reads == ["train", "id", "far"]
    whole = sweep(grid, id=HALF, ood_val={"far": OUT}, train=TRAIN, head=W.head)
    assert found.digests == whole.digests  # which do not depend on the batches
    assert found.settings == whole.settings
    assert found.sizes == {"ID": 50, "far": 50, "train": 400}


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


def test_a_model_is_run_and_odins_gradient_serves_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    g = torch.Generator().manual_seed(0)
    x, far = torch.randn(40, 6, generator=g), 3 * torch.randn(40, 6, generator=g)
    model, away = Net().eval(), ODIN._away
    taken = []
    monkeypatch.setattr(ODIN, "_away", lambda self, batch: taken.append(1) or away(self, batch))
    grid = {"odin": {"temperature": [1, 100], "eps": [0.0, 0.1, 0.5]}, "scale": None}
    found = sweep(grid, id=[x], ood_val={"far": [far]}, model=model)
    assert len(taken) == 4
    for setting, figures in zip(
        found.detectors["odin"].settings, found.detectors["odin"].mean, strict=True
    ):
        alone = ODIN(**setting, model=model)
        assert figures.auroc == ood_metrics(alone.score(x), alone.score(far)).auroc
    inside, outside = (
        {"features": found.features, "logits": found.logits}
        for found in (extract(model, x), extract(model, far))
    )
    same = sweep({"scale": None}, id=inside, ood_val={"far": outside}, head=model.fc)
    assert same.detectors["scale"].mean == found.detectors["scale"].mean


def test_noise_keeps_each_column_and_nothing_else() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(200, 1, generator=g)
    x = torch.cat([z, z + 0.01 * torch.randn(200, 1, generator=g)], 1)  # of one factor
    train = {"features": x, "labels": torch.zeros(200, dtype=torch.int64)}
    found = sweep({"mahalanobis": None}, id={"features": x}, ood_val="noise", train=train)
    assert found.detectors["mahalanobis"].mean[0].auroc > 0.95
    assert found.chosen_on == "noise of the ID samples: their columns shuffled, seed 0"
    same = sweep({"scale": None}, id=HALF, ood_val="noise", head=W.head)
    assert same.sizes == {"ID": 50, "noise": 50}
    with pytest.raises(ValueError, match="ood_val='noise' needs head where there are features and"):
        sweep({"energy": None}, id=HALF, ood_val="noise")


def test_own_grids_leave_out_what_is_refused() -> None:
    found = sweep(["knn", "vim"], id=HALF, ood_val={"far": OUT}, train=TRAIN, head=W.head)
    assert [s["k"] for s in found.detectors["knn"].settings] == [50, 100, 200]
    assert [line.split(":")[0] for line in found.detectors["knn"].left_out] == ["k=500", "k=1000"]
    assert found.settings["vim"] == {"dim": 16}
    few = {name: tensor[:60] for name, tensor in TRAIN.items()}
    with pytest.raises(ValueError, match="bank must have at least k = 70 rows, got 60"):
        sweep({"knn": {"k": [1, 70]}}, id=HALF, ood_val={"far": OUT}, train=few)


def test_every_grid_is_of_options_that_the_detector_takes() -> None:
    for name, detector in DETECTORS.items():
        spec = detector.spec
        assert spec.grid.keys() | spec.at_score | spec.at_fit - {"absent"} <= spec.options.keys()
        for option, values in spec.grid.items():
            for value in values:
                given = {option: value}
                if name.startswith("adascale"):  # low below high
                    given = {"low": 50, "high": 99.5, option: value}
                if name != "mcm":
                    made(name, given)


# --- other settings -------------------------------------------------------------------------------


def test_varied_settings_share_the_fit_and_part_from_it(tmp_path: Path) -> None:
    knn = KNN(5).fit(**TRAIN)
    other = knn.varied(k=20)
    assert other.bank is knn.bank
    torch.testing.assert_close(other.score(**HALF), KNN(20).fit(**TRAIN).score(**HALF))
    before = knn.score(**HALF)
    nci = DETECTORS["nci"](head=W.head).fit(**TRAIN)
    kept = nci.varied(alpha=0.5)
    expected = kept.score(**HALF)
    nci.partial_fit(features=W.features + 1, logits=W.head(W.features + 1).detach())
    assert torch.equal(kept.score(**HALF), expected)
    kept.partial_fit(features=W.features + 2, logits=W.head(W.features + 2).detach())
    assert not torch.equal(kept.score(**HALF), expected)
    assert torch.equal(knn.score(**HALF), before)
    mine = Mahalanobis(shrinkage=0.0).fit(**TRAIN)
    before = mine.score(**HALF)
    assert not torch.equal(mine.varied(shrinkage=0.5).score(**HALF), before)
    assert torch.equal(mine.score(**HALF), before)
    vim = ViM(5, head=W.head).fit(**TRAIN)
    vim.save(tmp_path / "vim")
    loaded = ViM.load(tmp_path / "vim")
    assert torch.equal(loaded.varied(dim=5).score(**HALF), vim.score(**HALF))
    for call, message in (
        (lambda: knn.varied(n=3), "KNN.varied: knn has no option 'n', only k, backend"),
        (lambda: knn.varied(k=500), "bank must have at least k = 500 rows, got 400"),
        (lambda: loaded.varied(dim=6), "ViM.varied: dim must be 5, as in the file: fit the detect"),
        (
            lambda: DETECTORS["corp"](m=8).fit(**TRAIN).varied(m=9),
            "CoRP.varied: m must be 8, as in the fit, which depends on it: fit another detector",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(NotFittedError, match="fit must come first"):
        KNN(5).varied(k=3).score(**HALF)


# --- what it is for, and what not -----------------------------------------------------------------


def test_a_file_gives_it_back(tmp_path: Path) -> None:
    grid = {"knn": {"k": [1, 10]}, "nnguide": {"size": [None, 20]}, "fdbd": None}
    found = sweep(grid, id=HALF, ood_val={"far": OUT}, train=TRAIN, head=W.head, by="fpr95")
    found.save(tmp_path / "tuned.json")
    again = Tuning.load(tmp_path / "tuned.json")
    assert again.to_json() == found.to_json()
    assert str(again) == str(found)
    assert "chosen by fpr95 on validation OOD far (50)" in str(found)
    for figures, one in zip(found.detectors.values(), again.detectors.values(), strict=True):
        best = min(row.fpr95 for row in figures.mean)
        assert figures.mean[figures.chosen].fpr95 == best
        assert one.best == figures.best
    content = json.loads(found.to_json())
    content["detectors"]["knn"]["settings"].pop()
    for text, message in (
        (json.dumps(content), "knn must have figures of every setting"),
        (json.dumps({**content, "by": "luck"}), "Tuning.from_json"),
        (json.dumps({**content, "format": "x"}), "format must be 'oodkernels.tuning', got 'x'"),
        ("{", "text must be JSON"),
    ):
        (tmp_path / "tuned.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Tuning.load(tmp_path / "tuned.json")


def test_a_stale_fit_another_model_and_the_validation_set_are_refused() -> None:
    from oodkernels._digest import StreamDigest
    from oodkernels.evaluation import evaluate

    found = sweep({"knn": {"k": [1, 10]}}, id=HALF, ood_val={"far": OUT}, train=TRAIN, head=W.head)
    for data, stale in ((TRAIN, False), ({**TRAIN, "features": W.features + 1}, True)):
        seen = StreamDigest()
        fit_detectors("test", [KNN(1)], data, seen=seen)
        if not stale:
            found.check_fit("test", seen.found())
            continue
        with pytest.raises(ValueError, match="test: training data must be those that the settings"):
            found.check_fit("test", seen.found())
    found.check_model("test", None, W.head)
    with pytest.raises(ValueError, match=r"test: model must be [0-9a-f]{16}, which settings were"):
        found.check_model("test", nn.Linear(24, 7))
    new = {"features": FAR + 1, "logits": W.head(FAR + 1).detach()}
    fresh = {"features": W.test + 0.1, "logits": W.head(W.test + 0.1).detach()}
    evaluation = evaluate(None, [fresh], {"new": [new]}, found.fitted, tuning=found)
    assert evaluation.remarks[-1] == (
        "settings of knn were chosen by auroc on validation OOD far (50)."
    )
    assert json.loads(evaluation.to_json())["tuning"]["detectors"]["knn"]["chosen"] in (0, 1)
    for inside, outside, name in (([fresh], [OUT], "far"), ([HALF], [new], "ID")):
        with pytest.raises(ValueError, match=rf"must be test data, got those .*\({name}\)"):
            evaluate(None, inside, {"new": outside}, found.fitted, tuning=found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": {}}, "grid must name at least one detector, got none"),
        ({"grid": ["nn"]}, "there is no detector 'nn', only"),
        ({"grid": {"knn": {"n": [1]}}}, "knn has no option 'n'"),
        ({"grid": {"knn": {"k": 3}}}, "k of knn must be a list of values to try, got 3"),
        ({"grid": {"knn": {"k": [0]}}}, "KNN: k must be an int >= 1, got 0"),
        ({"grid": {"knn": {"k": "all"}}}, "k of knn must be a list of values, got 'all'"),
        ({"grid": {"vim": {"dim": [24]}}}, "dim must be less than the 24 features, got 24"),
        ({"train": None}, "train must be given for knn"),
        ({"by": "luck"}, "by must be one of auroc, fpr95, got 'luck'"),
        ({"ood_val": OUT}, r"ood_val must be sets by name, .*got \['features', 'logits'\]"),
        ({"ood_val": "test"}, "ood_val must be sets by name or 'noise', got 'test'"),
        ({"ood_val": {"ID": OUT}}, "an OOD set cannot be called 'ID'"),
        ({"ood_val": {"far": []}}, "sweep: far has no samples"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    given = {
        "grid": {"knn": {"k": [1]}},
        "id": HALF,
        "ood_val": {"far": OUT},
        "train": TRAIN,
        "head": W.head,
    }
    with pytest.raises(ValueError, match=message):
        sweep(**{**given, **change})
