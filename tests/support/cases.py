"""The one table of cases: the family's known failures by name, small enough for literal loops."""

from dataclasses import replace

from cupycorr import Geometry
from cupycorr.layer import Layer

#          id: ((N, C, H, W), geometry)
GEOMETRIES = {
    "one pixel": ((1, 1, 1, 1), Geometry()),
    "one displacement": ((2, 3, 5, 7), Geometry()),
    "odd patch": ((2, 3, 6, 9), Geometry(patch_size=(5, 3))),
    "even patch": ((2, 3, 6, 9), Geometry(patch_size=(4, 2))),
    "even patch, dilated": ((1, 2, 9, 11), Geometry(patch_size=4, dilation_patch=(2, 3))),
    "patch in one row": ((1, 4, 5, 23), Geometry(patch_size=(1, 9))),
    "patch in one column": ((1, 4, 17, 3), Geometry(patch_size=(7, 1))),
    "displacement beyond the map": ((1, 3, 4, 5), Geometry(patch_size=(13, 15))),
    "all displacements outside": ((1, 2, 3, 4), Geometry(first_displacement=(0, 9))),
    "window": ((1, 3, 8, 9), Geometry(3, (3, 5))),
    "window at the border": ((1, 3, 6, 7), Geometry(3, 3, padding=2)),
    "even window": ((1, 2, 7, 8), Geometry((2, 4), 3, padding=(1, 2))),
    "window of one row": ((1, 2, 7, 8), Geometry((1, 3), (3, 1), padding=(0, 1))),
    "dilated window": ((1, 2, 12, 11), Geometry((3, 2), 3, dilation=(2, 3))),
    "stride": ((2, 3, 9, 10), Geometry(patch_size=3, stride=(2, 3))),
    "stride above window": ((1, 3, 17, 19), Geometry(2, 3, stride=(8, 7), padding=1)),
    "stride not dividing dilation_patch": (
        (1, 2, 13, 14),
        Geometry(patch_size=(5, 4), stride=(2, 3), dilation_patch=(3, 2)),
    ),
    "stride 6, dilation_patch 4": (
        (1, 2, 25, 27),
        Geometry(patch_size=5, stride=6, dilation_patch=4),
    ),
    "lattice of gcd 2": (
        (1, 2, 19, 21),
        Geometry(3, 3, stride=4, padding=1, dilation=6, dilation_patch=2),
    ),
    "lattice with untouched rows": (
        (1, 2, 14, 13),
        Geometry(2, 3, stride=2, padding=1, dilation=3),
    ),
    "negative padding": ((1, 3, 9, 11), Geometry(patch_size=5, padding=(-2, -1))),
    "negative padding, window": ((1, 2, 11, 12), Geometry(3, 3, 2, (-1, -2), 2)),
    "mixed padding": ((1, 2, 9, 8), Geometry(3, 3, padding=(3, -1))),
    "padding beyond the map": ((1, 2, 3, 4), Geometry(patch_size=3, padding=6, stride=2)),
    "one-sided displacements": (
        (1, 3, 4, 15),
        Geometry(patch_size=(1, 6), first_displacement=(0, -5)),
    ),
    "off-centre patch": ((1, 2, 9, 8), Geometry(patch_size=4, dilation_patch=3,
                                               first_displacement=-5)),
    "spatial-correlation-sampler's defaults": ((2, 3, 14, 12), Geometry(3, 3, 2, 1, 2, 2)),
    "FlowNetC": ((1, 4, 12, 16), Geometry(patch_size=7, dilation_patch=2)),
    "output 1 x 1": ((1, 2, 5, 6), Geometry((5, 6), 3)),
    "one channel": ((2, 1, 7, 6), Geometry(3, 5, padding=1)),
    "33 channels": ((1, 33, 6, 5), Geometry(patch_size=3)),
    "everything differs per axis": (
        (2, 3, 19, 15),
        Geometry((3, 2), (2, 5), (2, 1), (1, -1), (1, 2), (3, 1)),
    ),
    "no samples": ((0, 3, 5, 6), Geometry(patch_size=3)),
    "no channels": ((2, 0, 5, 6), Geometry(3, 3, padding=1)),
}  # fmt: skip

CASES = {name: (shape, Layer(geometry)) for name, (shape, geometry) in GEOMETRIES.items()}
"""((N, C, H, W), layer) by name; the layers sum products."""


def l1(case):
    """Return a case whose layer sums absolute differences."""
    shape, layer = case
    return shape, replace(layer, similarity="l1")
