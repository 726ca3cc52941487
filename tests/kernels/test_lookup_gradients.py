"""The CUDA kernels of the lookup's gradients, run on the processor by hostcuda.h."""

import host
import lookup_definition
import lookup_grads_host
import numpy as np
import pytest
from host import SM_80
from lookup_cases import CASES
from lookup_grads_host import SCALE, differences, problem

pytestmark = pytest.mark.skipif(host.unavailable() is not None, reason=str(host.unavailable()))

EVERY_CASE = pytest.mark.parametrize("name", CASES)


def compare(name, device, dtype="float32", **how):
    """Describe how the kernels' gradients differ from the definition's, by name."""
    given, indices = problem(name)
    *rest, coords = given
    wanted = lookup_definition.grads(
        *rest, coords.astype(np.float32), CASES[name].lookup, SCALE, **indices
    )
    got = lookup_grads_host.grads(
        device, *given, CASES[name].lookup, SCALE, dtype, **indices, **how
    )
    return differences(got, wanted, dtype)


@EVERY_CASE
def test_plain_kernels_are_exact(name):
    assert not compare(name, SM_80, plain=True)


@EVERY_CASE
def test_kernels_are_exact(name):
    assert not compare(name, SM_80)
