"""The example of docs/scale.md under Ray itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from oodkernels import ood_metrics
from oodkernels.detectors import Energy

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
pytest.importorskip("torchmetrics")

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def test_ray_data_counts_what_one_process_counts() -> None:
    code = PAGE.read_text().partition("## Ray")[2]
    example = re.search(r"^```python\n(.*?)^```", code, re.DOTALL | re.MULTILINE)
    assert example is not None
    scope: dict[str, Any] = {}
    exec("import torch\nimport oodkernels as oodk\n" + example[1], scope)
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(600, 10, generator=generator) * scale for scale in (3, 1)]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        states = []
        for each, name in zip(logits, (None, "far"), strict=True):
            rows = ray.data.from_items([{"logits": row.numpy()} for row in each])
            done = rows.map_batches(
                scope["Count"], fn_constructor_args=(name,), batch_size=100, concurrency=1
            )
            states += [row["state"] for row in done.iter_rows()]
    finally:
        ray.shutdown()
    assert len(states) >= 12
    found = scope["merge"](states).compute()["far"]
    exact = ood_metrics(*(Energy().score(logits=each) for each in logits))
    assert found["n_id"] == found["n_ood"] == 600
    assert found["auroc_lower"] <= exact.auroc <= found["auroc_upper"]
