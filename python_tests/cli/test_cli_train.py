from __future__ import annotations

import csv
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("safetensors")
pytest.importorskip("typer")

from test_cli import oodk, plain

from oodkernels import Groups, mos_predict
from oodkernels.data import ToTensor, load_model
from oodkernels.detectors import OODDetector
from oodkernels.nn import Head, read_weights
from oodkernels.training import load_checkpoint

C, D = 6, 5
OUTLIERS = ("oe", "energy", "absent-class", "dos", "ntom", "poem")


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    """Features of classes that are far apart, and of outliers; groups."""
    rng = np.random.default_rng(0)
    centres = 6 * rng.normal(size=(C, D))

    def save(name: str, n: int) -> None:
        labels = np.arange(n) % C
        x = centres[labels] + rng.normal(size=(n, D))
        np.savez(tmp_path / f"{name}.npz", features=x.astype(np.float32), labels=labels)

    save("train", 300)
    save("val", 60)
    outliers = (8 * rng.normal(size=(200, D))).astype(np.float16)
    np.savez(tmp_path / "outliers.npz", features=outliers)
    Groups.random(C, 2).save(tmp_path / "groups.json")
    return {path.stem: path for path in tmp_path.iterdir()}


def train(data: dict[str, Path], out: Path, objective: str, *more: object) -> dict[str, float]:
    given: tuple[object, ...] = ("--data", data["train"], "--out", out, "--objective", objective)
    if objective in (*OUTLIERS, "mos-outliers"):
        given = (*given, "--outliers", data["outliers"])
    if objective.startswith("mos"):
        given = (*given, "--groups", data["groups"])
    given = (*given, "--accelerator", "cpu", "--json", "--epochs", 3, "--batch-size", 32)
    found = oodk("train", *given, *more)
    assert found.exit_code == 0, found.output
    result: dict[str, float] = json.loads(found.stdout)
    return result


