"""What a flow-guided lookup samples: patches of cost around coordinates, in one value object.

A *level* is a feature map, pooled; a *cell* is a position of a level. A lookup takes, around the
place where each position of the first map is believed to lie in the second, the costs at a patch
of displacements, on every level of a pyramid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cupycorr.geometry import IntOrPair, Pair, integer, pair
from cupycorr.layer import DTYPES

Shape = tuple[int, ...]
ORDERS = ("yx", "xy")
MOST_LEVELS = 16
LARGEST_RADIUS = 1 << 12
"""In cells, times the spacing: sums of it and of a map's size are exact in float32."""


@dataclass(frozen=True, init=False, repr=False)
class Lookup:
    """Which displacements around its coordinates a lookup compares, independent of any image.

    Parameters
    ----------
    radius : int or (int, int)
        The patch has ``2 * radius + 1`` displacements, per axis.
    levels : int, default 1
        Levels of the pyramid; the first is the map itself.
    dilation_patch : int or (int, int), cells, default 1
        Spacing of the displacements, on every level.
    pool : int or (int, int), cells, default 2
        Cells of a level that are averaged to one of the next.
    order : {"yx", "xy"}, default "yx"
        Which displacements come first in the cost: the vertical ones, or, as RAFT has them, the
        horizontal ones.

    Raises
    ------
    TypeError
        If a parameter is not an int or a pair of ints.
    ValueError
        If radius is below 0, levels, dilation_patch or pool below 1, levels above 16, a radius
        reaches further than 4096 cells, or order is another.

    Notes
    -----
    Level 0 is ``fmap2``. With ``f_l`` for level l, zeros outside of it, and ``scale`` s::

        f_l[n, c, v, u] = mean of f_{l-1}[n, c, v*py : (v+1)*py, u*px : (u+1)*px]    (floor sizes)
        S[v, u]         = sum over c of fmap1[n, c, y, x] * f_l[n, c, v, u]
        X, Y            = coords[n, 0, y, x] / px**l, coords[n, 1, y, x] / py**l
        cost[n, l, j, i, y, x] = s * S at (Y + (j - ry) * dy, X + (i - rx) * dx), bilinear

    A lookup is immutable and hashable; pairs are always (y, x), and the channels of coords (x, y),
    as those of flow are. Definition: Z. Teed and J. Deng, "RAFT", ECCV 2020, section 3.2, with the
    interpolation after the sum over channels, which is the same sum.
    """

    radius: Pair
    levels: int
    dilation_patch: Pair
    pool: Pair
    order: str

    def __init__(
        self,
        radius: IntOrPair,
        levels: int = 1,
        dilation_patch: IntOrPair = 1,
        pool: IntOrPair = 2,
        order: str = "yx",
    ) -> None:
        fields = {
            "radius": pair("radius", radius, least=0),
            "levels": integer("levels", levels, least=1),
            "dilation_patch": pair("dilation_patch", dilation_patch, least=1),
            "pool": pair("pool", pool, least=1),
            "order": order,
        }
        # The class is frozen: attributes can only be set past its own __setattr__.
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        if self.levels > MOST_LEVELS:
            raise ValueError(f"levels must be at most {MOST_LEVELS}, got {levels}")
        if max(self.reach) > LARGEST_RADIUS:
            raise ValueError(
                f"radius * dilation_patch must be at most {LARGEST_RADIUS}, got {self.reach}"
            )
        if order not in ORDERS:
            raise ValueError(f"order must be 'yx' or 'xy', got {order!r}")

    @property
    def patch_size(self) -> Pair:
        """Number of displacements, (y, x)."""
        return 2 * self.radius[0] + 1, 2 * self.radius[1] + 1

    @property
    def reach(self) -> Pair:
        """Cells from a coordinate to the farthest displacement, (y, x)."""
        y, x = self.radius, self.dilation_patch
        return y[0] * x[0], y[1] * x[1]

    @property
    def displacements(self) -> tuple[range, range]:
        """The vertical and the horizontal displacements, in cells."""
        y, x = (
            range(-reach, reach + 1, step)
            for reach, step in zip(self.reach, self.dilation_patch, strict=True)
        )
        return y, x

    @property
    def in_rows(self) -> bool:
        """Whether displacements and levels leave rows as they are, as in stereo."""
        return self.radius[0] == 0 and self.pool[0] == 1

    @property
    def x_first(self) -> bool:
        """Whether the horizontal displacements come first in the cost."""
        return self.order == "xy"

    def level_sizes(self, height: int, width: int) -> list[Pair]:
        """Return the size (h, w) of each level of a map.

        Raises
        ------
        ValueError
            If a level would have no cell.
        """
        sizes, size = [], (height, width)
        for level in range(self.levels):
            if size[0] < 1 or size[1] < 1:
                raise ValueError(
                    f"every level must have cells, got {size} at level {level} "
                    f"of {self.levels} (map {(height, width)}, pool {self.pool})"
                )
            sizes.append(size)
            size = size[0] // self.pool[0], size[1] // self.pool[1]
        return sizes

    def cost_shape(self, fmap1: tuple[int, ...], coords: tuple[int, ...]) -> tuple[int, ...]:
        """Return the cost's shape for maps (A, C, *P) and coordinates (E, 2, *P).

        It is (E, levels, PH, PW, *P), with the patch of `patch_size`; (E, levels, PW, PH, *P)
        in the order "xy".
        """
        patch = self.patch_size[::-1] if self.x_first else self.patch_size
        return (coords[0], self.levels, *patch, *fmap1[2:])

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.parameters().items())
        return f"Lookup({given})"

    def parameters(self) -> dict[str, IntOrPair | str]:
        """Return radius and the parameters that differ from their defaults, as short as can be."""
        fields: dict[str, IntOrPair | str] = {}
        defaults = {"levels": 1, "dilation_patch": (1, 1), "pool": (2, 2), "order": "yx"}
        for name in ("radius", *defaults):
            value = getattr(self, name)
            if value != defaults.get(name):
                is_equal_pair = isinstance(value, tuple) and value[0] == value[1]
                fields[name] = value[0] if is_equal_pair else value
        return fields


