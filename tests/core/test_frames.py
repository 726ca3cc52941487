"""How few calls lie between the public functions and the work."""

import frames
import numpy as np
import pytest

import cupycorr
from cupycorr import Geometry

SHAPE = (1, 32, 10, 12)
# Products by matrix and by shifts, on one thread and on several, with taps and without.
CASES = {
    "small": (SHAPE, Geometry(patch_size=9)),
    "one displacement": (SHAPE, Geometry()),
    "taps": (SHAPE, Geometry(3, 3, padding=1)),
    "threads": ((2, 64, 32, 48), Geometry(patch_size=21, dilation_patch=2)),
}
LIBRARIES = ["numpy", "torch"]


@pytest.fixture
def stacks(monkeypatch):
    """Record the package's functions on the stack whenever NumPy multiplies."""
    recorded = []
    for name in ("matmul", "einsum", "multiply", "abs"):
        function = getattr(np, name)

        def spy(*arguments, function=function, **options):
            recorded.append(frames.stack())
            return function(*arguments, **options)

        monkeypatch.setattr(np, name, spy)
    return recorded


def maps(shape, library):
    arrays = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
    if library == "numpy":
        return list(arrays)
    torch = pytest.importorskip("torch")
    return [torch.from_numpy(array).requires_grad_() for array in arrays]


@pytest.mark.parametrize("similarity", ["product", "l1"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_few_functions_lie_between_a_call_and_its_work(stacks, library, case, similarity):
    shape, geometry = CASES[case]
    fmap1, fmap2 = maps(shape, library)
    cost = cupycorr.correlation(fmap1, fmap2, geometry, similarity=similarity)
    if library == "numpy":
        cupycorr.correlation_vjp(cost, fmap1, fmap2, geometry, similarity=similarity)
    else:
        cost.sum().backward()
    assert stacks
    for names in stacks:
        assert len(names) <= 8, names
        assert len(set(names)) == len(names), names


def test_a_small_call_enters_few_functions():
    fmap1, fmap2 = maps(SHAPE, "numpy")
    call = lambda: cupycorr.spatial_correlation_sample(fmap1, fmap2, patch_size=9)  # noqa: E731
    assert 20 < frames.entered(call) <= 55


def test_a_call_that_goes_around_is_counted():
    def around():
        return cupycorr.correlation(*maps(SHAPE, "numpy"), Geometry(patch_size=9))

    assert frames.entered(lambda: [around(), around()]) > 55