def predictions(head: Head, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = head(x)
    logits = found[0] if isinstance(found, tuple) else found
    if head.groups is not None:
        return head.groups.to_class(mos_predict(logits, head.groups).label)
    return logits[:, :C].argmax(1)


@pytest.mark.parametrize("objective", ["softmax", "mos", "mos-outliers", "confidence", *OUTLIERS])
def test_every_objective_trains_a_head_that_can_be_evaluated(
    data: dict[str, Path], tmp_path: Path, objective: str
) -> None:
    out = tmp_path / "run"
    bounds = ("--option", "m_in=-5", "--option", "m_out=-2")
    more = {
        "dos": ("--option", "k=32"),
        "mos": ("--option", "mixup=0.1"),
        "energy": bounds,
        "poem": bounds,
    }.get(objective, ())
    result = train(data, out, objective, *more)
    assert result["steps"] == 3 * 10
    head = Head.load(out / "head.safetensors")
    assert (head.groups is not None) == objective.startswith("mos")
    val = np.load(data["val"])
    answers = predictions(head, torch.from_numpy(val["features"]))
    assert (answers.numpy() == val["labels"]).mean() > 0.8
    with (out / "log.csv").open() as file:
        assert len(list(csv.DictReader(file))) >= 3
    assert f'objective = "{objective}"' in (out / "config.toml").read_text()

    detector = {"confidence": "confidence", "mos": "mos", "mos-outliers": "mos-class"}.get(
        objective, "energy"
    )
    if head.linear.out_features == C + 1:
        detector = "absent-class"
    given = ("--head", out / "head.safetensors", "--id", data["val"], "-d", detector)
    found = oodk("eval", *given, "--ood", data["outliers"], "--json")
    assert found.exit_code == 0, found.output
    np.save(tmp_path / "bare.npy", np.load(data["outliers"])["features"])
    bare = oodk("eval", *given, "--ood", f"outliers={tmp_path / 'bare.npy'}", "--json")
    (row, _) = json.loads(found.stdout)["results"]
    assert json.loads(bare.stdout)["results"][0] == row
    assert row["id_accuracy"] == (answers.numpy() == val["labels"]).mean()
    assert 0 <= row["auroc"] <= 1


def test_validation_keeps_the_best_and_resume_goes_on(
    data: dict[str, Path], tmp_path: Path
) -> None:
    constant = ("--val", data["val"], "--seed", 3, "--schedule", "constant")
    whole = train(data, tmp_path / "whole", "mos", *constant)
    assert whole["best"] > 0.8
    train(data, tmp_path / "parts", "mos", *constant, "--epochs", 2)
    found = oodk("train", "--data", data["train"], "--out", tmp_path / "parts")
    assert found.exit_code == 1
    assert "resume" in plain(found)
    config = tmp_path / "parts" / "config.toml"
    found = oodk("train", "--config", config, "--epochs", 3, "--resume")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["steps"] == whole["steps"] == 30
    heads = [(tmp_path / run / "head.safetensors").read_bytes() for run in ("parts", "whole")]
    assert heads[0] == heads[1]


def test_usage_errors(data: dict[str, Path], tmp_path: Path) -> None:
    given = ("--data", data["train"], "--out", tmp_path / "run")
    for arguments, code, message in (
        (("--objective", "dos"), 2, "is needed for --objective dos"),
        (("--outliers", data["outliers"]), 2, "is of no use for --objective softmax"),
        (("--objective", "mos"), 2, "is needed for --objective mos"),
        (("--groups", data["groups"]), 2, "is of no use for --objective softmax"),
        (("--objective", "synthetic"), 2, "--model"),
        (("--objective", "best"), 2, "best"),
        (("--epochs", 2, "--steps", 3), 2, "not both"),
        (("--option", "mixup"), 2, "must be NAME=VALUE"),
        (("--val", tmp_path / "no.npz"), 2, "there is no"),
        (("--option", "mixed=1"), 1, "mixed"),
        (("--classes", 3), 1, "labels must be class ids 0..2, got 3 for sample 3"),
        (("--val", data["outliers"]), 1, "has no labels"),
        (("--lr", -1), 1, "lr must be positive"),
    ):
        found = oodk("train", *given, *arguments)
        assert found.exit_code == code, found.output
        assert message in plain(found), found.output
        assert "Traceback" not in found.output


def test_width_of_outliers_must_fit(data: dict[str, Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "wide.npz", features=np.zeros((20, D + 1), np.float32))
    given = ("--data", data["train"], "--out", tmp_path / "run", "--objective", "oe")
    found = oodk("train", *given, "--outliers", tmp_path / "wide.npz")
    assert found.exit_code == 1
    assert f"features must have width {D}, as those of --data, got {D + 1}" in plain(found)


MODULE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
"""


@pytest.mark.parametrize("objective", ["softmax", "synthetic", "abnormality"])
def test_a_model_on_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    pytest.importorskip("PIL")
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "image_models", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "image_models.py").write_text(MODULE)
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(low, low + 128, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    given = ("--model", "image_models:make", "--data", "images", "--size", 8, "--out", "run")
    given = (*given, "--objective", objective, "--epochs", 3, "--batch-size", 8)
    random = ("--augment",) if find_spec("torchvision") else ()
    more = {"softmax": random, "abnormality": ("--val", "images")}.get(objective, ())
    found = oodk("train", *given, *more, "--accelerator", "cpu", "--quiet")
    assert found.exit_code == 0, found.output
    state = read_weights(tmp_path / "run" / "model.pt").state
    assert not torch.equal(state["3.weight"], torch.zeros(2, 16))
    if objective == "abnormality":  # the last epoch's: the best one's may be of the first phase
        last = load_checkpoint("run/last.pt")["model"]
        assert all(torch.equal(state[name], last[name]) for name in state)
        model, _ = load_model("image_models:make", "run/model.pt")
        detector = OODDetector.load(tmp_path / "run" / "abnormality.safetensors", model)
        x = ToTensor(8)(Image.open("images/dark/0.png"))[None]
        assert detector.score(x).isfinite().all()
    flat = ("--model", "image_models:make", "--data", "images/dark", "--out", "x", "--size", 8)
    found = oodk("train", *flat)
    assert found.exit_code == 1
    assert "images/dark: images must have labels" in plain(found)
    given = ("--model", "image_models:make", "--weights", "run/model.pt", "--size", 8)
    found = oodk("extract", *given, "--data", "images", "--out", "features")
    assert found.exit_code == 0, found.output
