from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchmetrics")

from processes import forked

from oodkernels import Groups, ood_metrics
from oodkernels.data.samples import Samples, open_samples
from oodkernels.detectors import KNN, MOS, MSP, ODIN, Energy, OODDetector
from oodkernels.evaluation import Evaluation, MethodResult, StreamedMethodResult, combine, evaluate
from oodkernels.evaluation.evaluate import ID
from oodkernels.evaluation.methods import OTHER, OWN
from oodkernels.evaluation.scoring import GIVEN
from oodkernels.evaluation.tables import AVERAGE, METRICS, best, to_csv, to_latex, to_markdown
from oodkernels.metrics.calibration import calibration_bins

C, D = 10, 6
GROUPS = Groups.random(C, 3, seed=1)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(n: int, columns: int = C, shift: float = 0.0, seed: int = 0) -> Tensor:
    z = 2 * torch.randn(n, columns, generator=rng(seed))
    z[:, 1] += shift
    return z


@pytest.fixture
def id_set() -> tuple[Tensor, Tensor]:
    return logits(300, shift=3), torch.randint(C, (300,), generator=rng(1))


@pytest.fixture
def ood() -> dict[str, Tensor]:
    return {"near": logits(200, shift=2, seed=2), "far": logits(100, shift=0, seed=3)}


def batches(z: Tensor, labels: Tensor | None = None, size: int = 64) -> Iterator[object]:
    for i in range(0, len(z), size):
        rows = slice(i, i + size)
        yield z[rows] if labels is None else (z[rows], labels[rows])


# --- scores and the table ---------------------------------------------------------------------


def test_scores_give_rows_an_average_and_the_best() -> None:
    id_scores = np.array([2.0, 3.0])
    ood = {"near": np.array([2.5, 0.0]), "far": np.array([0.0])}
    good = MethodResult("a", "s", 0.9, id_scores, ood)
    bad = MethodResult("b", "s", 0.8, -id_scores, {name: -scores for name, scores in ood.items()})
    rows = evaluate([good, bad]).rows
    assert [row.ood_set for row in rows] == ["near", "far", AVERAGE] * 2
    near, far, average = rows[:3]
    assert (near.fpr95, far.fpr95, average.fpr95) == (0.5, 0, 0.25)
    assert average.auroc == pytest.approx((near.auroc + far.auroc) / 2)
    assert (near.n_id, near.n_ood, average.n_ood) == (2, 2, 3)
    top = best(rows)
    assert top[AVERAGE, "fpr95"] == 0.25
    assert top["far", "auroc"] == 1
    assert top["far", "id_accuracy"] == 0.9
    assert best(rows[:3]) == {}  # of one method none is the best


def test_scores_by_name() -> None:
    inside, outside = torch.randn(50), torch.randn(40) - 1
    found = evaluate({"energy": (inside, {"far": outside}), "other": (-inside, {"far": outside})})
    assert [m.name for m in found.methods] == ["model: energy", "model: other"]
    expected = ood_metrics(inside, outside)
    assert found.rows[0].fpr95 == expected.fpr95
    assert math.isnan(found.rows[0].id_accuracy)


def test_threshold_keeps_95_percent_of_id() -> None:
    scores = np.arange(20.0)
    method = MethodResult("a", "s", 0.9, scores, {"near": scores})
    assert method.threshold == 1
    assert np.mean(scores >= method.threshold) == 0.95


# --- one pass over logits ---------------------------------------------------------------------


class Counted(OODDetector):
    """Counts what it is asked for; the score is the first column."""

    name = "counted"
    needs = frozenset({"logits"})

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def _score(self, batch: object) -> Tensor:
        z: Tensor = batch.logits  # type: ignore[attr-defined]
        self.rows += len(z)
        return z[:, 0].float()


