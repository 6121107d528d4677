import os

# Thousands of tiny calls cost several times less without waking other threads for each. Tests of
# threads set their number themselves; processes that tests start inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import oodkernels

DEVICES = ["cpu"]
if torch.cuda.is_available() and oodkernels.build_info()["cuda"]:
    DEVICES.append("cuda")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param
