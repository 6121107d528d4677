"""A pipe in place of a file is refused: reading it would wait for a writer that never comes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oodkernels import Groups, Threshold
from oodkernels.data.models import read_class_names
from oodkernels.detectors import OODDetector
from oodkernels.nn import Head, read_weights
from oodkernels.training import load_checkpoint

LOADERS: dict[str, Callable[[Path], Any]] = {
    "groups": Groups.load,
    "table": Groups.from_table,
    "image list": Groups.from_image_list,
    "threshold": Threshold.load,
    "head": Head.load,
    "detector": OODDetector.load,
    "weights": read_weights,
    "checkpoint": load_checkpoint,
    "class names": read_class_names,
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs mkfifo")
@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_a_pipe_is_not_waited_for(load: Callable[[Path], Any], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match=r"pipe\.safetensors: (file: )?must be a file, got a pipe"):
        load(pipe)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing.safetensors")
