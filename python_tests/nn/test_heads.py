from __future__ import annotations

from pathlib import Path

import pytest
import torch

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


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        Head.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        Head.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="must be the file of a head"):
        Head.load(path)
    save_file({"a": torch.zeros(1)}, path, {"oodkernels.head": '{"version": 2}'})
    with pytest.raises(ValueError, match="version must be 1, got 2"):
        Head.load(path)
    save_file({"a": torch.zeros(1)}, path, {"oodkernels.head": '{"version": 1, "groups": null}'})
    with pytest.raises(ValueError, match=r"linear\.weight"):
        Head.load(path)
