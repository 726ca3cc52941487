"""The oracle of the lookup has oracles: the correlation, adjoints, and differences."""

import definition
import lookup_definition
import numpy as np
import pytest

from cupycorr import Geometry, verify
from cupycorr.lookup import Lookup

LOOKUPS = {
    "RAFT": Lookup(2, 2, order="xy"),
    "stereo": Lookup((0, 2), 2, pool=(1, 2)),
    "dilated": Lookup((1, 2), 2, dilation_patch=(2, 3), pool=3),
}
EDGES = {"index1": np.array([1, 0, 1]), "index2": np.array([2, 2, 0])}


def problem(rng, lookup):
    """Return an upstream gradient, fmap1, levels and coords, which are no integers."""
    fmap1 = rng.integers(-2, 3, (2, 3, 4, 5)).astype(np.float64)
    levels = lookup_definition.pyramid(rng.integers(-2, 3, (3, 3, 9, 11)), lookup)
    coords = rng.integers(-16, 88, (3, 2, 4, 5)) / 8 + 1 / 16
    grad = rng.integers(-2, 3, lookup.cost_shape(fmap1.shape, coords.shape)).astype(np.float64)
    return grad, fmap1, levels, coords


@pytest.mark.parametrize("dilation", [1, 2])
def test_coordinates_of_the_pixel_grid_give_the_correlation(rng, dilation):
    maps = rng.integers(-2, 3, (2, 2, 3, 4, 5)).astype(np.float64)
    y, x = np.mgrid[:4, :5].astype(np.float64)
    coords = np.stack([x, y])[None].repeat(2, 0)
    got = lookup_definition.cost(
        maps[0], [maps[1]], coords, Lookup((1, 2), dilation_patch=dilation), 0.5
    )
    geometry = Geometry(patch_size=(3, 5), dilation_patch=dilation)
    want = definition.correlation(*maps, geometry) / 2
    assert verify.difference(got[:, 0], want) is None


@pytest.mark.parametrize("name", LOOKUPS)
def test_gradients_are_adjoint_to_the_cost(rng, name):
    lookup = LOOKUPS[name]
    grad, fmap1, levels, coords = problem(rng, lookup)
    cost = lookup_definition.cost(fmap1, levels, coords, lookup, 0.25, **EDGES)
    grad1, grads2, _ = lookup_definition.grads(grad, fmap1, levels, coords, lookup, 0.25, **EDGES)
    want = (grad * cost).sum()
    assert np.isclose((grad1 * fmap1).sum(), want)
    assert np.isclose(sum((g * f).sum() for g, f in zip(grads2, levels, strict=True)), want)
    grad2 = lookup_definition.pyramid_vjp(grads2, lookup)
    assert np.isclose((grad2 * levels[0]).sum(), want)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", LOOKUPS)
def test_the_gradient_of_coords_is_a_difference(rng, name, axis):
    lookup, step = LOOKUPS[name], 2.0**-10
    grad, fmap1, levels, coords = problem(rng, lookup)
    *_, slopes = lookup_definition.grads(grad, fmap1, levels, coords, lookup, 1, **EDGES)
    moved = [coords.copy() for _ in range(2)]
    moved[0][:, axis] -= step
    moved[1][:, axis] += step
    costs = [lookup_definition.cost(fmap1, levels, one, lookup, 1, **EDGES) for one in moved]
    want = (grad * (costs[1] - costs[0])).sum((1, 2, 3)) / (2 * step)
    assert np.allclose(slopes[:, axis], want)
