from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from oodkernels.data import OnRGB, load_model, model_classes, read_class_names
from oodkernels.nn import save_weights

pytest.importorskip("PIL")


class Classifier(nn.Module):
    """As models of timm are: with a configuration, and a classifier that can be exchanged."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.pretrained_cfg = {"classifier": "fc", "num_classes": 1000}
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(2, num_classes)


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What :func:`load_model` asks of timm, which needs torchvision."""
    made: Any = ModuleType("timm")
    made.data = ModuleType("timm.data")
    made.is_model = lambda name: name == "resnet10t"
    made.create_model = lambda name, pretrained, num_classes=1000: Classifier(num_classes)
    made.data.resolve_model_data_config = lambda model: {"input_size": (3, 8, 8)}
    made.data.create_transform = lambda input_size, is_training: str
    made.data.infer_imagenet_subset = lambda model: "imagenet-1k"

    class ImageNetInfo:
        def __init__(self, subset: str) -> None:
            assert subset == "imagenet-1k"

        def label_names(self) -> list[str]:
            return [f"n{i:08d}" for i in range(1000)]

    made.data.ImageNetInfo = ImageNetInfo
    monkeypatch.setitem(sys.modules, "timm", made)
    monkeypatch.setitem(sys.modules, "timm.data", made.data)
    return made


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("columns", [3, 1000])
def test_a_model_gets_the_columns_of_its_weights(
    tmp_path: Path, timm: ModuleType, columns: int, prefix: str
) -> None:
    """Of our own file, and of a state dict that says nothing."""
    trained = Classifier(columns)
    save_weights(trained, tmp_path / "ours.pt", columns)
    state = {prefix + name: value for name, value in trained.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "plain.pt")
    for name in ("ours.pt", "plain.pt"):
        model, transform = load_model("resnet10t", tmp_path / name)
        assert torch.equal(model.fc.weight, trained.fc.weight)
        assert not model.training
        assert isinstance(transform, OnRGB)


def test_whose_classes_are_known(tmp_path: Path, timm: ModuleType) -> None:
    model, _ = load_model("resnet10t")
    found = model_classes(model)
    assert found is not None
    assert found[:2] == ("n00000000", "n00000001")
    model, _ = load_model("resnet10t", columns=3)  # its classifier has learnt nothing yet
    assert model_classes(model) is None
    save_weights(model, tmp_path / "w.pt", 3, class_names=["a", "b", "c"])
    assert model_classes(model, tmp_path / "w.pt") == ("a", "b", "c")
    save_weights(model, tmp_path / "w.pt", 3)
    assert model_classes(model, tmp_path / "w.pt") is None
    own = nn.Linear(1, 2)
    assert model_classes(own) is None
    own.class_names = ["x", "y"]
    assert model_classes(own) == ("x", "y")


def test_names_of_classes(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("b\n\na\n", encoding="utf-8-sig")
    assert read_class_names(tmp_path / "names.txt") == ("b", "a")
    for name in ("b", "a", ".hidden"):
        (tmp_path / "train" / name).mkdir(parents=True)
    assert read_class_names(tmp_path / "train") == ("a", "b")
    (tmp_path / "names.txt").write_text("b\nb\n")
    with pytest.raises(ValueError, match="a class twice"):
        read_class_names(tmp_path / "names.txt")


def test_a_model_that_timm_does_not_have(timm: ModuleType) -> None:
    with pytest.raises(ValueError, match="timm has no model 'resnet11t'"):
        load_model("resnet11t")


@pytest.mark.parametrize("content", [b"", b"PK\3\4broken", b"\x80\x04cos\nsystem\n(S'id'\ntR."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_that_are_none_are_one_line(
    tmp_path: Path, timm: ModuleType, content: bytes, suffix: str
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"w\{suffix}") as raised:
        load_model("resnet10t", path)
    assert "\n" not in str(raised.value)


def test_models_by_name_need_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"needs timm.*pip install 'oodkernels\[vision\]'"):
        load_model("resnet50")
