"""The comparison of ptlflow_networks.py notices what is off; ptlflow is not needed for that."""

import numpy as np
import pytest
from ptlflow_networks import FLOAT64, NUDGE, Results, judge


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