def softmax_scores(z: Tensor) -> dict[str, Tensor]:
    p = z.double().softmax(1)
    return {
        "msp": p.amax(1),
        "max-logit": z.double().amax(1),
        "energy": z.double().logsumexp(1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detectors_of_logits(
    id_set: tuple[Tensor, Tensor], ood: dict[str, Tensor], dtype: torch.dtype
) -> None:
    z, y = id_set
    z, sets = z.to(dtype), {name: x.to(dtype) for name, x in ood.items()}
    found = evaluate(None, batches(z, y), {n: batches(x) for n, x in sets.items()})
    assert [m.score for m in found.methods] == ["msp", "max-logit", "energy"]
    inside = softmax_scores(z)
    for method in found.methods:
        assert isinstance(method, MethodResult)
        np.testing.assert_allclose(method.id_scores, inside[method.score], rtol=2e-6)
        for name, x in sets.items():
            np.testing.assert_allclose(
                method.ood_scores[name], softmax_scores(x)[method.score], rtol=2e-6
            )
        assert method.id_accuracy == (z.argmax(1) == y).double().mean()
        exact = ood_metrics(method.id_scores, method.ood_scores["near"])
        assert found.rows[0].auroc == pytest.approx(exact.auroc) or method.score != "msp"


def test_every_set_is_read_once_for_all_detectors(
    id_set: tuple[Tensor, Tensor], ood: dict[str, Tensor]
) -> None:
    read: list[str] = []

    def once(name: str, z: Tensor) -> Iterator[object]:
        read.append(name)
        yield from batches(z)

    counted = Counted()
    told: dict[str, list[int]] = {}
    found = evaluate(
        None,
        once(ID, id_set[0]),
        {name: once(name, z) for name, z in ood.items()},
        {"a": MSP(), "b": Energy(), "c": counted},
        on_batch=lambda name, done: told.setdefault(name, []).append(done),
    )
    assert read == [ID, "near", "far"]
    assert counted.rows == 600
    assert told == {ID: [64, 128, 192, 256, 300], "near": [64, 128, 192, 200], "far": [64, 100]}
    assert [m.score for m in found.methods] == ["a", "b", "c"]


def test_batches_do_not_matter(id_set: tuple[Tensor, Tensor], ood: dict[str, Tensor]) -> None:
    one = evaluate(None, [id_set], ood, ["msp", "energy"])
    z, y = id_set
    many = evaluate(
        None, batches(z, y, 7), {n: batches(x, size=7) for n, x in ood.items()}, ["msp", "energy"]
    )
    assert one.rows == many.rows


def test_streaming_brackets_what_is_exact(id_set: tuple[Tensor, Tensor]) -> None:
    z = logits(200_000, shift=1)
    sets = {"b": logits(30_000, seed=5), "a": logits(10_000, shift=0.5, seed=6)}
    exact = evaluate(None, z, sets, ["energy", "msp"])
    streamed = evaluate(None, z, sets, ["energy", "msp"], memory="8MiB")
    assert exact.uncertainty == 0
    assert 0 < streamed.uncertainty < 0.01
    assert [row[:3] for row in streamed.rows] == [row[:3] for row in exact.rows]
    for one, row in zip(streamed.methods, exact.methods, strict=True):
        assert isinstance(one, StreamedMethodResult)
        assert one.sizes == row.sizes
        for name in ("b", "a", AVERAGE):
            for metric in METRICS:
                value = row.figures[name][metric]
                low, high = (one.figures[name][f"{metric}_{end}"] for end in ("lower", "upper"))
                assert low <= value <= high
        levels = one.levels("a")
        assert (np.diff(levels.values) >= 0).all()
        assert (levels.n_id.sum(), levels.n_ood.sum()) == (200_000, 10_000)
        at = levels.values >= row.threshold
        assert levels.n_id[at].sum() == pytest.approx(190_000, rel=0.01)


def test_levels_count_every_score() -> None:
    method = MethodResult("m", "s", 1, np.array([1.0, 2, 2]), {"x": np.array([2.0, 0])})
    levels = method.levels("x")
    assert levels.values.tolist() == [0, 1, 2]
    assert levels.n_id.tolist() == [0, 1, 2]
    assert levels.n_ood.tolist() == [1, 0, 1]


@pytest.mark.parametrize("convention", ["openood", "mos"])
def test_conventions(
    id_set: tuple[Tensor, Tensor], ood: dict[str, Tensor], convention: str
) -> None:
    found = evaluate(None, [id_set], ood, ["energy"], convention=convention)
    (method,) = found.methods
    assert isinstance(method, MethodResult)
    expected = ood_metrics(method.id_scores, method.ood_scores, convention=convention)
    assert found.rows[0].fpr95 == expected["near"].fpr95
    assert found.rows[0].aupr_in == expected["near"].aupr_in
    assert found.convention["name"] == convention


# --- MOS heads, reliability -------------------------------------------------------------------


def others(z: Tensor) -> Tensor:
    parts = z.double().split((GROUPS.sizes + 1).tolist(), 1)
    return torch.stack([part.softmax(1)[:, 0] for part in parts], 1)


def test_mos_head() -> None:
    z, y = logits(300, GROUPS.width), torch.randint(C, (300,), generator=rng(1))
    far = logits(100, GROUPS.width, seed=2)
    found = evaluate(None, batches(z, y), {"far": batches(far)}, [MOS(GROUPS), "mos-log-odds"])
    by_score = {m.score: m for m in found.methods}
    mos = by_score["mos"]
    assert isinstance(mos, MethodResult)
    np.testing.assert_allclose(mos.id_scores, -others(z).amin(1), rtol=1e-5)

    best_class = torch.full((300,), -1)
    best_p = torch.zeros(300, dtype=torch.float64)
    for k, (start, end) in enumerate(GROUPS.slices().tolist()):
        p = z[:, start:end].double().softmax(1)[:, 1:]
        top, at = p.max(1)
        classes = (GROUPS.class_to_group == k).nonzero()[:, 0]
        better = top > best_p
        best_p[better], best_class[better] = top[better], classes[at[better]]
    correct = best_class == y
    assert mos.id_accuracy == correct.double().mean()
    bins = calibration_bins(best_p, correct)
    np.testing.assert_array_equal(found.reliability["model"].count, bins.count)
    assert found.reliability["model"].ece == pytest.approx(bins.ece, abs=1e-6)

    (shown,) = found.others
    own = GROUPS.class_to_group[y][:, None] == torch.arange(3)
    p = others(z)
    expected = {
        OWN: [p[own[:, k], k].mean() for k in range(3)],
        OTHER: [p[~own[:, k], k].mean() for k in range(3)],
        "far": others(far).mean(0),
    }
    assert list(shown.others) == [OWN, OTHER, "far"]
    for kind, values in expected.items():
        np.testing.assert_allclose(shown.others[kind], values, rtol=1e-5)
    assert shown.min_others[ID] == pytest.approx(float(p.amin(1).mean()), rel=1e-5)
    assert sorted(c for group in shown.groups for c in group) == list(range(C))


def test_flat_reliability_and_absent_class(id_set: tuple[Tensor, Tensor]) -> None:
    z, y = id_set
    found = evaluate(None, [(z, y)], {"x": z}, ["msp"])
    p = z.double().softmax(1)
    bins = calibration_bins(p.amax(1), p.argmax(1) == y)
    assert found.reliability["model"].ece == pytest.approx(bins.ece, abs=1e-6)
    with_absent = torch.cat((z, torch.full((300, 1), 100.0)), 1)  # which is no answer
    found = evaluate(None, [(with_absent, y)], {"x": with_absent}, ["absent-class"])
    assert found.methods[0].id_accuracy == (z.argmax(1) == y).double().mean()


# --- models, features, files ------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, D)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(D, C)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(self.drop(self.body(x).relu()))


def test_a_model_runs_once_a_batch_and_serves_features_and_logits() -> None:
    torch.manual_seed(0)
    model = Net().train()
    x, far = torch.randn(90, 4), torch.randn(40, 4) + 3
    y = torch.randint(C, (90,))
    features = model.body(x).relu().detach()
    knn = KNN(k=3).fit(features=features)
    found = evaluate(
        model, batches(x, y, 30), {"far": batches(far, size=30)}, {"msp": MSP(), "knn": knn}
    )
    assert model.calls == 3 + 2
    assert model.training
    by_score = {m.score: m for m in found.methods}
    z = model.eval()(x)
    msp, near = by_score["msp"], by_score["knn"]
    assert isinstance(msp, MethodResult)
    assert isinstance(near, MethodResult)
    np.testing.assert_allclose(msp.id_scores, z.softmax(1).amax(1).detach(), rtol=1e-5)
    np.testing.assert_allclose(near.id_scores, knn.score(features=features), atol=1e-6)
    assert msp.id_accuracy == (z.argmax(1) == y).double().mean()


def test_detectors_that_read_inputs_get_the_model() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(20, 4)
    found = evaluate(model, [x], {"far": [x + 1]}, ["odin"])
    (method,) = found.methods
    assert isinstance(method, MethodResult)
    np.testing.assert_allclose(method.id_scores, ODIN(model=model).score(x), rtol=1e-5)


def test_files(tmp_path: Path, id_set: tuple[Tensor, Tensor], ood: dict[str, Tensor]) -> None:
    z, y = id_set
    np.savez(tmp_path / "id.npz", logits=z.numpy(), labels=y.numpy())
    np.save(tmp_path / "far.npy", ood["far"].numpy())
    files = evaluate(
        None, open_samples(tmp_path / "id.npz"), {"far": open_samples(tmp_path / "far.npy")}
    )
    assert files.rows == evaluate(None, [(z, y)], {"far": ood["far"]}).rows


def test_features_are_not_read_where_no_detector_wants_them(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "x.npz",
        logits=np.random.default_rng(0).normal(size=(40, 5)),
        features=np.full((40, 3), np.nan),
    )
    samples = open_samples(tmp_path / "x.npz")
    assert len(evaluate(None, samples, {"x": samples}).methods) == 3
    knn = KNN(k=1).fit(features=torch.randn(9, 3))
    with pytest.raises(ValueError, match=r"x\.npz: sample 0: features must not be NaN"):
        evaluate(None, samples, {"x": samples}, {"knn": knn})


def test_scores_in_files(tmp_path: Path) -> None:
    inside, far = torch.randn(30), torch.randn(20) - 1
    np.save(tmp_path / "id.npy", inside.numpy())
    np.save(tmp_path / "far.npy", far.numpy())
    for memory in (None, "16MiB"):
        found = evaluate(
            None,
            open_samples(tmp_path / "id.npy"),
            {"far": open_samples(tmp_path / "far.npy")},
            memory=memory,
        )
        assert [m.score for m in found.methods] == [GIVEN]
        assert found.rows[0].auroc == ood_metrics(inside, far).auroc


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 64, 299])
def test_nan_is_refused_with_its_place(
    id_set: tuple[Tensor, Tensor], ood: dict[str, Tensor], row: int
) -> None:
    z = id_set[0].clone()
    z[row, 4] = math.nan
    message = rf"near: sample {row}: logits must not be NaN, got NaN in column 4"
    with pytest.raises(ValueError, match=message):
        evaluate(None, id_set[0], {"near": batches(z)}, ["msp"])


