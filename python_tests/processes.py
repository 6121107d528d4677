"""Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python here, beside the tests: at the root it would import the source tree, unbuilt."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=Path(__file__).parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
