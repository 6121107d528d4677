"""Damaged files, a few seconds of them; ``readers.py`` runs for as long as one likes."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
from processes import python

pytest.importorskip("PIL")
pytest.importorskip("pyarrow")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_no_damaged_file_ends_hangs_or_fills_the_process() -> None:
    """Another seed each day, so that all of CI together sees more than one run."""
    seed = int(time.time()) // 86400
    script = str(Path(__file__).with_name("readers.py"))
    run = python(script, "--seed", str(seed), "--seconds", "12", OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
    done = re.search(rf"seed {seed}: (\d+) cases, (\d+) refused, 0 failed", run.stdout)
    assert done is not None
    assert int(done[1]) >= 100
    assert int(done[2]) >= int(done[1]) // 4
