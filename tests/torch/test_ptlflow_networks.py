"""The comparison of ptlflow_networks.py notices what is off; ptlflow is not needed for that."""

import numpy as np
import pytest
from ptlflow_networks import FLOAT64, NUDGE, Results, Worker, judge

from cupycorr.cpu import lookup as numpy_lookup

torch = pytest.importorskip("torch")

from cupycorr.compat import ptlflow  # noqa: E402


@pytest.fixture
def want(rng):
    return Results(*rng.standard_normal((2, 1000)))


def off(results, flow=0.0, gradients=0.0):
    """Return results that are off by so much of their length."""
    return Results(results.flow * (1 + flow), results.gradients * (1 + gradients))


def nudged(want, leap=NUDGE):
    """Return the flow for images that differ a little."""
    return want.flow * (1 + leap)


@pytest.fixture
def plain(want):
    return [off(want, 1e-6, 1e-6), want]


def test_equal_errors_are_accepted(plain, want):
    shown, wrong = judge(plain, [off(want, -1e-6, 1e-2), off(want, FLOAT64 * 1e-6)], nudged(want))
    assert np.allclose(shown, [1e-6, 1e-6, 1e-6, 1e-2])
    assert not wrong


@pytest.mark.parametrize(
    ("errors32", "errors64", "found"),
    [
        ({"flow": 1e-5}, {}, "flow in float32"),
        ({"flow": np.nan}, {}, "flow in float32"),
        ({}, {"flow": 1e-9}, "flow in float64"),
        ({}, {"gradients": 1e-9}, "gradients in float64"),
    ],
)
def test_what_is_off_is_noticed(plain, want, errors32, errors64, found):
    _, (wrong,) = judge(plain, [off(want, **errors32), off(want, **errors64)], nudged(want))
    assert wrong.startswith(found)


def test_a_network_that_leaps_is_not_judged(plain, want):
    _, wrong = judge(plain, [off(want, 1.0), off(want, 1.0)], nudged(want, leap=1e-6))
    assert not wrong


class Network(torch.nn.Module):
    """Two lookups, of images in the place of maps."""

    def forward(self, inputs):
        one, two = inputs["images"].unbind(1)
        rows, columns = torch.meshgrid(*map(torch.arange, one.shape[2:]), indexing="ij")
        coords = torch.stack([columns + 1.3 - rows / 9, rows - 2.6 + columns / 7])[None]
        block = ptlflow.get_corr_block(one, two, num_levels=2, radius=3)
        return {"flows": block(coords) + block(coords + 0.4)}


@pytest.fixture
def worker():
    """Return a worker that has such a network, without ptlflow."""
    worker = object.__new__(Worker)
    worker.torch, worker.net = torch, Network()
    worker.images = torch.randn(1, 2, 5, 12, 17, generator=torch.Generator().manual_seed(0))
    return worker


def test_every_lookup_of_a_network_is_held_to_float64(worker):
    assert worker.volumes() == [None, None]


def test_a_lookup_that_is_off_is_noticed(worker, monkeypatch):
    right = numpy_lookup.run

    def run(what, arrays, lookup, scale, **options):
        right(what, arrays, lookup, scale, **options)
        if arrays["cost"].dtype == np.float32:
            arrays["cost"][0, 1, 2, 3, 4, 5] *= 1 + 1e-3

    monkeypatch.setattr(numpy_lookup, "run", run)
    found = worker.volumes()
    assert len(found) == 2
    assert all(what.startswith("level 1: 1 of ") for what in found)
