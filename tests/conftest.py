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
    if on_gpu and not _cuda_is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _cuda_is_available():
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


@pytest.fixture
def rng():
    return np.random.default_rng(0)
