"""The table of lookups that every engine is compared on, and their arguments.

Maps are small integers, coordinates eighths, and scales powers of two: all is exact in any order.
"""

from typing import NamedTuple

import lookup_definition
import numpy as np

from cupycorr.lookup import Lookup

SPECIAL = (np.nan, np.inf, -np.inf, 1e30, -1e30, 2.0**31, -(2.0**31))


class Case(NamedTuple):
    """A lookup and the sizes of its arrays."""

    lookup: Lookup
    channels: int
    positions: tuple
    map_size: tuple
    maps: tuple = (1, 1)
    """Entries of fmap1 and of fmap2."""
    samples: int = 0
    """Entries of coords, with indices; 0: one for each map, without."""
    kind: str = "eighths"
    """Of coordinates: eighths, rough, integers, special, or smooth flow."""


CASES = {
    "square": Case(Lookup(2), 4, (8, 8), (8, 8)),
    "outside": Case(Lookup((1, 2)), 3, (7, 9), (6, 5), kind="rough"),
    "four levels": Case(Lookup((2, 1), 4), 2, (13, 19), (13, 19)),
    "RAFT": Case(Lookup(4, 3, order="xy"), 40, (10, 19), (17, 20), kind="smooth"),
    "RAFT, rough": Case(Lookup(4, 2), 20, (9, 17), (18, 23), kind="rough"),
    "stereo": Case(Lookup((0, 4), 3, pool=(1, 2)), 5, (5, 19), (5, 21), kind="integers"),
    "stereo, fractional rows": Case(Lookup((0, 3), 2, pool=(1, 2)), 4, (5, 9), (5, 12)),
    "integers": Case(Lookup(3, 2), 4, (9, 10), (9, 10), kind="integers"),
    "three maps": Case(Lookup(1, 2, order="xy"), 3, (4, 5), (6, 7), maps=(3, 3)),
    "edges of patches": Case(
        Lookup(3, 2, pool=4), 5, (3, 3), (12, 13), maps=(4, 3), samples=7, kind="rough"
    ),
    "tokens": Case(Lookup(2, 2), 6, (11,), (9, 11), maps=(2, 2), kind="rough"),
    "three axes": Case(Lookup(1), 4, (2, 3, 4), (5, 6), kind="smooth"),
    "dilated": Case(Lookup((2, 1), 2, dilation_patch=(2, 3)), 4, (9, 11), (11, 12)),
    "special": Case(Lookup(2, 3), 8, (9, 10), (9, 10), kind="special"),
    "a level of one cell": Case(Lookup(1, 3), 3, (4, 6), (4, 7)),
    "large radius": Case(Lookup((7, 6), 2, order="xy"), 8, (9, 10), (20, 21), kind="smooth"),
    "one channel": Case(Lookup(1, 2), 1, (5, 6), (5, 6)),
}


def arguments(name, seed=0):
    """Return fmap1, levels, coords (float64, of values that float32 has) and indices by name."""
    case, rng = CASES[name], np.random.default_rng(seed)
    fmap1 = rng.integers(-2, 3, (case.maps[0], case.channels, *case.positions)).astype(float)
    fmap2 = rng.integers(-2, 3, (case.maps[1], case.channels, *case.map_size)).astype(float)
    levels = lookup_definition.pyramid(fmap2 * 16, case.lookup)
    samples, indices = case.samples or case.maps[0], {}
    if case.samples:
        for which, count in enumerate(case.maps, start=1):
            indices[f"index{which}"] = rng.integers(-1, count + 1, samples)
    return fmap1, levels, coordinates(case, samples, rng), indices


def volume_arguments(name, seed=0):
    """Return an upstream gradient, a volume's levels (N, *P, h, w) and coords, all as above."""
    case, rng = CASES[name], np.random.default_rng(seed)
    samples = case.samples or case.maps[0]
    sizes = case.lookup.level_sizes(*case.map_size)
    shape = case.lookup.cost_shape((samples, 1, *case.positions), (samples,))
    levels = [
        rng.integers(-2, 3, (samples, *case.positions, *size)).astype(float) for size in sizes
    ]
    grad = rng.integers(-2, 3, shape).astype(float)
    return grad, levels, coordinates(case, samples, rng)


def coordinates(case, samples, rng):
    """Return coords (samples, 2, *P)."""
    positions, (height, width) = case.positions, case.map_size
    grid = np.indices((*(1,) * max(0, 2 - len(positions)), *positions))[-2:]
    y, x = (axis.reshape(positions) for axis in grid)
    base = np.stack([x, y])[None].repeat(samples, 0).astype(float)
    if case.kind == "rough":
        low = -np.array([12.0, 12.0])
        span = np.array([width, height]) + 24
        scaled = rng.integers(0, 8 * span[:, None], (2, samples * int(np.prod(positions)))) / 8
        return (low[:, None] + scaled).reshape(2, samples, *positions).swapaxes(0, 1)
    if case.kind == "smooth":
        return base + np.array([2.375, -1.625]).reshape(2, *(1,) * len(positions))
    step = 8 if case.kind == "integers" else 1
    coords = base + rng.integers(-24 // step, 25 // step, base.shape) * step / 8
    if case.kind == "special":
        where = rng.choice(coords.size, 4 * len(SPECIAL), replace=False)
        coords.flat[where] = SPECIAL * 4
    return coords
