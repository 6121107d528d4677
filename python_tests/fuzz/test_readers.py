"""Damaged files, a few seconds of them; ``readers.py`` runs for as long as one likes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from processes import python

pytest.importorskip("PIL")
pytest.importorskip("pyarrow")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_no_damaged_file_ends_hangs_or_fills_the_process() -> None:
    script = str(Path(__file__).with_name("readers.py"))
    run = python(script, "--seed", "0", "--cases", "4000", OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
    done = re.search(r"seed 0: (\d+) cases, (\d+) refused, 0 failed", run.stdout)
    assert done is not None
    assert int(done[1]) == 4000
    assert int(done[2]) >= int(done[1]) // 4
