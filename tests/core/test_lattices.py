"""The lattices of an axis against brute force over the raw fields."""

from collections import Counter
from itertools import product

import pytest
from cases import GEOMETRIES
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases

from cupycorr import Geometry
from cupycorr.lattice import Band, lattices


def axes(case):
    """Return (axis, size) of both axes of a case."""
    shape, geometry = case
    return (geometry.y, shape[2]), (geometry.x, shape[3])


def raw_terms(axis, size):
    """Return (output, tap, displacement, position 1, position 2) of every term of an axis."""
    outputs = (size + 2 * axis.padding - axis.dilation * (axis.kernel_size - 1) - 1) // axis.stride
    terms = []
    for o, i, p in product(range(outputs + 1), range(axis.kernel_size), range(axis.patch_size)):
        position1 = o * axis.stride - axis.padding + i * axis.dilation
        position2 = position1 + axis.first_displacement + p * axis.dilation_patch
        if 0 <= position1 < size and 0 <= position2 < size:
            terms.append((o, i, p, position1, position2))
    return terms


def all_outputs(axis, size):
    return lattices(axis, size, 0, axis.output_size(size))


def met_by_phases(lattice, axis, size):
    """Return (lattice index, displacement, position 1, position 2) of all pairs of the phases."""
    met = []
    for phase in lattice.phases:
        indices = range(lattice.size)[phase.lattice]
        displacements = range(axis.patch_size)[phase.patch]
        positions1, positions2 = range(size)[phase.image1], range(size)[phase.image2]
        for m, p in product(range(len(indices)), range(len(displacements))):
            if 0 <= m + p + phase.band.shift < len(positions2):
                there = positions2[m + p + phase.band.shift]
                met.append((indices[m], displacements[p], positions1[m], there))
    return met


@given(cases())
def test_taps_of_the_lattices_gather_every_term_exactly_once(case):
    for axis, size in axes(case):
        gathered = Counter()
        for lattice in all_outputs(axis, size):
            met = met_by_phases(lattice, axis, size)
            for tap in lattice.taps:
                output_at = {index: o for o, index in enumerate(range(lattice.size)[tap])}
                gathered.update((output_at[i], *rest) for i, *rest in met if i in output_at)
        terms = Counter((o, p, y1, y2) for o, _, p, y1, y2 in raw_terms(axis, size))
        assert gathered == terms


@given(cases())
def test_phases_meet_no_pair_twice(case):
    for axis, size in axes(case):
        for lattice in all_outputs(axis, size):
            met = met_by_phases(lattice, axis, size)
            assert len({(index, p) for index, p, _, _ in met}) == len(met)


@given(cases())
def test_phases_meet_every_pair_of_their_lattice_that_exists(case):
    """The lattice's positions are recovered from one tap, then everything is counted anew."""
    for axis, size in axes(case):
        for number, lattice in enumerate(all_outputs(axis, size)):
            separate = len(lattice.taps) < axis.kernel_size
            origin = (number * axis.dilation if separate else 0) - axis.padding
            step = axis.stride // lattice.taps[0].step
            literal = set()
            for index, p in product(range(lattice.size), range(axis.patch_size)):
                here = origin + index * step
                there = here + axis.first_displacement + p * axis.dilation_patch
                if 0 <= here < size and 0 <= there < size:
                    literal.add((index, p, here, there))
            assert set(met_by_phases(lattice, axis, size)) == literal


@given(cases())
def test_slices_of_a_phase_are_as_long_as_its_band_says(case):
    for axis, size in axes(case):
        for lattice in all_outputs(axis, size):
            for phase in lattice.phases:
                assert (
                    len(range(size)[phase.image1]),
                    len(range(size)[phase.image2]),
                    len(range(axis.patch_size)[phase.patch]),
                    len(range(lattice.size)[phase.lattice]),
                ) == (*phase.band[:3], phase.band.count1)


@given(cases())
def test_every_displacement_and_position_of_a_phase_meets_something(case):
    for axis, size in axes(case):
        for lattice in all_outputs(axis, size):
            for phase in lattice.phases:
                count1, count2, patch, shift = phase.band
                met = [(m, p) for m, p in product(range(count1), range(patch))
                       if 0 <= m + p + shift < count2]  # fmt: skip
                assert {p for _, p in met} == set(range(patch))


@given(cases())
def test_taps_have_one_lattice_index_per_output(case):
    for axis, size in axes(case):
        lattices = all_outputs(axis, size)
        taps = [range(lattice.size)[tap] for lattice in lattices for tap in lattice.taps]
        assert [len(tap) for tap in taps] == [axis.output_size(size)] * axis.kernel_size


