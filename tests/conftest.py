"""Settings of the test run: reproducible random cases, and no GPU test without a GPU."""

import hypothesis
import numpy as np
import pytest

hypothesis.settings.register_profile(
    "reproducible", derandomize=True, deadline=None, database=None, max_examples=40
)
hypothesis.settings.load_profile("reproducible")


def pytest_collection_modifyitems(items):
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    missing = _what_cuda_lacks() if on_gpu else None
    if missing:
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA device and CuPy: {missing}"))


def _what_cuda_lacks():
    try:
        import cupy

        return None if cupy.cuda.runtime.getDeviceCount() else "no device"
    except Exception as error:  # CuPy raises whatever a missing driver gives it
        return str(error)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
