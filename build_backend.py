"""PEP 517 backend: scikit-build-core, told where the installed torch is.

pip builds in an isolated environment that hides an installed torch. Asking for torch there would
fetch a second one (gigabytes), so torch becomes a build requirement only where there is none.
"""

import importlib.util
import json
import os
import site
import sysconfig
from pathlib import Path

import scikit_build_core.build as _backend
import scikit_build_core.cmake as _cmake
from scikit_build_core.build import *  # noqa: F403

_HEADER = Path("include", "torch", "csrc", "stable", "library.h")
_MINIMUM = (2, 10)


def _torch_directory():
    """Directory of a usable torch package, or None: it is located, never imported."""
    spec = importlib.util.find_spec("torch")
    candidates = list(spec.submodule_search_locations or []) if spec else []
    roots = {sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()}
    candidates += [str(Path(root, "torch")) for root in sorted(roots)]
    for directory in map(Path, candidates):
        if (directory / _HEADER).is_file() and _version(directory) >= _MINIMUM:
            return directory
    return None


def _version(directory):
    scope = {}
    exec((directory / "version.py").read_text(), {"__name__": "torch.version"}, scope)
    major, minor, *_ = scope["__version__"].split(".")
    return int(major), int(minor)


def _requirements(hook, config_settings):
    extra = [] if _torch_directory() else ["torch>=2.10"]
    return hook(config_settings) + extra


def get_requires_for_build_wheel(config_settings=None):  # noqa: D103
    return _requirements(_backend.get_requires_for_build_wheel, config_settings)


def get_requires_for_build_editable(config_settings=None):  # noqa: D103
    return _requirements(_backend.get_requires_for_build_editable, config_settings)


def _keep_objects():
    """Let a build folder keep what is compiled, however often pip's environment moves.

    scikit-build-core empties a folder that was made from another environment, as each of pip's
    isolated ones is. Nothing compiled depends on the environment (cmake/Pybind11.cmake), only what
    CMake has cached does.
    """
    for info in Path("build").glob("*/.skbuild-info.json"):
        known = json.loads(info.read_text() or "{}")
        if known.get("source_dir") == os.fspath(Path.cwd()):
            info.with_name("CMakeCache.txt").unlink(missing_ok=True)
            info.write_text(json.dumps({**known, "skbuild_path": os.fspath(_cmake.DIR)}))


def _build(hook, *args):
    directory = _torch_directory()
    if directory:
        os.environ.setdefault("OODK_TORCH_DIR", str(directory))
    _keep_objects()
    return hook(*args)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):  # noqa: D103
    return _build(_backend.build_wheel, wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):  # noqa: D103
    return _build(_backend.build_editable, wheel_directory, config_settings, metadata_directory)
