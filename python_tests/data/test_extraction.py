from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("safetensors")
pytest.importorskip("typer")

from PIL import Image
from typer.testing import CliRunner, Result

from oodk.app import app
from oodkernels.data.extract import (
    ImageFiles,
    Plan,
    RandomCrop,
    Shards,
    ToTensor,
    augmented,
    extract_images,
    load_model,
    open_images,
)
from oodkernels.data.samples import open_samples

MODULE = """
import time
from pathlib import Path
import torch
from torch import nn
from oodkernels.data.extract import ToTensor

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3 * 8 * 8, 6)
        self.fc = nn.Linear(6, 4)
    def forward(self, x):
        return self.fc(self.body(x.flatten(1)).relu())

class Slow(Net):
    def forward(self, x):
        time.sleep(0.2)
        return super().forward(x)

def make():
    return Net(), ToTensor(8)

def make_slow():
    return Slow(), ToTensor(8)

def make_convs():
    return nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()), ToTensor(8)

nothing = 3

def make_nothing():
    return nothing
"""


def oodk(*args: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(arg) for arg in args])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of three classes, and a module with models, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_models.py").write_text(MODULE)
    rng = np.random.default_rng(0)
    for label, name in enumerate(("b", "a", "c")):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(7 + label):
            pixels = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return tmp_path


def expected(images: ImageFiles) -> dict[str, torch.Tensor]:
    """Straight from the model, one image at a time."""
    model, _ = load_model("my_models:make")
    x = torch.stack([images[i].image for i in range(len(images))])
    features = model.body(x.flatten(1)).relu()
    return {"features": features.detach(), "logits": model.fc(features).detach()}