def test_nan_in_a_file_names_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "id.npy", np.array([0.5, 1, np.nan, np.nan]))
    samples = open_samples(tmp_path / "id.npy")
    with pytest.raises(ValueError, match=r"id\.npy: sample 2: score must not be NaN"):
        evaluate(None, samples, {"x": samples})


def test_a_detector_that_gives_nan_is_named(id_set: tuple[Tensor, Tensor]) -> None:
    class Broken(Counted):
        def _score(self, batch: object) -> Tensor:
            return super()._score(batch) * math.nan

    with pytest.raises(ValueError, match="ID: sample 0: bad gives NaN"):
        evaluate(None, id_set[0], {"x": id_set[0]}, {"bad": Broken()})


def test_wrong_arguments(id_set: tuple[Tensor, Tensor]) -> None:
    z, y = id_set

    def run(**changes: object) -> Evaluation:
        arguments: dict[str, object] = {
            "model_or_scores": None,
            "id_loader": z,
            "ood_loaders": {"x": z},
            "detectors": ["msp"],
        }
        return evaluate(**{**arguments, **changes})  # type: ignore[arg-type]

    refused: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"ood_loaders": {}}, ValueError, "at least one OOD set"),
        ({"ood_loaders": {"average": z}}, ValueError, "cannot be called 'average'"),
        ({"ood_loaders": {"x": []}}, ValueError, "x has no samples"),
        ({"id_loader": [(z, y + C)]}, ValueError, r"class ids 0\.\.9, got 1\d for sample 0"),
        ({"id_loader": [(z, y - 99)]}, ValueError, r"class ids 0\.\.9"),
        ({"id_loader": [["a"]]}, TypeError, "a batch must be a tensor"),
        ({"id_loader": [{"labels": y}]}, TypeError, "a dict with logits, features or scores"),
        ({"id_loader": [{"features": z}], "detectors": None}, ValueError, "name the detectors"),
        ({"model_or_scores": 3}, TypeError, "must be a model or None"),
        ({"id_loader": None}, TypeError, "id_loader and ood_loaders are needed"),
        ({"detectors": ["best"]}, ValueError, "there is no detector 'best', only "),
        ({"detectors": ["mos"]}, ValueError, "detector 'mos' needs groups"),
        ({"detectors": ["msp", "msp"]}, ValueError, "two detectors are called 'msp'"),
        ({"detectors": [3]}, TypeError, "must be detectors or names of some, got int"),
        ({"detectors": ["knn"]}, ValueError, "fit must come first"),
        ({"convention": "mine"}, ValueError, "convention must be one of"),
        ({"convention": "oe", "memory": "16MiB"}, ValueError, "'default' with memory"),
        ({"memory": "lots"}, ValueError, "memory must be a size"),
        ({"groups": GROUPS, "detectors": ["mos"]}, ValueError, r"C \+ K = 13 columns, got 10"),
    ]
    for changes, error, message in refused:
        with pytest.raises(error, match=message):
            run(**changes)
    run()


