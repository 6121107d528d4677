"""Ways through the commands, from training to a threshold in use, and what they refuse."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("safetensors")
pytest.importorskip("typer")

from test_cli import oodk, plain

from oodkernels import Groups, ood_metrics
from oodkernels.detectors import DETECTORS, KNN, ODIN, AbsentClass, Energy
from oodkernels.nn import Head
from oodkernels.training import OBJECTIVES, TrainConfig

C, D = 4, 6


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    """Features of classes that are far apart, with labels, and outliers."""
    rng = np.random.default_rng(0)
    centres = 5 * rng.normal(size=(C, D))
    for name, n in (("train", 160), ("val", 40)):
        labels = np.arange(n) % C
        features = (centres[labels] + rng.normal(size=(n, D))).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", features=features, labels=labels)
    for name in ("outliers", "far"):
        features = (4 * rng.normal(size=(60, D))).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", features=features)
    return {path.stem: path for path in tmp_path.iterdir()}


def result(*arguments: object) -> Any:
    quiet = () if arguments[0] == "group" else ("--quiet",)
    found = oodk(*arguments, "--json", *quiet)
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def features(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(path)["features"])


def head_of(data: dict[str, Path], out: Path, objective: str, *more: object) -> Path:
    given: list[object] = ["--data", data["train"], "--out", out, "--objective", objective]
    if "outliers" in OBJECTIVES[objective].needs:
        given += ["--outliers", data["outliers"]]
    result("train", *given, "--accelerator", "cpu", "--epochs", 3, "--batch-size", 32, *more)
    return out / "head.safetensors"


def test_detectors_have_settings(data: dict[str, Path]) -> None:
    given = ("--id", data["val"], "--ood", data["far"], "--train", data["train"])
    rows = result("eval", *given, "-d", "knn", "-d", "knn:k=3")["results"]
    assert [row["score"] for row in rows] == ["knn", "knn", "knn:k=3", "knn:k=3"]
    knn = KNN(k=3).fit(features=features(data["train"]))
    sets = [knn.score(features=features(data[name])) for name in ("val", "far")]
    assert rows[2]["auroc"] == ood_metrics(*sets).auroc
    assert rows[2]["auroc"] != rows[0]["auroc"]
    for text, message in (
        ("knn:n=3", "has no option 'n', only"),
        ("knn:k=many", "k must be"),
        ("knn:k", "must be NAME=VALUE"),
        ("nn:k=3", "there is no detector 'nn'"),
    ):
        found = oodk("eval", *given, "-d", text)
        assert found.exit_code in (1, 2)
        assert message in plain(found)


def test_all_detectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a flat head: whatever reads features, logits or both, fitted where there is a --train."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(C, 16))
    data = {name: tmp_path / f"{name}.npz" for name in ("train", "val", "far")}
    for name, n in (("train", 160), ("val", 40)):
        labels = np.arange(n) % C
        x = np.maximum(centres[labels] + rng.normal(size=(n, 16)), 0).astype(np.float32)
        np.savez(data[name], features=x, labels=labels)
    np.savez(data["far"], features=np.abs(2 * rng.normal(size=(60, 16))).astype(np.float32))
    head = head_of(data, tmp_path / "flat", "softmax")
    sets = ("--id", data["val"], "--ood", data["far"], "--head", head, "-d", "all")
    monkeypatch.delitem(DETECTORS, "corp")  # eigenvectors of 4096 features take long

    def scores(*more: object) -> dict[str, float]:
        rows = result("eval", *sets, *more)["results"]
        return {row["score"]: row["auroc"] for row in rows}

    found = scores("--train", data["train"])
    expected = {
        name
        for name, cls in DETECTORS.items()
        if cls.spec.family in "ABCDE" and "confidence" not in cls.needs
    } - {"mos", "mos-class", "mos-log-odds", "absent-class", "weighted-energy", "mcm"}
    assert set(found) == expected
    assert len(found) > 25
    assert all(0 <= value <= 1 for value in found.values())
    assert set(scores()) == {name for name in expected if not DETECTORS[name].trained_on}


def test_several_heads_and_their_own_scores(data: dict[str, Path], tmp_path: Path) -> None:
    dos = head_of(data, tmp_path / "dos", "dos", "--option", "k=16")
    flat = head_of(data, tmp_path / "flat", "softmax")
    sets = ("--id", data["val"], "--ood", data["far"])
    record = result("eval", *sets, "--head", dos, "--head", f"flat={flat}")
    methods = list(dict.fromkeys((row["model"], row["score"]) for row in record["results"]))
    usual = ["msp", "max-logit", "energy"]
    assert methods == [
        ("dos", "absent-class"),
        *(("dos", score) for score in usual),
        *(("flat", score) for score in usual),
    ]
    assert "column 4 of the logits is the absent class's" in record["notes"][0]
    head = Head.load(dos)
    with torch.no_grad():
        logits = [head(features(data[name])) for name in ("val", "far")]
    labels = torch.from_numpy(np.load(data["val"])["labels"])
    by_score = {r["score"]: r for r in record["results"] if (r["model"]) == "dos"}
    for score, detector, columns in (
        ("energy", Energy(), C),
        ("absent-class", AbsentClass(), C + 1),
    ):
        scores = [detector.score(logits=z[:, :columns]) for z in logits]
        assert by_score[score]["auroc"] == pytest.approx(ood_metrics(*scores).auroc, abs=1e-12)
        assert by_score[score]["id_accuracy"] == (
            (logits[0][:, :C].argmax(1) == labels).double().mean()
        )
    # None of it changes with what is asked for.
    alone = result("eval", *sets, "--head", dos, "-d", "energy")["results"][0]
    assert alone["auroc"] == by_score["energy"]["auroc"]
    found = oodk("score", "--data", data["far"], "--head", dos, "--head", flat)
    assert found.exit_code == 2
    assert "one is enough" in plain(found)


def test_a_threshold_is_for_its_own_detector(data: dict[str, Path], tmp_path: Path) -> None:
    heads = [head_of(data, tmp_path / n, "softmax", "--seed", i) for i, n in enumerate("ab")]
    limit = tmp_path / "threshold.json"
    given = ("--id", data["val"], "--head", heads[0])
    found = oodk("threshold", *given, "-d", "energy", "--out", limit)
    assert found.exit_code == 0, found.output
    score = ("score", "--data", data["far"], "--threshold", limit, "--quiet")
    good = oodk(*score, "--head", heads[0], "-d", "energy")
    assert good.exit_code == 0, good.output
    assert {row["is_ood"] for row in csv.DictReader(io.StringIO(good.stdout))} <= {"0", "1"}
    for arguments, message in (
        (("--head", heads[0], "-d", "msp"), "detector = 'energy', got 'msp'"),
        (("--head", heads[0], "-d", "energy:temperature=2"), "temperature = 1.0, got 2.0"),
        (("--head", heads[1], "-d", "energy"), "model = "),
    ):
        found = oodk(*score, *arguments)
        assert found.exit_code == 1
        assert message in plain(found)
        assert found.stdout == ""


def test_a_threshold_of_a_column_is_for_that_column(tmp_path: Path) -> None:
    for name in ("msp", "energy"):
        rows = "".join(f"{i / 7}\n" for i in range(40))
        (tmp_path / f"{name}.csv").write_text(f"{name}\n{rows}")
    limit = tmp_path / "t.json"
    assert oodk("threshold", "--id", tmp_path / "msp.csv", "--out", limit).exit_code == 0
    given = ("--threshold", limit, "--quiet")
    assert oodk("score", "--data", tmp_path / "msp.csv", *given).exit_code == 0
    found = oodk("score", "--data", tmp_path / "energy.csv", *given)
    assert found.exit_code == 1
    assert "detector = 'msp', got 'energy'" in plain(found)


def test_training_flags_reach_the_run(data: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ("--monitor", "val_loss", "--no-nesterov", "--schedule", "step", "--gamma", 0.5)
    flags = (*flags, "--milestones", 0.25, "--milestones", 0.75, "--val", data["val"])
    head_of(data, out, "softmax", *flags, "--hidden", 8, "--standardize")
    config = TrainConfig.from_toml((out / "train.toml").read_text())
    assert (config.monitor, config.nesterov, config.gamma) == ("val_loss", False, 0.5)
    assert config.milestones == [0.25, 0.75]
    head = Head.load(out / "head.safetensors")
    assert [m.out_features for m in head.hidden if hasattr(m, "out_features")] == [8]
    torch.testing.assert_close(head.mean, features(data["train"]).mean(0))
    for name, value in (("--optimizer", "best"), ("--monitor", "test"), ("--precision", "8")):
        found = oodk("train", "--data", data["train"], "--out", tmp_path / "x", name, value)
        assert found.exit_code == 1
        assert f"{name[2:]} must be one of" in plain(found)


def test_help_of_train_lists_every_objective_with_its_options() -> None:
    shown = plain(oodk("train", "--help"))
    for spec in OBJECTIVES.values():
        assert f"{spec.name}:" in shown
        for option in spec.options.keys() - spec.needs:
            assert f"{option}=" in shown


# --- images -----------------------------------------------------------------------------------

MODULE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of a model, and images of two classes and of others."""
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "workflow_models", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "workflow_models.py").write_text(MODULE)
    rng = np.random.default_rng(0)
    for name, low, n in (("id/dark", 0, 12), ("id/light", 128, 12), ("far/any", 64, 9)):
        (tmp_path / name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(low, low + 128, (9, 9, 3), dtype=np.uint8)
            image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    (tmp_path / "third" / "a").mkdir(parents=True)
    return tmp_path


MODEL = ("--model", "workflow_models:make", "--size", 8)
TRAIN = ("train", *MODEL, "--accelerator", "cpu", "--batch-size", 8, "--epochs", 2, "--data", "id")


def test_from_images_to_a_threshold_of_any_detector(here: Path) -> None:
    result(*TRAIN, "--out", "run")
    given = (*MODEL, "--weights", "run/model.pt")
    fitted = ("--train", "id", "-d", "knn:k=3", "-d", "mahalanobis:shrinkage=0.1")
    record = result(
        "eval", *given, "-d", "odin", "-d", "msp", *fitted, "--id", "id", "--ood", "far"
    )
    rows = {row["score"]: row for row in record["results"] if row["ood_set"] == "far"}
    assert rows.keys() == {"odin", "msp", "knn:k=3", "mahalanobis:shrinkage=0.1"}
    assert (rows["odin"]["n_id"], rows["odin"]["n_ood"]) == (24, 9)
    assert rows["msp"]["id_accuracy"] >= 0.5
    assert record["notes"] == []
    found = oodk("threshold", *given, "-d", "odin", "--id", "id", "--out", "t.json", "--quiet")
    assert found.exit_code == 0, found.output
    found = oodk("score", *given, "-d", "odin", "--data", "far", "--threshold", "t.json", "--quiet")
    assert found.exit_code == 0, found.output
    scores = [float(row["odin"]) for row in csv.DictReader(io.StringIO(found.stdout))]

    from oodkernels.data import ToTensor, load_model, open_images

    model, _ = load_model("workflow_models:make", "run/model.pt")
    images = torch.stack([sample.image for sample in open_images("far", ToTensor(8))])
    np.testing.assert_allclose(scores, ODIN(model=model).score(images), rtol=1e-4)
    result(*TRAIN, "--out", "odd", "--seed", 1)
    other = (*MODEL, "--weights", "odd/model.pt", "-d", "odin", "--data", "far")
    found = oodk("score", *other, "--threshold", "t.json")
    assert found.exit_code == 1
    assert "model = " in plain(found)


def test_abnormality_can_be_evaluated(here: Path) -> None:
    result(*TRAIN, "--out", "run", "--objective", "abnormality")
    given = (*MODEL, "--weights", "run/model.pt", "-d", "run/abnormality.safetensors")
    record = result("eval", *given, "--id", "id", "--ood", "far")
    assert record["results"][0]["score"] == "abnormality"


def test_accuracy_is_left_out_where_classes_are_not_the_models(here: Path) -> None:
    record = result("eval", *MODEL, "--id", "id", "--ood", "far")  # made by hand: no names
    assert record["results"][0]["id_accuracy"] is None
    assert record["reliability"] == {}
    (note,) = record["notes"]
    assert "accuracy is left out: whether the classes of id (dark, light) are the model's" in note
    shown = oodk("eval", *MODEL, "--id", "id", "--ood", "far")
    assert note in plain(shown)

    result(*TRAIN, "--out", "run")
    given = ("eval", *MODEL, "--weights", "run/model.pt", "--ood", "far")
    whole = result(*given, "--id", "id")["results"][0]["id_accuracy"]
    (here / "part").mkdir()
    (here / "id" / "dark").rename(here / "part" / "dark")
    (here / "id" / "light").rename(here / "part" / "light")
    (here / "part" / "dark").rename(here / "dark")
    # One class alone has the number 0, and is matched by its name all the same.
    light = result(*given, "--id", "part")["results"][0]["id_accuracy"]
    (here / "part" / "light").rename(here / "part" / "bright")
    record = result(*given, "--id", "part")
    assert record["results"][0]["id_accuracy"] is None
    assert "(bright) are not the model's" in record["notes"][0]
    (here / "part" / "bright").rename(here / "light")
    (here / "part").rmdir()
    (here / "part").mkdir()
    (here / "dark").rename(here / "part" / "dark")
    dark = result(*given, "--id", "part")["results"][0]["id_accuracy"]
    assert whole == pytest.approx((light + dark) / 2)


def test_a_model_must_have_an_output_for_each_folder(here: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(here / "third" / "a" / "0.png")
    (here / "third" / "a").rename(here / "id" / "a")
    found = oodk(*TRAIN, "--out", "run")
    assert found.exit_code == 1
    assert "must give 3 logits for the 3 classes of id, got 2" in plain(found)
    assert "Traceback" not in found.output


def test_groups_go_with_the_model(here: Path) -> None:
    module = MODULE.replace("nn.Linear(16, 2)", "nn.Linear(16, 4)")
    (here / "workflow_models.py").write_text(module)
    Groups([0, 1]).save(here / "groups.json")
    result(*TRAIN, "--out", "run", "--objective", "mos", "--groups", "groups.json")
    given = (*MODEL, "--weights", "run/model.pt", "--ood", "far", "--id", "id")
    record = result("eval", *given)
    assert {row["score"] for row in record["results"]} == {"mos", "mos-log-odds"}
    assert record["results"][0]["id_accuracy"] is not None
    found = oodk("extract", *given[:5], "run/model.pt", "--data", "id", "--out", "features")
    assert found.exit_code == 0, found.output
    extracted = result("eval", "--id", "features", "--ood", "features")
    assert {row["score"] for row in extracted["results"]} == {"mos", "mos-log-odds"}
    assert extracted["results"][0]["id_accuracy"] == record["results"][0]["id_accuracy"]


# --- groups -----------------------------------------------------------------------------------


def test_taxonomy_says_what_is_in_misc_and_cuts_the_hierarchy(tmp_path: Path) -> None:
    from test_groups import SYNSETS, _synset

    (tmp_path / "data.noun").write_text("".join(_synset(n, *rest) for n, rest in SYNSETS.items()))
    wnids = tmp_path / "wnids.txt"
    wnids.write_text("\n".join(f"n{n:08d}" for n in (101, 102, 103, 104, 105, 106)))
    given = ("group", "taxonomy", wnids, "--wordnet", tmp_path, "--out", tmp_path / "groups.json")
    found = oodk(*given)
    assert found.exit_code == 0, found.output
    assert "16.7 % of the classes are in misc, with none of the names; -k cuts" in plain(found)
    assert result(*given[:-2], "--out", tmp_path / "g.json")["misc"] == pytest.approx(1 / 6)
    assert result(*given, "-k", 2)["sizes"] == {"canine": 3, "entity": 3}
    assert Groups.load(tmp_path / "groups.json").names == ("canine", "entity")
    (tmp_path / "t.csv").write_text("name,group\na,x\nb,y\n")
    found = oodk("group", "taxonomy", tmp_path / "t.csv", "-k", 2)
    assert found.exit_code == 2
    assert "not for a table" in plain(found)
