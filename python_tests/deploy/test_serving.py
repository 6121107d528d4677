"""``oodk bundle``, ``oodk score --bundle``, and the server in the documentation."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("PIL")
pytest.importorskip("safetensors")
pytest.importorskip("typer")

from bundles import GROUPS, data, network
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from oodk.app import app as commands
from oodkernels.data import ToTensor
from oodkernels.deploy import Bundle
from oodkernels.detectors import KNN, Energy
from oodkernels.nn import Head

PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "production.md"


class Grey(nn.Module):
    """The network on the mean of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(3)
        self.class_names = ("a", "b", "c")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.mean(1, keepdim=True))

    def get_classifier(self) -> nn.Module:
        return self.net.head


def make() -> tuple[nn.Module, ToTensor]:
    return Grey(), ToTensor(8)


def oodk(*args: object) -> Any:
    return CliRunner(env={"COLUMNS": "100"}).invoke(commands, [str(arg) for arg in args])


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for folder, n in (("train", 6), ("held-out", 8), ("new", 2)):
        for label in "abc":
            (root / folder / label).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(256, size=(10, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / label / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def made(images: Path) -> Iterator[Path]:
    out = images / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        found = oodk(
            *("bundle", "--model", "test_serving:make", "-d", "energy", "-d", "knn:k=2"),
            *("--train", images / "train", "--id", images / "held-out", "--out", out),
            *("--tpr", 0.9, "--json", "--quiet", "--device", "cpu"),
        )
        assert found.exit_code == 0, found.output
        facts = json.loads(found.stdout)
        assert facts["n_id"] == 24
        assert facts["counts"] == {"None": 24}
        yield out


def test_bundle_and_score(made: Path, images: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(made)
    assert list(bundle.detectors) == ["energy", "knn:k=2"]
    assert bundle.class_names == ("a", "b", "c")
    assert bundle.transform == ToTensor(8)
    out = tmp_path / "scores.csv"
    found = oodk("score", "--bundle", made, "--data", images / "new", "--out", out, "--quiet")
    assert found.exit_code == 0, found.output
    table = rows(out.read_text())
    paths = sorted((images / "new").rglob("*.png"))
    assert len(table) == len(paths) == 6
    x = torch.stack([bundle.transform(Image.open(path)) for path in paths])
    wanted, scores = bundle(x), bundle.score(x)
    for i, (row, path) in enumerate(zip(table, paths, strict=True)):
        assert row["name"].endswith(f"{path.parent.name}/{path.name}")
        assert row["class"] == "abc"[int(row["label"])]
        assert float(row["energy"]) == float(scores["energy"][i])
        assert float(row["knn:k=2"]) == float(scores["knn:k=2"][i])
        assert row["is_ood"] == str(int(wanted.is_ood[i]))
        assert float(row["p_value"]) == float(wanted.p_value[i])
    assert rows(oodk("score", "--bundle", made, "--data", images / "new", "-q").stdout) == table


def test_of_features_and_groups(tmp_path: Path) -> None:
    head = Head(6, GROUPS.width, GROUPS, class_names=list("ABCDEFG"))
    nn.init.normal_(head.linear.weight)
    head.save(tmp_path / "head.safetensors")
    held_out, new = torch.randn(2, 50, 6)
    for name, features in (("held", held_out), ("new", new)):
        save_file({"features": features}, tmp_path / f"{name}.safetensors")
    found = oodk(
        *("bundle", "--head", tmp_path / "head.safetensors", "-d", "mos", "--by", "group"),
        *("--id", tmp_path / "held.safetensors", "--out", tmp_path / "bundle", "-q"),
    )
    assert found.exit_code == 0, found.output
    assert found.stdout == f"{tmp_path / 'bundle'}\n"
    found = oodk(
        "score", "--bundle", tmp_path / "bundle", "--data", tmp_path / "new.safetensors", "-q"
    )
    assert found.exit_code == 0, found.output
    table = rows(found.stdout)
    wanted = Bundle.load(tmp_path / "bundle")(new)
    assert list(table[0]) == ["label", "class", "mos", "is_ood", "p_value", "group"]
    assert [int(row["group"]) for row in table] == wanted.group.tolist()
    assert [float(row["p_value"]) for row in table] == wanted.p_value.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "--bundle", "{b}", "--data", "{i}", "-d", "msp"], "'--detector': is in the bun"),
        (["score", "--bundle", "{b}", "--data", "{i}", "--out", "a.npz"], "must end in .csv with"),
        (["score", "--bundle", "{i}", "--data", "{i}"], "must be a folder with bundle.json"),
        (["score", "--bundle", "{b}", "--data", "{i}/no"], "No such file or directory"),
        (["bundle", "--id", "{i}", "--out", "{o}"], "'--detector': is needed"),
        (
            ["bundle", "--id", "{x}", "--out", "{o}", "-d", "msp", "--by", "group"],
            "'--by': needs groups: --groups",
        ),
    ],
)
def test_refused(
    arguments: list[str], message: str, made: Path, images: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", np.zeros((5, 3), np.float32))
    places = {"b": made, "i": images / "new", "o": tmp_path / "out", "x": tmp_path / "x.npy"}
    found = oodk(*(argument.format(**places) for argument in arguments))
    assert found.exit_code in (1, 2)
    assert message in " ".join(re.sub(r"\x1b\[[0-9;]*m|│", " ", found.output).split())


def test_logits_need_no_model(tmp_path: Path) -> None:
    logits = torch.randn(60, 4).numpy()
    np.save(tmp_path / "id.npy", logits)
    found = oodk(
        "bundle", "--id", tmp_path / "id.npy", "--out", tmp_path / "bundle", "-d", "energy", "-q"
    )
    assert found.exit_code == 0, found.output
    score = Energy().score(logits=torch.from_numpy(logits))
    assert torch.equal(Bundle.load(tmp_path / "bundle")(logits).score, score)


# --- the server -----------------------------------------------------------------------------------


def test_the_server_of_the_documentation(
    made: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("fastapi", "httpx", "python_multipart"):
        pytest.importorskip(package)
    from fastapi.testclient import TestClient

    (code,) = re.findall(r'```python title="serve.py"\n(.*?)```', PAGE.read_text(), re.DOTALL)
    assert len(code.splitlines()) < 38
    monkeypatch.setenv("BUNDLE", str(made))
    scope: dict[str, Any] = {}
    exec(compile(code, "serve.py", "exec", dont_inherit=True), scope)
    client, bundle = TestClient(scope["app"]), scope["bundle"]
    path = next((images / "new").rglob("*.png"))
    given = client.post("/score", files={"image": ("a.png", path.read_bytes())})
    assert given.status_code == 200, given.text
    found = bundle(bundle.transform(Image.open(path))[None])
    assert given.json() == {
        "class": bundle.class_names[int(found.label)],
        "score": float(found.score),
        "is_ood": bool(found.is_ood),
        "p_value": float(found.p_value),
    }
    given = client.post("/score", files={"image": ("a.png", b"not an image")})
    assert given.status_code == 400
    assert "a.png is no image" in given.json()["detail"]
    assert client.post("/score").status_code == 422
    assert "oodk_samples_total 1\n" in client.get("/metrics").text


@pytest.mark.slow
def test_under_load_nothing_is_lost(tmp_path: Path) -> None:
    for package in ("fastapi", "python_multipart", "uvicorn"):
        pytest.importorskip(package)
    script = PAGE.parents[2] / "benchmarks" / "load.py"
    command = [sys.executable, script, "--seconds", "2", "--out", tmp_path / "load.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["sent"] == found["answered"] > 0
    assert (found["lost"], found["wrong"], found["errors"]) == (0, 0, [])


def test_bundles_of_the_same_parts_have_the_same_fingerprints() -> None:
    found = data()
    model = network()
    bundles = []
    for _ in range(2):
        knn = KNN(3, "torch", model=model).fit([(found.train, found.labels)])
        bundles.append(Bundle(model, knn, input_shape=(1, 8, 8)))
        bundles[-1].calibrate(found.held_out)
    assert bundles[0].fingerprints() == bundles[1].fingerprints()
    bundles[1].calibrate(found.held_out[:-1])
    apart = {k for k, v in bundles[0].fingerprints().items() if bundles[1].fingerprints()[k] != v}
    assert apart == {"calibration"}
