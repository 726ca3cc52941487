"""What hypothesis draws: geometries, and maps that they fit."""

from hypothesis import strategies as st

from cupycorr import Geometry


def pairs(least, most):
    """Draw a pair of ints."""
    numbers = st.integers(least, most)
    return st.tuples(numbers, numbers)


@st.composite
def geometries(draw):
    """Draw a geometry, every parameter different per axis."""
    return Geometry(
        kernel_size=draw(pairs(1, 4)),
        patch_size=draw(pairs(1, 5)),
        stride=draw(pairs(1, 6)),
        padding=draw(pairs(-3, 6)),
        dilation=draw(pairs(1, 6)),
        dilation_patch=draw(pairs(1, 6)),
        first_displacement=draw(st.none() | pairs(-15, 15)),
    )


@st.composite
def cases(draw):
    """Draw (shape of the maps, geometry), such that the taps fit and the maps are small."""
    geometry = draw(geometries())
    sizes = []
    for extent, padding in zip(geometry.taps_extent, geometry.padding, strict=True):
        least = max(0, extent - 2 * padding)
        sizes.append(draw(st.integers(least, least + 14)))
    return (draw(st.integers(0, 2)), draw(st.integers(0, 3)), *sizes), geometry
