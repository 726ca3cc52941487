"""Torch tensors for the tests: small integers, whose sums are exact, and their comparison."""

import numpy as np
import pytest

import cupycorr
from cupycorr import Geometry, verify

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

SHAPE = (2, 3, 5, 6)
GEOMETRY = Geometry(kernel_size=2, patch_size=(3, 2), stride=(1, 2), padding=1, dilation_patch=2)
COST_SHAPE = GEOMETRY.cost_shape(SHAPE)
SMALL = (1, 1, 3, 3)
DTYPES = ("float16", "bfloat16", "float32", "float64")


def integers(shape=SHAPE, dtype="float64", seed=0, differentiable=False):
    values = np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float64)
    return torch.from_numpy(values).to(getattr(torch, dtype)).requires_grad_(differentiable)


def pair(shape=SHAPE, dtype="float64", differentiable=False):
    """Return two different maps."""
    return tuple(integers(shape, dtype, seed, differentiable) for seed in range(2))


def cost(fmap1, fmap2):
    return cupycorr.correlation(fmap1, fmap2, GEOMETRY)


def cubes(fmap1, fmap2):
    """Return a number that is cubic in both maps, so that it has many derivatives."""
    return cupycorr.correlation(fmap1, fmap2, Geometry(2, 3, padding=1)).pow(3).sum()


def difference(got, want):
    """Compare tensors of small integers, or tuples of them, to the bit; None if they agree."""
    if isinstance(want, (tuple, list)):
        assert len(got) == len(want)
        return next(filter(None, map(difference, got, want)), None)
    if got.dtype != want.dtype:
        return f"dtype {got.dtype} instead of {want.dtype}"
    return verify.difference(*(t.detach().double().numpy() for t in (got, want)))


class Dispatched(TorchDispatchMode):
    """A mode that changes nothing; under it every call goes through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.append(str(function))
        return function(*args, **(kwargs or {}))
