from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")

from safetensors.torch import save_file

from oodkernels import Groups
from oodkernels.nn.heads import Head

GROUPS = Groups([1, 0, 1], ["x", "y"])


def made(groups: Groups | None, confidence: bool) -> Head:
    head = Head(4, 5, groups, confidence)
    generator = torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return head


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("confidence", [False, True])
def test_a_head_comes_back_and_reads_half_precision(
    tmp_path: Path, groups: Groups | None, confidence: bool
) -> None:
    head, path = made(groups, confidence), tmp_path / "head.safetensors"
    head.save(path)
    first = path.read_bytes()
    head.save(path)
    assert path.read_bytes() == first
    loaded = Head.load(path)
    assert loaded.groups == groups
    assert not loaded.training
    x = torch.randn(3, 4, dtype=torch.float16)
    found = loaded(x)
    logits = found[0] if confidence else found
    expected = x.float() @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(logits, expected)
    if confidence:
        assert head.confidence is not None
        expected = x.float() @ head.confidence.weight.T + head.confidence.bias
        torch.testing.assert_close(found[1], expected)


def test_a_new_head_gives_zeros() -> None:
    logits, confidence = Head(4, 5, GROUPS, confidence=True)(torch.ones(2, 4))
    assert not logits.any()
    assert not confidence.any()
    with pytest.raises(ValueError, match=r"C \+ K = 5 of the groups, got 3"):
        Head(4, 3, GROUPS)


def test_what_the_columns_mean_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    Head(4, np.int64(3), absent=True, class_names=["a", "b"]).save(path)  # type: ignore[arg-type]
    head = Head.load(path)
    assert (head.absent_column, head.num_classes, head.class_names) == (2, 2, ["a", "b"])
    Head(4, 5, GROUPS).save(path)
    head = Head.load(path)
    assert (head.absent_column, head.num_classes, head.class_names) == (None, 3, None)
    with pytest.raises(ValueError, match="groups have no absent class"):
        Head(4, 5, GROUPS, absent=True)
    with pytest.raises(ValueError, match="class_names must be 2, one a class, got 3"):
        Head(4, 3, absent=True, class_names=["a", "b", "c"])


def test_hidden_layers_and_scales_are_in_the_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50_000, 4, generator=generator) * torch.tensor([1e-3, 1.0, 50.0, 0.0]) + 7
    head = Head(4, 3, hidden=[6, np.int64(5)], confidence=True)  # type: ignore[list-item]
    assert not head(x)[0].any()
    nn.init.normal_(head.linear.weight, generator=generator)
    head.standardize(x)
    seen: list[torch.Tensor] = []
    head.hidden[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = head(x)
    assert seen[0].mean(0).abs().max() < 1e-2
    torch.testing.assert_close(
        seen[0].std(0), torch.tensor([1.0, 1.0, 1.0, 0.0]), rtol=1e-2, atol=1e-3
    )
    head.save(tmp_path / "head.safetensors")
    loaded = Head.load(tmp_path / "head.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(loaded(x), found, strict=True))
    with pytest.raises(ValueError, match=r"features must be \(N, 4\), N at least 1, got \(0, 4\)"):
        head.standardize(x[:0])
    x[3, 1] = float("nan")
    with pytest.raises(ValueError, match="features must be finite"):
        head.standardize(x)


@pytest.mark.parametrize("width", [1, 3, 5])
def test_features_of_another_width_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match=rf"features must be \(N, 4\), got \(2, {width}\)"):
        Head(4, 3)(torch.ones(2, width))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        Head.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        Head.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"format must be 'oodkernels.head', got 'None'"):
        Head.load(path)
    head = {"format": "oodkernels.head", "version": 2, "groups": None}
    save_file({"a": torch.zeros(1)}, path, {"oodkernels": json.dumps(head)})
    with pytest.raises(ValueError, match="version must be 1, got 2"):
        Head.load(path)
    save_file({"a": torch.zeros(1)}, path, {"oodkernels": json.dumps({**head, "version": 1})})
    with pytest.raises(ValueError, match=r"linear\.weight"):
        Head.load(path)