# --- tables -----------------------------------------------------------------------------------


@pytest.fixture
def found(id_set: tuple[Tensor, Tensor], ood: dict[str, Tensor]) -> Evaluation:
    flat = evaluate(None, [id_set], ood, ["msp", "energy"], model_name="flat_1")
    scores = {"x%": (np.arange(9.0), {name: np.arange(5.0) - 3 for name in ood})}
    return combine(flat, evaluate(scores))


def test_csv_is_exact_and_empty_where_not_known(found: Evaluation) -> None:
    lines = list(csv.DictReader(to_csv(found.rows).splitlines()))
    assert [float(line["fpr95"]) for line in lines] == [row.fpr95 for row in found.rows]
    assert [line["id_accuracy"] == "" for line in lines] == [False] * 6 + [True] * 3


def test_markdown_and_latex_show_the_same_table(found: Evaluation) -> None:
    markdown = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in to_markdown(found.rows).splitlines()
    ]
    assert len({len(row) for row in markdown}) == 1
    assert markdown[0][3] == "near FPR95 ↓"
    assert markdown[0][-4:] == [
        "average FPR95 ↓",
        "average AUROC ↑",
        "average AUPR-in ↑",
        "average AUPR-out ↑",
    ]
    bold = {cell.strip("*") for row in markdown[2:] for cell in row if cell.startswith("**")}
    first = found.rows[0]
    assert markdown[2][3].strip("*") == f"{100 * first.fpr95:.2f}"
    assert markdown[4][2] == "-"
    latex = to_latex(found.rows).splitlines()
    body = [line for line in latex if line.endswith(r"\\")][2:]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)&", line[:-2])] for line in body]
    plain = [[re.sub(r"\\textbf\{(.*)\}", r"\1", cell) for cell in row] for row in cells]
    assert [row[2:] for row in plain] == [[c.strip("*") for c in r[2:]] for r in markdown[2:]]
    assert {c[8:-1] for row in cells for c in row if c.startswith(r"\textbf")} == bold
    assert [row[0] for row in plain] == [r"flat\_1", "", "model"]
    assert plain[2][1] == r"x\%"
    assert latex[1] == r"\begin{tabular}{ll" + "r" * 13 + "}"
    assert {len(row) for row in cells} == {15}