def check(shapes: dict[str, Shape], dtypes: dict[str, str], lookup: Lookup) -> None:
    """Check the arrays of a lookup.

    Parameters
    ----------
    shapes, dtypes : dict
        By name: "fmap1", "fmap2" or "fmap2[0]", "fmap2[1]" ... for levels, "coords", and "index1"
        and "index2" where they are given.
    lookup : Lookup
        What is looked up.

    Raises
    ------
    TypeError, ValueError
        As `cupycorr.correlation_lookup`.
    """
    fmap1, coords = shapes["fmap1"], shapes["coords"]
    seen = [name for name in shapes if name.startswith("fmap2")]
    maps = dtypes["fmap1"]
    for name in seen:
        if dtypes[name] != maps:
            raise TypeError(
                f"fmap1 and {name} must have equal dtypes, got {maps} and {dtypes[name]}"
            )
        check_map(shapes[name], maps, name)
        if shapes[name][0] != shapes[seen[0]][0] or shapes[name][1] != fmap1[1]:
            raise ValueError(
                f"{name} must have the channels of fmap1, and as many maps as other levels, got "
                f"{shapes[name]}, fmap1 {fmap1}"
            )
    _check_coords(dtypes["coords"], maps)
    if seen != ["fmap2"] and len(seen) != lookup.levels:
        raise ValueError(f"fmap2 must have {lookup.levels} levels, got {len(seen)}")
    if len(fmap1) < 3 or len(coords) != len(fmap1) or (coords[1], *coords[2:]) != (2, *fmap1[2:]):
        raise ValueError(
            f"fmap1 and coords must have shapes (N, C, *P) and (N, 2, *P), got {fmap1} and {coords}"
        )
    for index, name in (("index1", "fmap1"), ("index2", seen[0])):
        if index not in shapes:
            if shapes[name][0] != coords[0]:
                raise ValueError(
                    f"coords must have an entry for each map of {name} without {index}, got "
                    f"{coords[0]} and {shapes[name][0]}"
                )
            continue
        if dtypes[index] not in ("int32", "int64"):
            raise TypeError(f"{index} must have dtype int32 or int64, got {dtypes[index]}")
        if shapes[index] != coords[:1]:
            raise ValueError(
                f"{index} must have an entry for each of coords, got {shapes[index]} and {coords}"
            )


