"""Planning takes little beside the work, however wide the maps and the patch are."""

import sys

import pytest

from cupycorr import Geometry
from cupycorr.cpu.plan import CHUNK_BYTES, plan

WIDE = {
    "wide maps": ((64, 4, 60_000), Geometry(patch_size=(1, 65))),
    "many channels": ((256, 16, 8192), Geometry(patch_size=(1, 65))),
    "a wide patch": ((64, 4, 60_000), Geometry(patch_size=(1, 2001))),
    "high maps": ((8, 60_000, 4), Geometry(patch_size=(65, 1))),
    "few channels": ((2, 4, 60_000), Geometry(patch_size=(1, 3))),
    "taps and a stride": ((64, 4, 60_000), Geometry(3, (1, 65), stride=2, padding=1)),
    "phases": ((64, 4, 60_000), Geometry(patch_size=(1, 65), dilation_patch=(1, 7))),
    "far displacements": (
        (64, 4, 60_000),
        Geometry(patch_size=(1, 65), first_displacement=(0, -50_000)),
    ),
}


def calls_of(function):
    """Count the calls of functions, of Python's and of C's, that a call makes."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("adjoint", [False, True])
def test_planning_takes_few_steps(name, adjoint):
    shape, geometry = WIDE[name]
    # A step takes a tenth of a microsecond or more, in which a core does 5000 multiply-adds.
    most = 40_000 + geometry.multiply_adds((1, *shape)) // 50_000
    assert calls_of(lambda: plan.__wrapped__(shape, geometry, 4, adjoint)) <= most


def test_a_patch_is_not_cut_into_parts_that_pack_more_than_they_multiply():
    channels, rows, columns = 64, 4, 60_000
    packed_row = channels * columns * 4
    assert packed_row < CHUNK_BYTES
    parts = plan((channels, rows, columns), Geometry(patch_size=(1, 65)), 4, False).parts
    assert len(parts) <= rows
