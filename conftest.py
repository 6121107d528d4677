"""Tests and benchmarks use the installed package where the sources beside them are not built.

``python -m pytest`` puts this folder before all others, and its ``oodkernels`` has no extension.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
if not [*ROOT.glob("oodkernels/_C*.so"), *ROOT.glob("oodkernels/_C*.pyd")]:
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