@pytest.mark.parametrize("file_format", ["safetensors", "npy"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_image_folder(here: Path, file_format: str, dtype: str) -> None:
    given = ("--model", "my_models:make", "--data", "images", "--out", "run")
    given = (*given, "--format", file_format, "--dtype", dtype)
    found = oodk("extract", *given, "--batch-size", 4, "--part-size", 9)
    assert found.exit_code == 0, found.output
    written = found.stdout.split()
    assert all(Path(path).exists() for path in written)
    names = {path.name for path in (here / "run").iterdir()}
    data = {"safetensors": {"samples.safetensors"}}.get(
        file_format, {"features.npy", "labels.npy", "logits.npy"}
    )
    assert names == data | {"samples.txt", "classes.txt", "config.toml", "extract.json"}
    samples = open_samples("run")
    images = open_images("images", ToTensor(8))
    assert isinstance(images, ImageFiles)
    for role, values in expected(images).items():
        read = samples.read(role)
        assert read.dtype == getattr(torch, dtype)
        tolerance = 1e-6 if dtype == "float32" else 2e-3
        torch.testing.assert_close(read.float(), values, atol=tolerance, rtol=tolerance)
    assert samples.read("labels").tolist() == [0] * 8 + [1] * 7 + [2] * 9
    assert (here / "run/classes.txt").read_text().split() == ["a", "b", "c"]
    assert (here / "run/samples.txt").read_text().splitlines() == [str(p) for p in images.paths]


def test_bfloat16_and_a_layer(here: Path) -> None:
    given = ("--model", "my_models:make", "--data", "images", "--layer", "body")
    assert oodk("extract", *given, "--out", "run", "--dtype", "bfloat16").exit_code == 0
    features = open_samples("run").read("features")
    assert features.dtype == torch.bfloat16
    assert (features < 0).any()  # before the ReLU
    found = oodk("extract", *given, "--out", "x", "--dtype", "bfloat16", "--format", "npy")
    assert found.exit_code == 2


def test_file_lists(here: Path) -> None:
    (here / "list.txt").write_text("images/a/00.png 5\n\nimages/c/01.png 0\n")
    (here / "unlabelled.txt").write_text("a/00.png\nc/01.png\n")
    images = open_images("list.txt", ToTensor(8))
    assert isinstance(images, ImageFiles)
    assert images.labels == [5, 0]
    given = ("extract", "--model", "my_models:make", "--dtype", "float32")
    assert oodk(*given, "--data", "list.txt", "--out", "one").exit_code == 0
    found = oodk(*given, "--data", "unlabelled.txt", "--root", "images", "--out", "two")
    assert found.exit_code == 0, found.output
    one, two = open_samples("one"), open_samples("two")
    assert torch.equal(one.read("logits"), two.read("logits"))
    assert one.read("labels").tolist() == [5, 0]
    assert "labels" not in two.arrays


def test_shards(here: Path) -> None:
    pytest.importorskip("webdataset")
    images = open_images("images", ToTensor(8))
    assert isinstance(images, ImageFiles)
    for shard, rows in enumerate((range(0, 14), range(14, 24))):
        with tarfile.open(f"s-{shard:03d}.tar", "w") as tar:
            for i in rows:
                content = {"png": images.paths[i].read_bytes(), "cls": str(images.labels[i])}
                for suffix, data in content.items():
                    info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                    raw = data.encode() if isinstance(data, str) else data
                    info.size = len(raw)
                    tar.addfile(info, io.BytesIO(raw))
    given = ("--model", "my_models:make", "--data", "s-{000..001}.tar", "--dtype", "float32")
    found = oodk("extract", *given, "--out", "run", "--part-size", 5)
    assert found.exit_code == 0, found.output
    samples = open_samples("run")
    torch.testing.assert_close(samples.read("logits"), expected(images)["logits"])
    assert samples.read("labels").tolist() == images.labels
    later = open_images("s-{000..001}.tar", ToTensor(8))
    assert isinstance(later, Shards)
    later.start = 20
    assert [sample.name for sample in later] == ["00020", "00021", "00022", "00023"]


def test_killed_and_started_again(here: Path) -> None:
    command = [sys.executable, "-m", "oodkernels", "extract", "--model", "my_models:make_slow"]
    command += ["--data", "images", "--out", "run", "--batch-size", "2", "--part-size", "4"]
    command += ["--dtype", "float32", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    process = subprocess.Popen(command, cwd=here, env=environment)
    parts = here / "run" / ".parts"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("part-*.safetensors"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert {path.name for path in (here / "run").iterdir()} == {".parts", "config.toml"}
    done = {path: path.stat().st_mtime_ns for path in parts.glob("part-*.safetensors")}
    assert 2 <= len(done) < 6

    calls: list[int] = []
    model, transform = load_model("my_models:make_slow")
    images = open_images("images", transform)
    assert isinstance(images, ImageFiles)
    model.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    plan = Plan(
        **{k: v for k, v in json.loads((parts / "plan.json").read_text()).items() if k != "format"}
    )
    extract_images(model, images, "run", plan, batch_size=2, part_size=4)
    assert sum(calls) == 24 - 4 * len(done)
    torch.testing.assert_close(open_samples("run").read("logits"), expected(images)["logits"])
    assert not parts.exists()
    found = oodk(*command[3:])  # done: nothing is computed again
    assert found.exit_code == 0
    assert str(Path("run/samples.safetensors")) in found.stdout


def test_another_extraction_does_not_mix_with_one_that_is_there(here: Path) -> None:
    given = ("extract", "--model", "my_models:make", "--out", "run")
    assert oodk(*given, "--data", "images").exit_code == 0
    before = (here / "run/samples.safetensors").read_bytes()
    found = oodk(*given, "--data", "images", "--dtype", "float32")
    assert found.exit_code == 1
    assert "holds an extraction under other settings" in found.stderr
    assert (here / "run/samples.safetensors").read_bytes() == before


def test_an_unreadable_image_is_named_and_what_is_done_is_kept(here: Path) -> None:
    bad = here / "images" / "c" / "05.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:60])
    given = ("extract", "--model", "my_models:make", "--data", "images", "--out", "run")
    given = (*given, "--batch-size", "2", "--part-size", "4")
    found = oodk(*given)
    assert found.exit_code == 1
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("oodk extract: ")]
    assert "cannot read the image images/c/05.png" in line
    assert not (here / "run/samples.safetensors").exists()
    assert len(list((here / "run/.parts").glob("*.safetensors"))) == 5
    bad.write_bytes(good)
    assert oodk(*given).exit_code == 0
    assert open_samples("run").num_samples == 24


def test_a_full_disk_leaves_nothing_half_written(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("extract", "--model", "my_models:make", "--data", "images", "--out", "run")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("oodkernels.data.extract._write_safetensors", full)
        found = oodk(*given)
    assert found.exit_code == 1
    assert found.stderr.splitlines()[-1] == "oodk extract: No space left on device"
    assert {path.name for path in (here / "run").iterdir()} == {
        ".parts",
        "classes.txt",
        "config.toml",
        "samples.txt",
    }
    assert oodk(*given).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "my_models:nobody"), "my_models has no callable 'nobody'"),
        (("--model", "nowhere.at_all:make"), "there is no module 'nowhere.at_all'"),
        (("--model", "my_models:make_nothing"), "must give an nn.Module, got int"),
        (("--model", "my_models:make_convs"), "has no linear layer"),
        (
            ("--model", "my_models:make", "--layer", "boddy"),
            "no layer 'boddy'; near it are ['body'",
        ),
        (("--model", "my_models:make", "--data", "empty"), "must hold images"),
        (("--model", "my_models:make", "--data", "none.txt"), "none.txt: No such file"),
        (("--model", "my_models:make", "--weights", "w.pt"), "w.pt does not fit the model"),
    ],
)
def test_user_errors(here: Path, arguments: tuple[str, ...], message: str) -> None:
    (here / "empty").mkdir()
    torch.save({"x": torch.zeros(1)}, "w.pt")
    found = oodk("extract", "--data", "images", "--out", "run", *arguments)
    assert found.exit_code == 1, found.output
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("oodk extract: ")]
    assert message in line