def check_samples(shapes: dict[str, Shape], dtypes: dict[str, str], lookup: Lookup) -> None:
    """Check the arrays of a volume lookup, as `check`, with "volume" or "volume[0]" ... for maps.

    Raises
    ------
    TypeError, ValueError
        As `cupycorr.volume_lookup`.
    """
    coords = shapes["coords"]
    seen = [name for name in shapes if name.startswith("volume")]
    if seen != ["volume"] and len(seen) != lookup.levels:
        raise ValueError(f"volume must have {lookup.levels} levels, got {len(seen)}")
    for name in seen:
        if dtypes[name] != dtypes[seen[0]]:
            raise TypeError(
                f"all levels must have equal dtypes, got {dtypes[seen[0]]} and {dtypes[name]}"
            )
        check_volume(shapes[name], dtypes[name], name)
        batch, *positions = shapes[name][:-2]
        if coords != (batch, 2, *positions):
            raise ValueError(
                f"coords and {name} must have shapes (N, 2, *P) and (N, *P, H, W), got {coords} "
                f"and {shapes[name]}"
            )
    _check_coords(dtypes["coords"], dtypes[seen[0]])


def check_volume(shape: Shape, dtype: str, name: str = "volume") -> None:
    """Check a volume that is sampled, or one of its levels."""
    if dtype not in DTYPES:
        raise TypeError(f"{name} must have dtype {', '.join(DTYPES)}, got {dtype}")
    if len(shape) < 4:
        raise ValueError(f"{name} must have shape (N, *P, H, W), got {shape}")
    if shape[-2] < 1 or shape[-1] < 1:
        raise ValueError(f"every level must have cells, got {name} of shape {shape}")


def _check_coords(coords: str, maps: str) -> None:
    """Check the dtype of coords beside that of the maps."""
    wanted = "float64" if maps == "float64" else "float32"
    if coords != wanted:
        raise TypeError(f"coords must have dtype {wanted} with maps of {maps}, got {coords}")


def check_map(shape: Shape, dtype: str, name: str = "fmap2") -> None:
    """Check a map that is looked up, or one of its levels."""
    if dtype not in DTYPES:
        raise TypeError(f"{name} must have dtype {', '.join(DTYPES)}, got {dtype}")
    if len(shape) != 4:
        raise ValueError(f"{name} must have shape (N, C, H, W), got {shape}")
    if shape[2] < 1 or shape[3] < 1:
        raise ValueError(f"every level must have cells, got {name} of shape {shape}")


def convert_all(named: Mapping[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    """Convert arrays and lists of them, by name; what is None stays so."""
    return {
        name: [convert(one) for one in value]
        if isinstance(value, (tuple, list))
        else value
        if value is None
        else convert(value)
        for name, value in named.items()
    }


def scale_of(scale: float | None, channels: int) -> float:
    """Return what costs are multiplied by: 1 / sqrt(C) if nothing is given."""
    return float(max(1, channels) ** -0.5 if scale is None else scale)


def check_range(name: str, index: Any, maps: int) -> None:
    """Check the numbers of an index, an array or a tensor of the CPU."""
    if len(index) == 0:
        return
    least, most = int(index.min()), int(index.max())
    if least < 0 or most >= maps:
        raise IndexError(f"{name} must be at least 0 and below {maps}, got {least} to {most}")
