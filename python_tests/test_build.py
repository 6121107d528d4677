"""The build backend: what a build folder keeps when pip's isolated environment is another one."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

BACKEND = Path(__file__).parents[1] / "build_backend.py"

pytestmark = pytest.mark.skipif(not BACKEND.is_file(), reason="not in a source tree")


def backend() -> Any:
    pytest.importorskip("scikit_build_core")
    spec = importlib.util.spec_from_file_location("build_backend", BACKEND)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("own", [True, False])
def test_a_moved_environment_keeps_what_is_compiled(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects stay, what CMake has cached goes; of another source tree nothing stays."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    keep = backend()
    cmake = importlib.import_module("scikit_build_core.cmake")
    folder = tmp_path / "build" / "tag"
    compiled, cache = folder / "CMakeFiles" / "_C.dir" / "mos.o", folder / "CMakeCache.txt"
    compiled.parent.mkdir(parents=True)
    compiled.touch()
    cache.touch()
    source = tmp_path if own else tmp_path / "elsewhere"
    known = {"source_dir": str(source), "build_dir": str(folder), "skbuild_path": "/tmp/gone"}
    (folder / ".skbuild-info.json").write_text(json.dumps(known))
    monkeypatch.chdir(tmp_path)
    keep._keep_objects()
    cmake.CMaker(
        cmake.CMake.default_search(), source_dir=tmp_path, build_dir=folder, build_type="Release"
    )
    assert compiled.is_file() == own
    assert not cache.is_file()
