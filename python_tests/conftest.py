import pytest
import torch

import oodkernels

DEVICES = ["cpu"]
if torch.cuda.is_available() and oodkernels.build_info()["cuda"]:
    DEVICES.append("cuda")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param