def test_json_says_everything(found: Evaluation) -> None:
    record = json.loads(found.to_json())
    assert record["format"] == "oodkernels.evaluation"
    assert record["results"][0]["fpr95"] == found.rows[0].fpr95
    assert record["results"][-1]["id_accuracy"] is None
    assert record["figures"]["flat_1: msp"]["near"]["auroc"] == found.rows[0].auroc
    assert record["thresholds"]["flat_1: msp"] == found.methods[0].threshold
    assert sum(record["reliability"]["flat_1"]["count"]) == 300
    assert record["convention"]["name"] == "default"
    assert record["software"]["torch"] == torch.__version__


def test_printing_shows_the_table(found: Evaluation) -> None:
    assert str(found) == to_markdown(found.rows)


# --- sets that differ -------------------------------------------------------------------------


def test_cells_belong_to_their_set_and_averages_of_other_sets_are_not_compared() -> None:
    inside, far, near = np.arange(9.0), np.arange(5.0) - 3, np.arange(5.0)
    found = evaluate(
        [
            MethodResult("m", "a", math.nan, inside, {"near": near}),
            MethodResult("m", "b", math.nan, -inside, {"far": far, "near": near}),
        ]
    )
    header, _, *body = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in found.to_markdown().splitlines()
    ]
    column = {name: i for i, name in enumerate(header)}
    assert header[-4].startswith("average")
    assert body[0][column["far AUROC ↑"]] == "-"
    assert body[0][column["near AUROC ↑"]].strip("*") == f"{100 * found.rows[0].auroc:.2f}"
    assert body[1][column["far AUROC ↑"]] == f"{100 * found.rows[2].auroc:.2f}"
    assert "**" in body[0][column["near AUROC ↑"]]
    assert not any("**" in cell for row in body for cell in row[-4:])
    found.to_html()