@given(cases())
def test_untouched_names_the_lattice_indices_of_no_tap(case):
    for axis, size in axes(case):
        for lattice in all_outputs(axis, size):
            touched = {i for tap in lattice.taps for i in range(lattice.size)[tap]}
            assert set(lattice.untouched) == set(range(lattice.size)) - touched


@given(cases(), st.data())
def test_lattices_of_some_outputs_hold_the_terms_of_those_outputs(case, data):
    for axis, size in axes(case):
        outputs = axis.output_size(size)
        start = data.draw(st.integers(0, outputs - 1))
        stop = data.draw(st.integers(start + 1, outputs))
        gathered = Counter()
        for lattice in lattices(axis, size, start, stop):
            met = met_by_phases(lattice, axis, size)
            for tap in lattice.taps:
                output_at = {i: start + o for o, i in enumerate(range(lattice.size)[tap])}
                gathered.update((output_at[i], *rest) for i, *rest in met if i in output_at)
        terms = raw_terms(axis, size)
        assert gathered == Counter((o, *rest) for o, _, *rest in terms if start <= o < stop)


@given(cases(), st.data())
def test_patch_part_keeps_the_terms_of_its_displacements(case, data):
    for axis, size in axes(case):
        start = data.draw(st.integers(0, axis.patch_size - 1))
        stop = data.draw(st.integers(start + 1, axis.patch_size))
        part = raw_terms(axis.patch_part(slice(start, stop)), size)
        shifted = [(o, i, p + start, *rest) for o, i, p, *rest in part]
        assert shifted == [t for t in raw_terms(axis, size) if start <= t[2] < stop]


def test_windows_far_apart_have_a_lattice_per_tap():
    (axis, size), _ = axes(GEOMETRIES["stride above window"])
    assert [lattice.size for lattice in all_outputs(axis, size)] == [axis.output_size(size)] * 2


@given(cases())
def test_lattices_are_not_larger_than_all_windows_together(case):
    for axis, size in axes(case):
        positions = sum(lattice.size for lattice in all_outputs(axis, size))
        assert positions <= axis.output_size(size) * axis.kernel_size


@pytest.mark.parametrize("name", GEOMETRIES)
def test_multiply_adds_counts_the_different_pairs(name):
    shape, geometry = GEOMETRIES[name]
    pairs = [
        len({(p, y1, y2) for _, _, p, y1, y2 in raw_terms(axis, size)})
        for axis, size in axes((shape, geometry))
    ]
    assert geometry.multiply_adds(shape) == shape[0] * shape[1] * pairs[0] * pairs[1]


@given(cases())
def test_pairs_of_an_axis_counts_the_different_pairs(case):
    for axis, size in axes(case):
        assert axis.pairs(size) == len({t[2:] for t in raw_terms(axis, size)})


def test_flownetc_needs_907_million_multiply_adds():
    geometry = Geometry(patch_size=21, dilation_patch=2)
    assert round(geometry.multiply_adds((4, 256, 48, 64)) / 1e6) == 907


def test_displacements_as_far_apart_as_can_be_meet_nothing():
    geometry = Geometry(3, 4, dilation_patch=2**31 - 1, padding=1)
    pairs = raw_terms(geometry.y, 9)
    assert {p for _, _, p, _, _ in pairs} == {1}
    met = [met_by_phases(lattice, geometry.y, 9) for lattice in all_outputs(geometry.y, 9)]
    assert {p for pairs in met for _, p, _, _ in pairs} == {1}


@pytest.mark.parametrize("first", [2**40, -(2**40), 2**61])
def test_patch_far_outside_has_no_phases(first):
    axis = Geometry(3, 5, padding=1, first_displacement=first).y
    assert all(lattice.phases == () for lattice in all_outputs(axis, 9))


# Bands.

bands = st.builds(
    Band, st.integers(0, 9), st.integers(0, 9), st.integers(1, 7), st.integers(-12, 12)
)


def met_by_band(band):
    """Return (m, p, j) for all m and j that meet at displacement p."""
    return {
        (m, p, m + p + band.shift)
        for m, p in product(range(band.count1), range(band.count_patch))
        if 0 <= m + p + band.shift < band.count2
    }


@given(bands)
def test_mirroring_a_band_twice_gives_it_back(band):
    assert band.mirrored().mirrored() == band


@given(bands)
def test_mirrored_band_exchanges_the_maps_and_reverses_the_patch(band):
    last = band.count_patch - 1
    assert met_by_band(band.mirrored()) == {(j, last - p, m) for m, p, j in met_by_band(band)}
