"""Files of weights: what the columns mean, wrapped models, files that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from oodkernels import Groups
from oodkernels.nn import load_into, read_weights, save_weights


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))


@pytest.mark.parametrize(
    ("given", "classes"),
    [
        ({}, 5),
        ({"absent": True}, 4),
        ({"groups": Groups([1, 0, 1]), "class_names": list("abc")}, 3),
    ],
)
def test_what_the_columns_mean_comes_back(
    tmp_path: Path, given: dict[str, Any], classes: int
) -> None:
    made = model()
    save_weights(made, tmp_path / "model.pt", 5, **given)
    found = read_weights(tmp_path / "model.pt")
    assert found.columns == 5
    assert found.num_classes == classes
    assert found.absent_column == (4 if "absent" in given else None)
    assert found.groups == given.get("groups")
    assert found.class_names == given.get("class_names")
    fresh = model()
    load_into(fresh, found.state, "here")
    assert torch.equal(fresh[2].weight, made[2].weight)


class Wrapped(nn.Module):
    """As DataParallel and DDP name what they wrap, and torch.compile what is in them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner, self.head = model(), nn.Linear(5, 2)
        if name:
            self.inner = nn.Module()
            setattr(self.inner, name, model())


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_weights_of_a_wrapped_model_load(tmp_path: Path, prefix: str) -> None:
    made = model()
    torch.save(
        {"state_dict": {prefix + k: v for k, v in made.state_dict().items()}}, tmp_path / "x.pt"
    )
    state = read_weights(tmp_path / "x.pt").state
    fresh = model()
    load_into(fresh, state, "here")
    assert torch.equal(fresh[0].weight, made[0].weight)
    parallel = nn.DataParallel(model())  # the other way round too
    load_into(parallel, made.state_dict(), "here")
    assert torch.equal(parallel.module[0].weight, made[0].weight)
    inner = Wrapped("_orig_mod")
    load_into(inner, Wrapped("").state_dict(), "here")


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    other = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"^here: .*Unexpected key.*1\.weight"):
        load_into(other, model().state_dict(), "here")
    path = tmp_path / "x.pt"
    with pytest.raises(FileNotFoundError):
        read_weights(path)
    for content in (b"", b"no weights", b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"^read_weights: .*x\.pt must be a file of weights, got"
        ):
            read_weights(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="must hold a state dict"):
        read_weights(path)
    torch.save({"format": "oodkernels.model", "version": 9}, path)
    with pytest.raises(ValueError, match="version must be 1, got 9"):
        read_weights(path)