def test_sets_must_have_the_same_scores_and_widths(
    tmp_path: Path, id_set: tuple[Tensor, Tensor], ood: dict[str, Tensor]
) -> None:
    def file(name: str, *columns: str) -> Samples:
        rows = [",".join(columns), *(",".join("0.5" for _ in columns) for _ in range(4))]
        (tmp_path / name).write_text("\n".join(rows) + "\n")
        return open_samples(tmp_path / name)

    z, far = id_set[0], ood["far"]
    both, one = file("both.csv", "msp", "energy"), file("one.csv", "energy")
    other = file("other.csv", "msp")
    scores = {"msp": torch.rand(5), "energy": torch.rand(5)}
    for inside, outside, message in (
        (
            both,
            {"far": both, "near": one},
            r"one\.csv lacks the score 'msp', which .*both\.csv has",
        ),
        (one, {"far": both}, r"one\.csv lacks the score 'msp', which .*both\.csv has"),
        (one, {"far": other}, r"other\.csv lacks the score 'energy', which .*one\.csv has"),
        (z, {"far": [scores]}, "far lacks the score 'max-logit', which ID has"),
        (
            [{"energy": scores["energy"]}],
            {"far": far},
            "far lacks the score 'energy', which ID has",
        ),
        (z, {"far": far[:, :-1]}, "same width, got 10 in ID and 9 in far"),
        ([z[:5], z[5:, 1:]], {"far": far}, "same width, got 10 in ID and 9 in ID"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(None, inside, outside)  # type: ignore[arg-type]


def test_groups_without_detectors_are_scored_by_mos() -> None:
    z = logits(30, GROUPS.width)
    found = evaluate(None, z, {"x": z}, groups=GROUPS)
    assert [method.score for method in found.methods] == ["mos", "mos-log-odds"]


# --- names that mean something to a format ----------------------------------------------------

NAMES = [
    "=1+2",
    "@sum",
    "a,b\nc",
    'quote "x"',
    "$_$",
    "_x_ a_b *c*",
    "<script>alert(1)</script>",
    "[x](y)",
    "a|b\\|c",
    "50 % & #1 {~^}",
    "`code` &amp; ~~x~~",
]


def named() -> Evaluation:
    inside, outside = np.arange(9.0), np.arange(5.0) - 3
    return evaluate(
        [MethodResult(n, n, math.nan, inside + i, {n: outside}) for i, n in enumerate(NAMES)]
    )


def test_csv_reads_back_and_holds_no_formula() -> None:
    rows = list(csv.DictReader(io.StringIO(named().to_csv(), newline="")))
    for key in ("ood_set", "model", "score"):
        cells = [row[key] for row in rows if row["ood_set"] != AVERAGE]
        assert not any(cell.startswith(("=", "@", "+", "-")) for cell in cells)
        assert [cell.removeprefix("'") for cell in cells] == NAMES


def test_markdown_reads_back() -> None:
    from markdown_it import MarkdownIt

    found = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    html = found.render(named().to_markdown())

    class Cells(HTMLParser):
        cells: ClassVar[list[str]] = []
        tags: ClassVar[set[str]] = set()

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.tags.add(tag)
            if tag in ("td", "th"):
                self.cells.append("")

        def handle_data(self, data: str) -> None:
            if self.cells:
                self.cells[-1] += data

    parser = Cells()
    parser.feed(html)
    assert parser.tags <= {"table", "thead", "tbody", "tr", "th", "td", "strong"}
    width = 3 + 4 * (len(NAMES) + 1)
    rows = [
        [cell.strip() for cell in parser.cells[i : i + width]]
        for i in range(0, len(parser.cells), width)
    ]
    assert [row[0] for row in rows[1:]] == [row[1] for row in rows[1:]] == NAMES
    assert [h.removesuffix(" FPR95 ↓") for h in rows[0][3:-4:4]] == NAMES


def test_latex_has_no_command_of_a_name() -> None:
    latex = named().to_latex()
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 2 + len(NAMES)
    width = 3 + 4 * (len(NAMES) + 1)
    back = {
        r"\textbackslash{}": "\\",
        r"\textasciitilde{}": "~",
        r"\textasciicircum{}": "^",
        r"\textless{}": "<",
        r"\textgreater{}": ">",
        r"\textbar{}": "|",
        **{f"{{{c}}}": c for c in "[]*"},
        **{f"\\{c}": c for c in "&%$#_{}"},
    }
    special = re.compile("|".join(map(re.escape, back)))
    for row, name in zip(rows[2:], NAMES, strict=True):
        assert not row.lstrip().startswith(("[", "*"))
        cells = re.split(r"(?<!\\)&", row.removesuffix(r"\\"))
        assert len(cells) == width
        bare = special.sub("", cells[0])
        assert not set(bare) & set("\\{}[]$&#^_~%"), cells[0]
        assert special.sub(lambda m: back[m[0]], cells[0].strip()) == name.replace("\n", " ")


def test_a_name_that_is_not_utf_8_is_written(tmp_path: Path) -> None:
    found = evaluate(None, logits(9), {"caf\udce9": logits(9, seed=1)})
    paths = found.save(tmp_path)
    for path in paths:
        text = path.read_text(encoding="utf-8").replace(r"\textbackslash{}", "\\")
        assert "caf\\udce9" in text.replace("\\\\", "\\"), path


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
@pytest.mark.parametrize("memory", [None, "8MiB"])
def test_ranks_share_the_batches_and_find_the_same(tmp_path, memory):
    """Of every set, one of them with fewer batches than ranks; with groups and labels."""
    generator = torch.Generator().manual_seed(0)
    groups = Groups([0, 0, 1, 1])

    def batches(count, offset):
        for i in range(count):
            logits = torch.randn(5 + i % 2, groups.width, generator=generator) + offset
            yield logits, torch.arange(len(logits)) % 4

    sets = {name: list(batches(n, n / 10)) for name, n in (("ID", 9), ("a", 7), ("b", 1))}
    inside = sets.pop("ID")

    def work(out):
        found = evaluate(None, inside, sets, groups=groups, memory=memory, shared=True)
        (tmp_path / f"{out}-{os.getpid()}.json").write_text(found.to_json())

    work("one")
    (one,) = tmp_path.glob("one-*")
    for world in (2, 4):
        assert forked(world, tmp_path, partial(work, f"of{world}")) == [0] * world
        found = list(tmp_path.glob(f"of{world}-*"))
        assert len(found) == world
        assert {path.read_text() for path in found} == {one.read_text()}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_a_nan_on_any_rank_is_named_by_its_place_in_the_set(tmp_path, capfd):
    logits = torch.randn(40, 6)
    logits[37, 2] = torch.nan
    batches = [*logits[:34].split(8), logits[34:]]

    def work():
        try:
            evaluate(None, batches, {"a": [torch.randn(9, 6)]}, shared=True)
        except ValueError as error:
            sys.stderr.write(str(error))
            sys.stderr.flush()
            os._exit(1)

    assert 1 in forked(2, tmp_path, work)
    assert "ID: sample 37: logits must not be NaN, got NaN in column 2" in capfd.readouterr().err