def test_models_by_name_need_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"needs timm.*pip install 'oodkernels\[vision\]'"):
        load_model("resnet50")


def test_weights(here: Path) -> None:
    model, _ = load_model("my_models:make")
    torch.nn.init.ones_(model.fc.bias)
    torch.save({"state_dict": model.state_dict()}, "w.pt")
    loaded, _ = load_model("my_models:make", "w.pt")
    assert torch.equal(loaded.fc.bias, torch.ones(4))


def test_to_tensor_is_resize_crop_normalise() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 60), dtype=np.uint8), "L")
    found = ToTensor(size=14, mean=(0.5,) * 3, std=(0.25,) * 3)(image)
    resized = image.convert("RGB").resize((24, 16), Image.Resampling.BICUBIC)
    centre = np.asarray(resized, np.float64)[1:15, 5:19] / 255
    np.testing.assert_allclose(found.numpy(), (centre.transpose(2, 0, 1) - 0.5) / 0.25, atol=1e-5)
    assert ToTensor(size=32)(Image.new("L", (5, 3))).shape == (3, 32, 32)


def test_random_crops_are_parts_of_the_image_and_torchs_random_numbers() -> None:
    grey = np.linspace(0, 255, 40 * 60).reshape(40, 60).astype(np.uint8)
    image = Image.fromarray(grey, "L")
    crop = RandomCrop(8, mean=(0.0,) * 3, std=(1.0,) * 3)
    torch.manual_seed(0)
    found = torch.stack([crop(image) for _ in range(200)])
    assert found.shape == (200, 3, 8, 8)
    assert found.min() >= 0
    assert found.max() <= 1
    rows = found[:, 0].mean(2)
    assert (rows.diff(dim=1) > 0).all()  # never upside down
    mirrored = found[:, 0, 0, -1] < found[:, 0, 0, 0]
    assert 60 < mirrored.sum() < 140
    height = rows[:, -1] - rows[:, 0]
    assert height.max() / height.min() > 2
    torch.manual_seed(0)
    assert torch.equal(found[0], crop(image))
    whole = RandomCrop(8, mean=(0.0,) * 3, std=(1.0,) * 3, scale=(1, 1), ratio=(1.5, 1.5))(image)
    exact = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC), np.float32) / 255
    either = [exact, exact[:, ::-1]]
    assert any(np.allclose(whole[0], x, atol=1e-6) for x in either)


def test_what_is_augmented() -> None:
    model = torch.nn.Linear(1, 1)
    assert augmented(model, ToTensor(9, std=(1, 1, 1))) == RandomCrop(9, std=(1, 1, 1))
    with pytest.raises(ValueError, match="has a transform of its own"):
        augmented(model, lambda image: torch.zeros(1))
