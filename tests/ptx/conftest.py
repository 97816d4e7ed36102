"""What the tests of Hopper's kernels share."""

from __future__ import annotations

import pytest
import torch
from helpers import ON_GPU

from ptx import build
from pytransformer._parity import unwritten_is_nan

ON_HOPPER = "cuda" in ON_GPU and torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture(params=["detectors-1", "detectors-2", *(["gpu"] if ON_HOPPER else [])])
def hopper(request):
    """The name of a backend."""
    if request.param == "gpu":
        with torch.device("cuda"), unwritten_is_nan():
            yield "cuda"
        return
    if build.unavailable() is not None:
        pytest.skip(build.unavailable())
    from ptx import backend

    with backend.installed("90a", races=True, seed=int(request.param[-1])) as name, unwritten_is_nan():
        yield name
